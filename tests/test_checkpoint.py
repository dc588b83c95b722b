"""The header reader: real layouts, every family, the U-Net and VAE that really run, and files that lie."""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_subquad import checkpoint as module
from lib_subquad.checkpoint import AttentionLayer, Checkpoint, CheckpointError, from_shapes, read_attention_layers

pytest.importorskip("safetensors")

DATA = Path(__file__).parent / "data"
TINY = Path(__file__).parents[2] / "shared" / "checkpoints" / "tiny-sd1"
UNET = "model.diffusion_model."
VAE = "first_stage_model."
FUZZ_EXAMPLES = int(os.environ.get("SUBQUAD_FUZZ_EXAMPLES", "300"))  # for each of the five fuzz tests
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8}


# ------------------------------------------------------------------------------------------------ making checkpoints


def real_header(name: str) -> dict[str, list]:
    """name -> [dtype, shape] of a real checkpoint's U-Net and VAE."""
    return json.loads(gzip.decompress((DATA / f"header_{name}.json.gz").read_bytes()))


def real_shapes(name: str) -> dict[str, list[int]]:
    return {key: shape for key, (_, shape) in real_header(name).items()}


def unet(
    prefix=UNET,
    channels=320,
    mult=(1, 2, 4, 4),
    depths=(1, 1, 1, 0),
    middle=1,
    up_depths=None,
    context=768,
    inputs=4,
    linear=False,
    blocks=2,
):
    """What matters of a U-Net, as UNetModel lays it out: stem, resampling, and attention.

    `depths` are the transformer depths of each level on the way down; `up_depths` those of each block on the way up in
    the order they run (default: as on the way down, in one block more a level).
    """
    shapes = {f"{prefix}input_blocks.0.0.weight": [channels, inputs, 3, 3]}

    def transformer(path, width, depth):
        if depth:
            shapes[f"{prefix}{path}.proj_in.weight"] = [width, width] + ([] if linear else [1, 1])
        for i in range(depth):
            for which, keys in (("attn1", width), ("attn2", context)):
                name = f"{prefix}{path}.transformer_blocks.{i}.{which}"
                shapes[f"{name}.to_q.weight"] = [width, width]
                shapes[f"{name}.to_k.weight"] = shapes[f"{name}.to_v.weight"] = [width, keys]

    up = iter(up_depths or [depth for depth in reversed(depths) for _ in range(blocks + 1)])
    index = 1
    for level, factor in enumerate(mult):
        width = channels * factor
        for _ in range(blocks):
            transformer(f"input_blocks.{index}.1", width, depths[level])
            index += 1
        if level + 1 < len(mult):
            shapes[f"{prefix}input_blocks.{index}.0.op.weight"] = [width, width, 3, 3]
            index += 1
    transformer("middle_block.1", channels * mult[-1], middle)
    index = 0
    for level, factor in reversed(list(enumerate(mult))):
        width = channels * factor
        for last in [False] * blocks + [True]:
            depth = next(up)
            shapes[f"{prefix}output_blocks.{index}.0.out_layers.3.weight"] = [width, width, 3, 3]
            transformer(f"output_blocks.{index}.1", width, depth)
            if last and level:
                shapes[f"{prefix}output_blocks.{index}.{2 if depth else 1}.conv.weight"] = [width, width, 3, 3]
            index += 1
    return shapes


def vae(prefix=VAE, channels=512, halvings=3):
    shapes = {}
    for half in ("encoder", "decoder"):
        for part in ("q", "k", "v", "proj_out"):
            shapes[f"{prefix}{half}.mid.attn_1.{part}.weight"] = [channels, channels, 1, 1]
    for level in range(halvings):
        shapes[f"{prefix}encoder.down.{level}.downsample.conv.weight"] = [channels, channels, 3, 3]
        shapes[f"{prefix}decoder.up.{level + 1}.upsample.conv.weight"] = [channels, channels, 3, 3]
    return shapes


XL = {"mult": (1, 2, 4), "context": 2048, "linear": True}
SD1 = {}
SD2 = {"context": 1024, "linear": True}
SDXL = {"depths": (0, 2, 10), "middle": 10, **XL}
REFINER = {"channels": 384, "depths": (0, 4, 4, 0), "middle": 4, "context": 1280, "linear": True}
SSD = {"depths": (0, 2, 4), "middle": 0, "up_depths": [4, 4, 10, 2, 1, 1, 0, 0, 0], **XL}


def entries(shapes, dtype="F16"):
    """A header as JSON has it, tensors one after the other, and the bytes of data they need."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return header, place


def write(path: Path, header, data: int = 0, length: int | None = None) -> Path:
    """A .safetensors file with this header (bytes, or anything JSON can say) and so many bytes of (sparse) data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        file.truncate(8 + len(raw) + data)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def kinds(checkpoint: Checkpoint) -> Counter:
    return Counter((layer.part, layer.kind) for layer in checkpoint.layers)


