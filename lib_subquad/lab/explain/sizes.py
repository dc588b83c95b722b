"""The sizes of images: which can be asked about, and how one is written."""

from __future__ import annotations

import re
from typing import Any

from ...console import UserError
from ...settings import shown

STEP = 64  # pixels; the web UI's sizes are multiples of it or are rounded to 8
SMALLEST_SIDE = STEP
LARGEST_SIDE = 16384  # the largest image that an answer names can be asked about as well
WRITTEN = re.compile(r"(\d{1,9})(?:[xX×](\d{1,9}))?")


def parse_size(text: str, step: int = 1, largest: int = LARGEST_SIDE) -> tuple[int, int]:
    """(width, height) of "512" or "1024x1536".

    Raises:
        UserError: anything else, or a side that `side` refuses.
    """
    match = WRITTEN.fullmatch(text.strip())
    if match is None:
        raise UserError(f"size is {shown(text)}; expected pixels such as 512 or 1024x1536")
    return side("Width", int(match[1]), step, largest), side("Height", int(match[2] or match[1]), step, largest)


def side(name: str, value: Any, step: int = 1, largest: int = LARGEST_SIDE) -> int:
    """One side of an image, in pixels, from what was typed or sent.

    Raises:
        UserError: no multiple of `step` from `SMALLEST_SIDE` to `largest`.
    """
    return whole(name, value, SMALLEST_SIDE, largest, step)


def whole(name: str, value: Any, least: int, most: int, step: int = 1) -> int:
    """A whole number from a page's 512.0, a request's "512", or a number.

    Raises:
        UserError: it is none, is out of range, or is no multiple of `step`; the message calls it `name`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if isinstance(value, bool) or not (least <= number <= most and number % step == 0):
        # A page sends nothing for a field in which letters stand, too.
        given = "empty or no number" if value is None else shown(value)
        kind = "whole number" if step == 1 else f"multiple of {step}"
        raise UserError(f"{name} is {given}; it must be a {kind} from {least} to {most}.")
    return int(number)


def in_proportion(width: int, height: int) -> list[tuple[int, int]]:
    """The sizes in about these proportions, both sides multiples of `STEP`, the smallest first."""
    longer = max(width, height)

    def scaled(length: int, side: int) -> int:
        return max(STEP, round(side * length / longer / STEP) * STEP)

    return [(scaled(width, side), scaled(height, side)) for side in range(STEP, LARGEST_SIDE + 1, STEP)]
