"""Where the number of heads comes from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lib_subquad.checkpoint import read_attention_layers
from tests.checkpoint.making import config, entries, rows, unet, vae, write

TINY = Path(__file__).parents[3] / "shared" / "checkpoints" / "tiny-sd1"

pytest.importorskip("safetensors")


@pytest.mark.skipif(not TINY.is_dir(), reason="the tiny checkpoint is not here")
def test_the_tiny_checkpoint_and_its_yaml():
    checkpoint = read_attention_layers(TINY / "tiny-sd1.safetensors")
    assert checkpoint.family == "like Stable Diffusion 1.x"
    assert {(layer.heads, layer.head_width) for layer in checkpoint.layers} == {(4, 16), (4, 32), (1, 64)}
    assert any("tiny-sd1.yaml" in note for note in checkpoint.notes)
    assert rows(checkpoint, 512, 512)["self", 4, 4096, 4096, 16] == 3


@pytest.mark.parametrize(
    "text, expected, says",
    [
        (config(num_heads=4), (4, 16), "4 in each layer, from 'model.yaml'"),
        (config(num_head_channels=32), (2, 32), "32 channels wide, from 'model.yaml'"),
        (config(num_heads=4, num_head_channels=32), (2, 32), "32 channels wide"),
        (config(num_heads=4, num_head_channels=-1), (4, 16), "4 in each layer"),
        (config(num_heads=4).replace("unet_config", "network_config"), (4, 16), "4 in each layer"),
        (config(), (8, 8), "does not give the number of heads"),
        (config(num_heads="many"), (8, 8), "does not give the number of heads"),
        (config(num_heads=0), (8, 8), "does not give the number of heads"),
        ("", (8, 8), "does not give the number of heads"),
        ("- a\n- list\n", (8, 8), "does not give the number of heads"),
        ("? [a]\n: b\nmodel: &x {params: *x}\n", (8, 8), "does not give the number of heads"),
        ("model: [", (8, 8), "could not be read"),
        ("[" * 60_000, (8, 8), "could not be read"),
        ('"\\UFFFFFFFF"', (8, 8), "could not be read"),
        ("\0\1", (8, 8), "could not be read"),
        (" " * 70_000, (8, 8), "longer than 64 KiB"),
    ],
)
def test_heads_from_the_yaml_beside_the_file(file, text, expected, says):
    pytest.importorskip("yaml")
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,), context=64)))
    file.with_suffix(".yaml").write_text(text, encoding="utf-8")
    checkpoint = read_attention_layers(file)
    assert {(layer.heads, layer.head_width) for layer in checkpoint.layers} == {expected}
    assert any(says in note for note in checkpoint.notes)


def test_a_yaml_is_never_constructed(file, tmp_path):
    pytest.importorskip("yaml")
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,))))
    trap = tmp_path / "trap"
    bomb = "\n".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40))
    text = f"a: !!python/object/apply:os.mkdir ['{trap}']\nm0: &m0 {{x: 1}}\n{bomb}\n" + config(num_heads=2)[1:-1]
    file.with_suffix(".yaml").write_text(text, encoding="utf-8")
    assert {layer.heads for layer in read_attention_layers(file).layers} == {2}
    assert not trap.exists()


def test_without_pyyaml_a_note_says_so(file, monkeypatch):
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,))))
    file.with_suffix(".yaml").write_text(config(num_heads=2), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "yaml", None)
    checkpoint = read_attention_layers(file)
    assert {layer.heads for layer in checkpoint.layers} == {8}
    assert any("PyYAML is not installed" in note for note in checkpoint.notes)


def test_the_caller_knows_better(file):
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,)) | vae()))
    file.with_suffix(".yaml").write_text(config(num_heads=2), encoding="utf-8")
    checkpoint = read_attention_layers(file, heads=16)
    assert {layer.heads for layer in checkpoint.layers} == {16, 1}  # the VAE keeps its one head
    assert "Heads: 16 in each layer, as asked for." in checkpoint.notes
    for wrong in (0, -1, 2.0, "8", True):
        with pytest.raises(ValueError, match="heads is"):
            read_attention_layers(file, heads=wrong)
