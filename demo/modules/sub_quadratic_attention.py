"""What extensions look up for attention in little memory; here without chunks."""

from __future__ import annotations

import torch


def efficient_dot_product_attention(
    query, key, value, query_chunk_size=1024, kv_chunk_size=None, kv_chunk_size_min=None, use_checkpoint=True
):
    """Attention of [batch * heads, tokens, width]."""
    scores = torch.bmm(query, key.transpose(1, 2)) * query.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(-1), value)
