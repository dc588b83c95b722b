"""What a device is and what drives it, as far as measurements depend on it: nothing that names a user, a computer or a
file."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from functools import cache

import torch

PATIENCE = 5  # seconds for a program that tells of a device


def device_name(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    if device.type == "privateuseone" and "torch_directml" in sys.modules:
        return sys.modules["torch_directml"].device_name(device.index or 0).rstrip("\0 ")
    return processor() if device.type in ("cpu", "mps") else device.type  # Apple's are one chip


@cache
def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS, whose platform.processor() is "arm"
        return _first_line("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def driver(device: torch.device) -> str:
    """What drives it, with its version; "none" for the CPU, "" where nobody tells.

    Raises:
        OSError, subprocess.SubprocessError: the program that tells is missing, or fails.
    """
    if device.type == "cuda" and torch.version.hip:
        with contextlib.suppress(OSError), open("/sys/module/amdgpu/version", encoding="utf-8") as file:  # AMD's own
            return f"amdgpu {file.read().strip()}"
        return ""
    if device.type == "cuda":
        return f"NVIDIA {_nvidia()}"
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).driver_version
    if device.type == "mps":
        return f"macOS {platform.mac_ver()[0]}"
    return "none" if device.type == "cpu" else ""


@cache
def _nvidia() -> str:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _first_line(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE, check=True
    )
    return done.stdout.strip().splitlines()[0].strip()
