"""Chunked exact attention in plain PyTorch operators, for every device.

One fold over key parts (Rabe & Staats 2021, arXiv 2112.05682; Milakov & Gimelshein 2018, arXiv 1805.02867): a running
maximum, a running sum of exponentials and a running weighted sum of values, all in float32 or wider, rescaled whenever
the maximum moves. No part outlives its turn, and one score buffer serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ... import device as devices
from ...problem import Problem
from ...tensors import new_output, rows_of
from ..base import Sizes
from . import workers
from .sizes import Group, Piece, pieces, shares, sides

Part = tuple[Tensor, Tensor, Tensor | None]  # keys, values and their mask

LOG2_E = math.log2(math.e)
# Weights below 2^-100 of a row's largest change no float32 result, but exp2 of what would underflow takes up to
# twenty times as long.
SMALLEST_EXPONENT = -100.0
# A sum of weights this large says that the maximum assumed for a part was too small: more than any number of keys
# gives, and far from where weighted values would overflow.
LARGEST_SUM = 1e9


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    if problem.grad and torch.is_grad_enabled():
        return attend_keeping_scores(query, key, value, mask, scale), None
    batch, heads, queries, _ = query.shape
    output = new_output(query, value)
    compute = devices.compute_dtype(query.dtype)
    statistics = query.new_empty(batch, heads, queries, 2, dtype=compute) if problem.grad else None
    # Scores are scaled once their maximum has been subtracted: no pass over the queries, no rounding of them. That
    # needs a positive scale, and a mask that adds to scores needs them scaled before.
    late = scale if scale > 0 and (mask is None or mask.dtype == torch.bool) else 1.0
    lazy = devices.rules(query.device).lazy_maximum and mask is None and sizes.keys < key.shape[2]
    threads, each = shares(batch, heads, queries, sizes, workers.available(query, key, value))

    def attend_pieces(mine: Iterator[Piece]) -> None:
        scores = score_buffer(query, key, each)
        for index, rows in mine:
            group = scaled(query[index][:, rows], scale / late)
            group_mask = None if mask is None else rows_of(group_of(mask, index), rows)
            parts = key_parts(key[index], value[index], group_mask, each.keys)
            weighted, total, maximum = fold(group, parts, late, scores, lazy)
            divide(weighted, total, mask is not None, output[index][:, rows])
            if statistics is not None:
                torch.cat((maximum.mul_(late), total), dim=-1, out=statistics[index][:, rows])

    workers.share(pieces(batch, heads, queries, each), attend_pieces, threads)
    return output, statistics


def attend_keeping_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query chunk, differentiable by PyTorch itself, which keeps every score for the backward pass."""
    compute = devices.compute_dtype(query.dtype)
    scores = torch.matmul(scaled(query, scale), key.to(compute).transpose(-2, -1))
    if mask is None:
        return torch.matmul(scores.softmax(-1), value.to(compute)).to(value.dtype)
    scores = (
        scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask.to(compute)
    )
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # its softmax, and the gradient of that, would be NaN
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return torch.matmul(weights, value.to(compute)).to(value.dtype)


