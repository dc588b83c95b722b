"""The SD 1 checkpoint layout: what the tensors' shapes say about the model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lib_subquad.checkpoint.heads import Heads
from lib_subquad.console import UserError
from lib_subquad.lab.bench.capture import unet_architecture

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD1_HEADS = 8

Shapes = Mapping[str, "tuple[int, ...]"]


@dataclass(frozen=True)
class Architecture:
    """The arguments that `UNetModel` and the VAE's `Decoder` are built with."""

    unet: dict
    decoder: dict
    embed_dim: int


def architecture(shapes: Shapes, heads: Heads = Heads(count=SD1_HEADS)) -> Architecture:
    """Read the architecture off a checkpoint's shapes. The number of heads leaves no trace in them.

    Raises:
        UserError: the layout is not that of SD 1.
    """
    _refuse_other_layouts(shapes)
    try:
        return Architecture(
            unet=_unet(shapes, heads), decoder=_decoder(shapes), embed_dim=shapes[VAE + "post_quant_conv.weight"][1]
        )
    except (KeyError, IndexError) as e:
        raise UserError(f"checkpoint is not in the SD 1 layout: it lacks {e.args[0]}") from e


def _refuse_other_layouts(shapes: Shapes) -> None:
    if any(key.startswith("conditioner.") for key in shapes):
        raise UserError("checkpoint is in the SDXL layout; this demo loads SD 1")
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        raise UserError("checkpoint is in the SD 2 layout; this demo loads SD 1")
    if not any(key.startswith(UNET) for key in shapes):
        raise UserError(f"checkpoint is not in the SD 1 layout: no tensor's name starts with {UNET}")


def _unet(shapes: Shapes, heads: Heads) -> dict:
    own = {name[len(UNET) :]: shape for name, shape in shapes.items() if name.startswith(UNET)}
    found = unet_architecture(own)
    if found["in_channels"] != 4:
        raise UserError(
            f"checkpoint's U-Net takes {found['in_channels']} channels; this demo makes images with 4, from text"
        )
    return {**found, "num_heads": heads.count or -1, "num_head_channels": heads.width or -1}


def _decoder(shapes: Shapes) -> dict:
    decoder = VAE + "decoder."
    out_channels, width = shapes[decoder + "conv_out.weight"][:2]
    levels = _count(shapes, decoder + "up.")
    return {
        "ch": width,
        "out_ch": out_channels,
        "ch_mult": tuple(shapes[f"{decoder}up.{i}.block.0.conv1.weight"][0] // width for i in range(levels)),
        "num_res_blocks": _count(shapes, decoder + "up.0.block.") - 1,
        "attn_resolutions": [],
        "in_channels": 3,
        "resolution": 256,
        "z_channels": shapes[decoder + "conv_in.weight"][1],
    }


def _count(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})