def rows(checkpoint: Checkpoint, width: int, height: int, part: str = "unet") -> Counter:
    """(kind, heads, query tokens, key tokens, head width) -> how many layers."""
    found = Counter()
    for layer in checkpoint.layers:
        if layer.part == part:
            (_, heads, queries, channels), (_, _, keys, _), _ = layer.shapes(width, height)
            found[layer.kind, heads, queries, keys, channels] += 1
    return found


# ------------------------------------------------------------------------------------------------------ real layouts


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


# ---------------------------------------------------------------------------------------------------------- families


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


@pytest.mark.parametrize(
    "name, family, says",
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3", "none of the classes"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux", "none of the classes"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "diffusers layout", "not supported"),
        ("decoder.mid_block.attentions.0.to_q.weight", "VAE, diffusers layout", "not supported"),
        ("down_blocks.1.0.channelwise.0.weight", "Stable Cascade", "none of the classes"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA", "adds none"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "LoRA", "adds none"),
        ("control_model.input_hint_block.0.weight", "ControlNet", "choose the checkpoint"),
        (f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight", "video model", "across frames"),
        ("input_blocks.1.0.temopral_conv.conv1.2.weight", "video model", "across frames"),
    ],
)
def test_models_that_are_recognised_and_not_served(name, family, says):
    context = {f"{VAE}decoder.mid.attn_1.q.weight": [512, 512, 1, 1], "alphas_cumprod": [1000]}
    checkpoint = from_shapes({name: [64, 64]} | context)
    assert checkpoint.family == family and checkpoint.layers == ()
    assert name[:20] in checkpoint.notes[0] and says in checkpoint.notes[0]


ADD_ONS = {
    "LoRA": """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.hada_w1_a
        lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight
        lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w1
        lora_unet_down_blocks_0_attentions_0_proj_in.oft_blocks
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.on_input
        lora_unet_down_blocks_0_attentions_0_proj_in.diff
        lora_unet_down_blocks_0_attentions_0_norm.w_norm
        lora_unet_down_blocks_0_attentions_0_proj_in.a1.weight
        lora_unet_double_blocks_0_img_attn_proj.dora_scale
        lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight
        lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight
        lora_transformer_transformer_blocks_0_attn_to_k.lora_down.weight
        lora_prior_unet_down_blocks_0_0_mapper.lora_down.weight
        lycoris_down_blocks_0_attentions_0_proj_in.lokr_w2_b
        down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight
        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora.down.weight
        unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_linear_layer.down.weight
        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_magnitude_vector.weight
        text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight
        text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora.up.weight
        base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
        base_model.model.mid_block.attentions.0.proj_in.lora_B.default.weight
        base_model.model.mid_block.attentions.0.proj_in.oft_r.default
        base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.ia3_l
        base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight
        transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight
        transformer.transformer_blocks.0.attn.to_q.lora_B
        diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight
        diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight
        diffusion_model.input_blocks.1.1.proj_in.diff_b
        double_blocks.0.processor.proj_lora1.down.weight
        blocks.0.cross_attn.k.lora_down.weight
        unet:0:up
        text_encoder:9:down
    """,
    "motion LoRA": """
        down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight
        unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    """,
    "motion module": """
        down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
        module.down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight
        mid_block.motion_modules.0.temporal_transformer.norm.weight
        down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe
        down_blocks.1.temporal_attentions.0.transformer_blocks.0.attention_blocks.0.to_q.weight
        input_blocks.1.2.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
    """,
    "ControlNet": """
        control_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight
        input_hint_block.0.weight
        control_model.zero_convs.0.0.weight
        controlnet_cond_embedding.conv_in.weight
        controlnet_down_blocks.0.weight
        controlnet_mid_block.weight
        control_add_embedding.linear_1.weight
        controlnet_blocks.0.weight
        lora_controlnet
        lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight
    """,
    "T2I-Adapter": """
        body.0.block1.weight
        adapter.body.0.resnets.0.block1.weight
        body.0.in_conv.weight
        style_embedding
        transformer_layes.0.attn.in_proj_weight
    """,
    "IP-Adapter or InstantID": """
        image_proj.proj.weight
        ip_adapter.1.to_k_ip.weight
        image_proj.perceiver_resampler.proj_in.weight
        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight
        ip_adapter_proj_model.proj.weight
    """,
    "PhotoMaker": "id_encoder.visual_projection_2.weight",
    "PuLID": "id_adapter_attn_layers.1.id_to_k.weight id_adapter.latents pulid_ca.0.norm1.weight",
    "GLIGEN": "position_net.null_positive_feature input_blocks.1.1.transformer_blocks.0.fuser.attn.to_q.weight",
    "textual inversion embedding": "emb_params clip_l clip_g string_to_param.* <my-cat>",
    "upscaler": """
        model.1.sub.0.RDB1.conv1.0.weight
        conv_first.weight
        params_ema.conv_first.weight
        RRDB_trunk.0.RDB1.conv1.weight
        body.0.rdb1.conv1.weight
        body.0.weight
    """,
    "TAESD": """
        3.conv.4.bias
        encoder.layers.4.conv.4.bias
        decoder.layers.8.conv.0.weight
        taesd_decoder.1.weight
        taesdxl_encoder.0.weight
    """,
    "text encoder": """
        text_model.encoder.layers.0.self_attn.k_proj.weight
        text_model.embeddings.token_embedding.weight
        transformer.resblocks.0.attn.in_proj_weight
        clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight
        encoder.block.0.layer.0.SelfAttention.k.weight
    """,
    "image encoder": "vision_model.encoder.layers.0.self_attn.k_proj.weight visual.transformer.resblocks.0.ln_1.weight",
    "VAE, diffusers layout": "encoder.down_blocks.0.resnets.0.conv1.weight decoder.mid_block.attentions.0.to_k.weight",
}  # fmt: skip
ADD_ONS = [(family, name) for family, names in ADD_ONS.items() for name in names.split()]


