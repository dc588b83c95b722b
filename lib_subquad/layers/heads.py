"""Attention as a function of projections, as ComfyUI, Forge and their kin call it.

Their models hold a function `f(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False)`, and their VAEs one
of a single head, `f(q, k, v)`. What they are given has grown with the models; what is none of it is refused in words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import FLOAT_DTYPES
from ..settings import Settings
from .projections import Report, attend


def heads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    settings: Settings = Settings(),
    report: Report | None = None,
) -> Tensor:
    """Attention of several heads, whose channels lie side by side.

    Args:
        query: [batch, tokens, heads * width]; or [batch, heads, tokens, width] where `skip_reshape`.
        key: the same with the tokens that are asked, or [batch, tokens, heads, width] (as SD 3's blocks leave values);
            any floating-point dtype, and query's decides. Of another number of batch entries, consecutive queries share
            out the tokens of one (as Hypertile leaves them), or a query has those of several (IP-Adapter with several
            images), as a view by query's number has them.
        value: as key; its width may differ.
        heads: how many.
        mask: bool (True = may attend) or floating point (added to the scores); [tokens, key tokens], [batch, key
            tokens], [batch or heads or batch * heads, tokens, key tokens] or [batch, heads, tokens, key tokens]; any
            size may be one. Where sizes leave two of these open, the first holds.
        skip_output_reshape: leave the heads of the result apart.
        settings: the user's.
        report: called with the plan that was carried out.

    Returns:
        [batch, tokens, heads * value width], or [batch, heads, tokens, value width] where `skip_output_reshape`; in
        query's dtype.

    Raises:
        ValueError: what is not known how to compute; the message names it in a few words.
    """
    if not skip_reshape:
        key, value = _in_batches_of(query, *(_side_by_side(it, heads) for it in (key, value)))
    if reason := _why_not(query, key, value, heads, mask, skip_reshape=skip_reshape):
        raise ValueError(reason)
    if not skip_reshape:
        query, key, value = (it.unflatten(-1, (heads, -1)).transpose(1, 2) for it in (query, key, value))
    if mask is not None:
        mask = _mask_of_four_dimensions(mask, (*query.shape[:3], key.shape[2]))
    output = attend(query, key, value.to(query.dtype), mask, None, settings, report)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def spatial_attention(
    query: Tensor, key: Tensor, value: Tensor, *, settings: Settings = Settings(), report: Report | None = None
) -> Tensor:
    """Attention between the positions of a feature map, with one head of all channels.

    Args:
        query: [batch, channels, height, width], or any other number of sizes after the channels; key and value alike.

    Returns:
        As query, in shape and dtype.

    Raises:
        ValueError: what is not known how to compute; the message names it in a few words.
    """
    if reason := _why_not_spatial(query, key, value):
        raise ValueError(reason)
    shape = query.shape
    query, key, value = (it.flatten(2).transpose(1, 2)[:, None] for it in (query, key, value.to(query.dtype)))
    output = attend(query, key, value, None, None, settings, report)
    return output[:, 0].transpose(1, 2).contiguous().reshape(shape)  # as callers find it elsewhere


def _why_not(query: Any, key: Any, value: Any, heads: Any, mask: Any = None, *, skip_reshape: bool = False) -> str:
    """Why `heads_attention` cannot compute this, in words; empty if it can."""
    if reason := _why_no_projections(query, key, value, 4 if skip_reshape else 3):
        return reason
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        return "a number of heads that is no count"
    shapes = [it.shape for it in (query, key, value)]
    if not skip_reshape:
        if any(channels % heads or not channels for *_, channels in shapes):
            return "channels that the heads cannot share evenly"
        shapes = [(batch, heads, tokens, channels // heads) for batch, tokens, channels in shapes]
    batches, counts, tokens, widths = zip(*shapes)
    if counts != (heads,) * 3:
        return "heads that share keys and values"
    if len(set(batches)) > 1:
        return "batches of different sizes"
    if tokens[1] != tokens[2] or not tokens[1] or widths[0] != widths[1] or not all(widths):
        return "queries, keys and values that do not fit together"
    if mask is None:
        return ""
    if not isinstance(mask, Tensor) or mask.device != query.device or mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        return "a mask of a kind that is not known"
    fits = _mask_of_four_dimensions(mask, (batches[0], heads, *tokens[:2])) is not None
    return "" if fits else "a mask whose sizes do not fit"


def _why_not_spatial(query: Any, key: Any, value: Any) -> str:
    """Why `spatial_attention` cannot compute this, in words; empty if it can."""
    if not isinstance(query, Tensor) or query.dim() < 3:
        return "no feature maps"
    if reason := _why_no_projections(query, key, value, query.dim()):
        return reason
    if not query.shape == key.shape == value.shape:
        return "feature maps of different sizes"
    return "feature maps without channels or positions" if 0 in query.shape[1:] else ""


def _side_by_side(tensor: Tensor, heads: int) -> Tensor:
    """Channels of heads that are apart already, as a view by the number of heads has them."""
    apart = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[2] == heads
    return tensor.flatten(2) if apart else tensor


def _in_batches_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with query's number of batch entries, as a view by that number has them."""
    if not all(isinstance(it, Tensor) and it.dim() == 3 for it in (query, key, value)):
        return key, value
    wanted, (batch, tokens) = query.shape[0], key.shape[:2]
    if wanted in (0, batch) or batch * tokens % wanted or value.shape[:2] != key.shape[:2]:
        return key, value
    key, value = (it.reshape(wanted, batch * tokens // wanted, it.shape[2]) for it in (key, value))
    return key, value


def _why_no_projections(query: Any, key: Any, value: Any, dimensions: int) -> str:
    tensors = (query, key, value)
    if not all(isinstance(it, Tensor) and it.dim() == dimensions for it in tensors):
        return f"queries, keys or values that do not have {dimensions} dimensions"
    if not all(it.dtype in FLOAT_DTYPES for it in tensors):
        return "a dtype that attention is not computed in"
    return "" if len({it.device for it in tensors}) == 1 else "tensors on different devices"


def _mask_of_four_dimensions(mask: Tensor, scores: tuple[int, int, int, int]) -> Tensor | None:
    """The mask as one that broadcasts to `scores` [batch, heads, queries, keys]; None where no reading of it fits."""
    batch, heads, _, _ = scores
    if mask.dim() == 4:
        readings = [mask]
    elif mask.dim() == 3:
        readings = [mask[:, None], mask[None]]
        if mask.shape[0] == batch * heads:
            readings.append(mask.unflatten(0, (batch, heads)))
    else:
        readings = [mask[None, None], mask[:, None, None]] if mask.dim() == 2 else []
    return next((it for it in readings if all(size in (1, full) for size, full in zip(it.shape, scores))), None)
