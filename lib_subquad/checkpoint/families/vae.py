"""The VAE: one-headed attention at the deepest level of its encoder and decoder, sometimes at others.

    decoder.mid.attn_1.q.weight           [512, 512, 1, 1]
    decoder.up.1.upsample.conv.weight     twice the resolution behind it

The same layers stand in the VAEs of Stable Diffusion 1, 2, XL, 3 and of Flux; around them are convolutions, which take
the most memory:

    decoder.up.1.block.0.conv1.weight     [256, 512, 3, 3]
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...steps import CONVOLUTION, DOWN, LAST, RESIDUAL, UP, WHOLE, VaeStep
from ..layers import AttentionLayer, CheckpointError
from ..tensors import Tensors

PREFIXES = ("first_stage_model.", "vae.", "")

ATTENTION = re.compile(
    r"(?P<path>(?P<half>encoder|decoder)\.(?:mid\.attn_[0-9]|(?:down|up)\.(?P<level>[0-9])\.attn\.[0-9]))\.q\.weight"
)
RESAMPLE = re.compile(r"(?:encoder\.down\.[0-9]\.downsample|decoder\.up\.([0-9])\.upsample)\.conv\.weight")


def read(tensors: Tensors) -> tuple[tuple[AttentionLayer, ...], int, tuple[str, ...]]:
    """(layers, pixels along one side for one latent pixel, notes); (), 8, () where there is no VAE."""
    vae = _found(tensors)
    attention = list(vae.matches(ATTENTION))
    if not attention:
        return (), 8, ()
    resamples = list(vae.matches(RESAMPLE))
    ups = sum(match[1] is not None for match in resamples)
    halvings = max(ups, len(resamples) - ups) or 3  # a file that has none cannot say; every Stable Diffusion has 3
    factor = 2**halvings
    layers = [_layer(vae, match, halvings) for match in attention]
    layers.sort(key=lambda layer: layer.part == "vae_decoder")
    unusual = f"The VAE makes one latent pixel of {factor} × {factor} pixels, not of 8 × 8."
    return tuple(layers), factor, () if factor == 8 else (unusual,)


def halves(tensors: Tensors) -> tuple[tuple[VaeStep, ...], tuple[VaeStep, ...]]:
    """(steps of the encoder, of the decoder), each empty where it is not there or laid out in a way not known here."""
    vae = _found(tensors)
    return _known(_encoder(vae.under("encoder."))), _known(_decoder(vae.under("decoder.")))


def _found(tensors: Tensors) -> Tensors:
    """The VAE's, wherever it is that has such attention."""
    found = (tensors.under(prefix) for prefix in PREFIXES)
    return next((vae for vae in found if any(vae.matches(ATTENTION))), Tensors({}))


def _known(steps: Iterator[VaeStep]) -> tuple[VaeStep, ...]:
    try:
        made = tuple(steps)
    except LookupError:
        return ()
    fit = all(one.out == other.into for one, other in zip(made, made[1:]))
    return made if fit else ()


def _decoder(half: Tensors) -> Iterator[VaeStep]:
    """Raises LookupError where something is not there."""
    first = _convolution(half, "conv_in")
    yield first
    yield from _middle(half, first.out)
    for level in reversed(range(_count(half, "up"))):
        yield from _blocks(half, f"up.{level}")
        if level:
            yield _resampling(half, f"up.{level}.upsample.conv", UP)
    yield _convolution(half, "conv_out", LAST)


def _encoder(half: Tensors) -> Iterator[VaeStep]:
    """Raises LookupError where something is not there."""
    yield _convolution(half, "conv_in")
    levels = _count(half, "down")
    for level in range(levels):
        yield from _blocks(half, f"down.{level}")
        if level + 1 < levels:
            yield _resampling(half, f"down.{level}.downsample.conv", DOWN)
    last = _convolution(half, "conv_out", LAST)
    yield from _middle(half, last.into)
    yield last


def _middle(half: Tensors, channels: int) -> Iterator[VaeStep]:
    yield _block(half, "mid.block_1")
    yield VaeStep(WHOLE, channels, channels)
    yield _block(half, "mid.block_2")


def _blocks(half: Tensors, level: str) -> Iterator[VaeStep]:
    for number in range(_count(half, f"{level}.block")):
        block = _block(half, f"{level}.block.{number}")
        yield block
        if f"{level}.attn.{number}.q.weight" in half:
            yield VaeStep(WHOLE, block.out, block.out)


def _block(half: Tensors, path: str) -> VaeStep:
    first, second = (_convolution(half, f"{path}.{name}") for name in ("conv1", "conv2"))
    if not first.out == second.into == second.out:
        raise LookupError(path)
    return VaeStep(RESIDUAL, first.into, second.out)


def _resampling(half: Tensors, name: str, kind: str) -> VaeStep:
    conv = _convolution(half, name)
    return VaeStep(kind, conv.into, conv.out, kind)


def _convolution(half: Tensors, name: str, kind: str = CONVOLUTION) -> VaeStep:
    shape = half[f"{name}.weight"]
    if len(shape) != 4 or shape[2:] != (3, 3) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise LookupError(name)
    return VaeStep(kind, shape[1], shape[0])


def _count(half: Tensors, modules: str) -> int:
    """How many of them there are, numbered from 0 without a gap."""
    try:
        count = half.count(modules)
    except CheckpointError as error:
        raise LookupError(modules) from error
    if not count:
        raise LookupError(modules)
    return count


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
