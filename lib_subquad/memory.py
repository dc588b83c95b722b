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
    """What was free, in bytes, and when that was asked, by `clock`."""

    free_bytes: int
    at: float


_readings: dict[torch.device, Reading] = {}


def reading(device: torch.device) -> Reading:
    """The last answer of this device; a new one if that is older than `GREATEST_AGE` or forgotten."""
    known = _readings.get(device)
    if known is None or not 0 <= clock() - known.at < GREATEST_AGE:
        known = _readings[device] = Reading(devices.free_bytes(device), clock())
    return known


def forget() -> None:
    """Ask anew at the next call: memory ran out, or something large is about to begin."""
    _readings.clear()
