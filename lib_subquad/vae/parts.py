"""What the halves of a VAE are made of: their layers as steps, in the order in which their own forwards take them.

A step is computed by rows where the forward of its layer is known. Where it is not, because somebody has put another in
its place or watches it with a hook, the layer is called as it always was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..steps import CONVOLUTION, DOWN, LAST, RESIDUAL, UP, WHOLE, VaeStep

# Where the forwards stand that are known: the programs' own copies of latent diffusion's file.
HOMES = (
    "ldm.modules.diffusionmodules.model",
    "sgm.modules.diffusionmodules.model",  # SDXL in the web UI
    "modules.models.sd3.sd3_impls",  # SD 3 in the web UI
    "backend.nn.vae",  # Forge
    "ldm_patched.ldm.modules.diffusionmodules.model",  # reForge
)
OURS = f"{__package__}.model"  # which no web UI has
DECODERS, ENCODERS = ("Decoder", "VAEDecoder"), ("Encoder", "VAEEncoder")
NO_TIME = ("VAEDecoder", "VAEEncoder")  # whose residual blocks take no embedding of a time step
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class AnyModule(Protocol):
    """A module of whatever class: what it is made of is looked up by name."""

    def __getattr__(self, name: str) -> Any: ...

    def __call__(self, *arguments: Any, **named: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Stage(VaeStep):
    """A step of a half that is there. `call` is the layer as the half's own forward calls it."""

    layer: AnyModule
    call: Callable[[Tensor], Tensor]


def why_not(half: AnyModule, forward: Callable[..., Any] | None = None) -> str:
    """Why this module is no half of a VAE that is known, in words; empty if it is.

    `forward` is its class's own, where another stands in its place.
    """
    if not isinstance(half, torch.nn.Module):
        return "no module"
    if not _is(half, *DECODERS, *ENCODERS, forward=forward):
        return "a decoder or encoder whose forward is not known"
    if half.training:
        return "a VAE that is being trained"
    return ""


def steps_of(half: AnyModule, forward: Callable[..., Any] | None = None) -> tuple[Stage, ...]:
    """The steps of a half that is known."""
    made = _decoder_steps(half) if _is(half, *DECODERS, forward=forward) else _encoder_steps(half)
    return tuple(made)


def _decoder_steps(decoder: AnyModule) -> Iterator[Stage]:
    channels = _channels(decoder.conv_in)
    yield _convolution(decoder.conv_in)
    yield from _middle(decoder, channels)
    for level in reversed(range(decoder.num_resolutions)):
        up = decoder.up[level]
        for step in _blocks(decoder, up, decoder.num_res_blocks + 1, channels):
            channels = step.out
            yield step
        if level != 0:
            yield _resampling(up.upsample, UP, "Upsample", channels)
    if not getattr(decoder, "give_pre_end", False):
        yield _last(decoder, channels)


def _encoder_steps(encoder: AnyModule) -> Iterator[Stage]:
    channels = _channels(encoder.conv_in)
    yield _convolution(encoder.conv_in)
    for level in range(encoder.num_resolutions):
        down = encoder.down[level]
        for step in _blocks(encoder, down, encoder.num_res_blocks, channels):
            channels = step.out
            yield step
        if level != encoder.num_resolutions - 1:
            yield _resampling(down.downsample, DOWN, "Downsample", channels)
    yield from _middle(encoder, channels)
    yield _last(encoder, channels)


def _middle(half: AnyModule, channels: int) -> Iterator[Stage]:
    yield _residual(half, half.mid.block_1, channels)
    yield Stage(WHOLE, channels, channels, layer=half.mid.attn_1, call=half.mid.attn_1)
    yield _residual(half, half.mid.block_2, channels)


def _blocks(half: AnyModule, level: AnyModule, count: int, channels: int) -> Iterator[Stage]:
    attention = getattr(level, "attn", ())
    for number in range(count):
        step = _residual(half, level.block[number], channels)
        channels = step.out
        yield step
        if len(attention) > 0:
            yield Stage(WHOLE, channels, channels, layer=attention[number], call=attention[number])


def _convolution(conv: AnyModule) -> Stage:
    kind = CONVOLUTION if is_local(conv, 3) else WHOLE
    return Stage(kind, getattr(conv, "in_channels", 1), _channels(conv), layer=conv, call=conv)


def _residual(half: AnyModule, block: AnyModule, channels: int) -> Stage:
    def call(x: Tensor) -> Tensor:
        return block(x) if type(half).__name__ in NO_TIME else block(x, None)

    out = getattr(block, "out_channels", channels)
    kind = RESIDUAL if _is_residual(block) else WHOLE
    return Stage(kind, channels, out, in_place=_overwrites(block), layer=block, call=call)


