"""The layers' forwards against those of the real ldm, with random weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from lib_subquad import Settings
from lib_subquad.layers.ldm import attn_block, cross_attention

with contextlib.redirect_stdout(io.StringIO()):  # ldm's layers announce themselves
    ldm_attention = pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
    from ldm.modules.diffusionmodules.model import AttnBlock
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

CrossAttention = ldm_attention.CrossAttention

CHUNKED = Settings(engine="portable", query_chunk=7, kv_chunk=5)
PLANS = {"automatic": Settings(), "portable": Settings(engine="portable"), "chunked": CHUNKED}
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def settings(request):
    return request.param


def cross_layer(context_width: int | None = None, heads: int = 4, width: int = 8) -> CrossAttention:
    return CrossAttention(32, context_width, heads=heads, dim_head=width).eval()


def sharp(layer: nn.Module) -> nn.Module:
    """With weights large enough that attention is far from even, which would hide mistakes."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return layer.requires_grad_(False)


def by_hand(layer, x, context=None, mask=None):
    """CrossAttention in float64; `mask` is added to the scores [batch, heads, tokens, context tokens]."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    context = x if context is None else context.double()
    query, key, value = (
        projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for projected in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    scores = query @ key.transpose(-1, -2) * layer.scale
    attended = softmax(scores if mask is None else scores + mask.double(), -1) @ value
    return layer.to_out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("context_tokens", [None, 1, 13])
@pytest.mark.parametrize("heads", [1, 4])
def test_cross_attention_is_ldms(settings, context_tokens, heads):
    layer = sharp(cross_layer(None if context_tokens is None else 24, heads))
    x = torch.randn(3, 17, 32)
    context = None if context_tokens is None else torch.randn(3, context_tokens, 24)
    close(cross_attention(layer, x, context, settings=settings), layer(x, context))


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4)], ids=["tokens", "height and width"])
def test_ldms_bool_mask_of_keys(settings, shape):
    layer, x, context = sharp(cross_layer(24)), torch.randn(2, 17, 32), torch.randn(2, 12, 24)
    mask = torch.rand(shape) < 0.6
    mask.view(2, -1)[:, 0] = True  # a row that sees nothing is zeros here and a mean in ldm
    close(cross_attention(layer, x, context, mask, settings=settings), layer(x, context, mask))


def test_a_mask_that_hides_everything_gives_what_zeros_give(settings):
    layer, x = sharp(cross_layer()), torch.randn(2, 9, 32)
    mask = torch.tensor([True, False])[:, None].expand(2, 9)
    output = cross_attention(layer, x, mask=mask, settings=settings)
    close(output[:1], layer(x[:1]))
    close(output[1], layer.to_out(torch.zeros(9, 32)))


@pytest.mark.parametrize("shape", [(17, 12), (2, 1, 17, 12), (2, 4, 17, 12), (1, 1, 1, 12), (2, 17, 12), (8, 17, 12)])
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_masks_that_broadcast_as_sgms_do(settings, shape, kind):
    layer, x, context = sharp(cross_layer(24)), torch.randn(2, 17, 32), torch.randn(2, 12, 24)
    mask = torch.randn(shape)
    added = mask
    if kind == "bool":
        mask = mask > -1
        mask[..., 0] = True
        added = torch.zeros(shape).masked_fill(~mask, float("-inf"))
    if len(shape) == 3:  # [batch, queries, keys], or one a head
        added = added[:, None] if shape[0] == 2 else added.unflatten(0, (2, 4))
    expected = by_hand(layer, x, context, added).float()
    close(cross_attention(layer, x, context, mask, settings=settings), expected)


def test_additional_tokens_attend_and_are_attended_to_and_leave_again(settings):
    layer, x, tokens = sharp(cross_layer()), torch.randn(2, 9, 32), torch.randn(2, 3, 32)
    output = cross_attention(layer, x, additional_tokens=tokens, settings=settings)
    close(output, layer(torch.cat([tokens, x], 1))[:, 3:])
    context_layer, context = sharp(cross_layer(24)), torch.randn(2, 12, 24)
    output = cross_attention(context_layer, x, context, additional_tokens=tokens, settings=settings)
    close(output, context_layer(x, context))  # they ask as well, which changes no other answer


@pytest.mark.parametrize(("batch", "every"), [(4, 2), (9, 3), (1, 1)])
def test_frames_attend_to_every_nth_frame(settings, batch, every):
    layer, x = sharp(cross_layer()), torch.randn(batch, 9, 32)
    output = cross_attention(layer, x, n_times_crossframe_attn_in_self=every, settings=settings)
    for frame in range(batch):
        shown = x[frame // every * every]
        close(output[frame : frame + 1], layer(x[frame : frame + 1], shown[None]))


def test_frames_that_do_not_divide_are_refused_in_words():
    with pytest.raises(ValueError, match="batch 3; expected a multiple of n_times_crossframe_attn_in_self, 2"):
        cross_attention(cross_layer(), torch.randn(3, 9, 32), n_times_crossframe_attn_in_self=2)


def test_unknown_arguments_are_ignored():
    layer, block = sharp(cross_layer()), sharp(AttnBlock(32))
    x, image = torch.randn(1, 9, 32), torch.randn(1, 32, 3, 3)
    close(cross_attention(layer, x, value=None, transformer_options={}), layer(x))
    close(attn_block(block, image, temb=None), block(image))


@pytest.mark.parametrize("channels", [32, 512])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attn_block_is_ldms(settings, channels, memory_format):
    block = sharp(AttnBlock(channels))
    x = torch.randn(2, channels, 5, 7).contiguous(memory_format=memory_format)
    close(attn_block(block, x, settings=settings), block(x), atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(settings, dtype):
    try:
        nn.Linear(2, 2).to(dtype)(torch.ones(1, 2, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"this PyTorch has no linear layer in {dtype} on the CPU: {error}")
    layer, x, context = sharp(cross_layer(24)), torch.randn(2, 17, 32), torch.randn(2, 12, 24)
    output = cross_attention(copy.deepcopy(layer).to(dtype), x.to(dtype), context.to(dtype), settings=settings)
    assert output.dtype == dtype
    close(output.float(), layer(x, context), atol=HALF[dtype] * 2, rtol=HALF[dtype])


@pytest.mark.parametrize("upcast", ["always", "never"])
def test_upcast_and_autocast(settings, upcast):
    settings = Settings(**{**vars(settings), "upcast": upcast})
    layer, block = sharp(cross_layer()), sharp(AttnBlock(32))
    x, image = torch.randn(2, 17, 32), torch.randn(2, 32, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, pixels = cross_attention(layer, x, settings=settings), attn_block(block, image, settings=settings)
    assert tokens.dtype == torch.bfloat16
    close(tokens.float(), layer(x), atol=6e-2, rtol=3e-2)
    close(pixels.float(), block(image), atol=6e-2, rtol=3e-2)


@pytest.mark.parametrize("patched", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("upcast", ["always", "never"])
def test_one_projection_in_float32_among_half(settings, patched, upcast):
    class Float32(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    settings = Settings(**{**vars(settings), "upcast": upcast})
    layer, x = sharp(cross_layer()), torch.randn(2, 17, 32)
    expected, layer = layer(x), layer.bfloat16()
    linear = Float32(32, 32, bias=False)
    linear.load_state_dict(getattr(layer, patched).float().state_dict())
    setattr(layer, patched, linear)
    output = cross_attention(layer, x.bfloat16(), settings=settings)
    close(output.float(), expected, atol=6e-2, rtol=3e-2)


def test_split_context_feeds_keys_and_values(settings):
    layer, x, context = sharp(cross_layer(24)), torch.randn(2, 17, 32), torch.randn(2, 12, 24)

    def split(given):
        assert given is context
        return given + 1, given * 2

    layer.to_k.register_forward_pre_hook(lambda _, args: close(args[0], context + 1))
    layer.to_v.register_forward_pre_hook(lambda _, args: close(args[0], context * 2))
    output = cross_attention(layer, x, context, split_context=split, settings=settings)
    with torch.no_grad():  # values from 2c and keys from c+1, as one projection each of a doubled context
        wide = sharp(cross_layer(48))
        wide.to_q, wide.to_out = layer.to_q, layer.to_out
        wide.to_k.weight.copy_(torch.cat([layer.to_k.weight, torch.zeros(32, 24)], 1))
        wide.to_v.weight.copy_(torch.cat([torch.zeros(32, 24), layer.to_v.weight], 1))
    close(output, wide(x, torch.cat([context + 1, context * 2], -1)))


def test_projections_are_called_not_read():
    """What LoRA and its kin rely on: hooks run, and a patched class's own forward is what counts."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer, calls, x = sharp(cross_layer()), [], torch.randn(2, 9, 32)
    for name in ("to_q", "to_k", "to_v"):
        linear = Doubled(32, 32, bias=False).requires_grad_(False)
        linear.load_state_dict(getattr(layer, name).state_dict())
        linear.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        setattr(layer, name, linear)
    layer.to_out.register_forward_hook(lambda module, args, output: output + 1)
    output = cross_attention(layer, x)
    assert sorted(calls) == ["to_k", "to_q", "to_v"]
    close(output, layer(x))

    block, seen, image = sharp(AttnBlock(32)), [], torch.randn(1, 32, 3, 3)
    for name in ("norm", "q", "k", "v", "proj_out"):
        getattr(block, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    attn_block(block, image)
    assert sorted(seen) == ["k", "norm", "proj_out", "q", "v"]


def test_any_strides(settings):
    layer, block = sharp(cross_layer(24)), sharp(AttnBlock(32))
    x, context = torch.randn(17, 2, 64)[:, :, ::2].transpose(0, 1), torch.randn(1, 12, 24).expand(2, -1, -1)
    close(cross_attention(layer, x, context, settings=settings), layer(x.contiguous(), context.contiguous()))
    image = torch.randn(2, 7, 5, 32).permute(0, 3, 2, 1)[:, :, :, ::2]
    close(attn_block(block, image, settings=settings), block(image.contiguous()))


def test_reports_the_plan_that_was_carried_out():
    reported = []
    cross_attention(sharp(cross_layer()), torch.randn(1, 20, 32), settings=CHUNKED, report=reported.append)
    attn_block(sharp(AttnBlock(32)), torch.randn(1, 32, 4, 5), settings=CHUNKED, report=reported.append)
    assert [(plan.engine, plan.query_chunk, plan.kv_chunk) for plan in reported] == [("portable", 7, 5)] * 2


@pytest.mark.parametrize("gradients", [False, True], ids=["image", "gradients"])
def test_a_whole_unet(settings, monkeypatch, gradients):
    with contextlib.redirect_stdout(io.StringIO()):
        unet = sharp(UNetModel(8, 4, 32, 4, 1, (1, 2), channel_mult=(1, 2), num_heads=4, context_dim=24,
                               use_spatial_transformer=True, legacy=False, use_checkpoint=False)).eval()  # fmt: skip
    x, steps, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 24) * 0.3
    context.requires_grad_(gradients)

    def run():
        output = unet(x, steps, context=context)
        if not gradients:
            return output
        (gradient,) = torch.autograd.grad(output.square().mean(), context)
        return gradient / gradient.abs().max()

    plain, calls = run(), []
    hooked = functools.partialmethod(cross_attention, settings=settings, report=calls.append)
    monkeypatch.setattr(CrossAttention, "forward", hooked)
    close(run(), plain, atol=2e-5 * plain.abs().max().item(), rtol=0)
    assert len(calls) == sum(isinstance(module, CrossAttention) for module in unet.modules()) == 14
