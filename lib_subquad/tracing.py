"""Whether PyTorch is looking at a call rather than making it.

Compilers and exporters run a program on tensors without numbers, transforms of torch.func on tensors that stand for
many: plans, probes and retries mean nothing there, and what was asked there must not be remembered for real calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import trust
from .engines import order
from .plan import Plan
from .problem import HALF_DTYPES
from .settings import Settings

# Private, or newer than torch 2.0; without them nothing is taken for traced.
is_compiling = (
    getattr(getattr(torch, "compiler", None), "is_compiling", None)
    or getattr(torch._utils, "is_compiling", None)
    or bool  # False
)
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_jit_trace = getattr(torch._C, "_get_tracing_state", lambda: None)
WITHOUT_NUMBERS = ("FakeTensor", "FunctionalTensor")


def is_recorded() -> bool:
    """Whether the program is written down: by a compiler, an exporter or torch.jit.trace."""
    return is_compiling() or _jit_trace() is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode derivatives are computed."""
    return _transform() is not None or getattr(forward_ad, "_current_level", -1) >= 0


def is_traced(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this call is traced, exported, compiled or transformed."""
    if is_recorded() or is_transformed():
        return True
    if type(query) is type(key) is type(value) is Tensor:  # as nearly always
        return False
    return any(type(tensor).__name__ in WITHOUT_NUMBERS for tensor in (query, key, value))


def attend_traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    settings: Settings,
    report: Callable[[Plan], None] | None,
) -> Tensor:
    """attention() in operators that can be traced and transformed, without a plan."""
    dtype = torch.float32 if settings.upcast == "always" and query.dtype in HALF_DTYPES else query.dtype
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    given = query.to(dtype), key.to(dtype), value.to(dtype), mask, scale
    able = [engine for engine in order.exact(settings.engine) if not engine.why_not_traced(query.device, mask)]
    if is_compiling():  # reads this very code, so that nothing outside it must be touched
        return able[0].attend_traced(*given).to(value.dtype)
    able = [engine for engine in able if not trust.is_distrusted(engine, query.device)] or able[-1:]
    for engine in able:
        try:
            output = engine.attend_traced(*given)
            break
        except RuntimeError:  # torch 2.1 has no batching rule for its own
            if engine is able[-1]:
                raise
    if report is not None:
        sizes = query.shape[-2], key.shape[-2], query.shape[-3] if query.dim() > 2 else 1
        report(Plan(engine.NAME, *sizes, 0, ("it is traced or transformed: PyTorch decides how it is computed",)))
    return output.to(value.dtype)
