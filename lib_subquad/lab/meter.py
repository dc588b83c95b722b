"""Time and peak memory of one call, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    module = {"cuda": torch.cuda, "mps": getattr(torch, "mps", None), "xpu": getattr(torch, "xpu", None)}
    if module.get(device.type) is not None:
        module[device.type].synchronize()


def measure(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes beside what was there before) of one call, its result included.

    The peak is the allocator's on CUDA and XPU, the resident high-water mark of this process on the CPU under Linux,
    and None where nothing tells it.
    """
    synchronize(device)
    before = _start_peak(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = _peak(device)
    del result
    return seconds, None if before is None or peak is None else max(0, peak - before)


def _start_peak(device: torch.device) -> int | None:
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        module.reset_peak_memory_stats(device)
        return module.memory_allocated(device)
    if device.type == "cpu":
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the high-water mark: proc(5)
        except OSError:
            return None
        return _status_bytes("VmRSS:")
    return None


def _peak(device: torch.device) -> int | None:
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device)
    return _status_bytes("VmHWM:") if device.type == "cpu" else None


def _status_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None
