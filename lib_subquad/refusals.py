"""Engines that refused in the middle of a call what they had said they can do.

No list of rules is complete: kernels say no to what nobody foresaw. A refusal costs nothing but time: the next engine
goes on.
"""

from __future__ import annotations

from functools import cache

import torch

from . import console
from . import device as devices
from .problem import Problem

# Words of such errors.
FATAL_TEXTS = (
    "illegal memory access",
    "illegal address",
    "illegaladdress",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable",
    "device lost",
    "device_lost",
    "hardware error",
    "hardware stack error",
    "context is destroyed",
    "driver shutting down",
)
# PyTorch gives it with every error of a CUDA or HIP device.
ADVICE = "to enable device-side assertions"
# By class and not by ancestry: what others derive from these is control flow, such as what `torch.utils.checkpoint`
# raises through a kernel.
REFUSING = (RuntimeError, NotImplementedError, getattr(torch, "AcceleratorError", RuntimeError))


class WrongResult(RuntimeError):
    """What an engine computed is not what it should be; the message says which, and by how much."""


_refused: dict[tuple[Problem, str, tuple[bool, ...]], str] = {}


def is_refusal(error: Exception) -> bool:
    """Whether an engine's kernel says no to this call, and another one may still do it."""
    if isinstance(error, WrongResult):
        return True
    if type(error) not in REFUSING or devices.is_out_of_memory(error) or devices.is_captured():
        return False
    return not is_fatal(error)


def is_fatal(error: Exception) -> bool:
    """Whether the device computes nothing more after it that could be trusted."""
    text = str(error).lower().replace(ADVICE, "")
    return any(fatal in text for fatal in FATAL_TEXTS)


def reason(engine: str, error: Exception) -> str:
    """Why this engine gave way, in words."""
    if isinstance(error, WrongResult):
        return str(error)
    return f"the {engine} kernel refused these sizes: {console.first_line(error)}"


def remember(problem: Problem, engine: str, reason: str) -> None:
    """This engine is not asked for this problem again until `forget()`, as long as PyTorch's switches are as they are:
    with others it has another kernel."""
    _refused[problem, engine, devices.switches()] = reason
    _warn_once(f"[subquad] {reason}. The next engine goes on")


def of(problem: Problem, engine: str) -> list[str]:
    """Why this engine is not to be asked, if it refused before."""
    reason = _refused.get((problem, engine, devices.switches())) if _refused else None
    return [reason] if reason else []


def forget() -> None:
    _refused.clear()
    _warn_once.cache_clear()


_warn_once = cache(console.warn)
