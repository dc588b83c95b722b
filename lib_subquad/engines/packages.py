"""Kernels that a package brings, which the user may or may not have: finding it, loading it and calling it.

Nothing of a package is touched before somebody wants a kernel of it on a device that it serves.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import console
from .. import device as devices
from ..problem import Problem, item_bytes
from ..tensors import rows_of
from .base import Kept, Sizes, call_bytes

ALIGNMENT = 16  # bytes: kernels read so many at a time
# Errors that are a refusal, or ran out of memory, as they are; see `refusals`.
PYTORCHS = (RuntimeError, NotImplementedError, getattr(torch, "AcceleratorError", RuntimeError))

# Gradients of a chunk's query, of keys and values, from (rows, those three, the output's gradient, scale), all tensors
# as `as_given` has them.
Backward = Callable[[slice, Sequence[Tensor], Tensor, float], Sequence[Tensor]]


class Package:
    """`name` is what users call it, `module` what is imported, `needs` the functions that are called of it, and
    `distribution` what pip calls it, if that is not the name.

    Both questions are answered once a process: what is installed while it runs is found after a restart.
    """

    def __init__(self, name: str, module: str, needs: Sequence[str], distribution: str = "") -> None:
        self.name, self.needs, self._path, self._distribution = name, needs, module, distribution or name
        self.forget()

    def forget(self) -> None:
        self._installed: bool | None = None
        self._module: ModuleType | None = None
        self._broken = ""

    def installed(self) -> bool:
        """Whether it is there; imports nothing."""
        if self._installed is None:
            self._installed = _is_there(self._path.partition(".")[0])
        return self._installed

    def version(self) -> str:
        """Which one is there; imports nothing.

        Raises:
            importlib.metadata.PackageNotFoundError: it came without its metadata.
        """
        return importlib.metadata.version(self._distribution)

    def why_not(self) -> list[str]:
        """Why it cannot be used, in words, or nothing; imports it."""
        if not self.installed():
            return [f"{self.name} is not installed"]
        if self._module is None and not self._broken:
            try:
                module = importlib.import_module(self._path)
            except Exception as error:  # a missing library, one of another PyTorch, a check of its own
                self._broken = f"{self.name} is installed but cannot be loaded: {console.in_a_line(error)}"
            else:
                lacks = [name for name in self.needs if not callable(getattr(module, name, None))]
                self._module = None if lacks else module
                self._broken = f"this version of {self.name} has no {' and no '.join(lacks)}" if lacks else ""
        return [self._broken] if self._broken else []

    @property
    def module(self) -> Any:
        """What was imported; only where `why_not` has no reason."""
        if reasons := self.why_not():
            raise NotImplementedError(reasons[0])
        return self._module


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # whatever finds modules here
        return False


def why_not(package: Package, problem: Problem, refuses: Callable[[Problem], list[str]]) -> list[str]:
    """What keeps any such engine from a problem: the package is not there, the device is none of its, what `refuses`
    tells of the problem, or else, once it is loaded for it, that it cannot be."""
    if not package.installed():
        return [f"{package.name} is not installed"]
    if not devices.rules(problem.device).packages:
        return [f"{package.name} has no kernels for {devices.kind(problem.device)}"]
    reasons = []
    if not problem.batch * problem.heads * problem.queries:
        reasons.append("there is nothing to compute")
    most = devices.rules(problem.device).most_entries or math.inf
    if max(problem.batch, problem.heads) > most:
        reasons.append(f"{package.name} takes at most {most:,} batch entries or heads")
    if problem.mask_grad:
        reasons.append("the mask needs a gradient, which no fused kernel gives")
    if problem.grad and problem.upcast_dtype != problem.dtype:  # `gradients` would not know
        reasons.append("gradients of half-precision heads in float32 are left to others")
    reasons += refuses(problem)
    return reasons or package.why_not()


def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
    return ["kernels of packages are not traced"]


def attend_traced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    raise NotImplementedError(why_not_traced(query.device, mask)[0])


def in_words(*dtypes: torch.dtype | None) -> str:
    return " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def call(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """The package's function; what it raises beside PyTorch's own errors is a refusal as well.

    Raises:
        NotImplementedError: an assertion of its, a value that it does not take, a compiler that is not there.
        RuntimeError: as PyTorch raised it.
    """
    try:
        return function(*arguments, **more)
    except Exception as error:
        if type(error) in PYTORCHS or devices.is_out_of_memory(error):
            raise
        raise NotImplementedError(console.in_a_line(error)) from error


def prepared(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, channels side by side and every row where kernels can read it; a view, or the tensor itself,
    wherever its strides allow that."""
    tensor = tensor.to(dtype)
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _is_aligned(tensor: Tensor) -> bool:
    item = item_bytes(tensor.dtype)
    if tensor.stride(-1) != 1 or not tensor.stride(1):  # heads that are one and the same are not what kernels think
        return False
    if tensor.shape[-1] * item % ALIGNMENT:  # nor would a copy be
        return tensor.stride(-2) >= tensor.shape[-1] or tensor.shape[-2] == 1
    return not any(step * item % ALIGNMENT for step in (*tensor.stride()[:-1], tensor.storage_offset()))


def positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale that is not negative: kernels look for the largest before they scale them."""
    return (-query, -scale) if scale < 0 else (query, scale)


def with_heads_last(tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, width] as [batch, tokens, heads, width], or the other way round: a view."""
    return tensor.transpose(1, 2)


def as_given(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, heads, tokens, width] as kernels with heads last are given it, prepared for them."""
    return with_heads_last(prepared(tensor, dtype))


def workspace_bytes(problem: Problem, sizes: Sizes, attend_bytes: Callable[[Problem, int], int]) -> int:
    """Of a call in chunks of queries, of which attending one holds `attend_bytes(problem, queries)`."""
    total = call_bytes(problem, sizes.queries, lambda queries: attend_bytes(problem, queries))
    return total + problem.grad * problem.batch * problem.heads * problem.queries * 3 * 4  # statistics, made of a third


def cast_bytes(problem: Problem, queries: int) -> int:
    """What queries, keys and values in another dtype take beside those that are given."""
    item, heads = item_bytes(problem.upcast_dtype), problem.batch * problem.heads
    total = 0
    if problem.dtype != problem.upcast_dtype:
        total += heads * (queries + problem.keys) * problem.width * item
    if problem.value_dtype != problem.upcast_dtype:
        total += heads * problem.keys * problem.value_width * item
    return total


def result_bytes(problem: Problem, queries: int) -> int:
    """A chunk's result, and the same in value's dtype where that is another."""
    result = problem.batch * problem.heads * queries * problem.value_width
    other = problem.value_dtype != problem.upcast_dtype
    return result * (item_bytes(problem.upcast_dtype) + other * item_bytes(problem.value_dtype))


def statistics_of(logsumexp: Tensor, queries: int, nothing: Tensor | None) -> Tensor:
    """[batch, heads, queries, 2] of a logsumexp [batch, heads, queries or more]: it and one, or for `nothing` zeros."""
    logsumexp = logsumexp[..., :queries].float()
    some = torch.ones_like(logsumexp)
    if nothing is not None:
        logsumexp, some = (it.masked_fill(nothing[..., 0], 0.0) for it in (logsumexp, some))
    return torch.stack((logsumexp, some), dim=-1)


def logsumexp_of(statistics: Tensor) -> Tensor:
    """The other way round; infinite, which gives weights of zero, for a row that attended to nothing."""
    largest, total = statistics.unbind(-1)
    return torch.where(total == 0, math.inf, largest + total.log()).contiguous()


def gradients_in_chunks(
    backward: Backward, kept: Kept, grad_output: Tensor, scale: float, sizes: Sizes, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value and mask, of which there are none, from those of a chunk of queries, in which keys
    and values have their part; sums in float32."""
    dtype = kept.query.dtype
    queries: list[Tensor] = []
    keys: Tensor | None = None
    values: Tensor | None = None
    for rows in _chunks(kept.query.shape[2], sizes.queries):
        query, positive_scale = positive(rows_of(kept.query, rows), scale)
        given = [as_given(it, dtype) for it in (query, kept.key, kept.value)]
        found = backward(rows, given, as_given(rows_of(grad_output, rows), dtype), positive_scale)
        grad_query, grad_key, grad_value = map(with_heads_last, found)
        queries.append(-grad_query if scale < 0 else grad_query)
        keys = grad_key if keys is None else keys.float() + grad_key
        values = grad_value if values is None else values.float() + grad_value
    all_found = (queries[0] if len(queries) == 1 else torch.cat(queries, dim=2), keys, values, None)
    return [
        it.to(tensor.dtype) if needed and it is not None and tensor is not None else None
        for it, tensor, needed in zip(all_found, kept, wanted)
    ]


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA card; None of others, or where it does not tell."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        return torch.cuda.get_device_capability(device)
    except Exception:  # planned for a card that is not here
        return None