@pytest.mark.parametrize("family, name", ADD_ONS, ids=[name[:40] for _, name in ADD_ONS])
def test_an_add_on_is_called_what_it_is(family, name):
    """Names as they are in files of AnimateDiff, ComfyUI, diffusers, kohya's scripts, LyCORIS, PEFT, spandrel …"""
    checkpoint = from_shapes({name: [320, 4]})
    assert checkpoint.family == family and checkpoint.layers == ()
    assert repr(name) in checkpoint.notes[0]  # in full
    assert "choose the checkpoint it works with" in checkpoint.notes[0] or family in (
        "upscaler",
        "VAE, diffusers layout",
    )


@pytest.mark.parametrize("family, name", ADD_ONS, ids=[name[:40] for _, name in ADD_ONS])
@pytest.mark.parametrize("prefix", ["", UNET])
def test_a_checkpoint_into_which_something_was_merged_is_read(family, name, prefix):
    shapes = unet(prefix=prefix) | vae()
    assert from_shapes(shapes | {name: [320, 4]}).layers == from_shapes(shapes).layers
    assert from_shapes({name: [320, 4]} | shapes).family == "Stable Diffusion 1.x"


def test_adapters_that_hold_a_lora_are_told_by_their_own_names():
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": [4, 320]}
    faceid = {"ip_adapter.1.to_k_ip.weight": [640, 768], "ip_adapter.0.to_q_lora.down.weight": [128, 320]}
    assert from_shapes(faceid).family == "IP-Adapter or InstantID"
    assert from_shapes(lora | {"id_encoder.visual_projection.weight": [4, 4]}).family == "PhotoMaker"
    assert from_shapes(lora | {"lora_controlnet": [0]}).family == "ControlNet"
    diffusers = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": [320, 320]}
    assert from_shapes(lora | diffusers).family == "diffusers layout"
    assert from_shapes(lora | {"unet.down_blocks.0.attentions.0.proj_in.alpha": []}).family == "LoRA"
    embedding = {"bundle_emb.a-cat.clip_l": [4, 768]}
    assert from_shapes(lora | embedding).family == from_shapes(embedding).family == "LoRA"


@pytest.mark.parametrize(
    "name, options, family",
    [
        ("ControlNetModel", {}, "ControlNet"),
        ("MotionAdapter", {}, "motion module"),
        ("T2IAdapter", {}, "T2I-Adapter"),
        ("T2IAdapter", {"adapter_type": "light_adapter"}, "T2I-Adapter"),
        ("AutoencoderKL", {}, "VAE, diffusers layout"),
        ("AutoencoderTiny", {}, "TAESD"),
        ("UNet2DConditionModel", {}, "diffusers layout"),
    ],
)
def test_models_as_diffusers_saves_them(name, options, family):
    models = pytest.importorskip("diffusers.models")
    import torch

    with torch.device("meta"):
        model = getattr(models, name)(**options)
    assert from_shapes({key: tensor.shape for key, tensor in model.state_dict().items()}).family == family


