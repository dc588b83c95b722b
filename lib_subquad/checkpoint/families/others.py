"""Files that hold no model that this extension could serve, by names that only their kind uses."""

from __future__ import annotations

import re

from ..layers import Checkpoint
from ..tensors import Tensors, named

# Files without a model that this extension could serve, by a name that only they use. The first that fits is taken, so
# a face adapter's or motion module's own names come before the general ones that it holds as well. Names as they are
# in files of AnimateDiff, ComfyUI, diffusers, kohya's scripts, LyCORIS, PEFT, sd-webui-controlnet and spandrel.
_WITH = "choose the checkpoint it works with"
_STEERS = f"it steers what a checkpoint draws; {_WITH}"
_FACE = f"it shows a checkpoint a face to draw; {_WITH}"
_UNREAD = "its layers are not known here; where the web UI runs it through subquad, no plan is shown for it"
_VIDEO_MODEL = "it attends across frames as well, which this extension does not know"
VIDEO = r"\.(?:time_stack|temopral_conv)\."  # the latter as ModelScope spells it
OTHERS = (
    ("ControlNet",
     r"^(?:control_model|control_layers|control_all_x_embedder)\.|^lllite_|^lora_controlnet$|(?:^|\.)(?:input_hint_block|"
     r"zero_convs|control_add_embedding|controlnet_(?:cond_embedding|x_embedder|(?:down_|single_)?blocks|mid_block))\.",
     _STEERS),
    ("PhotoMaker", r"^id_encoder\.", _FACE),
    ("PuLID", r"^(?:pulid_(?:ca|encoder)|id_adapter(?:_attn_layers)?)\.", _FACE),
    ("IP-Adapter or InstantID",
     r"^(?:image_proj|ip_adapter|ip_adapter_proj_model)\.|\.(?:to_[kv]_ip|ip_adapter_double_stream_[kv]_proj)\.",
     f"it shows a checkpoint a picture beside the prompt; {_WITH}"),
    ("T2I-Adapter",
     r"^(?:adapter\.)?body\.[0-9]{1,3}\.(?:block[12]|resnets|in_conv)\.|^style_embedding$|^transformer_layes\.",
     _STEERS),
    ("GLIGEN", r"^position_net\.|\.fuser\.", f"it tells a checkpoint where to draw what; {_WITH}"),
    ("motion module", r"(?:^|\.)(?:motion_modules|temporal_transformer|temporal_attentions)\.",
     f"it makes a checkpoint's images move; {_WITH}"),
    ("textual inversion embedding", r"^(?:emb_params|clip_[lg]|string_to_param(?:\..{1,9})?|<[^<>]{1,99}>)$",
     f"it adds a word to the prompt; {_WITH}"),
    ("upscaler",
     r"^(?:(?:module|model|model_g|generator|params|params_ema)\.)?(?:conv_first|RRDB_trunk)\.|"
     r"^model\.[0-9]{1,3}\.sub\.[0-9]{1,3}\.|^(?:params\.|params_ema\.)?body\.[0-9]{1,3}\.(?:rdb[123]\.|weight$)",
     "it enlarges images that are finished; choose a checkpoint"),
    ("TAESD",
     r"^tae(?:sd|f)[a-z0-9]{0,3}_(?:en|de)coder\.|^(?:(?:en|de)coder\.(?:layers\.)?)?[0-9]{1,2}\.conv\.[024]\.",
     f"it is a small VAE for previews, without attention; {_WITH}"),
    ("HunyuanVideo", r"(?:^|\.)txt_in\.individual_token_refiner\.", _VIDEO_MODEL),
    ("Flux 2", r"(?:^|\.)double_stream_modulation_img\.", _UNREAD),
    ("HiDream", r"(?:^|\.)double_stream_blocks\.", _UNREAD),
    ("Hunyuan3D", r"(?:^|\.)latent_in\.weight$", _UNREAD),
    ("Chroma Radiance", r"(?:^|\.)nerf_image_embedder\.", _UNREAD),
    ("AuraFlow", r"(?:^|\.)double_layers\.[0-9]{1,3}\.attn\.w1q\.", _UNREAD),
    ("Lumina 2 or Z-Image", r"(?:^|\.)cap_embedder\.1\.", _UNREAD),
    ("HunyuanDiT", r"(?:^|\.)mlp_t5\.0\.", _UNREAD),
    ("PixArt", r"(?:^|\.)t_block\.1\.weight$", _UNREAD),
    ("Sana", r"(?:^|\.)blocks\.0\.cross_attn\.kv_linear\.", _UNREAD),
    ("Cosmos", r"(?:^|\.)blocks\.(?:block0\.blocks\.0\.block\.attn\.|0\.mlp\.layer1\.)", _UNREAD),
    ("Wan", r"(?:^|\.)head\.modulation$", _VIDEO_MODEL),
    ("LTX-Video", r"(?:^|\.)patchify_proj\.", _VIDEO_MODEL),
    ("Mochi", r"(?:^|\.)t5_yproj\.", _VIDEO_MODEL),
    ("Qwen-Image", r"(?:^|\.)transformer_blocks\.0\.img_mlp\.", _UNREAD),
    ("Krea 2", r"(?:^|\.)txtfusion\.projector\.", _UNREAD),
    ("Stable Audio", r"(?:^|\.)rotary_pos_emb\.inv_freq$", _UNREAD),
    ("Stable Cascade", r"(?:^|\.)clip_(?:txt_)?mapper\.|\.channelwise\.", _UNREAD),
    ("video model", VIDEO, _VIDEO_MODEL),
    ("Stable Diffusion 3 or Flux, diffusers layout",
     r"(?:^|\.)(?:single_transformer_blocks\.|transformer_blocks\.[0-9]{1,3}\.attn\.add_q_proj\.)",
     "not supported; the web UIs load files in the original layout, with names such as joint_blocks or double_blocks"),
    ("VAE, diffusers layout", r"^(?:vae\.)?(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block)\.",
     "not supported; the web UI loads VAEs in the original layout, with names such as decoder.mid.attn_1"),
    ("diffusers layout", r"(?:^|\.)(?:down_blocks|up_blocks|mid_block)\.", "not supported; the web UI loads files in "
     "the original layout, with names such as model.diffusion_model.input_blocks"),
    ("text encoder",
     r"^(?:model\.|clip_[lgh]\.|text_encoder(?:_[23])?\.)?(?:text_model\.|transformer\.(?:text_model|resblocks)\.|"
     r"encoder\.block\.[0-9]{1,3}\.layer\.)",
     f"it reads the prompt; {_WITH}"),
    ("image encoder", r"^(?:vision_model|visual)\.", f"it looks at pictures for an adapter; {_WITH}"),
)  # fmt: skip

