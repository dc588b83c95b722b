"""xFormers' memory-efficient attention (facebookresearch/xformers, BSD-3-Clause), where the user has installed it.

Called as its versions 0.0.20 to 0.0.35 have it, all tensors [batch, tokens, heads, width]. With web UI 1.10.1 it brings
FlashAttention 2, where the PyTorch of that day has the first; newer ones are thin layers over PyTorch's own kernels.
Which of its operators can do what, it says itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from .. import memory
from ..problem import Problem, item_bytes
from ..settings import Settings
from ..tensors import as_small_as_it_is, rows_of
from . import packages, whole
from .base import Kept, Sizes
from .masks import rows_of_nothing, would_be_rounded
from .packages import Package, as_given, positive, with_heads_last
from .packages import attend_traced as attend_traced
from .packages import why_not_traced as why_not_traced
from .whole import kept_bytes as kept_bytes
from .whole import least_bytes as least_bytes
from .whole import rows_at_once as rows_at_once
from .whole import smaller as smaller
from .whole import taking_over as taking_over

NAME = "xformers"
EXACT = True
SPLITS_KEYS = False
DIFFERENTIABLE = False
WHY = "xformers has a kernel for these sizes"

PACKAGE = Package(
    "xformers",
    "xformers.ops",
    [
        "memory_efficient_attention_forward",
        "memory_efficient_attention_forward_requires_grad",
        "memory_efficient_attention_backward",
    ],
)
installed = PACKAGE.installed
version = PACKAGE.version

MASK_ALIGNMENT = 8  # elements: ops/fmha/cutlass.py, _check_bias_alignment()
LOGSUMEXP_ALIGNMENT = 32  # rows: csrc/attention/cuda/fmha/kernel_forward.h, kAlignLSE


def why_not(problem: Problem) -> list[str]:
    reasons = packages.why_not(PACKAGE, problem, _refuses)
    if reasons:
        return reasons
    try:
        return list(_declared(PACKAGE.module, problem, devices.switches()))
    except Exception as error:  # private, and another one in every version
        if devices.is_out_of_memory(error):
            memory.forget()  # so that it is asked again at the next call
        return [f"xformers does not say whether it has a kernel ({type(error).__name__})"]


def _refuses(problem: Problem) -> list[str]:
    if would_be_rounded(problem.mask_dtype, problem.upcast_dtype):
        return [f"the mask's {packages.in_words(problem.mask_dtype)} would be rounded for the kernel"]
    return []


@lru_cache(maxsize=1024)
def _declared(ops: Any, problem: Problem, switches: tuple[bool, ...]) -> tuple[str, ...]:
    """What its own dispatcher says of tensors of these sizes, laid out as `attend` gives them.

    Raises:
        Exception: whatever this version has in place of what was there before.
    """
    query, key = (_probe(problem, tokens, problem.width) for tokens in (problem.queries, problem.keys))
    inputs = ops.fmha.Inputs(
        query=query,
        key=key,
        value=_probe(problem, problem.keys, problem.value_width),
        attn_bias=None if problem.mask is None else _mask_probe(problem),
        p=0.0,
        scale=1.0,
    )
    if type(query) is not Tensor:
        raise RuntimeError("a mode of PyTorch's makes tensors without numbers, of which nothing is to be remembered")
    dispatch = ops.fmha.dispatch
    try:
        _either(dispatch._dispatch_fw, inputs, problem.grad)  # 0.0.20 takes the inputs alone
        if problem.grad:
            _either(dispatch._dispatch_bw, inputs, None)  # so do those before 0.0.27
    except NotImplementedError as error:
        return (f"xformers has no kernel for this: {_shortest(str(error))}",)
    return ()


def _either(function: Any, inputs: Any, more: Any) -> None:
    try:
        function(inputs, more)
    except TypeError:
        function(inputs)


def _shortest(told: str) -> str:
    """Of what it tells of each operator, what is about the one that lacks least.

    `name` is not supported because:
        a reason
        another
    """
    operators: list[tuple[str, list[str]]] = []
    for line in told.splitlines():
        if line.startswith("`"):
            operators.append((line.split("`")[1], []))
        elif operators and line.strip() and not line.strip().startswith("HINT"):
            operators[-1][1].append(line.strip())
    if not operators:
        return (told.strip().splitlines() or ["it does not say why"])[0]
    name, reasons = min(operators, key=lambda operator: len(operator[1]))
    return f"{name}: {', '.join(reasons)}"


def _probe(problem: Problem, tokens: int, width: int) -> Tensor:
    """A tensor of the problem's sizes on storage for one token."""
    token = torch.zeros(problem.heads * width, dtype=problem.upcast_dtype, device=problem.device)
    probe = token.as_strided((problem.batch, tokens, problem.heads, width), (0, 0, width, 1))
    return probe.requires_grad_(problem.grad)