def test_real_unets_and_vaes_are_no_add_ons():
    for name in ("sd15", "sdxl_base"):
        shapes = real_shapes(name)
        alone = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
        assert from_shapes(alone).family == "VAE"
        for prefix in (UNET, ""):
            moved = {prefix + key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
            assert module._not_served(moved) is None


def test_a_unet_under_a_prefix_that_nobody_knows():
    prefix = "a_trainer_with_a_long_name.checkpoint_of_step_100000.module.model.diffusion_model."
    for more in ({}, vae()):
        checkpoint = from_shapes(unet(prefix=prefix) | more | {"lora_unet_x.lora_up.weight": [4, 4]})
        assert checkpoint.family == "unknown" and checkpoint.layers == ()
        assert repr(prefix) in checkpoint.notes[0] and repr(UNET) in checkpoint.notes[0]


def test_what_is_not_known_is_named_in_full():
    shapes = {f"model.diffusion_model.layers.{i}.attention.qkv.weight": [4, 4] for i in range(3)}
    shapes |= {"a_module_with_quite_a_long_name_" * 4 + ".inner.weight": [4]}
    note = from_shapes(shapes).notes[0]
    assert (
        "'model.diffusion_model.layers' (3)" in note and f"'{'a_module_with_quite_a_long_name_' * 4}.inner' (1)" in note
    )
    assert len(from_shapes({"x" * 10**6: [4]}).notes[0]) < 1000


@pytest.mark.parametrize("dtype", ["F8_E8M1", "FLOAT_TYPE_OF_THE_YEAR_AFTER_NEXT"])
def test_a_type_that_the_installed_safetensors_does_not_know_is_named(file, dtype):
    name = "a.tensor.whose.name.is.long.enough.to.be.cut.elsewhere.weight"
    with pytest.raises(CheckpointError, match=f"'{name}' is of the type '{dtype}', which safetensors .* does not know"):
        read_attention_layers(write(file, {"first": tensor(), name: tensor((8,), 8, 16, dtype)}, 16))


def test_a_file_is_named_in_full(tmp_path):
    path = tmp_path / ("a checkpoint's long name with version and author " * 3 + ".safetensors")
    with pytest.raises(CheckpointError) as error:
        read_attention_layers(path)
    assert path.name in str(error.value)


def test_a_controlnet_is_no_unet():
    shapes = {name: shape for name, shape in unet(prefix="").items() if "output_blocks" not in name}
    assert from_shapes(shapes | {"input_hint_block.0.weight": [16, 3, 3, 3]}).family == "ControlNet"
    assert from_shapes(shapes).family == "unknown"


def test_what_is_not_recognised_is_listed():
    shapes = {f"blocks.{i}.weight": [4] for i in range(3)} | {f"part{i}.weight": [4] for i in range(20)}
    checkpoint = from_shapes(shapes)
    assert checkpoint.family == "unknown" and checkpoint.layers == ()
    assert "'blocks' (3)" in checkpoint.notes[0] and "13 others" in checkpoint.notes[0]
    assert "no tensors" in from_shapes({}).notes[0]


def test_attention_of_another_kind_is_counted():
    shapes = unet() | {f"{UNET}input_blocks.1.2.qkv.weight": [960, 320, 1]}
    checkpoint = from_shapes(shapes)
    assert len(checkpoint.layers) == 32
    assert any(note.startswith("Left out, as attention of a kind not known here: 1,") for note in checkpoint.notes)
    bare = from_shapes({name: shape for name, shape in shapes.items() if "attn" not in name})
    assert bare.family == "unknown U-Net" and bare.layers == ()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"to_k.weight": None}, "to_k.weight is missing"),
        ({"to_k.weight": [640, 768]}, "do not fit together"),
        ({"to_v.weight": [320, 320]}, "do not fit together"),
        ({"to_q.weight": [320]}, "impossible shape"),
        ({"to_q.weight": [0, 320]}, "impossible shape"),
        ({"to_q.weight": [-320, 320]}, "impossible shape"),
        ({"to_q.weight": [2**40, 320]}, "impossible shape"),
        ({"to_q.weight": [324, 320], "to_k.weight": [324, 768], "to_v.weight": [324, 768]}, "do not divide into heads"),
    ],
)
def test_shapes_that_contradict_each_other(change, says):
    shapes = unet()
    for part, shape in change.items():
        name = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.{part}"
        shapes[name] = shape
        if shape is None:
            del shapes[name]
    with pytest.raises(CheckpointError, match=says):
        from_shapes(shapes)


def test_a_unet_that_cannot_be_placed():
    shapes = {name: shape for name, shape in unet().items() if not name.endswith(".op.weight")}
    with pytest.raises(CheckpointError, match="halves its resolution 0 times and doubles it 3 times"):
        from_shapes(shapes)


# ------------------------------------------------------------------------------------------------ sizes and batches


