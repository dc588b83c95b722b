"""What comes of a VAE's halves in bands, against their own forwards and float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad import Settings
from lib_subquad.vae import Interrupted, bands, halves, in_bands, why_not
from lib_subquad.vae.moments import Moments
from tests.threads import torch_threads
from tests.vae.making import CRAMPED, OUT_OF_MEMORY, ROOMY, TINY, Fails, as_good, distance, given, half, in_float64, ldm

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = ("decoder", "encoder")
both = pytest.mark.parametrize("name", HALVES)
both_plans = pytest.mark.parametrize("free", [ROOMY, CRAMPED], ids=["roomy", "cramped"])


@pytest.fixture(autouse=True)
def low_bands(monkeypatch):
    """So that small pictures have several."""
    monkeypatch.setattr(bands, "LEAST_ROWS", 3)


# ------------------------------------------------------------------------------------------------- the same picture


@both
@both_plans
@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect", "replicate"])
def test_bands_are_exact(name, free, padding):
    made, x = half(name), given(name, 37, 5)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = padding  # as the web UI's Tiling does it
    plans = []
    as_good(made, x, in_bands(made, x, free_bytes=free, report=plans.append))
    assert plans[0].retries == 0 and bool(plans[0].again) == (free == CRAMPED)


@both
@both_plans
@pytest.mark.parametrize("height, width", [(2, 2), (2, 9), (5, 1), (11, 4), (16, 8)])
def test_sizes(name, free, height, width):
    made, x = half(name), given(name, height, width)
    as_good(made, x, in_bands(made, x, free_bytes=free))


@both
@both_plans
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, free, dtype):
    made, x = half(name).to(dtype), given(name).to(dtype)
    try:
        made(x)
    except RuntimeError as error:  # older PyTorch has not every operator in half precision on the CPU
        pytest.skip(str(error))
    as_good(made, x, in_bands(made, x, free_bytes=free), 1.3 if dtype != torch.float64 else 1e4)


@both
@both_plans
def test_channels_last(name, free):
    made, x = half(name).to(memory_format=torch.channels_last), given(name).to(memory_format=torch.channels_last)
    found = in_bands(made, x, free_bytes=free)
    as_good(made, x, found)
    assert found.stride() == made(x).stride()


@both
@both_plans
def test_entries_of_a_batch_one_by_one(name, free):
    made, x = half(name), given(name, batch=3)
    before = x.clone()
    as_good(made, x, in_bands(made, x, free_bytes=free))
    assert torch.equal(x, before)


@both
@both_plans
def test_autocast(name, free):
    made, x = half(name), given(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = in_bands(made, x, free_bytes=free)
        usual = made(x)
    truth = in_float64(made, x)
    assert found.dtype == usual.dtype
    assert distance(found, truth) <= 1.3 * distance(usual, truth)


def test_a_layer_that_leaves_autocasts_dtype():
    made, x = half("decoder", give_pre_end=True), given("decoder")
    made.up[1].upsample.register_forward_hook(lambda layer, given, output: output.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert in_bands(made, x, free_bytes=ROOMY).dtype == made(x).dtype == torch.bfloat16


@both
def test_inference_mode(name):
    made, x = half(name), given(name)
    with torch.inference_mode():
        as_good(made, x, in_bands(made, x, free_bytes=CRAMPED))


def test_more_kinds_of_layers():
    """Attention at other levels, more channels inside than out, a wide shortcut, a result that ends with tanh."""
    made = half("decoder", attn_resolutions=[32], ch_mult=(1, 3, 2), num_res_blocks=2, tanh_out=True)
    assert len(made.up[1].attn) == 3
    x = given("decoder")
    for free in (ROOMY, CRAMPED):
        as_good(made, x, in_bands(made, x, free_bytes=free))
    made = half("decoder", give_pre_end=True)
    as_good(made, x, in_bands(made, x, free_bytes=CRAMPED))
    block = ldm.ResnetBlock(in_channels=64, out_channels=32, conv_shortcut=True, dropout=0.1, temb_channels=0)
    made.up[0].block[0] = block.eval().requires_grad_(False)
    as_good(made, x, in_bands(made, x, free_bytes=ROOMY))


def test_statistics_of_numbers_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 61, 13, generator=generator) + 3000
    norm = nn.GroupNorm(4, 8, eps=1e-6).requires_grad_(False)
    expected = copy.deepcopy(norm).double()(x.double())
    found = Moments.of(x[:, :, :1], 4)
    for start in range(1, 61, 7):
        found = found.merged(Moments.of(x[:, :, start : start + 7], 4))
    scale, shift = (it.double() for it in found.affine(norm, torch.float64))
    assert distance(x.double() * scale + shift, expected) < 0.5 * distance(norm(x), expected)
    assert found.numbers == x.numel() // 4


# ---------------------------------------------------------------------------------------------- what others have done


@both
def test_what_patches_convolutions_is_called(name, monkeypatch):
    """As the web UI's LoRA does it, for all of them."""
    made, x, forward = half(name), given(name), nn.Conv2d.forward
    before = made(x)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda layer, x: 1.25 * forward(layer, x))
    found = in_bands(made, x, free_bytes=CRAMPED)
    as_good(made, x, found)
    assert not torch.allclose(found, before, atol=0.01)


