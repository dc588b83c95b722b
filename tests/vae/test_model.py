"""The VAE in plain PyTorch that bench measures, and what a file's header tells of one, beside the layers themselves."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lib_subquad.checkpoint import from_shapes
from lib_subquad.steps import DOWN, UP, VaeStep
from lib_subquad.vae import bands, in_bands, steps_of, usual_bytes, why_not
from lib_subquad.vae.model import Decoder, Encoder, with_random_weights
from tests.checkpoint import public_models
from tests.threads import torch_threads
from tests.vae.making import CRAMPED, ROOMY, distance, given, half, in_float64

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"channels": (32, 64, 64), "blocks": 1}
OURS = {"decoder": Decoder, "encoder": Encoder}
both = pytest.mark.parametrize("name", OURS)


def ours(name, **config):
    return with_random_weights(OURS[name](**(SMALL | config)))


def of_layers(module):
    return [VaeStep(*(getattr(stage, field.name) for field in fields(VaeStep))) for stage in steps_of(module)]


def of_names(module, half):
    shapes = {f"first_stage_model.{half}.{name}": tensor.shape for name, tensor in module.state_dict().items()}
    return list(getattr(from_shapes(shapes), half))


@both
def test_it_is_latent_diffusions(name):
    """The same weights give the same numbers."""
    theirs, mine, x = half(name), ours(name), given(name)
    theirs.mid.attn_1 = mine.mid.attn_1  # ldm's keeps all scores
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(x), theirs(x))
    assert of_layers(mine) == of_layers(theirs)


@both
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("free", [ROOMY, CRAMPED], ids=["roomy", "cramped"])
def test_it_is_computed_in_bands(name, in_place, free):
    made, x = ours(name, in_place=in_place), given(name)
    assert why_not(made, x) == ""
    truth = in_float64(made, x)
    assert distance(in_bands(made, x, free_bytes=free), truth) <= 1.3 * distance(made(x), truth)
    assert {step.in_place for step in of_layers(made) if step.kind == "residual"} == {in_place}


@pytest.mark.parametrize("in_place", [False, True])
def test_what_its_own_forward_holds(in_place, peak_bytes):
    made, x = ours("decoder", in_place=in_place), torch.randn(1, 4, 64, 64)
    with torch_threads(2):
        held = peak_bytes(lambda: made(x))
    told = usual_bytes(steps_of(made), 64, 64, torch.float32)
    # Where nothing else is copied it is the convolution's kernel that does so, which PyTorch's count does not show.
    assert held <= 1.05 * told and told <= (1.5 if in_place else 1.1) * held


def test_silu_in_place_takes_less():
    size = (64, 64, torch.float32)
    usual, less = (usual_bytes(of_layers(ours("decoder", in_place=it)), *size) for it in (False, True))
    assert 0.8 < less / usual < 0.95


# ------------------------------------------------------------------------------------------------------- from a header


@both
@pytest.mark.parametrize("config", [{}, {"latent_channels": 16}, {"channels": (32, 64), "blocks": 2}])
def test_names_and_shapes_tell_what_the_layers_do(name, config):
    made = ours(name, **config)
    assert of_names(made, name) == of_layers(made)


@both
def test_attention_at_other_levels_is_seen(name):
    made = half(name, attn_resolutions=[32])
    assert of_names(made, name) == of_layers(made)


@pytest.mark.parametrize(("family", "latent"), [("sd15", 4), ("sdxl_base", 4), ("sdxl_refiner", 4), ("sd3_medium", 16)])
def test_public_models(family, latent):
    found = from_shapes(public_models.tensors(family))
    assert found.latent_factor == 8 and found.decoder[0].into == latent and found.encoder[-1].out == 2 * latent
    assert [step.resizes for step in found.decoder if step.resizes] == [UP] * 3
    assert [step.resizes for step in found.encoder if step.resizes] == [DOWN] * 3
    # Eight maps of 128 channels of 512 x 512 numbers: 1,024 MiB in float32.
    assert usual_bytes(found.decoder, 64, 64, torch.float32) == 8 * 128 * 512 * 512 * 4
    made = bands.plan_bands(found.decoder, 64, 64, torch.float32, free_bytes=ROOMY)
    assert made.bytes < 0.41 * made.usual_bytes


UNKNOWN = {
    "a video VAE": lambda shapes: {name: (*shape, 3) if len(shape) == 4 else shape for name, shape in shapes.items()},
    "a block too few": lambda shapes: {name: it for name, it in shapes.items() if "up.1.block.0." not in name},
    "no way out": lambda shapes: {name: it for name, it in shapes.items() if "conv_out" not in name},
    "no way up": lambda shapes: {name: it for name, it in shapes.items() if "upsample" not in name},
    "other kernels": lambda shapes: {**shapes, "decoder.conv_in.weight": (64, 4, 1, 1)},
    "channels that do not fit": lambda shapes: {**shapes, "decoder.mid.block_1.conv1.weight": (64, 32, 3, 3)},
    "a block whose two do not fit": lambda shapes: {**shapes, "decoder.mid.block_1.conv2.weight": (32, 64, 3, 3)},
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_of_what_is_not_known_nothing_is_said(change):
    shapes = {f"decoder.{name}": tuple(tensor.shape) for name, tensor in ours("decoder").state_dict().items()}
    assert from_shapes(shapes).decoder
    changed = {name: shape for name, shape in change(shapes).items()}
    changed["decoder.mid.attn_1.q.weight"] = shapes["decoder.mid.attn_1.q.weight"]
    assert from_shapes(changed).decoder == ()


def test_a_file_without_a_vae():
    found = from_shapes(public_models.tensors("flux_dev"))
    assert found.encoder == found.decoder == ()