def test_shapes_of_a_layer():
    cross = AttentionLayer("x", "unet", "cross", 8, 40, 16, context_tokens=77, context_width=768, guidance_copies=2)
    assert cross.shapes(512, 768, batch=3) == ((6, 8, 1536, 40), (6, 8, 77, 40), (6, 8, 77, 40))
    assert cross.shapes(512, 768, batch=3, guidance=False)[0] == (3, 8, 1536, 40)
    assert cross.shapes(512, 768, prompt_tokens=231)[1] == (2, 8, 231, 40)


def test_odd_sizes():
    layer = AttentionLayer("x", "unet", "self", 8, 160, 64)
    assert layer.tokens(520, 512) == 9 * 8  # 65 latent pixels -> 33 -> 17 -> 9
    assert layer.tokens(8, 8) == 1
    assert layer.tokens(519, 512) == 8 * 8  # the web UI drops what does not fill a latent pixel


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"width": 0}, "image side"),
        ({"height": -512}, "image side"),
        ({"width": 7}, "image side"),
        ({"width": 512.0}, "image side"),
        ({"width": "512"}, "image side"),
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prompt_tokens": 78}, "multiple of 77"),
    ],
)
def test_sizes_out_of_range(arguments, says):
    layer = AttentionLayer("x", "unet", "self", 8, 40, 8)
    with pytest.raises(ValueError, match=says):
        layer.shapes(**({"width": 512, "height": 512} | arguments))


# ---------------------------------------------------------------------------- against the U-Net and VAE that really run


def test_tokens_and_heads_are_those_of_a_real_unet(monkeypatch):
    """A small U-Net runs on 13 × 9 latent pixels, odd at every level, and every layer's own numbers are compared."""
    pytest.importorskip("ldm")
    import torch
    from ldm.modules import attention
    from ldm.modules.diffusionmodules import openaimodel

    class Torch:  # as the web UI does it: fit the way up to the skip connection
        def __getattr__(self, name):
            return getattr(torch, name)

        def cat(self, tensors, dim):
            first, second = tensors
            first = torch.nn.functional.interpolate(first, second.shape[-2:])
            return torch.cat((first, second), dim)

    monkeypatch.setattr(openaimodel, "th", Torch())
    model = openaimodel.UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1, 2, 4],
        num_res_blocks=1, channel_mult=[1, 2, 2], num_heads=4, use_spatial_transformer=True, transformer_depth=2,
        context_dim=[24, 24], legacy=False, use_checkpoint=False,
    ).eval()  # fmt: skip
    ran = []
    for name, layer in model.named_modules():
        if isinstance(layer, attention.CrossAttention):
            layer.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: ran.append((name, layer.heads, args[0].shape)), with_kwargs=True
            )
    with torch.no_grad():
        model(torch.zeros(2, 4, 9, 13), torch.zeros(2), context=[torch.zeros(2, 77, 24)] * 2)
    checkpoint = from_shapes({name: tensor.shape for name, tensor in model.state_dict().items()}, heads=4)
    told = []
    for layer in checkpoint.layers:
        batch, heads, tokens, width = layer.shapes(13 * 8, 9 * 8)[0]
        told.append((layer.name, heads, (batch, tokens, heads * width)))
    assert told == ran and len(ran) == 40


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_tokens_are_those_of_a_real_vae(half):
    pytest.importorskip("ldm")
    import torch
    from ldm.modules.diffusionmodules import model as ldm

    config = {
        "ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3,
        "resolution": 64, "z_channels": 4, "double_z": True, "attn_type": "vanilla",
    }  # fmt: skip
    network = (ldm.Encoder if half == "encoder" else ldm.Decoder)(**config).eval()
    ran = {}
    for name, layer in network.named_modules():
        if isinstance(layer, ldm.AttnBlock):
            layer.register_forward_pre_hook(lambda _, args, name=name: ran.update({f"{half}.{name}": args[0].shape}))
    with torch.no_grad():
        network(torch.zeros(1, 3, 72, 104) if half == "encoder" else torch.zeros(1, 4, 9, 13))
    shapes = {f"{half}.{name}": tensor.shape for name, tensor in network.state_dict().items()}
    told = {layer.name: layer for layer in from_shapes(shapes).layers}
    assert told.keys() == ran.keys() and len(ran) > 1
    for name, (_, channels, height, width) in ran.items():
        assert told[name].shapes(104, 72)[0] == (1, 1, height * width, channels)


