"""What the user typed, checked; whatever is wrong with it becomes one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib_subquad.console import UserError
from lib_subquad.lab.commands.files import writable_file
from lib_subquad.lab.explain import sizes

SIDE_STEP = 64  # the VAE shrinks by 8, an SD 1 U-Net by 8 again
SIDE_MAX, STEPS_MAX = 2048, 150  # as far as the web UI's own sliders go


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "256" or "512x384".

    Raises:
        UserError: the text is no size, or a side does not suit the model.
    """
    return sizes.parse_size(text, SIDE_STEP, SIDE_MAX)


def check_size(width: int, height: int) -> None:
    """Raise UserError unless both sides suit the model."""
    for name, side in (("Width", width), ("Height", height)):
        sizes.side(name, side, SIDE_STEP, SIDE_MAX)


def check_steps(steps: int) -> None:
    """Raise UserError unless the sampler can take so many steps."""
    if not 1 <= steps <= STEPS_MAX:
        raise UserError(f"steps is {steps}; expected 1 to {STEPS_MAX}")


def check_output(path: str) -> Path:
    """The file to write: a PNG, because only that keeps the infotext."""
    if not path.lower().endswith(".png"):
        raise UserError(f"output {path!r} must end in .png")
    try:
        return writable_file(path)
    except UserError as e:
        raise UserError(f"output {e}") from e


def parse_setting(text: str, opts) -> tuple[str, Any]:
    """Key and value from "key=value", the value in the type of that setting of `opts`."""
    key, equals, value = text.partition("=")
    if not equals or key not in opts.data_labels:
        known = ", ".join(sorted(opts.data_labels))
        raise UserError(f"setting {text!r}: expected key=value with a key out of {known}")
    if isinstance(opts.data_labels[key].default, bool):
        words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
        if value.lower() not in words:
            raise UserError(f"setting {text!r}: expected true or false")
        return key, words[value.lower()]
    try:
        return key, opts.cast_value(key, value)
    except (TypeError, ValueError) as e:
        raise UserError(f"setting {text!r}: expected a value like {opts.data_labels[key].default!r}") from e
