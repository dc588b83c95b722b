"""Gradients of the portable engine, recomputed chunk by chunk from two statistics of the forward pass.

For one query chunk and one key part, with scores s = scale.q.k + mask, weights p = exp(s - maximum) / total, and D the
row sums of grad_output * output (Dao et al. 2022, FlashAttention, arXiv 2205.14135, algorithm 4):

    grad_value += p^T . grad_output             grad_query += grad_scores . key . scale
    grad_scores = p * (grad_output . value^T - D)   grad_key += grad_scores^T . query . scale

Maximum and total stay apart, rather than as their logsumexp: beside a maximum of -1e9, as masks make it, the logarithm
of any total is rounded away. The division by total goes to the rows of grad_output, which are narrower than scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import device as devices
from ...tensors import rows_of
from ..base import Kept, Sizes
from . import workers
from .attend import Part, exp_, group_of, key_parts, scaled, score, score_buffer, shaped
from .sizes import Group, head_groups, shares, slices


def gradients(
    kept: Kept, grad_output: Tensor, scale: float, sizes: Sizes, wanted: Sequence[bool]
) -> list[Tensor | None]:
    query, key, value, mask, output, statistics = kept
    compute = devices.compute_dtype(query.dtype)
    tensors = (query, key, value, mask)
    grad_query, grad_key, grad_value, grad_mask = sums = [
        torch.zeros_like(tensor, dtype=compute) if needed and tensor is not None else None
        for tensor, needed in zip(tensors, wanted)
    ]
    batch, heads, queries, _ = query.shape
    # The gradient of a mask may be a sum over all heads, which no two threads can add to.
    threads = 1 if grad_mask is not None else workers.available(query, key, value)
    threads, each = shares(batch, heads, queries, sizes, threads)
    all_keys = slice(0, key.shape[2])

    def add(index: Group, rows: slice, keys: slice, grad_queries: Tensor | None, tiles: Sequence[Tensor]) -> None:
        """What these rows and keys of a group of heads give."""
        here = (*index, rows)
        maximum, total = statistics[here].split(1, dim=-1)
        # A row that attended to nothing has weights of zero, whatever its scores.
        maximum, total = (tensor.masked_fill(total == 0, math.inf) for tensor in (maximum, total))
        asking, grads = scaled(query[here], scale), scaled(grad_output[here], 1.0) / total
        row_sums = (grads * output[here]).sum(-1, keepdim=True)
        row_mask = None if mask is None else rows_of(group_of(mask, index), rows)
        for part, (asked, values, part_mask) in _parts(key[index], value[index], row_mask, keys, each.keys):
            tile = (*asking.shape[:2], asked.shape[1])
            weights = score(asking, asked, part_mask, shaped(tiles[0], tile)).sub_(maximum)
            exp_(weights, underflows=mask is None)
            if grad_value is not None:
                grad_value[index][:, part].baddbmm_(weights.transpose(1, 2), grads)
            if grad_query is None and grad_key is None and grad_mask is None:
                continue
            grad_scores = torch.bmm(grads, values.transpose(1, 2), out=shaped(tiles[1], tile))
            grad_scores.sub_(row_sums).mul_(weights)
            if grad_queries is not None:
                grad_queries.baddbmm_(grad_scores, asked, alpha=scale)
            if grad_key is not None:
                grad_key[index][:, part].baddbmm_(grad_scores.transpose(1, 2), asking)
            if grad_mask is not None:
                target = rows_of(group_of(grad_mask, index), rows)
                target = target if target.shape[-1] == 1 else target[..., part]
                target += grad_scores.sum_to_size(target.shape)

    def tiles() -> tuple[Tensor, Tensor]:
        return score_buffer(query, key, each), score_buffer(query, key, each)

    def add_groups(mine: Iterator[Group]) -> None:
        buffers = tiles()
        for index in mine:
            for rows in slices(queries, each.queries):
                here = (*index, rows)
                add(index, rows, all_keys, None if grad_query is None else grad_query[here], buffers)

    def add_rows(index: Group, rows: slice) -> None:
        """Threads share the keys, and each range of them has a gradient of the queries of its own."""

        def add_keys(mine: Iterator[tuple[slice, Tensor | None]]) -> None:
            buffers = tiles()
            for keys, grad_queries in mine:
                add(index, rows, keys, grad_queries, buffers)

        ranges = list(slices(key.shape[2], -(-key.shape[2] // (each.keys * threads)) * each.keys))
        here = (*index, rows)
        whole = None if grad_query is None else grad_query[here]
        given = [None if whole is None else torch.zeros_like(whole) for _ in ranges]
        workers.share(zip(ranges, given), add_keys, threads)
        for grad_queries in given:
            if whole is not None and grad_queries is not None:
                whole.add_(grad_queries)

    groups = list(head_groups(batch, heads, each.heads))
    if len(groups) >= threads:
        workers.share(groups, add_groups, threads)
    else:
        for index in groups:
            for rows in slices(queries, each.queries):
                add_rows(index, rows)
    return [None if total is None or tensor is None else total.to(tensor.dtype) for total, tensor in zip(sums, tensors)]


def _parts(key: Tensor, value: Tensor, mask: Tensor | None, keys: slice, size: int) -> Iterator[tuple[slice, Part]]:
    """Parts of these keys with the slice that each covers."""
    mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
    parts = key_parts(key[:, keys], value[:, keys], mask, size)
    for start, tensors in zip(range(keys.start, keys.stop, size), parts):
        yield slice(start, min(start + size, keys.stop)), tensors
