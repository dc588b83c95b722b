"""The checkpoints that a visitor may ask about: the loaded one, and those on the web UI's own list. Never a path."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint import AttentionLayer, Checkpoint, CheckpointError, from_shapes, read_attention_layers
from ..lab.explain import Row, explain, largest_image, with_size_note
from ..settings import Settings, shown
from .hosts import host
from .hosts.base import UNET, VAE, Refused

LOADED = "the loaded checkpoint"
LARGEST_SIDE = 4096
LARGEST_BATCH = 16
NOT_ACTIVE = "subquad is not active now: this is how it would compute attention."


def titles() -> list[str]:
    return [LOADED, *host().checkpoints()]


def read(title: str | None) -> Checkpoint:
    """The attention layers of a checkpoint on the list.

    Raises:
        Refused: a title that is not on the list, no model loaded, or a file that cannot be read.
    """
    if title in (None, "", LOADED):
        return _read_loaded()
    filename = host().checkpoints().get(title) if isinstance(title, str) else None
    if filename is None:
        raise Refused(f"There is no checkpoint {shown(title, 200)} on the web UI's list.")
    return _read_file(filename)


def rows_for(
    title: str | None, width: int, height: int, batch: int, settings: Settings
) -> tuple[Checkpoint, list[Row]]:
    """The checkpoint and its plan table; without the rows of what is not ours.

    Raises:
        Refused: as `read`, or a size or batch out of range.
    """
    width, height = (_whole(name, value, 64, LARGEST_SIDE) for name, value in (("Width", width), ("Height", height)))
    batch = _whole("Batch", batch, 1, LARGEST_BATCH)
    checkpoint = with_size_note(read(title), width, height)
    if not host().active:
        checkpoint = replace(checkpoint, notes=(NOT_ACTIVE, *checkpoint.notes))
    layers = _ours(checkpoint, settings)
    return checkpoint, explain(layers, width, height, batch, host().dtype(), host().device(), settings)


def largest(checkpoint: Checkpoint, width: int, height: int, batch: int, settings: Settings) -> tuple[int, int] | None:
    """(width, height) of the largest image in these proportions whose attention stays inside the memory limit."""
    layers = _ours(checkpoint, settings)
    return largest_image(layers, int(width), int(height), int(batch), host().dtype(), host().device(), settings)


def _ours(checkpoint: Checkpoint, settings: Settings) -> list[AttentionLayer]:
    parts = host().parts(settings)
    return [layer for layer in checkpoint.layers if (UNET if layer.part == "unet" else VAE) in parts]


def _read_loaded() -> Checkpoint:
    loaded = host().loaded()
    if loaded.filename or loaded.shapes is None:
        checkpoint = _read_file(loaded.filename)
    else:
        checkpoint = _describe(lambda: from_shapes(loaded.shapes()))
    return replace(checkpoint, notes=(loaded.note, *checkpoint.notes)) if loaded.note else checkpoint


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
