"""How much memory something needs at its peak, on top of what was there before."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Use as `with PeakMemory(device) as peak: ...`; `peak.bytes` holds the answer afterwards.

    On CUDA PyTorch's own count; elsewhere the process's resident memory, from the kernel's high-water mark on Linux and
    sampled a thousand times a second where there is none that can be reset.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self._meter = _Cuda(self.device)
        else:
            _trim()
            self._meter = _HighWaterMark() if _HighWaterMark.reset() else _Sampler()
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = max(self._meter.stop(), 0)


class _Cuda:
    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _HighWaterMark:
    """Linux: writing 5 to clear_refs brings the mark down to what is resident now (man 5 proc)."""

    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self):
        self.before = self._read()

    def stop(self) -> int:
        return self._read() - self.before

    @classmethod
    def reset(cls) -> bool:
        """Whether the mark could be brought down; some containers forbid it, some kernels have none."""
        try:
            cls.clear_refs.write_text("5")
            cls._read()
        except (OSError, TypeError):
            return False
        return True

    @classmethod
    def _read(cls) -> int:
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", cls.status.read_text(), re.MULTILINE)[1])


class _Sampler:
    def __init__(self):
        self.process = psutil.Process()
        self.before = self.peak = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return self.peak - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.process.memory_info().rss)


def _trim() -> None:
    # glibc keeps what was freed; without this one run's leavings would pass for memory that the next does not need
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