# What a LoRA and its kin (LyCORIS, DoRA, OFT, (IA)3) call their tensors, whoever saved them. Some checkpoints keep a
# few of a LoRA that was merged into them: so the other names are looked at first.
LORA_NAME = re.compile(
    r"^(?:lora|lycoris)_(?!controlnet$)|^bundle_emb\.|^(?:unet|text_encoder):[0-9]{1,4}:(?:up|down)$|"
    r"\.lora[._](?:up|down|mid|linear_layer|magnitude_vector|embedding_[AB]|[AB])(?:\.|$)|_lora[0-9]?\.(?:up|down)\.|"
    r"\.(?:hada_[wt][12]|lokr_[wt][12]|oft_(?:blocks|diag|[rR])|boft_[RS]|vera_lambda_[bd]|ia3_l|on_input|dora_scale|"
    r"[wb]_norm|diff|diff_b|set_weight)(?:_[ab])?(?:\.|$)"
)
LORA = (
    ("motion LoRA", r"(?:^|\.)(?:motion_modules|temporal_transformer|temporal_attentions)\.",
     f"it changes a motion module's layers and adds none; {_WITH}"),
    ("LoRA", r"", f"it changes a checkpoint's layers and adds none; {_WITH}"),
)  # fmt: skip

# Looked at last: a LoRA for Flux may bring norms of its own.
PARTS = (
    ("Stable Diffusion 3", r"(?:^|\.)joint_blocks\.", "the file holds a part of it only"),
    ("Flux", r"(?:^|\.)double_blocks\.", "the file holds a part of it only"),
)


LONGEST = 1000  # characters of a name; the longest of a real tensor has about 130


def read(tensors: Tensors) -> Checkpoint | None:
    """What kind of file it is and why it is not served; None where it is none of those known here."""
    names = [name for name in tensors if len(name) <= LONGEST]  # patterns are looked for in the whole of each
    lora = [name for name in names if LORA_NAME.search(name)]
    added = set(lora)
    others = [name for name in names if name not in added and not name.endswith(".alpha")]  # a LoRA's strength
    for names, kinds in ((others, OTHERS), (lora, LORA), (others, PARTS)):
        for family, pattern, why in kinds:
            name = next(filter(re.compile(pattern).search, names), None)
            if name is not None:
                return Checkpoint(family, notes=(f"{family} (names such as {named(name)}): {why}.",))
    return None
