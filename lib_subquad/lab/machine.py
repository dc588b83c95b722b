"""The machine that measures: what it is, and what other programs do on it meanwhile."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform

import torch

from .. import identity


def environment(device: str, threads: int | None = None) -> dict[str, object]:
    """What a measurement depends on beside its arguments."""
    return {
        "device": identity.device_name(torch.device(device)),
        "threads": (threads or torch.get_num_threads()) if torch.device(device).type == "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": load(),
    }


def bring_backend(device: str) -> None:
    """Import the package of its own that PyTorch has such a device from: DirectML's."""
    if device.startswith("privateuseone"):
        with contextlib.suppress(ImportError):
            importlib.import_module("torch_directml")


def load() -> float | None:
    """How many processes wanted to run in the last minute, where the system tells: what else a CPU was doing."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


Seconds = tuple[float, float, float]


def processor_seconds() -> Seconds | None:
    """(all that there was, what programs took of it, what this one took) since the start, where the system tells."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
        idle = seconds[3] + seconds[4]  # waiting for disks
    except (OSError, ValueError, AttributeError):  # only Linux has the file, and Windows has no sysconf
        try:
            import psutil
        except ImportError:
            return None
        times = psutil.cpu_times()
        seconds, idle = list(times), times.idle
    own = os.times()
    return sum(seconds), sum(seconds) - idle, own.user + own.system


def share_of_others(before: Seconds | None, after: Seconds | None) -> float | None:
    if before is None or after is None or after[0] == before[0]:
        return None
    everything, busy, own = (late - early for early, late in zip(before, after))
    return min(max(0.0, (busy - own) / everything), 1.0)
