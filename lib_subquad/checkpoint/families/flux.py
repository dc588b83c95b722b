"""Flux and what was made of it: a transformer that looks at image and prompt in one sequence.

    img_in.bias                                       [3072]   its width; a token is a patch of 2 × 2 latent pixels
    double_blocks.7.img_attn.norm.query_norm.scale    [128]    the width of a head
    double_blocks.7.img_attn.qkv.bias                 [9216]   queries, keys and values of the image's tokens
    double_blocks.7.txt_attn.qkv.bias                 [9216]   the same of the prompt's
    single_blocks.7.linear1.bias                      [21504]  the same of all of them, and the way into the MLP
    guidance_in.in_layer.bias                                  Flux dev: told how strongly to follow the prompt
    distilled_guidance_layer.in_proj.bias                      Chroma: one small network in place of all modulations

Black Forest Labs 2024, github.com/black-forest-labs/flux, model.py. Biases and scales are read, not weights, because
quantised files pack their weights and leave these as they are.
"""

from __future__ import annotations

from ..heads import Heads
from ..layers import AttentionLayer, Checkpoint, CheckpointError
from ..tensors import Tensors

NEEDED = (
    "double_blocks.0.img_attn.norm.query_norm.scale",
    "double_blocks.0.txt_attn.qkv.bias",
    "img_in.bias",
    "final_layer.linear.bias",
)
PATCH = 2  # latent pixels along one side of a token
BLOCKS = (19, 38)  # in two streams, and in one

# What a Flux model takes beside the 64 channels of its patches: (channels in all) -> what that makes it.
VARIANTS = {64: "", 128: "guided by a picture", 384: "inpainting"}


def prefixes(tensors: Tensors) -> list[str]:
    return tensors.prefixes(NEEDED)


def read(flux: Tensors, heads: Heads | None, latent_factor: int) -> Checkpoint:
    (width,) = flux.shape("img_in.bias", dimensions=(1,))
    (head_width,) = flux.shape(NEEDED[0], dimensions=(1,))
    blocks = flux.count("double_blocks"), flux.count("single_blocks")
    is_chroma = any(name.startswith("distilled_guidance_layer.") for name in flux)
    family = "Chroma" if is_chroma else "Flux dev" if "guidance_in.in_layer.bias" in flux else "Flux schnell"

    rule = heads or Heads(width=head_width, source="as the file's norms have them")
    count, head_width = rule.divide(width, flux.prefix + "img_in")
    paths = [f"double_blocks.{number}" for number in range(blocks[0])]
    paths += [f"single_blocks.{number}" for number in range(blocks[1])]
    for path in paths:
        double = path.startswith("double")
        (channels,) = flux.shape(f"{path}.img_attn.qkv.bias" if double else f"{path}.linear1.bias", dimensions=(1,))
        if channels < 3 * width or (double and channels > 3 * width):
            raise CheckpointError(f"{flux.prefix}{path} is not as wide as the model, {width} channels")
    layers = tuple(
        AttentionLayer(
            name=flux.prefix + path,
            part="transformer",
            kind="joint",
            heads=count,
            head_width=head_width,
            downsampling=PATCH * latent_factor,
            context_tokens=0,
            context_width=flux.inputs("txt_in"),
            reads_t5=True,
            guidance_copies=2 if is_chroma else 1,
            latent_factor=latent_factor,
            fills_up=True,
        )
        for path in paths
    )
    variant, notes = _variant(flux)
    if blocks != BLOCKS:
        notes.append(f"{blocks[0]} and {blocks[1]} blocks where {family} has {BLOCKS[0]} and {BLOCKS[1]}.")
    if is_chroma:
        notes.append("Chroma is given the tokens that the prompt has, often fewer than are counted here.")
    else:
        notes.append("Made without a negative prompt, as it is meant to be: with one every call is twice as large.")
    return Checkpoint(f"{family}, {variant}" if variant else family, layers, (f"Heads: {rule}.", *notes))


def _variant(flux: Tensors) -> tuple[str, list[str]]:
    """(what its input makes it, notes)."""
    channels = flux.inputs("img_in")
    if channels is None:
        return "", []
    if channels in VARIANTS:
        return VARIANTS[channels], []
    words = f"{channels} input channels"
    return words, [f"It takes {words}, which is no variant known here."]