def _tiled_across(layer):
    """As extensions tile in one direction only: no attribute tells."""

    def conv_forward(x, weight, bias):
        x = nn.functional.pad(nn.functional.pad(x, (0, 0, 1, 1), "circular"), (1, 1, 0, 0))
        return nn.functional.conv2d(x, weight, bias)

    layer._conv_forward = conv_forward


def _replaced(layer):
    forward = layer.forward
    layer.forward = lambda *given: forward(*given).roll(1, 3)  # which no norm takes back


def _hooked(layer):
    layer.register_forward_hook(lambda layer, given, output: output.roll(1, 3))


PATCHES = {
    "a convolution's padding": (_tiled_across, lambda half: half.mid.block_1.conv2),
    "a convolution": (_replaced, lambda half: half.mid.block_2.conv1),
    "the first convolution": (_tiled_across, lambda half: half.conv_in),
    "the last convolution": (_tiled_across, lambda half: half.conv_out),
    "a norm": (_replaced, lambda half: half.mid.block_1.norm2),
    "the last norm": (_hooked, lambda half: half.norm_out),
    "a block": (_replaced, lambda half: half.mid.block_1),
    "a hook on a block": (_hooked, lambda half: half.mid.block_2),
    "attention": (_hooked, lambda half: half.mid.attn_1),
    "a resampling": (
        _replaced,
        lambda half: half.up[1].upsample if hasattr(half, "up") else half.down[1].downsample,
    ),
    "a resampling's convolution": (
        _tiled_across,
        lambda half: half.up[1].upsample.conv if hasattr(half, "up") else half.down[0].block[0].conv1,
    ),
}


@both
@pytest.mark.parametrize("patch, layer", PATCHES.values(), ids=PATCHES)
def test_layers_that_somebody_has_changed_are_called_whole(name, patch, layer):
    made, x = half(name), given(name)
    before = made(x)
    patch(layer(made))
    usual = made(x)
    assert not torch.allclose(usual, before, atol=0.01)
    for free in (ROOMY, CRAMPED):
        torch.testing.assert_close(in_bands(made, x, free_bytes=free), usual, atol=1e-4, rtol=1e-4)


def test_a_class_of_norms_with_a_mind_of_its_own(monkeypatch):
    class Norm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 0.5

    made, x = half("decoder"), given("decoder")
    made.mid.block_1.norm1.__class__ = Norm
    torch.testing.assert_close(in_bands(made, x, free_bytes=ROOMY), made(x), atol=1e-4, rtol=1e-4)


