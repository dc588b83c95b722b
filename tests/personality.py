"""Devices that are not here, by their personality: modes that see every operator and know what a device forbids, or
run out of memory on demand.

The facts stand here a second time, apart from `lib_subquad.device.RULES`: a rule that is dropped there is noticed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lib_subquad import calls
from tests.threads import torch_threads

PRODUCTS = ("bmm", "baddbmm", "baddbmm_", "mm", "addmm", "addmm_", "addbmm", "addbmm_")


@dataclass(frozen=True)
class Forbidden:
    """What a device refuses. Caps are some 2^17 times smaller than the real ones: a test on the CPU can meet them.

    None is below 28,800 bytes or 7,200 elements, which gradients of `tests/test_device.py`'s own tensors take.
    """

    elements: int | None = None
    bytes: int | None = None
    float64: bool = False
    strided_operands: bool = False
    beta_of_zero: bool = False
    fused: bool = False
    fused_widths: tuple[int, ...] = ()  # but where it has a fused kernel, forward only and for more than 8 queries


APPLES = Forbidden(8191, 32768, float64=True, strided_operands=True, beta_of_zero=True, fused=True)
FORBIDDEN = {
    "mps 2.12": APPLES,  # with the version of torch
    "mps 2.13": replace(APPLES, fused_widths=(32, 64, 72, 80, 96, 128, 256)),
    "xpu": Forbidden(bytes=32768),
    "directml": Forbidden(float64=True, fused=True),
}


class Personality(TorchDispatchMode):
    """Watches what is called within it as the device `kind` would; `complaints` holds what that device refuses.

    Tensors that were there before, such as a test's own inputs, are not held against the call.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.forbidden = FORBIDDEN[kind]
        self.complaints: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.operators += 1
        self._check_call(name, args, kwargs)
        before = {storage_of(tensor) for tensor in tensors_in(args, kwargs)}
        result = function(*args, **kwargs)
        self._check_results(name, [tensor for tensor in tensors_in(result) if storage_of(tensor) not in before])
        return result

    def _check_call(self, name: str, args: tuple, kwargs: dict) -> None:
        given = tensors_in(args, kwargs)
        if self.forbidden.float64 and any(tensor.dtype == torch.float64 for tensor in given):
            self.complaints.append(f"{name}: takes float64")
        if self.forbidden.fused and "scaled_dot_product" in name:
            self._check_fused(name, args, kwargs)
        if self.forbidden.beta_of_zero and kwargs.get("beta", 1) == 0:
            self.complaints.append(f"{name}: beta is 0")
        if self.forbidden.strided_operands and name in PRODUCTS:
            operands = [*args[1:], *([kwargs["out"]] if "out" in kwargs else [])] if "add" in name else given
            for tensor in tensors_in(operands):
                if not tensor.is_contiguous() and not tensor.transpose(-2, -1).is_contiguous():
                    self.complaints.append(f"{name}: operand {list(tensor.shape)} has strides {tensor.stride()}")

    def _check_fused(self, name: str, args: tuple, kwargs: dict) -> None:
        """What makes `_scaled_dot_product_attention_math_mps` keep all scores, or PyTorch not even ask it."""
        query, key, value = args[:3]
        width, mask = query.shape[-1], kwargs.get("attn_mask")
        kept = width not in self.forbidden.fused_widths or value.shape[-1] != width or query.shape[-2] <= 8
        kept |= mask is not None and mask.dtype not in (torch.bool, query.dtype)
        if kept or any(tensor.requires_grad for tensor in (query, key, value)):
            self.complaints.append(f"{name}: materialises the scores")
        elif not all(tensor.is_contiguous() for tensor in (query, key, value)):
            self.complaints.append(f"{name}: strides of tensors that are not contiguous")

    def _check_results(self, name: str, made: list[Tensor]) -> None:
        for tensor in made:
            size = tensor.untyped_storage().nbytes()
            if self.forbidden.elements is not None and size // tensor.element_size() > self.forbidden.elements:
                self.complaints.append(f"{name}: makes {list(tensor.shape)}, too many elements")
            if self.forbidden.bytes is not None and size > self.forbidden.bytes:
                self.complaints.append(f"{name}: makes {list(tensor.shape)}, too many bytes")
            if self.forbidden.float64 and tensor.dtype == torch.float64:
                self.complaints.append(f"{name}: makes float64")


def tensors_in(*trees) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


TEXT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1610612736 bytes"


class FailAt(TorchDispatchMode):
    """Runs out of memory at one operator: before it has run, or (`halfway`) once it has written its result."""

    def __init__(self, number: int | None, halfway: bool = False) -> None:
        super().__init__()
        self.number, self.halfway, self.names, self.failed = number, halfway, [], ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mine = len(self.names) == self.number
        self.names.append(function.overloadpacket.__name__)
        if mine:
            self.failed = self.names[-1]
        if mine and not self.halfway:
            raise RuntimeError(TEXT)
        result = function(*args, **(kwargs or {}))
        if mine:
            raise RuntimeError(TEXT)
        return result


class FailOver(TorchDispatchMode):
    """Runs out of memory whenever an operator makes a tensor of more than `limit` bytes."""

    def __init__(self, limit: int, error: Exception | None = None) -> None:
        super().__init__()
        self.limit, self.error, self.failures = limit, error or RuntimeError(TEXT), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {storage_of(tensor) for tensor in tensors_in(args, kwargs or {})}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if storage_of(tensor) not in before and tensor.untyped_storage().nbytes() > self.limit:
                self.failures += 1
                raise self.error
        return result


@contextlib.contextmanager
def alone():
    """Nothing remembered, and one thread: on a busy machine two wait for each other at every small operator."""
    with torch_threads(1):
        torch.manual_seed(0)
        calls.forget()
        yield
        calls.forget()