@pytest.mark.parametrize(
    "made, config",
    [
        (SD1, {"num_heads": 8, "context_dim": 768}),
        (SD1 | {"inputs": 9}, {"num_heads": 8, "context_dim": 768, "in_channels": 9}),
        (SD2, {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}),
        (
            REFINER,
            {
                "model_channels": 384, "attention_resolutions": [4, 2], "transformer_depth": 4, "num_head_channels": 64,
                "context_dim": [1280] * 4, "use_linear_in_transformer": True, "num_classes": 10,
            },
        ),
    ],
    ids=["SD1", "SD1 inpainting", "SD2", "refiner"],
)  # fmt: skip
def test_full_size_unets_of_the_real_class(made, config):
    """The published configurations, built without memory for their weights, against the checkpoints made here."""
    pytest.importorskip("ldm")
    import torch
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    base = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
        "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True,
        "legacy": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = UNetModel(**(base | config))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert unet(prefix="", **made).items() <= shapes.items()
    real = {name: layer.heads for name, layer in model.named_modules() if isinstance(layer, CrossAttention)}
    assert {layer.name: layer.heads for layer in from_shapes(shapes).layers} == real


# -------------------------------------------------------------------------------------------------- the heads' source


def config(**params) -> str:
    return json.dumps({"model": {"params": {"unet_config": {"params": params}}}})  # JSON is YAML


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
    file.with_suffix(".yaml").write_text(text)
    checkpoint = read_attention_layers(file)
    assert {(layer.heads, layer.head_width) for layer in checkpoint.layers} == {expected}
    assert any(says in note for note in checkpoint.notes)


def test_a_yaml_is_never_constructed(file, tmp_path):
    pytest.importorskip("yaml")
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,))))
    trap = tmp_path / "trap"
    bomb = "\n".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40))
    text = f"a: !!python/object/apply:os.mkdir ['{trap}']\nm0: &m0 {{x: 1}}\n{bomb}\n" + config(num_heads=2)[1:-1]
    file.with_suffix(".yaml").write_text(text)
    assert {layer.heads for layer in read_attention_layers(file).layers} == {2}
    assert not trap.exists()


def test_without_pyyaml_a_note_says_so(file, monkeypatch):
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,))))
    file.with_suffix(".yaml").write_text(config(num_heads=2))
    monkeypatch.setitem(sys.modules, "yaml", None)
    checkpoint = read_attention_layers(file)
    assert {layer.heads for layer in checkpoint.layers} == {8}
    assert any("PyYAML is not installed" in note for note in checkpoint.notes)


def test_the_caller_knows_better(file):
    write(file, *entries(unet(channels=64, mult=(1,), depths=(1,)) | vae()))
    file.with_suffix(".yaml").write_text(config(num_heads=2))
    checkpoint = read_attention_layers(file, heads=16)
    assert {layer.heads for layer in checkpoint.layers} == {16, 1}  # the VAE keeps its one head
    assert "Heads: 16 in each layer, as asked for." in checkpoint.notes
    for wrong in (0, -1, 2.0, "8", True):
        with pytest.raises(ValueError, match="heads is"):
            read_attention_layers(file, heads=wrong)


# -------------------------------------------------------------------------------------------------- files that lie


