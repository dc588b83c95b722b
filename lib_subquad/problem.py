"""One attention problem: its sizes, dtypes and device, checked once at the door."""

from __future__ import annotations

import numbers
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .settings import shown

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
LARGEST_SCALE = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Problem:
    """Sizes of a call in the form [batch, heads, tokens, width], and what else decides how to compute it.

    `dtype` is that of query and key, `value_dtype` that of value and of the result. `mask` holds the mask's sizes
    broadcast against [batch, heads, queries, keys], `mask_dtype` its dtype. `grad` says whether the result must be
    differentiable, `mask_grad` whether in the mask as well. `upcast` asks for half precision to be computed in float32.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    mask: tuple[int, int, int, int] | None = None
    mask_dtype: torch.dtype | None = None
    grad: bool = False
    mask_grad: bool = False
    upcast: bool = False

    @property
    def upcast_dtype(self) -> torch.dtype:
        """What queries and keys are to be computed in at the least."""
        return torch.float32 if self.upcast and self.dtype in HALF_DTYPES else self.dtype

    @property
    def output_bytes(self) -> int:
        return self.batch * self.heads * self.queries * self.value_width * item_bytes(self.value_dtype)

    @classmethod
    def from_shapes(
        cls,
        query_shape: tuple[int, ...],
        key_shape: tuple[int, ...],
        value_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        value_dtype: torch.dtype | None = None,
        mask_shape: tuple[int, ...] | None = None,
        mask_dtype: torch.dtype | None = None,
        grad: bool = False,
        mask_grad: bool = False,
        upcast: bool = False,
    ) -> Problem:
        """The problem of these shapes.

        Args:
            query_shape: [..., queries, width]; the leading dimensions are [batch*heads] or [batch, heads].
            key_shape: [..., keys, width], `value_shape` [..., keys, value width]; same leading dimensions.
            dtype: of query and key; `value_dtype` if value's differs.
            mask_shape: broadcastable to [..., queries, keys].

        Raises:
            ValueError: shapes or dtypes that make no attention, or no device; the message names the argument and what
                was expected.
        """
        query_shape, key_shape, value_shape = tuple(query_shape), tuple(key_shape), tuple(value_shape)
        value_dtype = value_dtype or dtype
        _check_shapes(query_shape, key_shape, value_shape)
        _check_dtypes(query_shape, dtype, value_shape, value_dtype)
        if mask_shape is not None:
            mask_shape = _mask_sizes(tuple(mask_shape), mask_dtype, (*query_shape[:-1], key_shape[-2]))
        batch, heads = _leading(query_shape)
        return cls(
            batch=batch,
            heads=heads,
            queries=query_shape[-2],
            keys=key_shape[-2],
            width=query_shape[-1],
            value_width=value_shape[-1],
            dtype=dtype,
            value_dtype=value_dtype,
            device=_device(device),
            mask=mask_shape,
            mask_dtype=mask_dtype,
            grad=grad,
            mask_grad=mask_grad,
            upcast=upcast,
        )

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, upcast: bool = False) -> Problem:
        """The problem that these tensors pose.

        Raises:
            ValueError: tensors that make no attention; the message names the argument, its shape and what was expected.
        """
        _check_tensors(query, key, value, mask)
        recorded = torch.is_grad_enabled()
        mask_grad = recorded and mask is not None and mask.requires_grad
        return cls.from_shapes(
            query.shape,
            key.shape,
            value.shape,
            query.dtype,
            query.device,
            value_dtype=value.dtype,
            mask_shape=None if mask is None else mask.shape,
            mask_dtype=None if mask is None else mask.dtype,
            grad=mask_grad or recorded and (query.requires_grad or key.requires_grad or value.requires_grad),
            mask_grad=mask_grad,
            upcast=upcast,
        )


def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element (`dtype.itemsize` is newer than torch 2.0)."""
    return 1 if dtype == torch.bool else torch.finfo(dtype).bits // 8


def checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A shape that did not come from a tensor, its sizes of whatever integer type.

    Raises:
        ValueError: a size that is no count; the message names the argument.
    """
    try:
        sizes = tuple(shape)
    except TypeError:
        raise ValueError(f"{name} has shape {shown(shape)}; expected [..., tokens, width]") from None
    counts = tuple(count for count in map(as_count, sizes) if count is not None)
    if len(counts) < len(sizes):
        raise ValueError(f"{name} has shape {shown(list(sizes))}; expected whole numbers of at least 0")
    return counts


def as_count(value: Any) -> int | None:
    """A whole number of at least 0, of whatever integer type; None where it is none."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return count if count >= 0 else None


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {shown(device)}; expected one such as 'cpu' or 'cuda:0'") from None


