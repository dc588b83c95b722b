"""The device and what drives it, in words: nothing that names the user, the computer or a file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence

import torch

from ... import __version__, identity
from ... import device as devices
from .. import tables
from ..anonymous import anonymous

NOT_TOLD = "not told"
BESIDE = ("xformers", "flash-attn", "sageattention", "triton", "triton-windows", "diffusers", "torch-directml",
          "intel-extension-for-pytorch")  # fmt: skip
SWITCHES = ("flash", "mem_efficient", "cudnn", "math")
# What changes the kernels, the allocator or the threads. Others may hold somebody's names, so no other is ever told.
VARIABLES = (
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
    "TORCH_ROCM_FA_PREFER_CK",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE",
    "HSA_OVERRIDE_GFX_VERSION",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "MIOPEN_FIND_MODE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_LAUNCH_BLOCKING",
    "TORCH_CUDNN_SDPA_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "PYTORCH_MPS_LOW_WATERMARK_RATIO",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
    "UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
)


def facts(device: torch.device) -> list[tuple[str, str]]:
    """(what, its value) of all that a device's behaviour may depend on. Never raises."""
    return [
        ("subquad", __version__),
        ("Device", _safe(lambda: f"{identity.device_name(device)} ({device})")),
        ("Architecture", _safe(lambda: architecture(device))),
        ("Memory", _safe(lambda: _memory(device))),
        ("Driver", _safe(lambda: identity.driver(device))),
        ("PyTorch", _safe(_pytorch)),
        ("Beside it", _safe(_packages)),
        ("Python", _safe(lambda: f"{platform.python_implementation()} {platform.python_version()}")),
        ("System", _safe(lambda: anonymous(f"{platform.system()} {platform.release()}, {platform.machine()}"))),
        ("Processor", _safe(lambda: f"{identity.processor()}, {torch.get_num_threads()} threads")),
        ("PyTorch's kernels", _safe(_switches)),
        ("Rules of the device", _safe(lambda: _rules(device))),
        ("Environment", _safe(_variables)),
    ]


def _safe(ask: Callable[[], str]) -> str:
    try:
        return ask() or NOT_TOLD
    except Exception as error:  # a driver that does not answer is worth a report above all
        return f"{NOT_TOLD} ({type(error).__name__})"


def architecture(device: torch.device) -> str:
    """What kernels are built for: "gfx1101", "compute capability 8.9", "AVX2"; "" where nobody tells."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return properties.gcnArchName
        return f"compute capability {properties.major}.{properties.minor}"
    if device.type == "cpu":
        return getattr(torch.backends.cpu, "get_cpu_capability", str)()  # newer than torch 2.0
    return ""


def _memory(device: torch.device) -> str:
    free, total = devices.free_bytes(device), devices.total_bytes(device)
    if devices.UNKNOWN_FREE_BYTES in (free, total):
        return f"{NOT_TOLD}; {tables.memory(devices.UNKNOWN_FREE_BYTES)} are taken to be free"
    return f"{tables.memory(free)} free of {tables.memory(total)}"


def _pytorch() -> str:
    builds = [("CUDA", torch.version.cuda), ("HIP", torch.version.hip), ("XPU", getattr(torch.version, "xpu", None))]
    told = [f"{name} {version}" for name, version in builds if version]
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_built():
        told.append("MPS")
    return f"{torch.__version__}, built for {', '.join(told) or 'the CPU only'}"


def _packages() -> str:
    found = []
    for name in BESIDE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found) or "none of those that bring kernels"


def _switches() -> str:
    return ", ".join(f"{name} {'on' if enabled else 'off'}" for name, enabled in _enabled().items())


def switched_off() -> list[str]:
    """PyTorch's fused kernels that somebody has switched off, by the names that its functions have for them."""
    return [name for name, enabled in _enabled().items() if not enabled and name != "math"]


def _enabled() -> dict[str, bool]:
    asked = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled", None) for name in SWITCHES}
    return {name: bool(ask()) for name, ask in asked.items() if ask is not None}


def _rules(device: torch.device) -> str:
    rules, usual = devices.rules(device), devices.Rules()
    others = [
        f"{field.name} = {getattr(rules, field.name)!r}"
        for field in dataclasses.fields(rules)
        if getattr(rules, field.name) != getattr(usual, field.name)
    ]
    return f"{devices.kind(device)}: {', '.join(others) or 'none beside the usual ones'}"


def _variables(names: Sequence[str] = VARIABLES) -> str:
    told = [f"{name}={anonymous(os.environ[name])}" for name in names if name in os.environ]
    return ", ".join(told) or "none of those that matter is set"