def _resampling(layer: AnyModule, kind: str, name: str, channels: int) -> Stage:
    known = _is(layer, name) and getattr(layer, "with_conv", True)
    if kind == UP:
        known = known and is_local(layer.conv, 3) and getattr(layer, "scale_factor", 2.0) == 2.0
    else:
        known = known and is_local(layer.conv, 3, stride=2, padding=0)
    resizes = kind if known or type(layer).__name__ == name else ""
    return Stage(kind if known else WHOLE, channels, channels, resizes, layer=layer, call=layer)


def _last(half: AnyModule, channels: int) -> Stage:
    def call(x: Tensor) -> Tensor:
        return finish(half, half.conv_out(torch.nn.functional.silu(half.norm_out(x))))

    known = is_local(half.conv_out, 3) and is_group_norm(half.norm_out)
    kind = LAST if known else WHOLE
    return Stage(kind, channels, _channels(half.conv_out), in_place=_overwrites(half), layer=half, call=call)


def finish(half: AnyModule, x: Tensor) -> Tensor:
    """What comes after the last convolution."""
    return torch.tanh(x) if getattr(half, "tanh_out", False) else x


def shortcut(block: AnyModule) -> AnyModule | None:
    """The convolution that the input of a residual block goes through, where its channels change."""
    if block.in_channels == block.out_channels:
        return None
    return block.conv_shortcut if getattr(block, "use_conv_shortcut", False) else block.nin_shortcut


def _is_residual(block: AnyModule) -> bool:
    if not _is(block, "ResnetBlock"):
        return False
    dropout = getattr(block, "dropout", None)
    if dropout is not None and dropout.p and dropout.training:
        return False
    beside = shortcut(block)
    size = 3 if getattr(block, "use_conv_shortcut", False) else 1
    local = is_local(block.conv1, 3) and is_local(block.conv2, 3) and (beside is None or is_local(beside, size))
    return local and is_group_norm(block.norm1) and is_group_norm(block.norm2)


def _overwrites(layer: AnyModule) -> bool:
    """Whether its SiLU does, as in the Forge family and SD 3; latent diffusion's is a function that does not."""
    return bool(getattr(getattr(layer, "swish", None), "inplace", False))


def is_local(conv: AnyModule, size: int, stride: int = 1, padding: int | None = None) -> bool:
    """Whether it is a convolution of `size` x `size` whose rows depend on their neighbours alone.

    Its weights are nobody's business: it is called, whatever a LoRA makes of it. But what was put in the place of one
    layer's own forward may pad in a way that no attribute tells.
    """
    if not isinstance(conv, torch.nn.Conv2d) or {"forward", "_conv_forward"} & vars(conv).keys():
        return False
    padding = size // 2 if padding is None else padding
    told = (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    return told == ((size, size), (stride, stride), (1, 1), (padding, padding)) and conv.padding_mode in PADDING_MODES


def is_group_norm(norm: AnyModule) -> bool:
    """Whether nothing but its groups, eps, weight and bias decides what it gives.

    It is called with a few numbers and compared: whatever a program has made of the class, such as bringing its weights
    to the device or merging a LoRA into them, has been done by then.
    """
    if not isinstance(norm, torch.nn.GroupNorm) or _is_watched(norm):
        return False
    parameter = norm.weight if norm.weight is not None else torch.zeros(())
    if parameter.is_meta:
        return False
    size = 4 * norm.num_channels
    numbers = torch.arange(size, dtype=torch.float32, device=parameter.device).mul_(7).remainder_(11).sub_(5)
    numbers = numbers.to(parameter.dtype).reshape(1, norm.num_channels, 2, 2)
    with torch.no_grad():
        found = norm(numbers).float()
        weight, bias = (None if it is None else it.float() for it in (norm.weight, norm.bias))
        expected = torch.nn.functional.group_norm(numbers.float(), norm.num_groups, weight, bias, norm.eps)
    return bool(torch.allclose(found, expected, rtol=0.02, atol=0.02, equal_nan=True))


def _is(module: AnyModule, *names: str, forward: Callable[..., Any] | None = None) -> bool:
    """Whether its forward is that of one of these classes, as its home has it."""
    if forward is None:
        if _is_watched(module):
            return False
        forward = getattr(type(module), "forward", None)
    forward = getattr(forward, "__func__", forward)
    home = getattr(forward, "__globals__", {}).get("__name__")
    return home in (*HOMES, OURS) and getattr(forward, "__qualname__", "") in {f"{name}.forward" for name in names}


def _is_watched(module: AnyModule) -> bool:
    """Whether somebody wants to be called before, after or in place of this very module's forward."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _channels(conv: AnyModule) -> int:
    return getattr(conv, "out_channels", 1)
