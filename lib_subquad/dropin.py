"""The signature that the web UI, ComfyUI and Forge ship, as a drop-in for their kernel."""

from __future__ import annotations

import math

from torch import Tensor

from .attention import attention
from .settings import CHUNK_MAX, Settings


def efficient_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_chunk_size: int = 1024,
    kv_chunk_size: int | None = None,
    kv_chunk_size_min: int | None = None,
    use_checkpoint: bool = True,
) -> Tensor:
    """Exact attention in the chunks that the caller asks for, as far as memory allows.

    Args:
        query: [batch * heads, queries, width]; key [batch * heads, keys, width]; value [batch * heads, keys, value
            width].
        query_chunk_size: queries scored at a time.
        kv_chunk_size: keys scored at a time; the square root of their number if None.
        kv_chunk_size_min: the least number of keys scored at a time.
        use_checkpoint: recompute scores in the backward pass instead of keeping them.

    Returns:
        [batch * heads, queries, value width] in value's dtype.

    Raises:
        ValueError: input that makes no attention, or a chunk size below 1; the message names the argument.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [batch * heads, tokens, width]")
    keys = key.shape[1]
    kv_chunk_size = min(kv_chunk_size or math.isqrt(keys), keys)
    if kv_chunk_size_min is not None:
        kv_chunk_size = max(kv_chunk_size, kv_chunk_size_min)
    for name, size in (("query_chunk_size", query_chunk_size), ("kv_chunk_size", kv_chunk_size)):
        if size < 1 and keys:
            raise ValueError(f"{name} is {size}; expected at least 1")
    settings = Settings(
        query_chunk=min(query_chunk_size, CHUNK_MAX),
        kv_chunk=min(kv_chunk_size, CHUNK_MAX),
        checkpointing="always" if use_checkpoint else "never",
    )
    return attention(query, key, value, settings=settings)
