"""PyTorch's fused kernel for heads of widths that it does not take: columns of zeros are added up to one that it does.

Exact: zeros add nothing to a score, whose scale stays that of the true width, and the result's are cut off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from ..problem import Problem, item_bytes
from ..settings import Settings
from . import fused, whole
from .base import Sizes, call_bytes
from .whole import kept_bytes as kept_bytes
from .whole import least_bytes as least_bytes
from .whole import rows_at_once as rows_at_once
from .whole import smaller as smaller
from .whole import taking_over as taking_over

NAME = "padded"
EXACT = True
SPLITS_KEYS = False
DIFFERENTIABLE = True
WHY = "PyTorch has a fused kernel for these sizes with columns of zeros added"

STEPS = (8, 16, 32, 64)  # kernels take multiples of such numbers


def unasked(problem: Problem) -> bool:
    return devices.rules(problem.device).pads


def why_not(problem: Problem) -> list[str]:
    reasons = fused.why_not(problem)
    if not reasons:
        return ["the fused kernel takes these widths as they are"]
    return reasons if _wide(problem) is problem else []  # the very same: nothing is to be said of zeros


def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
    return ["how wide heads are is not known before a program is traced"]


def _wide(problem: Problem) -> Problem:
    """The problem with widths that the fused kernel takes; the very same where there are none."""
    device = problem.device
    try:
        return _widened(problem, (devices.switches(), devices.rules(device), devices.fused_widths(device)))
    except LookupError:
        return problem


@lru_cache(maxsize=1024)
def _widened(problem: Problem, state: tuple[object, ...]) -> Problem:
    """Asked at every call. An exception is nothing to remember: what said no may have had no memory to answer."""
    for width in _widths(problem):
        wide = replace(problem, width=width, value_width=width)
        if not fused.why_not(wide) and not _too_large(wide, 0):
            return wide
    raise LookupError(problem.width)


def _widths(problem: Problem) -> Iterator[int]:
    """Those worth a try, from the narrowest on."""
    least = max(problem.width, problem.value_width)
    known = devices.fused_widths(problem.device)
    for width in known or sorted({least, *(least + -least % step for step in STEPS)}):
        if width >= least and (width, width) != (problem.width, problem.value_width):
            yield width


def _too_large(wide: Problem, queries: int) -> bool:
    return fused.too_large(wide, wide.batch * wide.heads * max(wide.keys, queries) * wide.width)


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    wide = _wide(problem)
    bounded = fused.bounded(workspace_bytes, lambda problem, queries: _too_large(wide, queries))
    return whole.fitting(bounded, problem, settings, limit)


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    wide, heads = _wide(problem), problem.batch * problem.heads
    padded = wide.width != problem.width, wide.width != problem.value_width

    def attend_bytes(queries: int) -> int:
        ours = padded[0] * (queries + problem.keys) * item_bytes(problem.dtype)
        ours += padded[1] * problem.keys * item_bytes(problem.value_dtype)
        return heads * wide.width * ours + fused.attend_bytes(wide, queries, padded)

    total = call_bytes(problem, sizes.queries, attend_bytes)
    if sizes.queries < problem.queries:  # one result, zeros and all, stays beside the next
        total += heads * sizes.queries * (wide.width - problem.value_width) * item_bytes(problem.value_dtype)
    return total + fused.kept_for_gradients(problem)


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    wide = _wide(problem)
    query, key, value = (_with_zeros(tensor, wide.width) for tensor in (query, key, value))
    output, _ = fused.attend(wide, sizes, query, key, value, mask, scale)
    return output[..., : problem.value_width], None


def attend_traced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    width, value_width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (_with_zeros(tensor, width) for tensor in (query, key, value))
    return fused.attend_traced(query, key, value, mask, scale)[..., :value_width]


def _with_zeros(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[-1])) if width > tensor.shape[-1] else tensor
