"""Exact attention in chunks: a loop over query chunks, and an engine that attends each of them.

attention(query, key, value) = softmax(scale * query . key^T + mask) . value
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import device as devices
from . import second
from .calls import call_for, done
from .engines.base import Engine
from .forward import attend_chunks
from .plan import Plan, check_report
from .problem import check, check_mask, check_scale
from .recompute import AttentionNode
from .retry import Chunks
from .settings import Settings, check_settings
from .tensors import as_small_as_it_is, mask_with_four_dimensions, with_four_dimensions
from .tracing import attend_traced, is_traced


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    settings: Settings = Settings(),
    report: Callable[[Plan], None] | None = None,
) -> Tensor:
    """Softmax attention, exact, inside a memory limit.

    Args:
        query: [..., queries, width]; leading dimensions [batch*heads] or [batch, heads]. Any strides.
        key: [..., keys, width], in query's dtype.
        value: [..., keys, value width], in query's dtype, or half beside float32 queries.
        mask: broadcastable to [..., queries, keys]; bool (True = may attend) or floating point (added to the scores).
            A row that may attend to nothing gives zeros.
        scale: of the scores; width ** -0.5 if None.
        settings: what the user has set.
        report: called with the plan that was carried out, retries and all.

    Returns:
        [..., queries, value width] in value's dtype, differentiable in query, key, value and a floating-point mask.

    Raises:
        ValueError: input that makes no attention, a scale that is no number, settings that are no `Settings`, a report
            that cannot be called; the message names the argument, its shape and what was expected.
        RuntimeError: the device's own out-of-memory, when not even the smallest chunk fits.

    Example:
        >>> import torch
        >>> from lib_subquad import Settings, attention
        >>> query, key, value = torch.randn(3, 1, 8, 64, 40)  # each [batch, heads, tokens, width]
        >>> exact = (query @ key.transpose(-2, -1) * 40**-0.5).softmax(-1) @ value
        >>> torch.allclose(attention(query, key, value), exact, atol=1e-5)
        True

        What the user may set, and the plan that was carried out:

        >>> plans = []
        >>> settings = Settings(engine="portable", query_chunk=32, memory_limit=30)
        >>> output = attention(query, key, value, settings=settings, report=plans.append)
        >>> plans[0].engine, plans[0].query_chunk
        ('portable', 32)
    """
    check_settings(settings)
    if report is not None:
        check_report(report)
    if scale is not None:
        scale = check_scale(scale)
    if is_traced(query, key, value):
        check(query, key, value, mask)
        return attend_traced(query, key, value, mask, scale, settings, report)
    if mask is not None:
        if type(mask) is not Tensor:
            check_mask(mask)
        elif mask.layout is torch.strided and not (mask.is_nested or mask.requires_grad) and 0 in mask.stride():
            mask = as_small_as_it_is(mask)
    call = call_for(query, key, value, mask, settings)
    leading, scale = query.shape[:-2], call.problem.width**-0.5 if scale is None else scale
    query, key, value = [with_four_dimensions(tensor) for tensor in (query, key, value)]
    mask = None if mask is None else mask_with_four_dimensions(mask, leading)
    chunks = Chunks(call.problem, call.plan, settings)
    output = None
    if call.engine is not None and not chunks.one_node and not devices.autocast_enabled(query.device.type):
        output = _at_once(call.engine, query, key, value, mask, scale, chunks)
    if output is None:
        output = _in_chunks(query, key, value, mask, scale, chunks)
        if chunks.refusals:
            chunks.remember_refusals()
        done(call)
    if report is not None:
        report(chunks.plan)
    return output if len(leading) == 2 else output.reshape(*leading, *output.shape[-2:])


def _at_once(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chunks: Chunks
) -> Tensor | None:
    """All queries in one go, as nearly every call is; None when memory ran out, and `chunks` are smaller now."""
    try:
        output = engine.attend(chunks.problem, chunks.plan.sizes, query, key, value, mask, scale)[0]
        if chunks.problem.grad:
            second.enable(output)
        return output
    except Exception as error:
        smaller = chunks.smaller_after(error)
    chunks.go_on(smaller)
    return None


def _in_chunks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chunks: Chunks) -> Tensor:
    with devices.without_autocast(query.device):
        while True:
            one_node = chunks.one_node
            output: Tensor | None = None  # and nothing of what the graph of an unfinished one keeps
            if one_node:
                output = AttentionNode.apply(query, key, value, mask, scale, chunks)
            else:
                output, _ = attend_chunks(query, key, value, mask, scale, chunks)
            if output is not None and chunks.one_node == one_node:
                return output
