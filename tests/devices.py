"""Where tests of numbers compute: on the CPU, or on the device that `pytest --device` names.

Such tests make their tensors on the CPU, with a seeded generator, and compare there; `on_device(function)` is the
function on the device, whose arguments go there and whose results come back, gradients too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import lib_subquad
from lib_subquad import device as devices
from lib_subquad.console import UserError
from lib_subquad.lab.commands import arguments
from tests import stand_in

HELP = "where tests of numbers compute: cpu, cuda, cuda:1, mps, xpu, or a stand-in of tests/stand_in.py"

_device = torch.device("cpu")
_stands_in = False


def use(name: str) -> None:
    """From now on that device.

    Raises:
        UsageError: it cannot be used here.
    """
    global _device, _stands_in
    _stands_in = name in stand_in.NAMES
    if _stands_in and stand_in.why_not():
        raise pytest.UsageError(stand_in.why_not())
    try:
        _device = stand_in.device(name) if _stands_in else arguments.usable(name)
    except UserError as error:
        raise pytest.UsageError(f"{error}, and as stand-ins {', '.join(stand_in.NAMES)}") from error


def device() -> torch.device:
    return _device


def is_cpu() -> bool:
    return _device.type == "cpu"


def is_stand_in() -> bool:
    return _stands_in


def of_stand_in() -> str:
    """ "directml" or "card", if it is one of those."""
    return {"privateuseone": "directml"}.get(_device.type, _device.type) if _stands_in else ""


cpu_only = pytest.mark.skipif("config.getoption('device') != 'cpu'", reason="asks for what only the CPU tells")


def dtypes(wanted: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    """Those of them that the device has."""
    return tuple(dtype for dtype in wanted if dtype != torch.float64 or devices.rules(_device).float64)


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu" if is_stand_in() else _device.type, dtype)  # stand-ins have none of their own


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` there, of tensors that are here."""

    @functools.wraps(function)
    def computed(*arguments: Any, **named: Any) -> Any:
        if is_cpu():
            return function(*arguments, **named)
        return tree_map(_back, function(*tree_map(_there, arguments), **tree_map(_there, named)))

    return computed


def _there(it: Any) -> Any:
    return _There.apply(it) if isinstance(it, Tensor) and it.device.type == "cpu" else it


def _back(it: Any) -> Any:
    return it.to("cpu") if isinstance(it, Tensor) else it


class _There(torch.autograd.Function):
    """The tensor on the device, with the strides and the place in its storage that it has, whatever they are."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.to(_device)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        offset = tensor.storage_offset()
        storage = tensor.as_strided((offset + last + 1,), (1,), 0)
        return storage.to(_device).as_strided(tensor.shape, tensor.stride(), offset)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output.to("cpu")


attention = on_device(lib_subquad.attention)
