"""Time and peak memory of what is done in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from ..console import say
from ..device import give_back_freed_memory as give_back_freed_memory

Stop = Callable[[], int]  # ends a measurement: bytes at the peak, beside what was there before


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    module = {"cuda": torch.cuda, "mps": getattr(torch, "mps", None), "xpu": getattr(torch, "xpu", None)}
    if (found := module.get(device.type)) is not None:
        found.synchronize()
    elif device.type != "cpu":  # DirectML has no such function: what is fetched comes after all that was asked before
        torch.zeros(1, device=device).to("cpu")


def measure(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes as `PeakMemory` has them) of one call, its result included."""
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        result = call()
        synchronize(device)
        seconds = time.perf_counter() - start
    del result
    return seconds, peak.bytes


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; `peak.bytes` afterwards is the most that was held beside what was there
    before, None where nothing tells it.

    On CUDA and XPU it is the allocator's own. On the CPU it is this process's resident memory: under Linux its
    high-water mark; where there is none that can be reset and `sampled` is true, what a thread saw a thousand times a
    second.
    """

    def __init__(self, device: torch.device, sampled: bool = False) -> None:
        self.device, self.sampled = device, sampled
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        synchronize(self.device)
        self._stop = self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = None if self._stop is None else max(0, self._stop())

    def _start(self) -> Stop | None:
        if self.device.type in ("cuda", "xpu"):
            return _allocator(self.device)
        if self.device.type != "cpu":
            return None
        return _high_water_mark() or (_samples() if self.sampled else None)


def _allocator(device: torch.device) -> Stop:
    module = getattr(torch, device.type)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    return lambda: module.max_memory_allocated(device) - before


def _high_water_mark() -> Stop | None:
    """Some containers forbid to reset it, some kernels have none."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # down to what is resident now: proc(5)
    except OSError:
        return None
    before = _status_bytes("VmRSS:")
    if before is None or _status_bytes("VmHWM:") is None:
        return None
    return lambda: (_status_bytes("VmHWM:") or before) - before


def _status_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None


def _samples() -> Stop | None:
    try:
        import psutil
    except ImportError:
        say("psutil is not installed: no peak memory on this system")
        return None
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()

    def stop() -> int:
        done.set()
        watcher.join()
        return peak - before

    return stop