def test_what_a_program_does_to_a_norm_when_it_is_called_is_done():
    """As the web UI merges a LoRA into it at its next call."""

    class Norm(nn.GroupNorm):
        def forward(self, x):
            self.weight.fill_(2.0)
            return super().forward(x)

    made, x = half("decoder"), given("decoder")
    made.mid.block_1.norm1.__class__ = Norm
    found = in_bands(made, x, free_bytes=ROOMY)
    assert (made.mid.block_1.norm1.weight == 2).all()
    as_good(made, x, found)


def test_a_class_whose_forward_is_another(monkeypatch):
    made, x, forward = half("decoder"), given("decoder"), ldm.ResnetBlock.forward
    monkeypatch.setattr(ldm.ResnetBlock, "forward", lambda block, x, temb: 1.25 * forward(block, x, temb))
    torch.testing.assert_close(in_bands(made, x, free_bytes=ROOMY), made(x), atol=1e-4, rtol=1e-4)


@both
def test_what_is_not_known_is_refused_in_words(name, monkeypatch):
    made, x = half(name), given(name)
    assert why_not(made, x) == ""
    assert why_not(made, x[0]) and why_not(made, x.long()) and why_not(made, x[:0])
    assert "not known" in why_not(nn.Conv2d(4, 4, 3), x)
    assert "not known" in why_not(ldm.Model, x) or why_not(ldm.Model, x)
    made.train()
    assert "trained" in why_not(made, x)
    made.eval().conv_in.weight.requires_grad_(True)
    assert why_not(made, x) == "gradients are wanted"
    with torch.no_grad():
        assert why_not(made, x) == ""
    made.requires_grad_(False)
    own = type(made).forward
    monkeypatch.setattr(type(made), "forward", lambda half, x: own(half, x))
    with pytest.raises(ValueError, match="not known"):
        in_bands(made, x)
    as_good(made, x, in_bands(made, x, forward=own, free_bytes=ROOMY))  # whoever puts another there knows its own
    made.forward = lambda x: x  # as Tiled VAE does it
    with pytest.raises(ValueError, match="not known"):
        in_bands(made, x)


# ------------------------------------------------------------------------------------------------------ out of memory


