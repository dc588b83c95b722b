"""Files that are no checkpoint that is served are called what they are."""

from __future__ import annotations

import pytest

from lib_subquad.checkpoint import CheckpointError, from_shapes, read_attention_layers
from lib_subquad.checkpoint.families import others
from lib_subquad.checkpoint.tensors import Tensors
from tests.checkpoint.making import UNET, VAE, tensor, unet, vae, write
from tests.checkpoint.public_models import tensors

pytest.importorskip("safetensors")


@pytest.mark.parametrize(
    "name, family, says",
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3", "a part of it only"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux", "a part of it only"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "diffusers layout", "not supported"),
        ("decoder.mid_block.attentions.0.to_q.weight", "VAE, diffusers layout", "not supported"),
        ("down_blocks.1.0.channelwise.0.weight", "Stable Cascade", "not known here"),
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
        shapes = tensors(name)
        alone = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
        assert from_shapes(alone).family == "VAE"
        for prefix in (UNET, ""):
            moved = {prefix + key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
            assert others.read(Tensors(moved)) is None


def test_names_that_are_too_long_to_be_real_are_not_looked_at():
    """A header may hold sixteen of a million characters; each would be searched fifty times."""
    name = "x" * 1001 + ".double_blocks.0.img_attn.qkv.weight"
    assert from_shapes({name: [4, 4]}).family == "unknown"
    assert from_shapes({name[2 * len(name) // 3 :]: [4, 4]}).family == "Flux"


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
