"""Whether PyTorch is looking at a call rather than making it.

Compilers and exporters run a program on tensors without numbers, transforms of torch.func on tensors that stand for
many: plans, probes and retries mean nothing there, and what was asked there must not be remembered for real calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Private, or newer than torch 2.0; without them nothing is taken for traced.
_is_compiling = (
    getattr(getattr(torch, "compiler", None), "is_compiling", None)
    or getattr(torch._utils, "is_compiling", None)
    or bool  # False
)
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
WITHOUT_NUMBERS = ("FakeTensor", "FunctionalTensor")


def is_traced(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this call is traced, exported, compiled or transformed."""
    if _is_compiling() or _transform() is not None:
        return True
    for tensor in (query, key, value):
        if type(tensor) is not Tensor and type(tensor).__name__ in WITHOUT_NUMBERS:
            return True
    return False


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is reading this very code, so that nothing outside it must be touched."""
    return _is_compiling()