def fold(
    query: Tensor, parts: Iterable[Part], scale: float, buffer: Tensor, lazy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold one group of heads, query [heads, queries, width], over all key parts.

    `lazy` takes the maximum seen so far for a part's own, which saves a pass over its scores. Exact as long as no sum
    overflows; one that does, or scores spread so far that exponentials underflow, ends it for the rest of the group.

    Returns:
        The weighted sum of values [heads, queries, value width], the sum of weights and the maximum score, both
        [heads, queries, 1].
    """
    maximum = total = weighted = buffer  # of no meaning before a first part
    first = True
    for key, value, mask in parts:
        scores = shaped(buffer, (*query.shape[:2], key.shape[1]))
        if lazy and not first:
            weights = exp_(torch.baddbmm(-maximum, query, key.transpose(1, 2), out=scores), scale)
            sums = weights.sum(-1, keepdim=True)
            if sums.amax() <= LARGEST_SUM:  # false for NaN too
                total += sums
                weighted.baddbmm_(weights, value)
                continue
            lazy = False
        score(query, key, mask, scores)
        # A row whose every key so far is masked has a finite maximum too, so that -inf minus it is no NaN. The lowest
        # that there is: a mask of finfo.min on every key leaves their mean, as it does with PyTorch's attention.
        highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        if first:
            maximum = highest
            lazy = lazy and bool((scores.amin() - maximum.amax()) * (scale * LOG2_E) > SMALLEST_EXPONENT)
        else:
            previous, maximum = maximum, torch.maximum(maximum, highest)
            rescale = exp_(previous.sub_(maximum), scale)
            total *= rescale
            weighted *= rescale
        weights = exp_(scores.sub_(maximum), scale, underflows=not lazy and mask is None)
        sums = weights.sum(-1, keepdim=True)
        if first:
            total, weighted, first = sums, torch.bmm(weights, value), False
        else:
            total += sums
            weighted.baddbmm_(weights, value)
    return weighted, total, maximum


def divide(weighted: Tensor, total: Tensor, masked: bool, output: Tensor) -> None:
    """Write weighted / total into output; where masked, zeros for rows that may attend to nothing, whose total is 0."""
    if masked:
        weighted.div_(total).masked_fill_(total == 0, 0.0)
    elif output.dtype == weighted.dtype and not devices.rules(output.device).contiguous:
        torch.div(weighted, total, out=output)
        return
    else:
        weighted.div_(total)
    output.copy_(weighted)


def score(query: Tensor, key: Tensor, mask: Tensor | None, scores: Tensor) -> Tensor:
    """Scores of scaled queries against keys, masked, written into `scores` [heads, queries, keys]."""
    # bmm rather than baddbmm with beta=0, which on MPS lets NaN through from uninitialised memory: ComfyUI #15804.
    torch.bmm(query, key.transpose(1, 2), out=scores)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores.add_(mask.to(scores.dtype))  # a wider mask would make a wider copy of all scores
    return scores


def exp_(scores: Tensor, scale: float = 1.0, underflows: bool = False) -> Tensor:
    """exp(scale * scores) in place. exp2 is three times as fast on the CPU; log2(e) goes in after the maximum has been
    subtracted, since folding it into the queries costs eleven times the error on large scores.

    `underflows`: some may, which takes a CPU up to twenty times as long. These are kept from it, and are zero all the
    same: beside the largest values of a dtype not even 2^-100 is nothing.
    """
    scores.mul_(scale * LOG2_E)
    if not (underflows and scores.dtype == torch.float32 and devices.rules(scores.device).lazy_maximum):
        return scores.exp2_()
    if not scores.amin() < SMALLEST_EXPONENT:
        return scores.exp2_()
    return torch.threshold_(scores.clamp_(min=SMALLEST_EXPONENT).exp2_(), 2.0**SMALLEST_EXPONENT, 0.0)


def scaled(query: Tensor, scale: float) -> Tensor:
    """Queries times `scale`, in the dtype of the computation, so that no half-precision score overflows."""
    query = query.to(devices.compute_dtype(query.dtype))
    if scale != 1.0:
        query = query * scale
    return query.contiguous() if devices.rules(query.device).contiguous else query


def score_buffer(query: Tensor, key: Tensor, sizes: Sizes) -> Tensor:
    """Room for the scores of one tile, flat."""
    beside, _ = sides(query.shape[0], query.shape[1], sizes.heads)
    rows = min(sizes.queries, query.shape[-2]) * min(sizes.heads, beside)
    return query.new_empty(rows * min(sizes.keys, key.shape[-2]), dtype=devices.compute_dtype(query.dtype))


def shaped(buffer: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The front of a flat buffer as a tensor of this shape."""
    return buffer[: math.prod(shape)].view(shape)


def group_of(mask: Tensor, index: Group) -> Tensor:
    """The part [heads or 1, queries or 1, keys or 1] of a mask that belongs to a group of heads."""
    its: list[int | slice] = [slice(None) if size == 1 else some for size, some in zip(mask.shape, index)]
    return mask[tuple(its)].flatten(0, -3)


def key_parts(key: Tensor, value: Tensor, mask: Tensor | None, size: int) -> Iterator[Part]:
    """Keys, values and mask in parts of `size` keys, in the dtype of the computation."""
    compute = devices.compute_dtype(key.dtype)
    contiguous = devices.rules(key.device).contiguous
    for start in range(0, key.shape[1], size):
        part = slice(start, start + size)
        keys, values = key[:, part].to(compute), value[:, part].to(compute)
        if contiguous:
            keys, values = keys.contiguous(), values.contiguous()
        yield keys, values, mask if mask is None or mask.shape[-1] == 1 else mask[..., part]
