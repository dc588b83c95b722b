"""Functions for the places of others: of the web UI's kernel, of that of ComfyUI and Forge, and of PyTorch's own.

`efficient_dot_product_attention` has one name and two meanings out there. AUTOMATIC1111's web UI hands over keys
[batch * heads, keys, width]; ComfyUI and Forge hand over the same transposed, [batch * heads, width, keys], and where
the width equals the number of keys nothing but the caller tells them apart. So each has a function here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

from . import device as devices
from .attention import attention
from .engines import pytorch
from .plan import Plan, check_report
from .problem import HALF_DTYPES
from .retry import add_line
from .settings import CHUNK_MAX, Settings, check_settings
from .tracing import is_recorded, is_transformed

CAST = (torch.float32, *HALF_DTYPES)  # by autocast, which leaves float64 alone


def efficient_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_chunk_size: int = 1024,
    kv_chunk_size: int | None = None,
    kv_chunk_size_min: int | None = None,
    use_checkpoint: bool = True,
    upcast_attention: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Exact attention in the chunks that the caller asks for, as far as memory allows: the web UI's function.

    Args:
        query: [batch * heads, queries, width]; key [batch * heads, keys, width]; value [batch * heads, keys, value
            width].
        query_chunk_size: queries scored at a time.
        kv_chunk_size: keys scored at a time; the square root of their number if None.
        kv_chunk_size_min: the least number of keys scored at a time.
        use_checkpoint: recompute scores in the backward pass instead of keeping them.
        upcast_attention: compute half precision in float32.
        mask: broadcastable to [batch * heads, queries, keys]; bool (True = may attend) or added to the scores.

    Returns:
        [batch * heads, queries, value width] in value's dtype.

    Raises:
        ValueError: input that makes no attention, or a chunk size below 1; the message names the argument.

    Example:
        >>> import torch
        >>> from lib_subquad import efficient_dot_product_attention
        >>> query, key, value = torch.randn(3, 16, 64, 40)  # each [batch * heads, tokens, width]
        >>> efficient_dot_product_attention(query, key, value, query_chunk_size=32, use_checkpoint=False).shape
        torch.Size([16, 64, 40])
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
        upcast="always" if upcast_attention else "never",
    )
    return attention(query, key, value, mask=mask, settings=settings)


def efficient_dot_product_attention_of_transposed_keys(
    query: Tensor, key: Tensor, value: Tensor, *sizes: Any, **more: Any
) -> Tensor:
    """`efficient_dot_product_attention` as ComfyUI and Forge call it: with keys [batch * heads, width, keys].

    Args:
        sizes, more: the further arguments of `efficient_dot_product_attention`, by place or by name.

    Raises:
        ValueError: as `efficient_dot_product_attention`.

    Example:
        >>> import torch
        >>> from lib_subquad import efficient_dot_product_attention_of_transposed_keys
        >>> query, key, value = torch.randn(3, 16, 64, 40)
        >>> efficient_dot_product_attention_of_transposed_keys(query, key.transpose(1, 2), value, 32).shape
        torch.Size([16, 64, 40])
    """
    if not isinstance(key, Tensor) or key.dim() != 3:
        shape = list(getattr(key, "shape", ()))
        raise ValueError(f"key has shape {shape}; expected [batch * heads, width, tokens]")
    return efficient_dot_product_attention(query, key.transpose(1, 2), value, *sizes, **more)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    settings: Settings = Settings(),
    report: Callable[[Plan], None] | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, which it may be put in the place of, inside a memory limit.

    Takes and returns what PyTorch's function does. Dropout, causal masks, and whatever attention() does not know are
    PyTorch's to compute, and so are its errors. A row that may attend to nothing gives zeros.

    Args:
        query: [..., queries, width]; key [..., keys, width], value [..., keys, value width], whose leading dimensions
            broadcast; with `enable_gqa` several of query's heads share one of theirs.
        attn_mask: broadcastable to [..., queries, keys]; bool (True = may attend) or added to the scores. Of fewer than
            two dimensions and of any floating-point dtype as well, as attention() takes it; PyTorch's function takes
            such masks for some shapes only.
        settings, report: those of attention(); calls that are PyTorch's to compute are not reported.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lib_subquad import sdpa
        >>> pytorchs, F.scaled_dot_product_attention = F.scaled_dot_product_attention, sdpa
        >>> query, key, value = torch.randn(3, 1, 8, 64, 40)  # whatever calls PyTorch's function now calls ours
        >>> F.scaled_dot_product_attention(query, key, value).shape
        torch.Size([1, 8, 64, 40])
        >>> F.scaled_dot_product_attention = pytorchs
    """
    pytorchs: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    pytorchs.update(
        {"scale": scale} if scale is not None else {}, **({"enable_gqa": enable_gqa} if enable_gqa is not False else {})
    )
    if _has_a_function(attn_mask):  # which knows PyTorch's by its public name, whoever has that
        return handle_torch_function(F.scaled_dot_product_attention, (attn_mask,), query, key, value, **pytorchs)
    if dropout_p != 0 or is_causal is not False or type(enable_gqa) is not bool:
        return pytorch.OWN(query, key, value, **pytorchs)
    if is_recorded() or pytorch.is_running() or not all(map(_is_plain, (query, key, value))):
        return pytorch.OWN(query, key, value, **pytorchs)
    if report is not None:
        check_report(report)
    made: list[Plan] = []
    try:
        asking, keys, values = _with_equal_leading(query, key, value, enable_gqa)
        asking, keys, values, mask = _as_autocast_gives(asking, keys, values, attn_mask)
        told = None if report is None else made.append
        output = attention(asking, keys, values, mask=mask, scale=scale, settings=settings, report=told)
    except ValueError as error:  # such as integers: PyTorch may compute what attention() does not know
        check_settings(settings)
        refused = str(error)
    else:
        if report is not None:
            for plan in made:
                report(plan)
        return output
    try:
        return pytorch.OWN(query, key, value, **pytorchs)
    except Exception as error:
        add_line(error, refused)
        raise