def _leading(shape: tuple[int, ...]) -> tuple[int, int]:
    """(batch, heads) of a shape: [batch*heads] counts as heads, and dimensions before [batch, heads] as batch."""
    batch = 1
    for size in shape[:-3]:
        batch *= size
    return batch, shape[-3] if len(shape) > 2 else 1


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Say what makes no attention, and nothing else: for tensors without numbers.

    Raises:
        ValueError: as `Problem.of`.
    """
    _check_tensors(query, key, value, mask)
    _check_shapes(query.shape, key.shape, value.shape)
    _check_dtypes(query.shape, query.dtype, value.shape, value.dtype)
    if mask is not None:
        _mask_sizes(tuple(mask.shape), mask.dtype, (*query.shape[:-1], key.shape[-2]))


def check_scale(scale: Any) -> float:
    """A scale of the scores as the number that it is, whatever holds it.

    Raises:
        ValueError: it is no finite number, or a gradient would be wanted of it.
    """
    if type(scale) in (float, int) and abs(scale) <= LARGEST_SCALE:  # in no words that a compiler does not know
        return scale
    if isinstance(scale, (torch.SymFloat, torch.SymInt)):  # of an exporter, which may not know the number yet
        return scale  # type: ignore[return-value]  # stands for a float in all that is done with one
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("scale is a tensor that needs a gradient, which attention does not give; expected a number")
    number = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if real and abs(number) <= LARGEST_SCALE:
        return float(number)
    raise ValueError(f"scale is {shown(scale)}; expected a finite number")


def check_mask(mask: Any) -> None:
    """Say it in words where a mask is of a class that stands for numbers, such as PyTorch's `CausalBias`, and has none.

    Raises:
        ValueError: it is.
    """
    own = getattr(type(mask), "__torch_function__", None)
    if isinstance(mask, Tensor) and getattr(own, "__func__", own) not in PLAIN_FUNCTIONS:
        raise ValueError(
            f"mask is a {type(mask).__name__}; expected a plain tensor of numbers (sdpa() takes such masks)"
        )


PLAIN_FUNCTIONS = (vars(Tensor)["__torch_function__"].__func__, torch._C._disabled_torch_function_impl)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    named = {"query": query, "key": key, "value": value}
    if mask is not None:
        named["mask"] = mask
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} is {tensor.layout}; expected a dense tensor, such as to_dense() makes")
        if tensor.is_nested:
            raise ValueError(f"{name} is a nested tensor; expected one of a single shape")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} {_sizes(tensor.shape)} is on {tensor.device}; expected {query.device}, where query is"
            )
    if key.dtype != query.dtype:
        raise ValueError(f"key {_sizes(key.shape)} is {key.dtype}; expected {query.dtype}, the dtype of query")


def _check_shapes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(f"{name} has shape {_sizes(shape)}; expected [..., tokens, width]")
        if shape[:-2] != query[:-2]:
            raise ValueError(
                f"{name} has shape {_sizes(shape)}; expected leading dimensions {_sizes(query[:-2])}, those of query"
            )
    if key[-1] != query[-1]:
        raise ValueError(f"key has shape {_sizes(key)}; expected width {query[-1]}, that of query")
    if query[-1] == 0:
        raise ValueError(f"query has shape {_sizes(query)}; expected a width of at least 1")
    if key[-2] == 0:
        raise ValueError(f"key has shape {_sizes(key)}; expected at least one key")
    if value[-2] != key[-2]:
        raise ValueError(f"value has shape {_sizes(value)}; expected {key[-2]} tokens, one for each key")


def _check_dtypes(query: tuple[int, ...], dtype: torch.dtype, value: tuple[int, ...], value_dtype: torch.dtype) -> None:
    for name, shape, given in (("query", query, dtype), ("value", value, value_dtype)):
        if given not in FLOAT_DTYPES:
            raise ValueError(f"{name} {_sizes(shape)} is {given}; expected float16, bfloat16, float32 or float64")
    # The one mixture that a web UI makes: queries and keys upcast, values as the weights are.
    if value_dtype != dtype and not (dtype == torch.float32 and value_dtype in HALF_DTYPES):
        raise ValueError(
            f"value {_sizes(value)} is {value_dtype}; expected {dtype}, the dtype of query, "
            "or half beside float32 queries"
        )


def _mask_sizes(mask: tuple[int, ...], dtype: torch.dtype | None, scores: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The mask's sizes in four dimensions, ones where it broadcasts."""
    if dtype != torch.bool and dtype not in FLOAT_DTYPES:
        raise ValueError(f"mask {_sizes(mask)} is {dtype}; expected bool or a floating-point dtype")
    fits = len(mask) <= len(scores) and all(
        size == 1 or size == wanted
        for size, wanted in zip(reversed(mask), reversed(scores))  # compilers know no `in`
    )
    if not fits:
        raise ValueError(f"mask has shape {_sizes(mask)}; expected one that broadcasts to {_sizes(scores)}")
    mask = (1,) * (len(scores) - len(mask)) + mask
    if len(scores) > 4 and any(size != 1 for size in mask[:-3]):  # with_four_dimensions() makes these dimensions one
        mask = (*scores[:-3], *mask[-3:])
    batch, heads = _leading(mask)
    return batch, heads, mask[-2], mask[-1]


def _sizes(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
