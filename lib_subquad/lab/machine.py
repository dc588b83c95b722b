"""The machine that measures: what it is, and what other programs do on it meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys

import torch


def environment(device: str, threads: int | None = None) -> dict[str, object]:
    """What a measurement depends on beside its arguments."""
    return {
        "device": device_name(device),
        "threads": (threads or torch.get_num_threads()) if torch.device(device).type == "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": load(),
    }


def device_name(device: str) -> str:
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).get_device_name(device)
    if kind == "privateuseone" and "torch_directml" in sys.modules:
        return sys.modules["torch_directml"].device_name(torch.device(device).index or 0).rstrip("\0 ")
    return _processor() if kind in ("cpu", "mps") else kind  # Apple's are one chip


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS, whose platform.processor() is "arm"
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=20, check=True)
        return done.stdout.strip()
    return platform.processor() or platform.machine()


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
    except (OSError, ValueError, AttributeError):  # only Linux has the file, and Windows has no sysconf
        return None
    own = os.times()
    return sum(seconds), sum(seconds) - seconds[3] - seconds[4], own.user + own.system  # idle, and waiting for disks


def share_of_others(before: Seconds | None, after: Seconds | None) -> float | None:
    if before is None or after is None or after[0] == before[0]:
        return None
    everything, busy, own = (late - early for early, late in zip(before, after))
    return min(max(0.0, (busy - own) / everything), 1.0)
