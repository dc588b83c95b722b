"""How much memory is free, asked no more often than it changes.

The question is slow: files of the control group on Linux, on CUDA the allocator's whole dictionary of statistics.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from . import device as devices

GREATEST_AGE = 0.25  # seconds
clock = time.monotonic


class Reading(NamedTuple):
    """A number of bytes to plan by, and when it was asked for, by `clock`."""

    bytes: int
    at: float


_readings: dict[tuple[torch.device, bool], Reading] = {}


def reading(device: torch.device, lasting: bool = False) -> Reading:
    """What is free on this device, asked for anew when that is older than `GREATEST_AGE` or forgotten.

    `lasting`: all that there is instead, which does not change. Calls whose gradients are wanted are planned by it:
    whoever recomputes a forward pass must find the same engine and the same chunks, whatever is free by then.
    """
    known = _readings.get((device, lasting))
    if known is None or not lasting and not 0 <= clock() - known.at < GREATEST_AGE:
        asked = devices.total_bytes if lasting else devices.free_bytes
        known = _readings[device, lasting] = Reading(asked(device), clock())
    return known


def forget() -> None:
    """Ask anew at the next call: memory ran out, or something large is about to begin."""
    _readings.clear()