def _known_to_scripts() -> None:
    """A program that torch.jit.script reads while ours is in the place of PyTorch's has PyTorch's operator there."""
    with contextlib.suppress(AttributeError, ImportError):  # private; without it such a program cannot be read
        from torch.jit._builtins import _register_builtin

        _register_builtin(sdpa, "aten::scaled_dot_product_attention")


_known_to_scripts()


def _has_a_function(mask: Tensor | None) -> bool:
    """Whether it is of a class that stands for a mask, such as PyTorch's `CausalBias`, and says itself what follows."""
    return not (mask is None or type(mask) is Tensor) and has_torch_function((mask,))


def _is_plain(tensor: Tensor) -> bool:
    """Whether its sizes and numbers are where attention() looks for them."""
    return type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def _as_autocast_gives(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as PyTorch's function has them where autocast is on."""
    device = query.device
    if is_transformed() or not devices.autocast_enabled(device.type):  # transforms know no autocast
        return query, key, value, mask
    dtype = devices.autocast_dtype(device.type)
    if _is_cast(device, dtype):
        query, key, value = (it.to(dtype) if it.dtype in CAST else it for it in (query, key, value))
        mask = mask.to(dtype) if mask is not None and mask.dtype in CAST else mask
    return query, key, value, mask


@lru_cache(maxsize=64)
def _is_cast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether autocast is about PyTorch's function: not on the CPU before torch 2.2."""
    token = torch.zeros(1, 1, 1, 8, dtype=torch.float32, device=device)
    return pytorch.OWN(token, token, token).dtype == dtype


def _with_equal_leading(query: Tensor, key: Tensor, value: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    if shared and query.dim() > 2 and key.dim() > 2:
        for name, it in (("key", key), ("value", value)):
            if not it.shape[-3] or query.shape[-3] % it.shape[-3]:
                raise ValueError(f"{name} has {it.shape[-3]} heads; expected a divisor of query's {query.shape[-3]}")
        key, value = (it.repeat_interleave(query.shape[-3] // it.shape[-3], dim=-3) for it in (key, value))
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return query, key, value
    leading = query.shape[:-2]
    for name, it in (("key", key), ("value", value)):
        try:
            leading = torch.broadcast_shapes(leading, it.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {list(it.shape)}; expected leading dimensions that broadcast with {list(leading)}"
            ) from None
    query, key, value = (it.expand(*leading, *it.shape[-2:]) for it in (query, key, value))
    return query, key, value
