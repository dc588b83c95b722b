"""U-Nets and their families: real layouts, and what was made of them."""

from __future__ import annotations

import sys

import pytest

from lib_subquad.checkpoint import CheckpointError, from_shapes, read_attention_layers
from tests.checkpoint.making import (
    REFINER,
    SD1,
    SD2,
    SDXL,
    SSD,
    UNET,
    VAE,
    entries,
    kinds,
    real_shapes,
    rows,
    unet,
    vae,
    write,
)

pytest.importorskip("safetensors")


def test_sd15_at_512():
    checkpoint = from_shapes(real_shapes("sd15"))
    assert checkpoint.family == "Stable Diffusion 1.x"
    assert kinds(checkpoint) == {
        ("unet", "self"): 16, ("unet", "cross"): 16, ("vae_encoder", "self"): 1, ("vae_decoder", "self"): 1
    }  # fmt: skip
    assert rows(checkpoint, 512, 512) == {
        ("self", 8, 4096, 4096, 40): 5, ("cross", 8, 4096, 77, 40): 5,
        ("self", 8, 1024, 1024, 80): 5, ("cross", 8, 1024, 77, 80): 5,
        ("self", 8, 256, 256, 160): 5, ("cross", 8, 256, 77, 160): 5,
        ("self", 8, 64, 64, 160): 1, ("cross", 8, 64, 77, 160): 1,
    }  # fmt: skip
    for part in ("vae_encoder", "vae_decoder"):
        assert rows(checkpoint, 512, 512, part) == {("self", 1, 4096, 4096, 512): 1}
    assert any("8 in each layer" in note for note in checkpoint.notes)


def test_sdxl_base_at_1024():
    checkpoint = from_shapes(real_shapes("sdxl_base"))
    assert checkpoint.family == "SDXL base"
    assert kinds(checkpoint) == {
        ("unet", "self"): 70, ("unet", "cross"): 70, ("vae_encoder", "self"): 1, ("vae_decoder", "self"): 1
    }  # fmt: skip
    assert rows(checkpoint, 1024, 1024) == {
        ("self", 10, 4096, 4096, 64): 10, ("cross", 10, 4096, 77, 64): 10,
        ("self", 20, 1024, 1024, 64): 60, ("cross", 20, 1024, 77, 64): 60,
    }  # fmt: skip
    assert rows(checkpoint, 1024, 1024, "vae_decoder") == {("self", 1, 16384, 16384, 512): 1}
    assert {layer.context_width for layer in checkpoint.layers if layer.kind == "cross"} == {2048}


def test_layers_are_named_and_stand_in_the_order_they_run():
    names = [layer.name for layer in from_shapes(real_shapes("sdxl_base")).layers]
    assert names[0] == "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
    assert names[1] == "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2"
    assert names[-3] == "model.diffusion_model.output_blocks.5.1.transformer_blocks.1.attn2"
    assert names[-2:] == ["first_stage_model.encoder.mid.attn_1", "first_stage_model.decoder.mid.attn_1"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name, options", [("sd15", SD1), ("sdxl_base", SDXL)])
def test_the_checkpoints_made_here_agree_with_the_real_ones(name, options):
    real, made = real_shapes(name), unet(**options)
    assert made.items() <= real.items()
    assert from_shapes(made | vae()).layers == from_shapes(real).layers


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="needs sparse files")
def test_a_file_of_6_9_gigabytes(file):
    shapes = real_shapes("sdxl_base")
    for i in range(587):  # stands for the two text encoders: the real file has 2515 tensors
        shapes[f"conditioner.embedders.1.model.transformer.resblocks.{i}.weight"] = [1280, 1090]
    header, data = entries(shapes)
    assert 6.9e9 < data < 7e9
    checkpoint = read_attention_layers(write(file, header | {"__metadata__": {"format": "pt"}}, data))
    assert checkpoint.family == "SDXL base"
    assert checkpoint.layers == from_shapes(real_shapes("sdxl_base")).layers


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_the_data_type_does_not_matter(file, dtype):
    assert read_attention_layers(write(file, *entries(unet(channels=32), dtype))).layers


