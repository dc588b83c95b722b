"""cuDNN's attention, which PyTorch brings but takes last on most cards: put first for the time of a call.

Twice as fast as what PyTorch takes on some cards (ComfyUI #9299), slower on others (sglang #38689): to be measured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from ..problem import Problem
from . import fused
from .base import Sizes
from .fused import attend_traced as attend_traced
from .fused import fitting as fitting
from .fused import kept_bytes as kept_bytes
from .fused import least_bytes as least_bytes
from .fused import rows_at_once as rows_at_once
from .fused import smaller as smaller
from .fused import taking_over as taking_over
from .fused import workspace_bytes as workspace_bytes

NAME = "cudnn"
EXACT = True
SPLITS_KEYS = False
DIFFERENTIABLE = True
WHY = "cuDNN has a kernel for these sizes, which is put before PyTorch's others"

# The order is one of the whole process. Two threads that put back what each had found would leave it changed.
_one_at_a_time = threading.RLock()


def installed() -> bool:
    """Whether this PyTorch was built with cuDNN; what AMD's has in its place has no attention."""
    return torch.version.hip is None and torch.backends.cudnn.is_available()


def version() -> str:
    return str(torch.backends.cudnn.version() or "")  # another one may lie beside PyTorch than it came with


def unasked(problem: Problem) -> bool:
    return devices.rules(problem.device).cudnn


def why_not(problem: Problem) -> list[str]:
    if not installed():
        return ["this PyTorch has no cuDNN"]
    if not devices.rules(problem.device).cudnn:
        return [f"cuDNN does not run on {devices.kind(problem.device)}"]
    if _order is None or _set_order is None:
        return [f"torch {torch.__version__}: cuDNN's kernel cannot be put first before 2.6"]
    if reasons := fused.why_no_kernel(problem):
        return reasons
    try:
        return list(_kernel_reasons(problem, devices.switches()))
    except Exception as error:  # it may be another function by then
        return [f"PyTorch does not say whether cuDNN has a kernel ({type(error).__name__})"]


@lru_cache(maxsize=1024)
def _kernel_reasons(problem: Problem, switches: tuple[bool, ...]) -> tuple[str, ...]:
    if fused.asked(problem, _can):
        return ()
    off = "" if torch.backends.cuda.cudnn_sdp_enabled() else " (it is switched off)"
    return (f"cuDNN has no attention kernel for these sizes on this card{off}",)


def _can(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    # PyTorch has its own order once it has chosen a kernel; before that, what is put back is another one.
    fused.choice(query, key, value, mask)
    asked = torch.backends.cuda
    return asked.can_use_cudnn_attention(asked.SDPAParams(query, key, value, mask, 0.0, False, False))


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    with _put_first():
        return fused.attend(problem, sizes, query, key, value, mask, scale)


@contextlib.contextmanager
def _put_first() -> Iterator[None]:
    """cuDNN's kernel comes first in here. The others stay switched on as they are, for other threads' calls."""
    with _one_at_a_time:
        before = _order()
        _set_order([fused.CUDNN_KERNEL, *(kernel for kernel in before if kernel != fused.CUDNN_KERNEL)])
        try:
            yield
        finally:
            _set_order(before)


def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
    return ["which kernel comes first is not part of a traced program"]


# What torch.nn.attention.sdpa_kernel(..., set_priority=True) does it with, from torch 2.6 on: private. That one forgets
# the places of kernels which are switched off, takes 38 us, and before it could only switch all other kernels off, so
# that calls of other threads found none.
_order: Any = getattr(torch._C, "_get_sdp_priority_order", None)
_set_order: Any = getattr(torch._C, "_set_sdp_priority_order", None)
