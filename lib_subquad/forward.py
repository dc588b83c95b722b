"""The loop over query chunks, each of which an engine attends."""

from __future__ import annotations

import contextlib

from torch import Tensor

from . import recorded, second, trust
from .engines import order
from .engines.base import attended
from .retry import Chunks
from .tensors import new_output, rows_of


def attend_chunks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chunks: Chunks
) -> tuple[Tensor | None, Tensor | None]:
    """The loop: output [batch, heads, queries, value width], and for gradients the statistics [..., queries, 2].

    A chunk that runs out of memory comes again in smaller pieces; what is already written stays. Unfinished, and of no
    use, where `chunks` are still pending; or None, where not even a first one was done.
    """
    output: Tensor | None = None
    statistics: Tensor | None = None
    unseen = recorded.unseen_by_policies if chunks.watched else contextlib.nullcontext
    for rows in chunks:
        with chunks.attempt():
            engine, sizes = order.named(chunks.plan.engine), chunks.plan.sizes
            row_mask = None if mask is None else rows_of(mask, rows)
            call = chunks.problem, sizes, query[:, :, rows], key, value, row_mask, scale
            if chunks.one_node and engine.DIFFERENTIABLE:
                chunk, chunk_statistics, record = recorded.attend(engine, rows, *call)
                if record is None:
                    chunks.leave_to_pytorch()
                    break
                chunks.records.append(record)
            else:
                with unseen() if chunks.one_node else contextlib.nullcontext():
                    chunk, chunk_statistics = attended(engine, *call)
                if chunk.requires_grad:
                    second.enable(chunk)
            trust.check(engine, chunks.problem, *call[2:], chunk)
            if rows == slice(0, query.shape[2]):
                return chunk, chunk_statistics
            with unseen():
                if output is None:
                    output = new_output(query, value)
                output[:, :, rows] = chunk
                if chunks.problem.grad and chunk_statistics is not None:
                    statistics = chunk_statistics.new_empty(*output.shape[:3], 2) if statistics is None else statistics
                    statistics[:, :, rows] = chunk_statistics
    if output is None and not chunks.problem.queries:
        output = new_output(query, value)
    return output, statistics
