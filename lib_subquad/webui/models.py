"""The checkpoints that a visitor may ask about: the loaded one, and those on the web UI's own list. Never a path."""

from __future__ import annotations

import os

import torch
from modules import sd_models, shared

from ..checkpoint import Checkpoint, CheckpointError, from_shapes, read_attention_layers
from ..lab.explain import Row, explain, largest_image, with_size_note
from ..settings import Settings, shown

LOADED = "the loaded checkpoint"
LARGEST_SIDE = 4096
LARGEST_BATCH = 16


class Refused(ValueError):
    """A question that cannot be answered; the message is a sentence for the user."""


def titles() -> list[str]:
    return [LOADED, *getattr(sd_models, "checkpoints_list", {})]


def read(title: str | None) -> Checkpoint:
    """The attention layers of a checkpoint on the list.

    Raises:
        Refused: a title that is not on the list, no model loaded, or a file that cannot be read.
    """
    if title in (None, "", LOADED):
        return _read_loaded()
    info = getattr(sd_models, "checkpoints_list", {}).get(title) if isinstance(title, str) else None
    if info is None:
        raise Refused(f"There is no checkpoint {shown(title, 200)} on the web UI's list.")
    return _read_file(info.filename)


def rows_for(
    title: str | None, width: int, height: int, batch: int, settings: Settings
) -> tuple[Checkpoint, list[Row]]:
    """The checkpoint and its plan table; without the VAE's row where the VAE is not ours.

    Raises:
        Refused: as `read`, or a size or batch out of range.
    """
    width, height = (_whole(name, value, 64, LARGEST_SIDE) for name, value in (("Width", width), ("Height", height)))
    batch = _whole("Batch", batch, 1, LARGEST_BATCH)
    checkpoint = with_size_note(read(title), width, height)
    layers = [layer for layer in checkpoint.layers if settings.vae or layer.part == "unet"]
    return checkpoint, explain(layers, width, height, batch, dtype(), device(), settings)


def largest(checkpoint: Checkpoint, width: int, height: int, batch: int, settings: Settings) -> tuple[int, int] | None:
    """(width, height) of the largest image in these proportions whose attention stays inside the memory limit."""
    layers = [layer for layer in checkpoint.layers if settings.vae or layer.part == "unet"]
    return largest_image(layers, int(width), int(height), int(batch), dtype(), device(), settings)


def device() -> torch.device:
    return torch.device(shared.device)


def dtype() -> torch.dtype:
    """What the U-Net computes in."""
    from modules import devices

    return getattr(devices, "dtype_unet", getattr(devices, "dtype", torch.float32))


def _read_loaded() -> Checkpoint:
    model = sd_models.model_data.sd_model  # shared.sd_model would load one
    if model is None:
        raise Refused("No checkpoint is loaded yet. Choose one from the list, or make an image first.")
    filename = getattr(getattr(model, "sd_checkpoint_info", None), "filename", "")
    if filename.endswith(".safetensors") and os.path.exists(filename):
        return _read_file(filename)
    return _describe(lambda: from_shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))


def _read_file(filename: str) -> Checkpoint:
    return _describe(lambda: read_attention_layers(filename))


def _describe(reader) -> Checkpoint:
    try:
        return reader()
    except (CheckpointError, OSError) as error:
        raise Refused(str(error)) from error


def _whole(name: str, value, least: int, most: int) -> int:
    try:
        number = float(value)  # a page gives 512.0 for 512
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if isinstance(value, bool) or not (least <= number <= most and number.is_integer()):
        given = "empty" if value is None else shown(value)
        raise Refused(f"{name} is {given}; it must be a whole number from {least} to {most}.")
    return int(number)