def tensor(shape=(2, 2), begin=0, end=8, dtype="F16"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, data, says",
    [
        (b"\xff\xfe\x00", 0, "not UTF-8"),
        (b"{not json", 0, "not JSON"),
        (b"", 0, "not JSON"),
        (b"[]", 0, "not a table"),
        (b"null", 0, "not a table"),
        (b'"text"', 0, "not a table"),
        (b"[" * 100_000, 0, "nested too deeply"),
        (b'{"a":' * 100_000, 0, "nested too deeply"),
        (b'{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,0]}}', 0, "impossible shape"),
        (b'{"a":{"dtype":"F16","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}', 0, "1000000 digits"),
        (b'{"a":1,"a":2}', 0, "'a' more than once"),
        (b'{"a":{"dtype":"F16","dtype":"F32"}}', 0, "'dtype' more than once"),
        ({"a": 1}, 0, "no dtype, shape and data_offsets"),
        ({"a": {"dtype": "F16", "shape": [1]}}, 0, "no dtype, shape and data_offsets"),
        ({"a": tensor(shape=(-2, -2))}, 8, "impossible shape"),
        ({"a": tensor(shape=(2.0, 2))}, 8, "impossible shape"),
        ({"a": tensor(shape=(True, 4))}, 8, "impossible shape"),
        ({"a": tensor(shape=("2", 2))}, 8, "impossible shape"),
        ({"a": tensor() | {"shape": 4}}, 8, "impossible shape"),
        ({"a": tensor(shape=(1,) * 17, end=2)}, 2, "impossible shape"),
        ({"a": tensor(shape=(2**62, 2**62))}, 8, "but 8 bytes"),
        ({"a": tensor(shape=(3, 2))}, 8, "but 8 bytes"),
        ({"a": tensor() | {"data_offsets": [0]}}, 8, "impossible place"),
        ({"a": tensor(begin=-8, end=0)}, 8, "impossible place"),
        ({"a": tensor(begin=8, end=0)}, 8, "impossible place"),
        ({"a": tensor() | {"data_offsets": {"0": 8}}}, 8, "impossible place"),
        ({"a": tensor(shape=(2**40,), end=2**41)}, 8, "ends at byte"),
        ({"a": tensor(), "b": tensor(begin=4, end=12)}, 12, "overlaps"),
        ({"a": tensor(), "b": tensor()}, 8, "overlaps"),
        ({"a": tensor(), "b": tensor(begin=10, end=18)}, 18, "gap of 2 bytes"),
        ({"a": tensor(begin=2, end=10)}, 10, "gap of 2 bytes"),
        ({"a": tensor()}, 9, "1 bytes at its end"),
        ({"a": tensor(dtype="F17")}, 8, "safetensors package refuses"),
        ({"a": tensor(dtype=["F16"])}, 8, "safetensors package refuses"),
        ({"a": tensor(), "__metadata__": {"x": 1}}, 8, "safetensors package refuses"),
        ({"a": tensor(), "__metadata__": "x"}, 8, "safetensors package refuses"),
        ({"\ud800": tensor()}, 8, "safetensors package refuses"),
    ],
)  # fmt: skip
def test_headers_that_lie(file, header, data, says):
    with pytest.raises(CheckpointError, match=says) as error:
        read_attention_layers(write(file, header, data))
    assert str(error.value).startswith("'model.safetensors': ")
    assert len(str(error.value)) < 300
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "it is empty"),
        (b"\x02\0\0", "only 3 bytes"),
        (b"\x02\0\0\0\0\0\0\0", "claims a header of 2 bytes and has 8 in all"),
        (b"\x03\0\0\0\0\0\0\0{}", "claims a header of 3 bytes"),
        (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
        (b"PK\x03\x04\0\0\0\x08" + b"archive/data.pkl" * 9, "a PyTorch pickle"),
        (b"\x80\x02}q\0(X\x0a\0\0\0state_dictq\x01", "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0", "GGUF"),
    ],
)
def test_other_files(file, content, says):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_attention_layers(file)


def test_a_pickle_is_not_executed(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"model{protocol}.ckpt"
        path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
        with pytest.raises(CheckpointError):
            read_attention_layers(path)
    assert not (tmp_path / "trap").exists()


def test_no_file_to_read(tmp_path):
    for path, says in [
        (tmp_path, "it is a folder"),
        (tmp_path / "missing.safetensors", "there is no such file"),
        (tmp_path / "a\0b.safetensors", "cannot be opened"),
        (tmp_path / ("x" * 5000), "cannot be opened"),
    ]:
        with pytest.raises(CheckpointError, match=says) as error:
            read_attention_layers(path)
        assert str(tmp_path) not in str(error.value)  # a shared web UI shows this message to strangers


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_not_waited_for(file):
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="it is not a file"):
        read_attention_layers(file)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="needs sparse files")
@pytest.mark.parametrize("length", [10**10, module.HEADER_LIMIT + 1])
def test_a_header_of_10_gigabytes_is_not_allocated(file, length):
    write(file, b"{}", data=11 * 10**9, length=length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes; more than"):
            read_attention_layers(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_longest_header_is_read(file):
    header, data = entries(unet(channels=32))
    raw = json.dumps(header).encode()
    raw += b" " * (module.HEADER_LIMIT - len(raw))  # the format pads with spaces
    assert len(read_attention_layers(write(file, raw, data)).layers) == 32


def test_a_header_of_very_many_tensors_takes_no_quadratic_time(file):
    empty = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}  # get_slice needs 68 s for 20,000 of them
    checkpoint = read_attention_layers(write(file, {str(i): empty for i in range(100_000)}))
    assert checkpoint.family == "unknown" and "99992 others" in checkpoint.notes[0]


def test_without_safetensors_the_error_names_it(file, monkeypatch):
    write(file, *entries({"a": [2]}))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="needs the Python package safetensors"):
        read_attention_layers(file)


# ------------------------------------------------------------------------------------------------------------- fuzz

fuzzed = Counter()
fuzz = settings(
    max_examples=FUZZ_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip

VALID_HEADER, VALID_DATA = entries(
    unet(channels=16, mult=(1, 2), depths=(1, 1), context=24, blocks=1) | vae(channels=8, halvings=1)
)
VALID = struct.pack("<Q", len(json.dumps(VALID_HEADER))) + json.dumps(VALID_HEADER).encode() + bytes(VALID_DATA)

numbers = st.one_of(st.integers(), st.integers(0, 64), st.sampled_from([2**31, 2**32, 2**63 - 1, 2**64, 10**19]))
names = st.one_of(st.sampled_from(sorted(VALID_HEADER)), st.sampled_from(["__metadata__", "", "\ud800"]), st.text())
garbage = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(names, inner, max_size=5)),
    max_leaves=20,
)
tensors = st.fixed_dictionaries({
    "dtype": st.one_of(st.sampled_from(sorted(BYTES)), garbage),
    "shape": st.one_of(st.lists(numbers, max_size=5), garbage),
    "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), garbage),
})  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


