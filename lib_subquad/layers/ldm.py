"""The forwards of latent diffusion's attention layers.

`CrossAttention` is that of `ldm.modules.attention` and `sgm.modules.attention`, `AttnBlock` that of
`ldm.modules.diffusionmodules.model` and `sgm.modules.diffusionmodules.model`; the web UI's own for SD 3 has its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .. import device as devices
from ..settings import Settings
from .projections import Report, attend


class CrossAttentionParts(Protocol):
    """What is used of a `CrossAttention`."""

    to_q: Callable[[Tensor], Tensor]
    to_k: Callable[[Tensor], Tensor]
    to_v: Callable[[Tensor], Tensor]
    to_out: Callable[[Tensor], Tensor]
    heads: int
    scale: float


class AttnBlockParts(Protocol):
    """What is used of an `AttnBlock`."""

    norm: Callable[[Tensor], Tensor]
    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    proj_out: Callable[[Tensor], Tensor]


def cross_attention(
    layer: CrossAttentionParts,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    additional_tokens: Tensor | None = None,
    n_times_crossframe_attn_in_self: int = 0,
    *,
    settings: Settings = Settings(),
    split_context: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    report: Report | None = None,
    **ignored: object,
) -> Tensor:
    """`CrossAttention.forward`.

    Args:
        layer: a `CrossAttention`; its projections are called, never read, so that what patches them still works.
        x: [batch, tokens, channels]; asks.
        context: [batch, context tokens, context channels]; is asked. x itself if None.
        mask: bool [batch, context tokens], True = may attend, as ldm takes it; or what broadcasts to
            [batch, heads, tokens, context tokens], as sgm takes it.
        additional_tokens: [batch, more tokens, channels], put before x and taken off the result (sgm).
        n_times_crossframe_attn_in_self: every n-th batch entry's keys and values serve the entries around it (sgm).
        settings: the user's.
        split_context: makes the context of the keys and that of the values out of one (hypernetworks).
        report: called with the plan that was carried out.
        ignored: further keyword arguments, as the hosts' own forwards do.

    Returns:
        [batch, tokens, channels]
    """
    if additional_tokens is not None:
        x = torch.cat([additional_tokens, x], dim=1)
    query = layer.to_q(x)
    key_context = value_context = x if context is None else context
    if split_context is not None:
        key_context, value_context = split_context(key_context)
    key, value = layer.to_k(key_context), layer.to_v(value_context)
    if n_times_crossframe_attn_in_self:
        key, value = (_across_frames(tensor, x.shape[0], n_times_crossframe_attn_in_self) for tensor in (key, value))
    query, key, value = (tensor.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    if mask is not None:
        mask = _mask_of_four_dimensions(mask, query.shape[0], layer.heads, key.shape[2])
    output = attend(query, key, value, mask, layer.scale, settings, report)
    output = output.transpose(1, 2).flatten(2)
    if additional_tokens is not None:
        output = output[:, additional_tokens.shape[1] :]
    return layer.to_out(output)


def attn_block(
    layer: AttnBlockParts,
    x: Tensor,
    *,
    settings: Settings = Settings(),
    report: Report | None = None,
    **ignored: object,
) -> Tensor:
    """`AttnBlock.forward`: every position of a feature map attends to every other, with one head of all channels.

    Args:
        layer: an `AttnBlock`.
        x: [batch, channels, height, width]

    Returns:
        [batch, channels, height, width]
    """
    normed = layer.norm(x)
    if not devices.rules(x.device).contiguous:
        # Feature maps with channels last in memory are tokens already: one copy here saves one each of q, k and v.
        normed = normed.contiguous(memory_format=torch.channels_last)
    query, key, value = (project(normed).flatten(2).transpose(1, 2)[:, None] for project in (layer.q, layer.k, layer.v))
    del normed
    output = attend(query, key, value, None, None, settings, report)
    return x + layer.proj_out(output[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def _across_frames(tensor: Tensor, batch: int, every: int) -> Tensor:
    """Every n-th entry in place of its neighbours (Text2Video-Zero, arXiv 2303.13439)."""
    if batch % every:
        raise ValueError(f"x has batch {batch}; expected a multiple of n_times_crossframe_attn_in_self, {every}")
    return tensor[::every].repeat_interleave(batch // every, dim=0)


def _mask_of_four_dimensions(mask: Tensor, batch: int, heads: int, keys: int) -> Tensor:
    """A host's mask as one that broadcasts to [batch, heads, queries, keys]."""
    if mask.dtype == torch.bool and mask.shape[0] == batch and mask.numel() == batch * keys:
        return mask.reshape(batch, 1, 1, keys)
    if mask.dim() == 3 and mask.shape[0] == batch * heads:
        return mask.unflatten(0, (batch, heads))
    return mask.unsqueeze(1) if mask.dim() == 3 else mask
