"""U-Nets: Stable Diffusion 1 and 2, SDXL and what was made of them.

    input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight   [640, 640]    self-attention
    input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight   [640, 2048]   looks at the prompt
    input_blocks.3.0.op.weight                                half the resolution from here on
    output_blocks.2.2.conv.weight                             twice the resolution from here on

Only the number of heads leaves no trace in the tensors. It comes from the caller, from a `.yaml` of the same name
beside the file, or from the family's convention, and `Checkpoint.notes` says from which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..heads import Heads
from ..layers import PROMPT_TOKENS, AttentionLayer, Checkpoint, CheckpointError
from ..tensors import Tensors, named
from .others import VIDEO

STEM = "input_blocks.0.0.weight"
_EIGHT_HEADS = Heads(count=8)
_WIDE_64 = Heads(width=64)
_XL_VAE = "SDXL's own VAE overflows in half precision; where it does, the web UI runs it in float32."


@dataclass(frozen=True)
class _Family:
    """What tells a family: channels of a prompt token and of the first block, and the number of attention layers."""

    name: str
    context_width: int
    channels: int
    layers: int
    heads: Heads
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


def prefixes(tensors: Tensors) -> list[str]:
    """What comes before "input_blocks" in the names of each U-Net.

    A ControlNet is half a U-Net, so the way up must be there too; a video model is a U-Net and more.
    """
    if any(map(re.compile(VIDEO).search, tensors)):
        return []
    up = "output_blocks."
    found = dict.fromkeys(name[: name.index(up)] for name in tensors if up in name)
    return [prefix for prefix in found if f"{prefix}{STEM}" in tensors]


def read(unet: Tensors, heads: Heads | None, latent_factor: int) -> Checkpoint:
    found = sorted(_attention(unet))
    channels, input_channels, *_ = unet.shape(STEM, dimensions=(4,))
    family, rule, notes = _family(found, channels, heads, _is_linear(unet))

    variant = _VARIANTS.get(input_channels, f"{input_channels} input channels")
    if input_channels not in _VARIANTS:
        notes.append(f"The U-Net takes {input_channels} channels, which is no variant known here.")
    copies = 3 if variant == "instruct-pix2pix" else 2  # guided by the prompt, by the picture, and by neither

    known = {f"{attention.name}.to_q.weight" for attention in found}
    others = [match.string for match in unet.matches(_ANY_ATTENTION) if match.string not in known]
    if others:
        example = named(unet.prefix + others[0])
        notes.append(f"Left out, as attention of a kind not known here: {len(others)}, such as {example}.")

    downsampling = _downsampling(unet)
    layers = []
    for attention in found:
        name = unet.prefix + attention.name
        count, width = rule.divide(attention.channels, name)
        crosses = attention.context_width is not None
        layers.append(AttentionLayer(
            name=name,
            part="unet",
            kind="cross" if crosses else "self",
            heads=count,
            head_width=width,
            downsampling=downsampling(attention.section, attention.block) * latent_factor,
            context_tokens=PROMPT_TOKENS if crosses else None,
            context_width=attention.context_width,
            guidance_copies=copies,
            latent_factor=latent_factor,
            # A stride-2 convolution with padding 1 keeps an odd last pixel. On the way up the web UI fits each block to
            # the skip connection of the same level, so both halves of the U-Net have the same sizes.
            fills_up=True,
        ))  # fmt: skip
    return Checkpoint(f"{family}, {variant}" if variant else family, tuple(layers), tuple(notes))


def _attention(unet: Tensors) -> Iterator[_Attention]:
    for match in unet.matches(_UNET_ATTENTION):
        name = match["path"]
        query, key, value = (unet.shape(f"{name}.to_{part}.weight", dimensions=(2,)) for part in "qkv")
        if key != value or key[0] != query[0]:
            raise CheckpointError(f"the shapes of to_q, to_k and to_v of {unet.prefix}{name} do not fit together")
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
    found: Sequence[_Attention], channels: int, heads: Heads | None, linear: bool
) -> tuple[str, Heads, list[str]]:
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


def _is_linear(unet: Tensors) -> bool:
    """Whether the transformers are entered by a linear layer, as since SD 2, and not by SD 1's 1×1 convolution."""
    return any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in unet.items())


def _downsampling(unet: Tensors) -> Callable[[str, int], int]:
    """A function (section, block) -> latent pixels along one side for one token there: 1, 2, 4 or 8."""
    downs = {int(match[1]) for match in unet.matches(_DOWNSAMPLE)}
    ups = {int(match[1]) for match in unet.matches(_UPSAMPLE)}
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
