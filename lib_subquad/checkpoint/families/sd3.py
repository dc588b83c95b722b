"""Stable Diffusion 3 and 3.5: a transformer whose every block looks at image and prompt in one sequence (MMDiT).

    x_embedder.proj.bias                       [1536]   its width; a token is a patch of 2 × 2 latent pixels
    pos_embed                       [1, 36864, 1536]   a position for each of 192 × 192 tokens: no image has more
    joint_blocks.7.x_block.attn.qkv.bias       [4608]   queries, keys and values of the image's tokens
    joint_blocks.7.context_block.attn.qkv.bias [4608]   the same of the prompt's; in the last block too
    joint_blocks.7.x_block.attn2.qkv.bias      [4608]   SD 3.5 medium: the image looks at itself as well, next

Esser et al. 2024, arXiv 2403.03206; Stability-AI/sd3.5, mmditx.py. Biases are read, not weights, because quantised
files pack their weights and leave biases as they are.
"""

from __future__ import annotations

import math

from ..heads import Heads
from ..layers import PROMPT_TOKENS, AttentionLayer, Checkpoint, CheckpointError
from ..tensors import Tensors

NEEDED = ("joint_blocks.0.x_block.attn.qkv.bias", "x_embedder.proj.bias", "final_layer.linear.bias")

# (width, blocks, whether the image also looks at itself) -> name.
MODELS = {
    (1536, 24, False): "Stable Diffusion 3 medium",
    (1536, 24, True): "Stable Diffusion 3.5 medium",
    (2432, 38, False): "Stable Diffusion 3.5 large or large turbo",
}
UNKNOWN = "like Stable Diffusion 3"


def prefixes(tensors: Tensors) -> list[str]:
    return tensors.prefixes(NEEDED)


def read(mmdit: Tensors, heads: Heads | None, latent_factor: int) -> Checkpoint:
    (width,) = mmdit.shape("x_embedder.proj.bias", dimensions=(1,))
    out, _, patch, other = mmdit.shape("x_embedder.proj.weight", dimensions=(4,))
    if out != width or patch != other:
        raise CheckpointError(f"{mmdit.prefix}x_embedder.proj makes no tokens {width} channels wide of square patches")
    blocks = mmdit.count("joint_blocks")
    attention = []
    for block in (f"joint_blocks.{number}" for number in range(blocks)):
        if mmdit.shape(f"{block}.x_block.attn.qkv.bias", dimensions=(1,)) != (3 * width,):
            raise CheckpointError(f"{mmdit.prefix}{block} is not as wide as the model, {width} channels")
        attention.append((block, "joint"))
        if f"{block}.x_block.attn2.qkv.bias" in mmdit:
            attention.append((f"{block}.x_block.attn2", "self"))

    family = MODELS.get((width, blocks, len(attention) > blocks), UNKNOWN)
    whose = "Stable Diffusion 3" if family == UNKNOWN else family
    rule = heads or Heads(width=64, source=f"as {whose} has them")
    layers = []
    for path, kind in attention:
        name = mmdit.prefix + path
        count, head_width = rule.divide(width, name)
        layers.append(AttentionLayer(
            name=name,
            part="transformer",
            kind=kind,
            heads=count,
            head_width=head_width,
            downsampling=patch * latent_factor,
            context_tokens=PROMPT_TOKENS if kind == "joint" else None,
            context_width=mmdit.inputs("context_embedder") if kind == "joint" else None,
            reads_t5=kind == "joint",
            guidance_copies=2,
            latent_factor=latent_factor,
        ))  # fmt: skip
    notes = [f"Heads: {rule}."]
    if family == UNKNOWN:
        notes.append(f"{blocks} blocks {width} channels wide: none of the models known here.")
    largest = None
    if "pos_embed" in mmdit:
        positions = math.isqrt(mmdit.shape("pos_embed", dimensions=(3,))[1])
        largest = positions * patch * latent_factor
    return Checkpoint(family, tuple(layers), tuple(notes), largest)
