"""The VAE: one-headed attention at the deepest level of its encoder and decoder, sometimes at others.

    decoder.mid.attn_1.q.weight           [512, 512, 1, 1]
    decoder.up.1.upsample.conv.weight     twice the resolution behind it

The same layers stand in the VAEs of Stable Diffusion 1, 2, XL, 3 and of Flux.
"""

from __future__ import annotations

import re

from ..layers import AttentionLayer, CheckpointError
from ..tensors import Tensors

PREFIXES = ("first_stage_model.", "vae.", "")

ATTENTION = re.compile(
    r"(?P<path>(?P<half>encoder|decoder)\.(?:mid\.attn_[0-9]|(?:down|up)\.(?P<level>[0-9])\.attn\.[0-9]))\.q\.weight"
)
RESAMPLE = re.compile(r"(?:encoder\.down\.[0-9]\.downsample|decoder\.up\.([0-9])\.upsample)\.conv\.weight")


def read(tensors: Tensors) -> tuple[tuple[AttentionLayer, ...], int, tuple[str, ...]]:
    """(layers, pixels along one side for one latent pixel, notes); (), 8, () where there is no VAE."""
    for prefix in PREFIXES:
        vae = tensors.under(prefix)
        attention = list(vae.matches(ATTENTION))
        if attention:
            break
    else:
        return (), 8, ()
    resamples = list(vae.matches(RESAMPLE))
    ups = sum(match[1] is not None for match in resamples)
    halvings = max(ups, len(resamples) - ups) or 3  # a file that has none cannot say; every Stable Diffusion has 3
    factor = 2**halvings
    layers = [_layer(vae, match, halvings) for match in attention]
    layers.sort(key=lambda layer: layer.part == "vae_decoder")
    unusual = f"The VAE makes one latent pixel of {factor} × {factor} pixels, not of 8 × 8."
    return tuple(layers), factor, () if factor == 8 else (unusual,)


def _layer(vae: Tensors, match: re.Match[str], halvings: int) -> AttentionLayer:
    name = match.string
    channels, into, *_ = vae.shape(name, dimensions=(2, 4))
    if channels != into:
        raise CheckpointError(f"the shape of {vae.prefix}{name} is not square")
    # down.N and up.N both work at 1/2^N of the image's side; the middle block at the latent's.
    level = halvings if match["level"] is None else int(match["level"])
    if level > halvings:
        raise CheckpointError(f"{vae.prefix}{name} lies deeper than the {halvings} halvings of the VAE")
    return AttentionLayer(
        name=vae.prefix + match["path"],
        part=f"vae_{match['half']}",
        kind="self",
        heads=1,
        head_width=channels,
        downsampling=2**level,
        latent_factor=2**halvings,
    )