def _mask_probe(problem: Problem) -> Tensor:
    row = torch.zeros(problem.keys, dtype=problem.upcast_dtype, device=problem.device)
    return row.as_strided((problem.batch, problem.heads, problem.queries, problem.keys), (0, 0, 0, 1))


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    return whole.fitting(workspace_bytes, problem, settings, limit)


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    return packages.workspace_bytes(problem, sizes, _attend_bytes)


def _attend_bytes(problem: Problem, queries: int) -> int:
    item, heads = item_bytes(problem.upcast_dtype), problem.batch * problem.heads
    kernel = heads * -(-queries // LOGSUMEXP_ALIGNMENT) * LOGSUMEXP_ALIGNMENT * 4
    widest = devices.rules(problem.device).widest_in_registers
    if widest is not None and problem.value_width > widest and item == 2:
        kernel += heads * queries * problem.value_width * 4
    copy = making = 0
    if problem.mask is not None:
        batch, mask_heads, rows, _ = problem.mask
        rows = batch * mask_heads * min(rows, queries)
        copy = rows * -(-problem.keys // MASK_ALIGNMENT) * MASK_ALIGNMENT * item
        making = rows * problem.keys  # of a bool mask the opposite
    computing = max(making, kernel + packages.result_bytes(problem, queries))
    return packages.cast_bytes(problem, queries) + copy + computing


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    query, scale = positive(query, scale)
    given = [as_given(tensor, problem.upcast_dtype) for tensor in (query, key, value)]
    bias, nothing = _bias(given, mask)
    ops, statistics = PACKAGE.module, None
    if problem.grad:
        forward = ops.memory_efficient_attention_forward_requires_grad
        output, logsumexp = packages.call(forward, *given, attn_bias=bias, scale=scale)
        statistics = packages.statistics_of(logsumexp, query.shape[2], nothing)
    else:
        output = packages.call(ops.memory_efficient_attention_forward, *given, attn_bias=bias, scale=scale)
    output = with_heads_last(output)
    if nothing is not None:
        output = output.masked_fill_(nothing, 0.0)
    return output.to(problem.value_dtype), statistics


def _bias(given: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as its operators take one, [batch, heads, queries, keys] in query's dtype with rows that begin at
    multiples of `MASK_ALIGNMENT`, and which rows may attend to nothing."""
    if mask is None:
        return None, None
    query, key = given[:2]
    mask, keys = as_small_as_it_is(mask.detach()), key.shape[1]
    padded = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    bias = query.new_empty((*mask.shape[:-1], padded))[..., :keys]
    if mask.dtype == torch.bool:
        bias.zero_().masked_fill_(mask.logical_not(), -torch.inf)
    else:
        bias.copy_(mask)
    return bias.expand(query.shape[0], query.shape[2], query.shape[1], keys), rows_of_nothing(mask)


def gradients(
    kept: Kept, grad_output: Tensor, scale: float, sizes: Sizes, wanted: Sequence[bool]
) -> list[Tensor | None]:
    function = PACKAGE.module.memory_efficient_attention_backward

    def backward(rows: slice, given: Sequence[Tensor], grad: Tensor, scale: float) -> Sequence[Tensor]:
        bias, _ = _bias(given, None if kept.mask is None else rows_of(kept.mask, rows))
        output = as_given(rows_of(kept.output, rows), kept.query.dtype)
        logsumexp = packages.logsumexp_of(rows_of(kept.statistics, rows))
        return packages.call(function, grad, output, logsumexp, *given, attn_bias=bias, scale=scale)

    return packages.gradients_in_chunks(backward, kept, grad_output, scale, sizes, wanted)
