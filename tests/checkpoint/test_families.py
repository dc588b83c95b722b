"""The reader against public model code that was built and run: layers, heads, widths and tokens."""

from __future__ import annotations

import pytest

from lib_subquad.checkpoint import from_shapes
from tests.checkpoint.public_models import NAMES, digest, expand, runs, tensors
from tests.checkpoint.public_models import recorded as record


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("alone", ["alone"]),
        ("a.{0-2,5}.b", ["a.0.b", "a.1.b", "a.2.b", "a.5.b"]),
        ("{0-1}.{weight,bias}", ["0.weight", "0.bias", "1.weight", "1.bias"]),
    ],
)
def test_a_folded_name_stands_for_all_of_its_names(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_those_that_the_model_held(name):
    table = tensors(name)
    assert len(table) == record(name)["tensors"]
    assert digest(sorted(f"{key} {shape}" for key, shape in table.items())) == record(name)["sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_the_calls_are_those_that_the_model_made(name):
    assert {(run.width, run.height) for run in runs(name)} >= {(1024, 1024), (768, 1344)}
    for run in runs(name):
        lines = (f"{c.module} {c.kind} {list(c.query)} {list(c.key)} {list(c.value)}" for c in run.calls)
        assert digest(lines) == run.sha256


@pytest.mark.parametrize("name", NAMES)
def test_every_call_belongs_to_a_module_that_has_tensors(name):
    modules = {key.rsplit(".", depth)[0] for key in tensors(name) for depth in range(1, 6)}
    assert {call.module for run in runs(name) for call in run.calls} <= modules


FAMILIES = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x",
    "sdxl_base": "SDXL base",
    "sdxl_refiner": "SDXL refiner",
    "sd3_medium": "Stable Diffusion 3 medium",
    "sd35_medium": "Stable Diffusion 3.5 medium",
    "sd35_large": "Stable Diffusion 3.5 large or large turbo",
    "flux_dev": "Flux dev",
    "flux_schnell": "Flux schnell",
    "chroma": "Chroma",
    "vae_4": "VAE",
    "vae_16": "VAE",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_finds_the_calls_in_the_order_they_run(name):
    checkpoint = from_shapes(tensors(name))
    assert checkpoint.family == FAMILIES[name]
    for run in runs(name):
        found = [
            (layer.name.removesuffix(".x_block.attn2"), layer.kind, *shapes(layer, run)) for layer in checkpoint.layers
        ]
        assert found == [(c.module, c.kind, c.query, c.key, c.value) for c in run.calls]


def shapes(layer, run):
    """Of one image without a negative prompt, T5 given what CLIP leaves of the prompt's tokens."""
    t5_tokens = max((run.text_tokens or 77) - (layer.context_tokens or 0), 1)
    return layer.shapes(run.width, run.height, guidance=False, t5_tokens=t5_tokens)