@both
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_out_of_memory_at_any_operator_costs_no_picture(name, again, after, monkeypatch):
    """Before each of them, and after each that writes to what there was before."""

    def planned(steps, *size, **more):
        made = bands.plan_bands(steps, *size, **more)
        return replace(made, bytes=made.bytes // 2, least_rows=10, again=tuple(range(len(steps))) if again else ())

    monkeypatch.setattr(halves, "plan_bands", planned)
    made, x = half(name, ch_mult=(1, 2)), given(name, 10, 1) if name == "decoder" else given(name, 4, 0)
    expected, wrong, plans = made(x), [], []
    with Fails() as counted:
        in_bands(made, x, report=plans.append)
    assert counted.count > 400
    for number in counted.writing if after else range(1, counted.count + 1):
        with Fails({number}, after):
            found = in_bands(made, x, report=plans.append)
        if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
            wrong.append(number)
    assert not wrong
    retries = [plan.retries for plan in plans]
    assert set(retries) == {0, 1} and sum(retries) > len(plans) // 3  # the first operators come before the plan


def test_bands_become_lower_until_they_fit():
    """Everything larger than a few rows fails, wherever it is computed."""

    class Small(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.convolution.default and result.shape[2] > 4 and result.shape[3] > 20:
                raise RuntimeError(OUT_OF_MEMORY)
            return result

    made, x, plans = half("decoder"), given("decoder"), []
    with Small():
        found = in_bands(made, x, free_bytes=ROOMY, report=plans.append)
    as_good(made, x, found)
    assert plans[0].retries > 1


def test_no_kernel_begins_for_which_there_is_no_room(monkeypatch):
    """oneDNN ends the process where there is none for its code."""
    asked = []

    def check_room(bytes_, device):
        asked.append(bytes_)
        if bytes_ > room:
            raise MemoryError("can't allocate memory")

    monkeypatch.setattr(halves.devices, "check_room", check_room)
    made, x, plans, room = half("decoder"), given("decoder"), [], 10**12
    in_bands(made, x, free_bytes=ROOMY)
    room = (max(asked) + halves.BESIDE) // 2
    found = in_bands(made, x, free_bytes=ROOMY, report=plans.append)
    as_good(made, x, found)
    assert plans[0].retries and min(asked) > halves.BESIDE
    room = 0
    with pytest.raises(MemoryError, match=halves.SMALLEST):
        in_bands(made, x, free_bytes=ROOMY)


@both
def test_one_that_lasts_is_the_devices_own_error(name):
    made, x = half(name), given(name)
    with Fails() as counted:
        in_bands(made, x, free_bytes=ROOMY)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised, Fails(range(100, 10**9)) as fails:
        in_bands(made, x, free_bytes=ROOMY)
    assert halves.SMALLEST in str(raised.value)
    assert fails.count < 20 * counted.count


def test_without_retrying_the_first_one_is_the_users():
    made, x = half("decoder"), given("decoder")
    with pytest.raises(RuntimeError) as raised, Fails({200}):
        in_bands(made, x, settings=Settings(retry=False))
    assert str(raised.value) == OUT_OF_MEMORY


def test_other_errors_are_nobodys_to_mend():
    class Broken(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                raise RuntimeError("an illegal memory access was encountered")
            return function(*args, **(kwargs or {}))

    with pytest.raises(RuntimeError, match="illegal memory access"), Broken():
        in_bands(half("decoder"), given("decoder"))


# --------------------------------------------------------------------------------------- interrupted, and how far it is


@both
def test_it_can_be_interrupted_between_bands(name):
    made, x, asked = half(name), given(name), []
    in_bands(made, x, interrupted=lambda: bool(asked.append(None)))
    often = len(asked)
    assert often > 50
    for last in (1, often // 2, often):
        asked.clear()

        def interrupted(last=last):
            asked.append(None)
            return len(asked) == last

        with pytest.raises(Interrupted):
            in_bands(made, x, interrupted=interrupted)
        assert len(asked) == last


@both
@both_plans
def test_how_far_it_is(name, free):
    shares = []
    in_bands(half(name), given(name, batch=2), free_bytes=free, progress=shares.append)
    assert len(shares) > 50 and shares == sorted(shares)
    assert shares[0] < 0.05 and shares[-1] == pytest.approx(1)
    assert max(after - before for before, after in zip(shares, shares[1:])) < 0.1


# -------------------------------------------------------------------------------------------------------------- plans


def test_memory(peak_bytes, monkeypatch):
    """The most that is held at a time, with the proportions of Stable Diffusion, and what the plan says of it."""
    monkeypatch.setattr(bands, "LEAST_ROWS", 4)
    made, x, plans = half("decoder"), torch.randn(1, 4, 64, 64), []
    made.mid.attn_1 = nn.Identity()  # ldm's keeps all scores
    with torch_threads(2):  # with one PyTorch takes another way to convolve
        usual = peak_bytes(lambda: made(x))
        roomy = peak_bytes(lambda: in_bands(made, x, free_bytes=ROOMY, report=plans.append))
        cramped = peak_bytes(lambda: in_bands(made, x, free_bytes=CRAMPED, report=plans.append))
    assert roomy < 0.41 * usual and cramped < 0.33 * usual
    for found, plan in zip((roomy, cramped), plans):
        assert 0.8 * found < plan.bytes < 1.25 * found
        assert plan.usual_bytes == pytest.approx(usual, rel=0.1)


@pytest.mark.parametrize("name", ["decoder", "encoder"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5])
def test_memory_of_every_plan_between(name, share, peak_bytes, monkeypatch):
    """Whichever layers are computed again: no place of a map that is needed no more is held beside what is planned."""
    monkeypatch.setattr(bands, "LEAST_ROWS", 4)
    made, plans = half(name), []
    x = torch.randn(1, 4, 64, 64) if name == "decoder" else torch.randn(1, 3, 256, 256)
    made.mid.attn_1 = nn.Identity()  # ldm's keeps all scores
    roomy = bands.plan_bands(steps_of(name), *x.shape[2:], x.dtype, free_bytes=ROOMY).bytes
    with torch_threads(2):
        free = int(roomy * share * 100 / 70) + 1
        found = peak_bytes(lambda: in_bands(made, x, free_bytes=free, report=plans.append))
    assert found < 1.15 * plans[0].bytes


@pytest.mark.parametrize("multipliers", [(1, 2, 2), (1, 1, 2)], ids=["twice", "alike"])
def test_memory_of_an_encoder(multipliers, peak_bytes, monkeypatch):
    """Two maps of its first level, or one and rows, where its own forward holds four and a convolution's copy."""
    monkeypatch.setattr(bands, "LEAST_ROWS", 4)
    made, x, plans = half("encoder", ch_mult=multipliers), torch.randn(1, 3, 256, 256), []
    made.mid.attn_1 = nn.Identity()  # ldm's keeps all scores
    with torch_threads(2):
        usual = peak_bytes(lambda: made(x))
        roomy = peak_bytes(lambda: in_bands(made, x, free_bytes=ROOMY, report=plans.append))
        cramped = peak_bytes(lambda: in_bands(made, x, free_bytes=CRAMPED, report=plans.append))
    assert roomy < 0.6 * usual and cramped < 0.41 * usual
    for found, plan in zip((roomy, cramped), plans):
        assert 0.8 * found < plan.bytes < 1.25 * found


def steps_of(name, **config):
    from lib_subquad.vae import steps_of

    return steps_of(half(name, **config))


def test_plans_stay_within_the_limit_where_that_can_be(monkeypatch):
    monkeypatch.setattr(bands, "LEAST_ROWS", 16)
    steps = steps_of("decoder", ch_mult=(1, 2, 4, 4), num_res_blocks=2)
    size = (256, 256, torch.float32)
    roomy = bands.plan_bands(steps, *size, free_bytes=ROOMY)
    assert roomy.reasons == () and roomy.again == () and roomy.rows > 16
    before = roomy
    for percent in (95, 90, 80, 70, 62):
        made = bands.plan_bands(steps, *size, Settings(memory_limit=50), free_bytes=2 * roomy.bytes * percent // 100)
        assert made.bytes <= roomy.bytes * percent / 100 and made.bytes <= before.bytes and made.reasons
        before = made
    assert before.again
    least = bands.plan_bands(steps, *size, free_bytes=0)
    assert bands.FLOOR_REASON in least.reasons and least.bytes <= before.bytes


def test_after_an_out_of_memory_plans_become_smaller_and_come_to_an_end():
    steps, size = steps_of("decoder"), (40, 30, torch.float32)
    made = bands.plan_bands(steps, *size, free_bytes=ROOMY)
    seen = [made]
    while (made := bands.smaller(seen[-1], steps, *size)) is not None:
        seen.append(made)
    assert 3 <= len(seen) < 20
    assert [plan.bytes for plan in seen] == sorted((plan.bytes for plan in seen), reverse=True)
    assert len({plan.bytes for plan in seen}) == len(seen)
    assert [plan.retries for plan in seen] == list(range(len(seen)))
    assert seen[-1].least_rows == 1 and seen[-1].again and bands.RETRY_REASON in seen[-1].reasons


def test_a_plan_in_words():
    steps = steps_of("decoder", **TINY)
    told = str(bands.plan_bands(steps, 64, 64, torch.float32, free_bytes=0))
    assert "rows" in told and "MiB instead of" in told and bands.AGAIN_REASON in told
