"""The checkpoints that a visitor may ask about: the loaded one, and those on the web UI's own list. Never a path."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from ..checkpoint import Checkpoint, from_shapes, read_attention_layers
from ..console import UserError
from ..lab.explain.question import Question
from ..settings import shown
from .hosts import host
from .hosts.base import UNET, VAE

LOADED = "the loaded checkpoint"
NOT_RUN = "This web UI does not run such a model: this is what its attention would cost."
NOT_ACTIVE = "subquad is not active now: this is how it would compute attention."


def titles() -> list[str]:
    return [LOADED, *host().checkpoints()]


def read(title: str | None) -> Checkpoint:
    """The attention layers of a checkpoint on the list.

    Raises:
        UserError: a title that is not on the list, no model loaded, or a file that cannot be read.
    """
    if title in (None, "", LOADED):
        return _read_loaded()
    filename = host().checkpoints().get(title) if isinstance(title, str) else None
    if filename is None:
        raise UserError(f"There is no checkpoint {shown(title, 200)} on the web UI's list.")
    return _of_file(filename)


def question(title: str | None, width: object, height: object, batch: object) -> Question:
    """What was asked, under the settings of now; without what is not ours.

    Raises:
        UserError: as `read`, or a size or batch out of range.
    """
    checkpoint, settings = read(title), host().settings()
    if not host().active:
        checkpoint = replace(checkpoint, notes=(NOT_ACTIVE, *checkpoint.notes))
    here, parts = host(), host().parts(settings)
    if here.does_not_run(checkpoint):
        checkpoint = replace(checkpoint, notes=(NOT_RUN, *checkpoint.notes))
    more = {"t5_tokens": here.t5_tokens, "model": UNET in parts, "vae": VAE in parts}
    return Question(checkpoint, width, height, batch, here.dtype(), here.device(), settings, **more)


def _read_loaded() -> Checkpoint:
    loaded = host().loaded()
    if loaded.filename or loaded.shapes is None:
        checkpoint = _of_file(loaded.filename)
    else:
        checkpoint = from_shapes(loaded.shapes())
    return replace(checkpoint, notes=(loaded.note, *checkpoint.notes)) if loaded.note else checkpoint


def _of_file(filename: str) -> Checkpoint:
    """Read once for each state of the file, and of the `.yaml` beside it: every image asks."""
    return _of_file_as_it_is(filename, tuple(map(_state, (filename, f"{os.path.splitext(filename)[0]}.yaml"))))


@lru_cache(maxsize=8)
def _of_file_as_it_is(filename: str, _states: tuple) -> Checkpoint:
    return read_attention_layers(filename)


def _state(filename: str) -> tuple[int, int] | None:
    try:
        found = os.stat(filename)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size
