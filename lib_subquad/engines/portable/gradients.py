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
from ..base import Sizes
from .attend import exp_, group_of, head_groups, key_parts, scaled, score, score_buffer, shaped


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    grad_output: Tensor,
    scale: float,
    sizes: Sizes,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of query, key, value and mask, each in its tensor's dtype, None where it is not wanted."""
    compute = devices.compute_dtype(query.dtype)
    tensors = (query, key, value, mask)
    grad_query, grad_key, grad_value, grad_mask = sums = [
        torch.zeros_like(tensor, dtype=compute) if needed else None for tensor, needed in zip(tensors, wanted)
    ]
    scores, products = score_buffer(query, key, sizes), score_buffer(query, key, sizes)
    for index in head_groups(*query.shape[:2], sizes.heads):
        for start in range(0, query.shape[2], sizes.queries):
            rows = (*index, slice(start, start + sizes.queries))
            maximum, total = statistics[rows].split(1, dim=-1)
            # A row that attended to nothing has weights of zero, whatever its scores.
            maximum, total = (tensor.masked_fill(total == 0, math.inf) for tensor in (maximum, total))
            queries, grads = scaled(query[rows], scale), scaled(grad_output[rows], 1.0) / total
            row_sums = (grads * output[rows]).sum(-1, keepdim=True)
            row_mask = None if mask is None else rows_of(group_of(mask, index), rows[-1])
            for part, (keys, values, part_mask) in _parts(key[index], value[index], row_mask, sizes.keys):
                tile = (*queries.shape[:2], keys.shape[1])
                weights = score(queries, keys, part_mask, shaped(scores, tile)).sub_(maximum)
                exp_(weights, underflows=mask is None)
                if grad_value is not None:
                    grad_value[index][:, part].baddbmm_(weights.transpose(1, 2), grads)
                if grad_query is None and grad_key is None and grad_mask is None:
                    continue
                grad_scores = torch.bmm(grads, values.transpose(1, 2), out=shaped(products, tile))
                grad_scores.sub_(row_sums).mul_(weights)
                if grad_query is not None:
                    grad_query[rows].baddbmm_(grad_scores, keys, alpha=scale)
                if grad_key is not None:
                    grad_key[index][:, part].baddbmm_(grad_scores.transpose(1, 2), queries)
                if grad_mask is not None:
                    target = rows_of(group_of(grad_mask, index), rows[-1])
                    target = target if target.shape[-1] == 1 else target[..., part]
                    target += grad_scores.sum_to_size(target.shape)
    return [None if total is None else total.to(tensor.dtype) for total, tensor in zip(sums, tensors)]


def _parts(key: Tensor, value: Tensor, mask: Tensor | None, size: int) -> Iterator[tuple[slice, tuple]]:
    """Key parts with the slice of keys that each covers."""
    for number, tensors in enumerate(key_parts(key, value, mask, size)):
        yield slice(number * size, (number + 1) * size), tensors
