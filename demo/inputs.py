"""What the user typed, checked; whatever is wrong with it becomes one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib_subquad.lab.cli import writable_file

SIDE_STEP, SIDE_MAX, STEPS_MAX = 64, 2048, 150


class DemoError(Exception):
    """Something that the user can put right; the message says what."""


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "256" or "512x384".

    Raises:
        DemoError: the text is no size, or a side is not a multiple of 64 within the limits.
    """
    parts = text.lower().split("x")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise DemoError(f"size {text!r} is not like 256 or 512x384")
    check_size(sides[0], sides[-1])
    return sides[0], sides[-1]


def check_size(width: int, height: int) -> None:
    """Raise DemoError unless both sides suit the model: the VAE shrinks by 8, an SD 1 U-Net by 8 again."""
    for side in (width, height):
        if side % SIDE_STEP or not SIDE_STEP <= side <= SIDE_MAX:
            raise DemoError(f"size {width}x{height}: sides must be multiples of {SIDE_STEP} up to {SIDE_MAX}")


def check_steps(steps: int) -> None:
    """Raise DemoError unless the sampler can take so many steps."""
    if not 1 <= steps <= STEPS_MAX:
        raise DemoError(f"steps is {steps}; expected 1 to {STEPS_MAX}")


def check_output(path: str) -> Path:
    """The file to write: a PNG, because only that keeps the infotext."""
    if not path.lower().endswith(".png"):
        raise DemoError(f"output {path!r} must end in .png")
    try:
        return writable_file(path)
    except ValueError as e:
        raise DemoError(f"output {e}") from e


def parse_setting(text: str, opts) -> tuple[str, Any]:
    """Key and value from "key=value", the value in the type of that setting of `opts`."""
    key, equals, value = text.partition("=")
    if not equals or key not in opts.data_labels:
        known = ", ".join(sorted(opts.data_labels))
        raise DemoError(f"setting {text!r}: expected key=value with a key out of {known}")
    if isinstance(opts.data_labels[key].default, bool):
        words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
        if value.lower() not in words:
            raise DemoError(f"setting {text!r}: expected true or false")
        return key, words[value.lower()]
    try:
        return key, opts.cast_value(key, value)
    except (TypeError, ValueError) as e:
        raise DemoError(f"setting {text!r}: expected a value like {opts.data_labels[key].default!r}") from e
