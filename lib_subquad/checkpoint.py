"""The attention layers of a checkpoint, from the header of its `.safetensors` file alone.

A `.safetensors` file starts with eight bytes (a little-endian length N) and N bytes of JSON that map every tensor's
name to its type, shape and place. Names follow the modules that hold the tensors, so the header of a Stable Diffusion
checkpoint shows where every attention layer sits and how wide it is:

    model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight   [640, 640]    self-attention
    model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight   [640, 2048]   looks at the prompt
    model.diffusion_model.input_blocks.3.0.op.weight                                half the resolution from here on
    model.diffusion_model.output_blocks.2.2.conv.weight                             twice the resolution from here on
    first_stage_model.decoder.mid.attn_1.q.weight           [512, 512, 1, 1]        the VAE's one-headed attention

Only the number of heads leaves no trace in the tensors. It comes from the caller, from a `.yaml` of the same name
beside the file, or from the family's convention, and `Checkpoint.notes` says from which.

Nothing in the file is executed and no tensor is loaded. Read `read_attention_layers`, then `from_shapes`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from .settings import shown

Shape = tuple[int, int, int, int]

PROMPT_TOKENS = 77  # CLIP reads a prompt in pieces of 75 tokens between a start and an end token
HEADER_LIMIT = 16 * 2**20  # bytes; SDXL's header has 0.3 MiB, metadata such as a preview picture may add a few
YAML_LIMIT = 64 * 2**10  # bytes; the longest that comes with the web UI has 6 KiB
LONGEST_NAME = 200  # characters; the longest of a real tensor has about 130


class CheckpointError(ValueError):
    """A file or a set of shapes that cannot be a checkpoint; the message is a sentence for the user."""


# ------------------------------------------------------------------------------------------------- what is answered


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a checkpoint.

    Attributes:
        name: the module's name, such as "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1".
        part: "unet", "vae_encoder" or "vae_decoder".
        kind: "self" (the image looks at itself) or "cross" (the image looks at the prompt).
        heads: number of heads.
        head_width: channels of one head; heads × head_width is the layer's width.
        downsampling: pixels along one side of the image for one token: 8, 16, 32 or 64 in a U-Net.
        context_tokens: tokens of one piece of the prompt (77); None for self-attention.
        context_width: channels of a prompt token; None for self-attention.
        guidance_copies: how many times one image passes through this layer at once when a negative prompt is in use
            (classifier-free guidance): 2 in a U-Net, 3 in instruct-pix2pix, 1 in a VAE.
        latent_factor: pixels along one side of the image for one latent pixel (8 in every Stable Diffusion).
    """

    name: str
    part: str
    kind: str
    heads: int
    head_width: int
    downsampling: int
    context_tokens: int | None = None
    context_width: int | None = None
    guidance_copies: int = 1
    latent_factor: int = 8

    def tokens(self, width: int, height: int) -> int:
        """Positions that this layer attends from, for an image of `width` × `height` pixels.

        Raises:
            ValueError: a side that is not a whole number, or is shorter than one latent pixel.
        """
        for side in (width, height):
            _check_whole("an image side", side, self.latent_factor)
        return self._side(width) * self._side(height)

    def _side(self, pixels: int) -> int:
        if self.part == "vae_encoder":
            return max(pixels // self.downsampling, 1)  # its convolutions pad one side only and drop an odd last pixel
        latent = pixels // self.latent_factor
        if self.part == "vae_decoder":
            return latent * self.latent_factor // self.downsampling
        # A stride-2 convolution with padding 1 keeps an odd last pixel. On the way up the web UI fits each block to
        # the skip connection of the same level, so both halves of the U-Net have the same sizes.
        return -(-latent * self.latent_factor // self.downsampling)

    def shapes(
        self, width: int, height: int, batch: int = 1, guidance: bool = True, prompt_tokens: int = PROMPT_TOKENS
    ) -> tuple[Shape, Shape, Shape]:
        """The shapes of query, key and value, each (batch, heads, tokens, head width).

        Args:
            width, height: of the image, in pixels.
            batch: images generated at once. The web UI passes them through the VAE one by one.
            guidance: whether a negative prompt is in use, so that each image passes through the U-Net more than once.
            prompt_tokens: length of the prompt: 77, or a multiple of it for prompts of more than 75 tokens.

        Raises:
            ValueError: a size, batch or prompt length out of range; the message names it.
        """
        _check_whole("batch", batch, 1)
        _check_whole("prompt_tokens", prompt_tokens, 1)
        if prompt_tokens % PROMPT_TOKENS:
            raise ValueError(f"prompt_tokens is {prompt_tokens}; expected a multiple of {PROMPT_TOKENS}")
        if self.part != "unet":
            batch = 1
        elif guidance:
            batch *= self.guidance_copies
        queries = self.tokens(width, height)
        keys = queries if self.context_tokens is None else prompt_tokens
        query = (batch, self.heads, queries, self.head_width)
        key = (batch, self.heads, keys, self.head_width)
        return query, key, key


@dataclass(frozen=True)
class Checkpoint:
    """What a header told.

    Attributes:
        family: such as "Stable Diffusion 1.x", "SDXL base, inpainting", "VAE" or "unknown".
        layers: the attention layers that this extension serves, the U-Net's in the order they run, then the VAE's.
            Empty for a model that is recognised but not served, and for one that is not recognised.
        notes: sentences for the user: where the number of heads comes from, what is missing, what was not recognised.
    """

    family: str
    layers: tuple[AttentionLayer, ...]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ the ways in


def read_attention_layers(path: str | os.PathLike[str], heads: int | None = None) -> Checkpoint:
    """The attention layers of the checkpoint at `path`, a `.safetensors` file.

    Args:
        path: the file. A `.yaml` of the same name beside it is asked for the number of heads, as the web UI does.
        heads: number of heads of every U-Net layer, if the caller knows better than the `.yaml` and the convention.

    Raises:
        CheckpointError: the file is missing, is no intact `.safetensors` file, or holds shapes that contradict each
            other. A file that is intact but not recognised is no error: see `Checkpoint.family` and `notes`.
        ValueError: `heads` is not a whole number of at least 1.
    """
    path = Path(path)
    rule, notes = _asked_for(heads), ()
    try:
        shapes = _read_shapes(path)
        if rule is None:
            rule, notes = _heads_from_yaml(path.with_suffix(".yaml"))
        checkpoint = _describe(shapes, rule)
    except CheckpointError as error:
        raise CheckpointError(f"{_named(path.name)}: {error}") from error
    return replace(checkpoint, notes=checkpoint.notes + notes)


def from_shapes(shapes: Mapping[str, Sequence[int]], heads: int | None = None) -> Checkpoint:
    """The attention layers of a model whose tensors have these names and shapes.

    Args:
        shapes: name -> shape, such as `{name: tensor.shape for name, tensor in model.state_dict().items()}`.
        heads: number of heads of every U-Net layer; None to follow the family's convention.

    Raises:
        CheckpointError: shapes that contradict each other, or channels that do not divide into the heads.
        ValueError: `heads` is not a whole number of at least 1.
    """
    return _describe(shapes, _asked_for(heads))


def _check_whole(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number of at least {minimum}")


# ------------------------------------------------------------------------------------------- recognising a family


@dataclass(frozen=True)
class _Heads:
    """How a layer's channels divide into heads: into `count` heads, or into heads of `width` channels."""

    count: int | None = None
    width: int | None = None
    source: str = ""

    def __str__(self) -> str:
        return f"{f'{self.width} channels wide' if self.width else f'{self.count} in each layer'}, {self.source}"

    def divide(self, channels: int, name: str) -> tuple[int, int]:
        """(heads, head width) of a layer with so many channels."""
        unit = self.width or self.count
        if channels % unit:
            raise CheckpointError(f"the {channels} channels of {name} do not divide into heads: {self}")
        return (channels // unit, unit) if self.width else (unit, channels // unit)


def _asked_for(heads: int | None) -> _Heads | None:
    if heads is None:
        return None
    _check_whole("heads", heads, 1)
    return _Heads(count=heads, source="as asked for")


_EIGHT_HEADS = _Heads(count=8)
_WIDE_64 = _Heads(width=64)
_XL_VAE = "SDXL's own VAE overflows in half precision; where it does, the web UI runs it in float32."


@dataclass(frozen=True)
class _Family:
    """What tells a family: channels of a prompt token and of the first block, and the number of attention layers."""

    name: str
    context_width: int
    channels: int
    layers: int
    heads: _Heads
    reads: str  # the text encoder that makes the prompt tokens
    remark: str = ""


_FAMILIES = (
    _Family("Stable Diffusion 1.x", 768, 320, 32, _EIGHT_HEADS, reads="CLIP ViT-L"),
    _Family("Stable Diffusion 2.x", 1024, 320, 32, _WIDE_64, reads="OpenCLIP ViT-H"),
    _Family("SDXL base", 2048, 320, 140, _WIDE_64, reads="CLIP ViT-L and OpenCLIP ViT-bigG", remark=_XL_VAE),
    _Family("SDXL refiner", 1280, 384, 88, _WIDE_64, reads="OpenCLIP ViT-bigG", remark=_XL_VAE),
    # SDXL distilled: no transformer in the middle, fewer and shallower ones elsewhere.
    _Family("SSD-1B", 2048, 320, 68, _WIDE_64, reads="CLIP ViT-L and OpenCLIP ViT-bigG", remark=_XL_VAE),
)

# What a U-Net takes beside the 4 channels of the latent it works on: (channels in all) -> what that makes it.
_VARIANTS = {4: "", 5: "depth-guided", 8: "instruct-pix2pix", 9: "inpainting"}

# Files without a U-Net that this extension could serve, by a name that only they use. The first that fits is taken, so
# a face adapter's or motion module's own names come before the general ones that it holds as well. Names as they are
# in files of AnimateDiff, ComfyUI, diffusers, kohya's scripts, LyCORIS, PEFT, sd-webui-controlnet and spandrel.
_WITH = "choose the checkpoint it works with"
_STEERS = f"it steers what a checkpoint draws; {_WITH}"
_FACE = f"it shows a checkpoint a face to draw; {_WITH}"
_ELSEWHERE = "it uses none of the classes that this extension serves"
_VIDEO = r"\.(?:time_stack|temopral_conv)\."  # the latter as ModelScope spells it
_NOT_SERVED = (
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
    ("Stable Diffusion 3", r"(?:^|\.)joint_blocks\.", _ELSEWHERE),
    ("Flux", r"(?:^|\.)double_blocks\.", _ELSEWHERE),
    ("Stable Cascade", r"(?:^|\.)clip_txt_mapper\.|\.channelwise\.", _ELSEWHERE),
    ("video model", _VIDEO, "it attends across frames as well, which this extension does not know"),
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
_LORA_NAME = re.compile(
    r"^(?:lora|lycoris)_(?!controlnet$)|^bundle_emb\.|^(?:unet|text_encoder):[0-9]{1,4}:(?:up|down)$|"
    r"\.lora[._](?:up|down|mid|linear_layer|magnitude_vector|embedding_[AB]|[AB])(?:\.|$)|_lora[0-9]?\.(?:up|down)\.|"
    r"\.(?:hada_[wt][12]|lokr_[wt][12]|oft_(?:blocks|diag|[rR])|boft_[RS]|vera_lambda_[bd]|ia3_l|on_input|dora_scale|"
    r"[wb]_norm|diff|diff_b|set_weight)(?:_[ab])?(?:\.|$)"
)
_LORA = (
    ("motion LoRA", r"(?:^|\.)(?:motion_modules|temporal_transformer|temporal_attentions)\.",
     f"it changes a motion module's layers and adds none; {_WITH}"),
    ("LoRA", r"", f"it changes a checkpoint's layers and adds none; {_WITH}"),
)  # fmt: skip


def _describe(shapes: Mapping[str, Sequence[int]], heads: _Heads | None) -> Checkpoint:
    """`from_shapes` with the heads in either form; None follows the family's convention."""
    shapes = {str(name): tuple(shape) for name, shape in shapes.items()}
    unets = _unet_prefixes(shapes)
    unet = next((prefix for prefix in _UNET_PREFIXES if prefix in unets), None)
    if unets and unet is None:
        where = f"its U-Net's names start with {_named(unets[0])}, where the web UI expects {_UNET_PREFIXES[0]!r}"
        return Checkpoint("unknown", (), (f"Not recognised: {where}.",))
    not_served = None if unet is not None else _not_served(shapes)
    if not_served is not None:
        return not_served

    vae_layers, latent_factor, notes = _vae_layers(shapes)
    if unet is None:
        if vae_layers:
            return Checkpoint("VAE", vae_layers, ("Only a VAE: the file holds no U-Net.", *notes))
        return Checkpoint("unknown", (), (f"Not recognised. The names in it start with {_prefixes(shapes)}.", *notes))

    family, unet_layers, unet_notes = _unet_layers(shapes, unet, heads, latent_factor)
    if not vae_layers:
        notes += ("No VAE attention in this file: the web UI uses a separate VAE, whose layers are not listed here.",)
    return Checkpoint(family, unet_layers + vae_layers, unet_notes + notes)


_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


def _unet_prefixes(shapes: Mapping[str, tuple]) -> list[str]:
    """What comes before "input_blocks" in the names of each U-Net.

    A ControlNet is half a U-Net, so the way up must be there too; a video model is a U-Net and more.
    """
    if any(map(re.compile(_VIDEO).search, shapes)):
        return []
    up = "output_blocks."
    prefixes = dict.fromkeys(name[: name.index(up)] for name in shapes if up in name)
    return [prefix for prefix in prefixes if f"{prefix}input_blocks.0.0.weight" in shapes]


def _not_served(shapes: Mapping[str, tuple]) -> Checkpoint | None:
    lora = [name for name in shapes if _LORA_NAME.search(name)]
    added = set(lora)
    others = [name for name in shapes if name not in added and not name.endswith(".alpha")]  # a LoRA's strength
    for names, kinds in ((others, _NOT_SERVED), (lora, _LORA)):
        for family, pattern, why in kinds:
            name = next(filter(re.compile(pattern).search, names), None)
            if name is not None:
                return Checkpoint(family, (), (f"{family} (names such as {_named(name)}): {why}.",))
    return None


def _prefixes(shapes: Mapping[str, tuple], most: int = 8) -> str:
    """What comes before the first number or the last part of every name, with how often it occurs, in words."""

    def prefix(name: str) -> str:
        parts = name.split(".")
        numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        return ".".join(parts[: max(numbered, 1)])

    counts = Counter(map(prefix, shapes))
    listed = [f"{_named(prefix)} ({count})" for prefix, count in counts.most_common(most)]
    if len(counts) > most:
        listed.append(f"{len(counts) - most} others")
    return ", ".join(listed) or "nothing: it holds no tensors"


def _named(name: str) -> str:
    """A tensor's, type's or file's name, whole: the part that matters is often its last."""
    return shown(name, LONGEST_NAME)


# ------------------------------------------------------------------------------------------------------ the U-Net

_UNET_ATTENTION = re.compile(
    r"(?P<path>(?P<section>input_blocks|middle_block|output_blocks)\.(?P<block>[0-9]{1,3})\.(?:[0-9]{1,3}\.)?"
    r"transformer_blocks\.(?P<depth>[0-9]{1,3})\.attn(?P<which>[12]))\.to_q\.weight"
)
_DOWNSAMPLE = re.compile(r"input_blocks\.([0-9]{1,3})\.0\.op\.weight")
_UPSAMPLE = re.compile(r"output_blocks\.([0-9]{1,3})\.[0-9]\.conv\.weight")
_ANY_ATTENTION = re.compile(r"(?:input_blocks|middle_block|output_blocks)\..*\.(?:to_q|qkv)\.weight")


@dataclass(frozen=True, order=True)
class _Attention:
    """One attention layer as it stands in the U-Net; sorts in the order the layers run in."""

    section: str  # "input_blocks" < "middle_block" < "output_blocks" is also the order they run in
    block: int
    depth: int
    which: str
    name: str
    channels: int
    context_width: int | None = field(compare=False)  # None: it looks at the image itself


def _unet_layers(
    shapes: Mapping[str, tuple], prefix: str, heads: _Heads | None, latent_factor: int
) -> tuple[str, tuple[AttentionLayer, ...], tuple[str, ...]]:
    """(family with its variant, layers in the order they run, notes) of the U-Net under `prefix`."""
    found = sorted(_unet_attention(shapes, prefix))
    channels, input_channels, *_ = _shape(shapes, f"{prefix}input_blocks.0.0.weight", dimensions=(4,))
    family, rule, notes = _family(found, channels, heads, _linear(shapes, prefix))

    variant = _VARIANTS.get(input_channels, f"{input_channels} input channels")
    if input_channels not in _VARIANTS:
        notes.append(f"The U-Net takes {input_channels} channels, which is no variant known here.")
    copies = 3 if variant == "instruct-pix2pix" else 2  # guided by the prompt, by the picture, and by neither

    known = {f"{attention.name}.to_q.weight" for attention in found}
    others = [match.string for match in _matches(_ANY_ATTENTION, shapes, prefix) if match.string not in known]
    if others:
        notes.append(f"Left out, as attention of a kind not known here: {len(others)}, such as {_named(others[0])}.")

    downsampling = _unet_downsampling(shapes, prefix)
    layers = []
    for attention in found:
        count, width = rule.divide(attention.channels, attention.name)
        crosses = attention.context_width is not None
        layers.append(AttentionLayer(
            name=attention.name,
            part="unet",
            kind="cross" if crosses else "self",
            heads=count,
            head_width=width,
            downsampling=downsampling(attention.section, attention.block) * latent_factor,
            context_tokens=PROMPT_TOKENS if crosses else None,
            context_width=attention.context_width,
            guidance_copies=copies,
            latent_factor=latent_factor,
        ))  # fmt: skip
    return f"{family}, {variant}" if variant else family, tuple(layers), tuple(notes)


def _unet_attention(shapes: Mapping[str, tuple], prefix: str) -> Iterator[_Attention]:
    for match in _matches(_UNET_ATTENTION, shapes, prefix):
        name = prefix + match["path"]
        query, key, value = (_shape(shapes, f"{name}.to_{part}.weight", dimensions=(2,)) for part in "qkv")
        if key != value or key[0] != query[0]:
            raise CheckpointError(f"the shapes of to_q, to_k and to_v of {name} do not fit together")
        # attn2 looks at the prompt; attn1 at the image, unless the model has its self-attention switched off there
        # (the x4 upscaler): then it too takes keys as wide as a prompt token.
        looks_at_itself = match["which"] == "1" and key[1] == query[1]
        yield _Attention(
            section=match["section"],
            block=int(match["block"]),
            depth=int(match["depth"]),
            which=match["which"],
            name=name,
            channels=query[0],
            context_width=None if looks_at_itself else key[1],
        )


def _family(
    found: Sequence[_Attention], channels: int, heads: _Heads | None, linear: bool
) -> tuple[str, _Heads, list[str]]:
    """(name, how channels divide into heads, notes) of a U-Net with these attention layers.

    `channels` are those of its first block; `heads` is None where the convention decides.
    """
    if not found:
        return "unknown U-Net", heads or _EIGHT_HEADS, ["The U-Net has no attention layers of the kind known here."]
    contexts = Counter(attention.context_width for attention in found if attention.context_width is not None)
    context_width = contexts.most_common(1)[0][0] if contexts else 0
    alike = [family for family in _FAMILIES if (family.context_width, family.channels) == (context_width, channels)]
    if alike:
        family = next((family for family in alike if family.layers == len(found)), alike[0])
        name, rule = family.name, heads or replace(family.heads, source=f"as {family.name} has them")
        notes = [f"Prompt tokens are {context_width} channels wide, as made by {family.reads}."]
        if family.layers != len(found):
            notes.append(f"{len(found)} attention layers where {name} has {family.layers}: it was pruned or changed.")
        notes += filter(None, [family.remark])
    else:
        name = "like Stable Diffusion 2.x or SDXL" if linear else "like Stable Diffusion 1.x"
        rule = heads or replace(_WIDE_64 if linear else _EIGHT_HEADS, source="a guess from the layout")
        notes = ["It is none of the models known here; its layers are read from the file all the same."]
    if len(contexts) > 1:
        notes.append(f"Layers look at prompts of different widths: {', '.join(map(str, sorted(contexts)))}.")
    return name, rule, [f"Heads: {rule}.", *notes]


def _linear(shapes: Mapping[str, tuple], prefix: str) -> bool:
    """Whether the transformers are entered by a linear layer, as since SD 2, and not by SD 1's 1×1 convolution."""
    return any(
        name.startswith(prefix) and name.endswith(".proj_in.weight") and len(shape) == 2
        for name, shape in shapes.items()
    )


def _unet_downsampling(shapes: Mapping[str, tuple], prefix: str) -> Callable[[str, int], int]:
    """A function (section, block) -> latent pixels along one side for one token there: 1, 2, 4 or 8."""
    downs = {int(match[1]) for match in _matches(_DOWNSAMPLE, shapes, prefix)}
    ups = {int(match[1]) for match in _matches(_UPSAMPLE, shapes, prefix)}
    if len(downs) != len(ups) or len(downs) > 8:
        raise CheckpointError(
            f"the U-Net halves its resolution {len(downs)} times and doubles it {len(ups)} times, so its layers "
            f"cannot be placed"
        )

    def downsampling(section: str, block: int) -> int:
        if section == "input_blocks":
            return 2 ** sum(down <= block for down in downs)
        if section == "middle_block":
            return 2 ** len(downs)
        # An output block attends first and upsamples last, so its own upsampling does not count.
        return 2 ** sum(up >= block for up in ups)

    return downsampling


def _matches(pattern: re.Pattern[str], shapes: Mapping[str, tuple], prefix: str) -> Iterator[re.Match[str]]:
    """The names under `prefix` whose rest is all of what the pattern describes."""
    for name in shapes:
        if name.startswith(prefix) and (match := pattern.fullmatch(name, len(prefix))):
            yield match


# -------------------------------------------------------------------------------------------------------- the VAE

_VAE_ATTENTION = re.compile(
    r"(?P<path>(?P<half>encoder|decoder)\.(?:mid\.attn_[0-9]|(?:down|up)\.(?P<level>[0-9])\.attn\.[0-9]))\.q\.weight"
)
_VAE_RESAMPLE = re.compile(r"(?:encoder\.down\.[0-9]\.downsample|decoder\.up\.([0-9])\.upsample)\.conv\.weight")


def _vae_layers(shapes: Mapping[str, tuple]) -> tuple[tuple[AttentionLayer, ...], int, tuple[str, ...]]:
    """(layers, pixels along one side for one latent pixel, notes); (), 8, () where there is no VAE."""
    for prefix in ("first_stage_model.", ""):
        attention = list(_matches(_VAE_ATTENTION, shapes, prefix))
        if not attention:
            continue
        resamples = list(_matches(_VAE_RESAMPLE, shapes, prefix))
        ups = sum(match[1] is not None for match in resamples)
        halvings = max(ups, len(resamples) - ups) or 3  # a file that has none cannot say; every Stable Diffusion has 3
        layers = []
        for match in attention:
            name = match.string
            channels, into, *_ = _shape(shapes, name, dimensions=(2, 4))
            if channels != into:
                raise CheckpointError(f"the shape of {name} is not square")
            # down.N and up.N both work at 1/2^N of the image's side; the middle block at the latent's.
            level = halvings if match["level"] is None else int(match["level"])
            if level > halvings:
                raise CheckpointError(f"{name} lies deeper than the {halvings} halvings of the VAE")
            layers.append(AttentionLayer(
                name=prefix + match["path"],
                part=f"vae_{match['half']}",
                kind="self",
                heads=1,
                head_width=channels,
                downsampling=2**level,
                latent_factor=2**halvings,
            ))  # fmt: skip
        layers.sort(key=lambda layer: layer.part == "vae_decoder")
        factor = 2**halvings
        unusual = f"The VAE makes one latent pixel of {factor} × {factor} pixels, not of 8 × 8."
        return tuple(layers), factor, () if factor == 8 else (unusual,)
    return (), 8, ()


def _shape(shapes: Mapping[str, tuple], name: str, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with one of these numbers of dimensions and nothing empty."""
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{name} is missing")
    if len(shape) not in dimensions or not all(isinstance(size, int) and 1 <= size <= 2**20 for size in shape):
        raise CheckpointError(f"{name} has the impossible shape {shown(list(shape))}")
    return shape


# --------------------------------------------------------------------------------------------- heads from a .yaml


def _heads_from_yaml(path: Path) -> tuple[_Heads | None, tuple[str, ...]]:
    """(heads as the model's configuration has them or None, notes). A broken configuration is a note, not an error.

    Only the syntax tree is built: values are never constructed, so that no tag, merge key or alias can cost anything.
    """
    if not os.path.isfile(path):
        return None, ()
    ignored = f"{_named(path.name)} beside the file was not used: "
    try:
        import yaml
    except ImportError:
        return None, (f"{ignored}PyYAML is not installed.",)
    try:
        with open(path, "rb") as file:
            text = file.read(YAML_LIMIT + 1)
        if len(text) > YAML_LIMIT:
            return None, (f"{ignored}it is longer than {YAML_LIMIT // 1024} KiB.",)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        return None, (f"{ignored}it could not be read ({type(error).__name__}).",)

    def value(node: Any, *keys: str) -> Any:
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((inner for name, inner in pairs if name.value == key), None)
        return node

    def number(name: str) -> int | None:
        for config in ("unet_config", "network_config"):  # ldm's name and sgm's
            node = value(tree, "model", "params", config, "params", name)
            if isinstance(node, yaml.ScalarNode) and re.fullmatch("[1-9][0-9]{0,4}", node.value):
                return int(node.value)
        return None

    source = f"from {_named(path.name)} beside the file"
    if width := number("num_head_channels"):  # wins over num_heads, as in UNetModel; -1 stands for "not given"
        return _Heads(width=width, source=source), ()
    if count := number("num_heads"):
        return _Heads(count=count, source=source), ()
    return None, (f"{ignored}it does not give the number of heads.",)


# ------------------------------------------------------------------------------------------------- reading the file

_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

# What else ends up under the name of a checkpoint, by its first bytes.
_OTHER_FILES = (
    (b"PK\x03\x04", "a PyTorch pickle (.ckpt, .pt); only .safetensors is read, because a pickle can run code"),
    (b"\x80", "a pickle (.ckpt, .pt); only .safetensors is read, because a pickle can run code"),
    (b"version https://git-lfs", "a Git LFS pointer: the checkpoint itself was never downloaded"),
    (b"<", "a web page: the download went wrong"),
    (b"GGUF", "a GGUF file; only .safetensors is read"),
)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor in a `.safetensors` file.

    The header is checked here first: the `safetensors` package says little about what is wrong, lets a name occur
    twice, and reads up to 100 MB before it looks. Then the package opens the file and has the last word. The shapes are
    those of the header as checked: asking the package for them (`get_slice(name).get_shape()`) takes a time that grows
    with the square of the number of tensors, 0.5 s for SDXL's 2,515, and at that rate hours for a hostile header.
    """
    try:
        import safetensors
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError("reading a checkpoint needs the Python package safetensors") from error
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            raise CheckpointError("it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_size = _read_header(file, size)
        _check_tensors(header, data_size)
        with safe_open(path, framework="numpy"):  # raises if it disagrees
            pass
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file") from error
    except SafetensorError as error:
        why = _named(str(error))
        if unknown := _unknown_type(header):
            why = f"{unknown}, which safetensors {safetensors.__version__} does not know; a newer one may"
        raise CheckpointError(f"the safetensors package refuses it: {why}") from error
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no file system can have
        # strerror, because str() of an OSError would show a stranger the whole path.
        raise CheckpointError(f"it cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """(the header, bytes of tensor data after it) of a file of `size` bytes."""
    start = file.read(24)
    if not start:
        raise CheckpointError("it is empty")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > min(HEADER_LIMIT, size - 8):
        for magic, what in _OTHER_FILES:
            if start.startswith(magic):
                raise CheckpointError(f"it is {what}")
        if len(start) < 8:
            raise CheckpointError(f"it is only {size} bytes long")
        if length > size - 8:
            raise CheckpointError(
                f"it is no .safetensors file, or cut short: it claims a header of {length} bytes and has {size} in all"
            )
        raise CheckpointError(f"it claims a header of {length} bytes; more than {HEADER_LIMIT} is not read")
    file.seek(8)
    return _parse_header(file.read(length)), size - 8 - length


def _parse_header(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"its header names {_named(name)} more than once")
        return table

    def whole(digits: str) -> int:
        if len(digits) > 20:  # more than any file has bytes; and long numbers take long to convert
            raise CheckpointError(f"its header holds a number of {len(digits)} digits")
        return int(digits)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=whole)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"its header is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"its header is not JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise CheckpointError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise CheckpointError("its header is JSON, but not a table of tensors")
    return header


def _check_tensors(header: Mapping[str, Any], data_size: int) -> None:
    """Every entry is whole, and together they fill the `data_size` bytes after the header exactly once."""
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise CheckpointError(f"its header has no dtype, shape and data_offsets for {_named(name)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _whole_numbers(shape) or len(shape) > 16:
            raise CheckpointError(f"{_named(name)} has the impossible shape {shown(shape)}")
        if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"{_named(name)} has the impossible place {shown(offsets)}")
        begin, end = offsets
        if end > data_size:
            raise CheckpointError(f"{_named(name)} ends at byte {end} of {data_size}: the file is cut short or lies")
        each = _BYTES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        # A type newer than this table is left to the package.
        if each is not None and math.prod(shape) * each != end - begin:
            raise CheckpointError(
                f"{_named(name)} has the shape {shown(shape)} of {entry['dtype']}, but {end - begin} bytes"
            )
        places.append((begin, end, name))

    covered = 0
    for begin, end, name in sorted(places):
        if begin != covered:
            wrong = "overlaps the tensor before it" if begin < covered else f"follows a gap of {begin - covered} bytes"
            raise CheckpointError(f"{_named(name)} {wrong}")
        covered = end
    if covered != data_size:
        raise CheckpointError(f"{data_size - covered} bytes at its end belong to no tensor")


def _unknown_type(header: Mapping[str, Any]) -> str:
    """The first tensor whose type is none of `_BYTES`, in words; empty where there is none."""
    for name, entry in header.items():
        dtype = None if name == "__metadata__" else entry["dtype"]
        if isinstance(dtype, str) and dtype not in _BYTES:
            return f"{_named(name)} is of the type {_named(dtype)}"
    return ""


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