def answers(kind: str, call, *arguments) -> None:
    """The only two outcomes allowed: a Checkpoint whose layers can say their shapes, or a CheckpointError."""
    fuzzed[kind] += 1
    try:
        checkpoint = call(*arguments)
    except CheckpointError as error:
        fuzzed["refused"] += 1
        assert str(error)
        return
    assert isinstance(checkpoint, Checkpoint) and isinstance(checkpoint.family, str)
    for note in checkpoint.notes:
        note.encode()
    for layer in checkpoint.layers:
        assert all(all(n >= 1 for n in shape) for shape in layer.shapes(520, 776, batch=2))


@fuzz
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda raw: prefixed(raw))))
def test_fuzz_random_bytes(scratch, content):
    scratch.write_bytes(content)
    answers("random bytes", read_attention_layers, scratch)


def prefixed(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


@fuzz
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 8))
def test_fuzz_mutated_bytes(scratch, seed, edits):
    rng, content = random.Random(seed), bytearray(VALID)
    header_end = 8 + struct.unpack("<Q", VALID[:8])[0]
    for _ in range(edits):
        place = rng.randrange(min(len(content), header_end))
        what = rng.choice(["flip", "digit", "cut", "insert", "copy", "length", "end"])
        if what == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif what == "digit":  # keeps the JSON whole and changes what it says
            digits = [i for i in range(8, min(len(content), header_end)) if 48 <= content[i] <= 57]
            content[rng.choice(digits or [place])] = rng.randrange(48, 58)
        elif what == "cut":
            del content[place : place + rng.randrange(1, 40)]
        elif what == "insert":
            content[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif what == "copy":
            start = rng.randrange(len(content))
            content[place:place] = content[start : start + rng.randrange(1, 200)]
        elif what == "length":
            content[:8] = struct.pack("<Q", rng.choice([0, 1, len(content) - 8, len(content), rng.getrandbits(64)]))
        else:
            del content[rng.randrange(len(content)) :]
        if len(content) < 16:
            break
    scratch.write_bytes(content)
    answers("mutated bytes", read_attention_layers, scratch)


@fuzz
@given(
    header=st.one_of(garbage, st.dictionaries(names, st.one_of(tensors, garbage), max_size=6)),
    data=st.integers(0, 64),
    kept=st.integers(0, len(VALID_HEADER)),
)
def test_fuzz_structured_json(scratch, header, data, kept):
    if isinstance(header, dict):
        header = dict(list(VALID_HEADER.items())[:kept]) | header
    answers("structured JSON", read_attention_layers, write(scratch, header, data))


@fuzz
@given(changes=st.dictionaries(names, st.one_of(st.none(), st.lists(numbers, max_size=5)), max_size=6))
def test_fuzz_shapes(scratch, changes):
    """Well-formed sets of shapes that make no sense; those that a file can have also go through one."""
    shapes = {name: entry["shape"] for name, entry in VALID_HEADER.items()} | changes
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    answers("shapes", from_shapes, shapes)
    if all(0 <= n <= 64 for shape in shapes.values() for n in shape):
        answers("shapes in a file", read_attention_layers, write(scratch, *entries(shapes)))


@fuzz
@given(
    content=st.one_of(
        st.binary(max_size=100),
        st.text(alphabet="model:params_hd{}[]&*!<>|-? \n\"'\\U0123456789%,#", max_size=100).map(str.encode),
        st.builds(lambda heads: config(num_heads=heads).encode(), garbage),
    )
)
def test_fuzz_yaml(scratch, content):
    pytest.importorskip("yaml")
    scratch.write_bytes(VALID)
    beside = scratch.with_suffix(".yaml")
    beside.write_bytes(content)
    try:
        answers("yaml", read_attention_layers, scratch)
    finally:
        beside.unlink()


def test_how_much_was_fuzzed(capsys, record_property):
    refused = fuzzed["refused"]
    inputs = Counter({kind: count for kind, count in fuzzed.items() if kind != "refused"})
    record_property("fuzzed_inputs", inputs.total())
    with capsys.disabled():
        listed = ", ".join(f"{count} {kind}" for kind, count in inputs.items())
        print(f"\nheader reader: {inputs.total()} inputs tried, {refused} refused ({listed})")
