"""A call as one node of PyTorch's graph, which keeps the same of it whatever engine and sizes there were.

What is kept is query, key, value, mask, output and two numbers a row. From these the gradients come by the node that
PyTorch itself has recorded of a chunk (`recorded`), or are recomputed chunk by chunk by an engine that it cannot
differentiate. `torch.utils.checkpoint`, which runs a block twice, never sees that memory ran out in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import device as devices
from . import recorded
from .engines import order
from .engines.base import Kept, recomputes
from .forward import attend_chunks
from .plan import Plan
from .problem import Problem
from .recorded import Record
from .retry import Attempts, Chunks
from .second import Gradients
from .settings import Settings


class AttentionNode(torch.autograd.Function):
    """attention() with gradients in query, key, value and a floating-point mask."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        chunks: Chunks,
    ) -> Tensor | None:
        """The loop, without gradients; None, or of no use, where it is left unfinished."""
        output, statistics = attend_chunks(query, key, value, mask, scale, chunks)
        if chunks.one_node:  # and not left unfinished
            ctx.save_for_backward(query, key, value, mask, output, statistics)
            ctx.scale = scale
            ctx.call = chunks.problem, chunks.plan, chunks.settings
            ctx.records = chunks.records
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept = Kept(*ctx.saved_tensors)  # once: torch.utils.checkpoint gives them no second time
        wanted = ctx.needs_input_grad[:4]

        def first(grad_output: Tensor) -> list[Tensor | None]:
            level = recorded.batch_level(grad_output)
            if level is not None:
                return _for_each(first, grad_output, level)
            return _gradients(ctx.call, ctx.records, kept, grad_output, ctx.scale, wanted)

        if torch.is_grad_enabled():
            gradients = Gradients.apply(*kept[:4], grad_output, ctx.scale, first)
        else:
            gradients = first(grad_output)
        return (*gradients, None, None)


def _for_each(first: Callable[[Tensor], list[Tensor | None]], grad_output: Tensor, level: int) -> list[Tensor | None]:
    """Of many output gradients at a time (is_grads_batched=True), one after the other."""
    each = [first(it) for it in torch._remove_batch_dim(grad_output, level, 1, 0)]
    return [None if found[0] is None else torch._add_batch_dim(torch.stack(found), 0, level) for found in zip(*each)]


def _gradients(
    call: tuple[Problem, Plan, Settings],
    records: list[Record],
    kept: Kept,
    grad_output: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of query, key, value and mask, each in its tensor's dtype, None where it is not wanted."""
    attempts = Attempts(*call, backward=True)
    if not _is_whole(records, grad_output.shape[2]):
        attempts.recompute()
    with devices.without_autocast(grad_output.device):
        while attempts.pending:
            with attempts.attempt():  # from the start: a chunk that failed may have added to grad_key already
                engine = order.named(attempts.plan.engine)
                if recomputes(engine):
                    gradients = engine.gradients(kept, grad_output, scale, attempts.plan.sizes, wanted)
                else:
                    gradients = _recorded_gradients(records, kept, grad_output, wanted)
    attempts.remember_refusals()
    return gradients


def _is_whole(records: list[Record], queries: int) -> bool:
    return sum(record.rows.stop - record.rows.start for record in records) == queries


def _recorded_gradients(
    records: list[Record], kept: Kept, grad_output: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    queries: list[Tensor] = []
    keys: Tensor | None = None
    values: Tensor | None = None
    for record in records:
        grad_query, grad_key, grad_value = record.gradients(kept, grad_output)
        queries.append(grad_query)
        keys = grad_key if keys is None else keys + grad_key
        values = grad_value if values is None else values + grad_value
    found = (queries[0] if len(queries) == 1 else torch.cat(queries, dim=-2), keys, values, None)
    return [
        it.to(tensor.dtype) if needed and it is not None and tensor is not None else None
        for it, tensor, needed in zip(found, kept, wanted)
    ]
