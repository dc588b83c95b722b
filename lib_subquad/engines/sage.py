"""SageAttention (thu-ml/SageAttention; version 1 is BSD-3-Clause, 2 Apache-2.0), where the user has chosen it.

Queries and keys are rounded to 8 bits and, on some cards, weights and values to 8 as well: fast, and *inexact*. Black
images of half-precision models are its commonest report (ComfyUI #8573, #9773, #13166), so that a result is looked at,
which waits for the device: with NaN or infinity where none was given, the call is an exact engine's.

Called as `sageattn(q, k, v, tensor_layout, is_causal, sm_scale)`, in which versions 1 and 2 agree.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .. import device as devices
from ..problem import HALF_DTYPES, Problem, item_bytes
from ..settings import Settings
from . import packages, whole
from .base import Sizes, UselessResult
from .packages import Package, positive, prepared
from .packages import attend_traced as attend_traced
from .packages import why_not_traced as why_not_traced
from .whole import kept_bytes as kept_bytes
from .whole import least_bytes as least_bytes
from .whole import rows_at_once as rows_at_once
from .whole import smaller as smaller
from .whole import taking_over as taking_over

NAME = "sage"
EXACT = False
SPLITS_KEYS = False
DIFFERENTIABLE = True  # it gives no gradients, and so is never asked for any
WHY = "it is set, and SageAttention takes these sizes"

PACKAGE = Package("SageAttention", "sageattention", ["sageattn"], distribution="sageattention")
installed = PACKAGE.installed
version = PACKAGE.version

WIDTHS = (64, 96, 128)  # of version 1; 2 pads others up to the widest


def why_not(problem: Problem) -> list[str]:
    return packages.why_not(PACKAGE, problem, _refuses) or _of_the_width(problem)


def _refuses(problem: Problem) -> list[str]:
    reasons = []
    if {problem.upcast_dtype, problem.value_dtype} - set(HALF_DTYPES) or problem.dtype != problem.value_dtype:
        given = packages.in_words(problem.upcast_dtype, problem.value_dtype)
        reasons.append(f"SageAttention takes float16 and bfloat16, not {given}")
    if problem.mask is not None:
        reasons.append("SageAttention takes no mask")
    if problem.grad:
        reasons.append("SageAttention gives no gradients")
    if problem.value_width != problem.width:
        reasons.append("SageAttention takes no values of another width than the keys")
    if problem.width > WIDTHS[-1]:
        reasons.append(f"SageAttention takes heads up to {WIDTHS[-1]} wide, not {problem.width}")
    return reasons


def _of_the_width(problem: Problem) -> list[str]:
    if _is_first() and problem.width not in WIDTHS:
        return [f"SageAttention 1 takes heads {', '.join(map(str, WIDTHS))} wide, not {problem.width}"]
    return []


def _is_first() -> bool:
    """Whether this is a version 1, or does not say what it is."""
    try:
        return "return_lse" not in inspect.signature(PACKAGE.module.sageattn).parameters
    except ValueError:
        return True


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    return whole.fitting(workspace_bytes, problem, settings, limit)


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    return packages.workspace_bytes(problem, sizes, _attend_bytes)


def _attend_bytes(problem: Problem, queries: int) -> int:
    """Keys that it may change, all padded, rounded to 8 bits, values in float16; and what looking at a result takes."""
    item, heads = item_bytes(problem.dtype), problem.batch * problem.heads
    width = next((width for width in WIDTHS if width >= problem.width), WIDTHS[-1])
    padded = (queries + 2 * problem.keys) * width * item if width > problem.width else 0
    rounded = (queries + problem.keys) * width + problem.keys * width * 2
    result = queries * width * item
    looking = queries * problem.value_width * (item + 3)
    return heads * (problem.keys * problem.width * item + result + max(padded + rounded, looking))


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    query, scale = positive(query, scale)
    given = [prepared(tensor, problem.dtype) for tensor in (query, key, value)]
    if given[1] is key and _is_first():  # which subtracts their mean from the keys that it is given
        given[1] = key.clone(memory_format=torch.contiguous_format)
    function = PACKAGE.module.sageattn
    output = packages.call(function, *given, tensor_layout="HND", is_causal=False, sm_scale=scale)
    if not devices.is_captured() and not output.isfinite().all() and _are_finite(query, key, value):
        raise UselessResult("sage gave NaN or infinity where there was none before")
    return output, None


def _are_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
