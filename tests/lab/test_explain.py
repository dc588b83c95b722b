"""The plan table and the largest image, for two real checkpoints' headers."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from lib_subquad import Settings
from lib_subquad.checkpoint import from_shapes
from lib_subquad.device import GIB
from lib_subquad.lab.explain import explain, largest_image

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")


def layers(name):
    with gzip.open(DATA / f"header_{name}.json.gz", "rt") as file:
        header = json.load(file)
    shapes = {key: entry[1] if isinstance(entry[0], str) else entry for key, entry in header.items()}
    return from_shapes(shapes).layers


def table(name, size, **settings):
    return explain(layers(name), size, size, 1, torch.float32, CPU, Settings(**settings), free_bytes=8 * GIB)


def counted(rows, part, kind):
    return sum(row.layers for row in rows if row.part.startswith(part) and row.kind == kind)


def test_sdxl_base_at_1024_has_140_layers_and_the_vae():
    rows = table("sdxl_base", 1024)
    assert counted(rows, "unet", "self") == counted(rows, "unet", "cross") == 70
    assert counted(rows, "vae", "self") == 2
    assert {row.problem.queries for row in rows if row.part == "unet"} == {4096, 1024}


def test_sd15_at_512_has_32_layers_and_the_vae():
    rows = table("sd15", 512)
    assert counted(rows, "unet", "self") + counted(rows, "unet", "cross") == 32
    assert counted(rows, "vae", "self") == 2


def test_the_table_says_what_a_setting_brings_about():
    row = next(row for row in table("sd15", 512, kv_chunk=256) if row.problem.queries == 4096 == row.problem.keys)
    assert row.cells()["Engine"] == "portable"
    assert row.cells()["KV chunk"] == "256"
    assert "splits 4096 keys" in row.cells()["Why"]


def test_the_largest_image_grows_with_memory_and_every_call_of_it_fits():
    sd15, sizes = layers("sd15"), []
    for free in (GIB // 4, GIB, 4 * GIB):
        size = largest_image(sd15, 768, 512, 1, torch.float16, CPU, Settings(), free_bytes=free)
        rows = explain(sd15, *size, 1, torch.float16, CPU, Settings(), free_bytes=free)
        assert max(row.call_bytes for row in rows) <= free * 70 // 100
        assert size[0] % 64 == size[1] % 64 == 0
        assert size[0] / size[1] == pytest.approx(1.5, rel=0.1)
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_no_image_fits_no_memory():
    assert largest_image(layers("sd15"), 512, 512, 1, torch.float16, CPU, Settings(), free_bytes=1000) is None


@pytest.mark.parametrize("size", [0, -64, 4.5])
def test_a_size_that_makes_no_image_is_an_error(size):
    with pytest.raises(ValueError, match="side"):
        explain(layers("sd15"), size, 512, 1, torch.float32, CPU, Settings())
