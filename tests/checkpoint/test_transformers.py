"""Transformers as their files come: all in one or alone, packed, mixed, cut down, and beside others like them."""

from __future__ import annotations

import dataclasses

import pytest

from lib_subquad.checkpoint import (
    AttentionLayer,
    Checkpoint,
    CheckpointError,
    families,
    from_shapes,
    read_attention_layers,
)
from tests.checkpoint.making import UNET, entries, flux, mmdit, write
from tests.checkpoint.public_models import tensors

TRANSFORMERS = ("sd3_medium", "sd35_medium", "sd35_large", "flux_dev", "flux_schnell", "chroma")


def alone(name: str, prefix: str = "") -> dict[str, list[int]]:
    """The transformer's tensors only."""
    model = {
        key: shape for key, shape in tensors(name).items() if "first_stage_model." not in key and "vae." not in key
    }
    return {prefix + key.removeprefix(UNET): shape for key, shape in model.items()}


def same(layers, others) -> bool:
    """Whether they are the same but for their names."""
    return [dataclasses.replace(it, name="") for it in layers] == [dataclasses.replace(it, name="") for it in others]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("prefix", [UNET, "diffusion_model.", ""])
def test_a_transformer_alone(name, prefix):
    checkpoint = from_shapes(alone(name, prefix))
    whole = from_shapes(tensors(name))
    assert checkpoint.family == whole.family
    assert same(checkpoint.layers, [layer for layer in whole.layers if not layer.is_vae])
    assert all(layer.name.startswith(prefix) for layer in checkpoint.layers)
    assert any("separate VAE" in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_everything_in_one_file(name):
    vae = {f"vae.{key}": shape for key, shape in tensors("vae_16").items()}
    encoders = {
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": [768, 768],
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": [4096, 4096],
    }
    checkpoint = from_shapes(alone(name, UNET) | vae | encoders)
    assert checkpoint.family == from_shapes(tensors(name)).family
    assert [layer.name for layer in checkpoint.layers if layer.is_vae] == [
        "vae.encoder.mid.attn_1",
        "vae.decoder.mid.attn_1",
    ]


def nf4(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """As bitsandbytes packs linear layers: two numbers a byte in one column, and what unpacks them beside."""
    packed = {}
    for name, shape in shapes.items():
        packed[name] = shape
        if len(shape) == 2:
            packed[name] = [shape[0] * shape[1] // 2, 1]
            packed[f"{name}.absmax"], packed[f"{name}.quant_map"] = [shape[0] * shape[1] // 64], [16]
            packed[f"{name}.quant_state.bitsandbytes__nf4"] = [97]
    return packed


def fp8(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """As scaled 8-bit floats are saved: a scale beside each linear layer."""
    scales = {name.removesuffix("weight") + "scale_weight": [1] for name, shape in shapes.items() if len(shape) == 2}
    return shapes | scales | {f"{UNET}scaled_fp8": [0]}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("quantised", [nf4, fp8])
def test_quantised_files_have_the_same_layers(name, quantised):
    plain, found = from_shapes(tensors(name)), from_shapes(quantised(tensors(name)))
    assert found.family == plain.family and len(found.layers) == len(plain.layers)
    for one, other in zip(found.layers, plain.layers):
        assert one.shapes(1024, 1024) == other.shapes(1024, 1024)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_types_are_mixed(name, tmp_path):
    header, _ = entries(alone(name, UNET), "F8_E4M3")
    place = 0
    for key, entry in header.items():  # weights in 8 bits, everything else in 32
        entry["dtype"], size = ("F8_E4M3", 1) if key.endswith(".weight") else ("F32", 4)
        for count in entry["shape"]:
            size *= count
        entry["data_offsets"], place = [place, place + size], place + size
    checkpoint = read_attention_layers(write(tmp_path / "mixed.safetensors", header, place))
    assert checkpoint == from_shapes(alone(name, UNET))


@pytest.mark.parametrize("channels, family", [(64, ""), (128, ", guided by a picture"), (384, ", inpainting")])
def test_variants_of_flux(channels, family):
    checkpoint = from_shapes(alone("flux_dev") | {"img_in.weight": [3072, channels]})
    assert checkpoint.family == f"Flux dev{family}"
    assert same(checkpoint.layers, from_shapes(alone("flux_dev")).layers)


def test_a_variant_of_flux_that_is_not_known():
    checkpoint = from_shapes(alone("flux_dev") | {"img_in.weight": [3072, 96]})
    assert checkpoint.family == "Flux dev, 96 input channels"
    assert any("no variant known here" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    "name, made",
    [
        ("sd3_medium", mmdit()),
        ("sd35_medium", mmdit(twice=13)),
        ("sd35_large", mmdit(width=2432, blocks=38)),
        ("flux_dev", flux()),
        ("flux_schnell", flux(more=())),
        ("chroma", flux(more=("distilled_guidance_layer.in_proj.bias",))),
    ],
)
def test_the_checkpoints_made_here_agree_with_the_real_ones(name, made):
    real = from_shapes(alone(name))
    found = from_shapes(made)
    assert found.family == real.family and same(found.layers, real.layers)


def without(shapes, *beginnings):
    return {name: shape for name, shape in shapes.items() if not name.startswith(beginnings)}


def test_fewer_blocks():
    flux = from_shapes(without(alone("flux_dev"), *(f"double_blocks.{number}." for number in range(8, 19))))
    assert flux.family == "Flux dev" and len(flux.layers) == 8 + 38
    assert "8 and 38 blocks where Flux dev has 19 and 38." in flux.notes
    mmdit = from_shapes(without(alone("sd3_medium"), "joint_blocks.23.", "joint_blocks.22."))
    assert mmdit.family == "like Stable Diffusion 3" and len(mmdit.layers) == 22
    assert any("22 blocks 1536 channels wide" in note for note in mmdit.notes)


@pytest.mark.parametrize(
    "name, gone, says",
    [
        ("flux_dev", "double_blocks.3.", "double_blocks.3 is missing"),
        ("flux_dev", "single_blocks.0.", "single_blocks.0 is missing"),
        ("sd3_medium", "joint_blocks.7.", "joint_blocks.7 is missing"),
        ("sd3_medium", "x_embedder.proj.weight", "x_embedder.proj.weight is missing"),
        ("sd3_medium", "joint_blocks.7.x_block.attn.qkv.bias", "joint_blocks.7.x_block.attn.qkv.bias is missing"),
    ],
)
def test_a_block_is_missing(name, gone, says):
    with pytest.raises(CheckpointError, match=says):
        from_shapes(without(alone(name), gone))


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("flux_dev", {"double_blocks.3.img_attn.qkv.bias": [9215]}, "double_blocks.3 is not as wide"),
        ("flux_dev", {"double_blocks.3.img_attn.qkv.bias": [12288]}, "double_blocks.3 is not as wide"),
        ("flux_dev", {"single_blocks.3.linear1.bias": [9000]}, "single_blocks.3 is not as wide"),
        ("sd3_medium", {"x_embedder.proj.weight": [1536, 16, 4, 1]}, "square patches"),
        ("sd3_medium", {"x_embedder.proj.weight": [2, 2, 16, 1536]}, "square patches"),
        ("flux_dev", {"img_in.bias": [3073]}, "do not divide into heads"),
        ("flux_dev", {"double_blocks.0.img_attn.norm.query_norm.scale": []}, "impossible shape"),
        ("sd3_medium", {"joint_blocks.3.x_block.attn.qkv.bias": [1536]}, "joint_blocks.3 is not as wide"),
        ("sd3_medium", {"x_embedder.proj.weight": [1536, 16]}, "impossible shape"),
        ("sd3_medium", {"x_embedder.proj.bias": [0]}, "impossible shape"),
    ],
)
def test_shapes_that_contradict_each_other(name, change, says):
    with pytest.raises(CheckpointError, match=says):
        from_shapes(alone(name) | change)


def test_the_heads_of_an_unknown_size_are_told_in_a_sentence():
    checkpoint = from_shapes(mmdit(blocks=18, width=1152))
    assert "Heads: 64 channels wide, as Stable Diffusion 3 has them." in checkpoint.notes


def test_the_caller_knows_better_how_many_heads():
    checkpoint = from_shapes(alone("sd3_medium"), heads=12)
    assert {(layer.heads, layer.head_width) for layer in checkpoint.layers} == {(12, 128)}
    assert "Heads: 12 in each layer, as asked for." in checkpoint.notes


def test_the_prompt_and_its_copies():
    sd3, flux, chroma = (from_shapes(alone(name)).layers[0] for name in ("sd3_medium", "flux_dev", "chroma"))
    assert sd3.shapes(1024, 1024)[0] == (2, 24, 4096 + 77 + 256, 64)
    assert sd3.shapes(1024, 1024, prompt_tokens=154, t5_tokens=77)[1] == (2, 24, 4096 + 154 + 77, 64)
    assert flux.shapes(1024, 1024, batch=3)[2] == (3, 24, 4096 + 256, 128)
    assert flux.shapes(1024, 1024, prompt_tokens=231)[2] == (1, 24, 4096 + 256, 128)
    assert chroma.shapes(1024, 1024, t5_tokens=9)[0] == (2, 24, 4096 + 9, 128)


def test_patches_that_are_not_whole():
    """Flux fills them up; SD 3 leaves them out."""
    sd3, flux = (from_shapes(alone(name)).layers[0] for name in ("sd3_medium", "flux_dev"))
    assert (flux.tokens(1000, 1016), flux.size_step) == (63 * 64, 8)
    assert (sd3.tokens(1000, 1016), sd3.size_step) == (62 * 63, 16)


@pytest.mark.parametrize(
    "name, family",
    [
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "LoRA"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "IP-Adapter or InstantID"),
        ("pulid_ca.0.to_q.weight", "PuLID"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        ("double_stream_modulation_img.lin.weight", "Flux 2"),
        ("latent_in.weight", "Hunyuan3D"),
    ],
)
def test_what_is_like_flux_and_is_not(name, family):
    block = {"double_blocks.0.img_attn.norm.query_norm.scale": [128], "double_blocks.0.img_attn.qkv.bias": [9216]}
    if family == "LoRA":  # one for depth has new norms beside its differences
        del block["double_blocks.0.img_attn.qkv.bias"]
    assert from_shapes({name: [8, 8]} | block).family == family


@pytest.mark.parametrize(
    "name, family",
    [
        ("double_layers.0.attn.w1q.weight", "AuraFlow"),
        ("cap_embedder.1.weight", "Lumina 2 or Z-Image"),
        ("mlp_t5.0.weight", "HunyuanDiT"),
        ("t_block.1.weight", "PixArt"),
        ("blocks.0.cross_attn.kv_linear.weight", "Sana"),
        ("net.blocks.block0.blocks.0.block.attn.to_q.0.weight", "Cosmos"),
        ("net.blocks.0.mlp.layer1.weight", "Cosmos"),
        ("head.modulation", "Wan"),
        ("patchify_proj.weight", "LTX-Video"),
        ("t5_yproj.weight", "Mochi"),
        ("transformer_blocks.0.img_mlp.net.0.proj.weight", "Qwen-Image"),
        ("double_stream_blocks.0.block.adaLN_modulation.1.bias", "HiDream"),
        ("nerf_image_embedder.embedder.0.bias", "Chroma Radiance"),
        ("txtfusion.projector.weight", "Krea 2"),
        ("model.model.transformer.rotary_pos_emb.inv_freq", "Stable Audio"),
        ("clip_mapper.weight", "Stable Cascade"),
        ("single_transformer_blocks.0.attn.to_q.weight", "Stable Diffusion 3 or Flux, diffusers layout"),
        ("transformer_blocks.0.attn.add_q_proj.weight", "Stable Diffusion 3 or Flux, diffusers layout"),
    ],
)
@pytest.mark.parametrize("prefix", ["", UNET])
def test_transformers_that_are_recognised_and_not_read(name, family, prefix):
    more = {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": [8, 8]}
    checkpoint = from_shapes({prefix + name: [8, 8]} | more)
    assert checkpoint.family == family and checkpoint.layers == ()
    assert name in checkpoint.notes[0]


def test_a_family_is_added(monkeypatch):
    class Tiny:
        """One block that looks at image and prompt in turn."""

        @staticmethod
        def prefixes(tensors):
            return tensors.prefixes(["tiny.qkv.weight", "tiny.out.weight"])

        @staticmethod
        def read(model, heads, latent_factor):
            channels = model.shape("tiny.out.weight", dimensions=(2,))[0]
            count, width = heads.divide(channels, "tiny") if heads else (1, channels)
            common = {"heads": count, "head_width": width, "downsampling": 2 * latent_factor}
            layers = [
                AttentionLayer(f"{model.prefix}tiny", "transformer", kind, **common) for kind in ("self", "joint")
            ]
            return Checkpoint("Tiny", tuple(layers))

    shapes = {"tiny.qkv.weight": [96, 32], "tiny.out.weight": [32, 32]}
    assert from_shapes(shapes).family == "unknown"
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, Tiny])
    checkpoint = from_shapes({UNET + name: shape for name, shape in shapes.items()}, heads=4)
    assert checkpoint.family == "Tiny"
    assert [(layer.name, layer.kind, *layer.shapes(64, 64)) for layer in checkpoint.layers] == [
        (f"{UNET}tiny", kind, *[(1, 4, 16, 8)] * 3) for kind in ("self", "joint")
    ]