@pytest.mark.parametrize(
    "options, family, layers, heads_and_widths",
    [
        (SD1, "Stable Diffusion 1.x", 32, {(8, 40), (8, 80), (8, 160)}),
        (SD1 | {"inputs": 9}, "Stable Diffusion 1.x, inpainting", 32, {(8, 40), (8, 80), (8, 160)}),
        (SD1 | {"inputs": 8}, "Stable Diffusion 1.x, instruct-pix2pix", 32, {(8, 40), (8, 80), (8, 160)}),
        (SD2, "Stable Diffusion 2.x", 32, {(5, 64), (10, 64), (20, 64)}),
        (SD2 | {"inputs": 9}, "Stable Diffusion 2.x, inpainting", 32, {(5, 64), (10, 64), (20, 64)}),
        (SD2 | {"inputs": 5}, "Stable Diffusion 2.x, depth-guided", 32, {(5, 64), (10, 64), (20, 64)}),
        (SDXL, "SDXL base", 140, {(10, 64), (20, 64)}),
        (SDXL | {"inputs": 9}, "SDXL base, inpainting", 140, {(10, 64), (20, 64)}),
        (SDXL | {"inputs": 8}, "SDXL base, instruct-pix2pix", 140, {(10, 64), (20, 64)}),
        (REFINER, "SDXL refiner", 88, {(12, 64), (24, 64)}),
        (SSD, "SSD-1B", 68, {(10, 64), (20, 64)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families(options, family, layers, heads_and_widths):
    checkpoint = from_shapes(unet(**options) | vae())
    assert checkpoint.family == family
    assert kinds(checkpoint) == {
        ("unet", "self"): layers // 2, ("unet", "cross"): layers // 2,
        ("vae_encoder", "self"): 1, ("vae_decoder", "self"): 1,
    }  # fmt: skip
    assert {(layer.heads, layer.head_width) for layer in checkpoint.layers if layer.part == "unet"} == heads_and_widths
    batches = {layer.shapes(512, 512, batch=4)[0][0] for layer in checkpoint.layers if layer.part == "unet"}
    assert batches == {12 if "pix2pix" in family else 8}
    assert not any("pruned" in note or "none of the models" in note for note in checkpoint.notes)


def test_ssd_1b_and_the_refiner_at_1024():
    assert rows(from_shapes(unet(**SSD)), 1024, 1024) == {
        ("self", 10, 4096, 4096, 64): 8, ("cross", 10, 4096, 77, 64): 8,
        ("self", 20, 1024, 1024, 64): 26, ("cross", 20, 1024, 77, 64): 26,
    }  # fmt: skip
    assert rows(from_shapes(unet(**REFINER)), 1024, 1024) == {
        ("self", 12, 4096, 4096, 64): 20, ("cross", 12, 4096, 77, 64): 20,
        ("self", 24, 1024, 1024, 64): 20, ("cross", 24, 1024, 77, 64): 20,
        ("self", 24, 256, 256, 64): 4, ("cross", 24, 256, 77, 64): 4,
    }  # fmt: skip


def test_a_pruned_model_keeps_its_family_and_says_so():
    shapes = {name: shape for name, shape in unet(**SDXL).items() if "middle_block" not in name}
    checkpoint = from_shapes(shapes)
    assert checkpoint.family == "SDXL base"
    assert "120 attention layers where SDXL base has 140: it was pruned or changed." in checkpoint.notes


def test_an_unknown_width_is_described_and_called_a_guess():
    one = from_shapes(unet(channels=64, context=64))
    assert one.family == "like Stable Diffusion 1.x"
    assert {layer.heads for layer in one.layers} == {8}
    two = from_shapes(unet(channels=64, context=96, linear=True))
    assert two.family == "like Stable Diffusion 2.x or SDXL"
    assert {layer.head_width for layer in two.layers} == {64}
    for checkpoint in (one, two):
        assert any("a guess from the layout" in note for note in checkpoint.notes)
        assert any("none of the models known here" in note for note in checkpoint.notes)
        assert not any("first block" in note for note in checkpoint.notes)  # developers' words


def test_switched_off_self_attention_looks_at_the_prompt():  # the x4 upscaler
    shapes = unet(channels=256, context=1024, inputs=7, linear=True)
    for part in ("to_k", "to_v"):
        shapes[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.{part}.weight"] = [256, 1024]
    checkpoint = from_shapes(shapes, heads=8)
    assert checkpoint.layers[0].kind == "cross" and checkpoint.layers[0].context_width == 1024
    assert checkpoint.family.endswith("7 input channels")
    assert any("no variant known here" in note for note in checkpoint.notes)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", UNET])
def test_a_unet_alone(prefix):
    checkpoint = from_shapes(unet(prefix=prefix))
    assert checkpoint.family == "Stable Diffusion 1.x" and len(checkpoint.layers) == 32
    assert checkpoint.layers[0].name == f"{prefix}input_blocks.1.1.transformer_blocks.0.attn1"
    assert any("No VAE" in note for note in checkpoint.notes)


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_vae_alone(prefix):
    checkpoint = from_shapes(vae(prefix=prefix))
    assert checkpoint.family == "VAE"
    assert kinds(checkpoint) == {("vae_encoder", "self"): 1, ("vae_decoder", "self"): 1}
    assert checkpoint.layers[0].shapes(1024, 1024, batch=4) == ((1, 1, 16384, 512),) * 3
    assert any("no U-Net" in note for note in checkpoint.notes)


def test_half_a_vae_and_one_with_another_latent():
    decoder = {name: shape for name, shape in vae().items() if "decoder" in name}
    assert [layer.part for layer in from_shapes(decoder).layers] == ["vae_decoder"]
    four = from_shapes(unet(**SD2) | vae(halvings=2))
    assert four.layers[0].tokens(512, 512) == four.layers[-1].tokens(512, 512) == 128 * 128
    assert any("4 × 4" in note for note in four.notes)


def test_attention_elsewhere_in_a_vae():
    shapes = vae()
    shapes[f"{VAE}encoder.down.2.attn.0.q.weight"] = shapes[f"{VAE}decoder.up.2.attn.1.q.weight"] = [256, 256, 1, 1]
    found = {layer.name: layer.tokens(512, 256) for layer in from_shapes(shapes).layers}
    assert found[f"{VAE}encoder.down.2.attn.0"] == found[f"{VAE}decoder.up.2.attn.1"] == 128 * 64
    shapes[f"{VAE}decoder.up.7.attn.0.q.weight"] = [256, 256, 1, 1]
    with pytest.raises(CheckpointError, match="deeper than the 3 halvings"):
        from_shapes(shapes)
