"""flash-attn 2 (Dao-AILab/flash-attention, BSD-3-Clause), where the user has installed it.

Called as its versions 2.0 to 2.8 have it: `flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, …)`, tensors
[batch, tokens, heads, width] of any strides but the last. Gradients are its own, of a call that is made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import HALF_DTYPES, Problem, item_bytes
from ..settings import Settings
from . import packages, whole
from .base import Kept, Sizes
from .packages import Package, as_given, positive, with_heads_last
from .packages import attend_traced as attend_traced
from .packages import why_not_traced as why_not_traced
from .whole import kept_bytes as kept_bytes
from .whole import least_bytes as least_bytes
from .whole import rows_at_once as rows_at_once
from .whole import smaller as smaller
from .whole import taking_over as taking_over

NAME = "flash-attn"
EXACT = True
SPLITS_KEYS = False
DIFFERENTIABLE = False
WHY = "flash-attn has a kernel for these sizes"

PACKAGE = Package("flash-attn", "flash_attn", ["flash_attn_func"])
installed = PACKAGE.installed
version = PACKAGE.version

# csrc/flash_attn/flash_api.cpp, mha_fwd() and set_params_splitkv()
WIDEST = 256
OLDEST = (8, 0)  # compute capability: Ampere
WIDTH_STEP = 8  # others are padded
MOST_SPLITS, SPLIT_KEYS, SPLIT_QUERIES = 128, 64, 64
MOST_PROCESSORS = 192  # no card has more; fewer blocks than there are processors are split by keys


def why_not(problem: Problem) -> list[str]:
    return packages.why_not(PACKAGE, problem, _refuses)


def _refuses(problem: Problem) -> list[str]:
    reasons = []
    if {problem.upcast_dtype, problem.value_dtype} - set(HALF_DTYPES):
        given = packages.in_words(problem.upcast_dtype, problem.value_dtype)
        reasons.append(f"flash-attn takes float16 and bfloat16, not {given}")
    if problem.mask is not None:
        reasons.append("flash-attn takes no mask")
    if problem.width > WIDEST:
        reasons.append(f"flash-attn takes heads up to {WIDEST} wide, not {problem.width}")
    if problem.value_width != problem.width:
        reasons.append("flash-attn takes no values of another width than the keys")
    if (capability := packages.capability(problem.device)) is not None and capability < OLDEST:
        reasons.append("flash-attn needs an RTX 30 or newer")
    return reasons


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    return whole.fitting(workspace_bytes, problem, settings, limit)


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    return packages.workspace_bytes(problem, sizes, _attend_bytes)


def _attend_bytes(problem: Problem, queries: int) -> int:
    item, heads = item_bytes(problem.upcast_dtype), problem.batch * problem.heads
    padded = -(-problem.width // WIDTH_STEP) * WIDTH_STEP
    more = 0
    if padded > problem.width:  # and the result, of which a part is ours
        more = heads * ((queries + 2 * problem.keys) * padded + queries * (padded - problem.width)) * item
    logsumexp = heads * queries * 4
    blocks = max(heads * math.ceil(queries / SPLIT_QUERIES), 1)
    splits = min(MOST_SPLITS, math.ceil(problem.keys / SPLIT_KEYS), MOST_PROCESSORS // blocks)
    parts = heads * queries * (padded + 1) * 4 * splits if splits > 1 else 0
    return packages.cast_bytes(problem, queries) + more + logsumexp + parts + packages.result_bytes(problem, queries)


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    query, scale = positive(query, scale)
    given = [as_given(tensor, problem.upcast_dtype) for tensor in (query, key, value)]
    if not problem.grad:
        return with_heads_last(_called(given, scale)).to(problem.value_dtype), None
    output, logsumexp, *_ = _called(given, scale, return_attn_probs=True)  # of which there are none without dropout
    statistics = packages.statistics_of(logsumexp, query.shape[2], None)
    return with_heads_last(output).to(problem.value_dtype), statistics


def gradients(
    kept: Kept, grad_output: Tensor, scale: float, sizes: Sizes, wanted: Sequence[bool]
) -> list[Tensor | None]:
    return packages.gradients_in_chunks(_backward, kept, grad_output, scale, sizes, wanted)


def _backward(rows: slice, given: Sequence[Tensor], grad: Tensor, scale: float) -> Sequence[Tensor]:
    with torch.enable_grad():
        leaves = [it.detach().requires_grad_() for it in given]
        output = _called(leaves, scale)
    return packages.call(torch.autograd.grad, output, leaves, grad)


def _called(given: Sequence[Tensor], scale: float, **more: bool):  # type: ignore[no-untyped-def]  # one tensor or three
    function = PACKAGE.module.flash_attn_func
    return packages.call(function, *given, dropout_p=0.0, softmax_scale=scale, causal=False, **more)
