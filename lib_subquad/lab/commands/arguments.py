"""What may be typed: each a `type=` for argparse that says what was expected."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable

import torch

from ... import console
from .. import machine

DTYPES = ("float32", "float16", "bfloat16")


def argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A `type=` for argparse that shows the message of a ValueError."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


@argument
def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


@argument
def count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r}; expected a whole number of at least 0")
    return int(text)


@argument
def percent(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 100:
        raise ValueError(f"{text!r}; expected a whole number from 1 to 100")
    return int(text)


@argument
def device(text: str) -> str:
    """A device that this torch can put a tensor on."""
    machine.bring_backend(text)
    try:
        torch.empty(1, device=text)
    except Exception as error:  # what a missing backend raises differs from one to the next
        raise ValueError(f"{text!r} is no device of this torch: {console.first_line(error)}") from error
    return text


def best_device() -> torch.device:
    """The accelerator that this computer has, else its processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    with contextlib.suppress(Exception):  # Intel's own package gives older torch its "xpu"; it may be broken
        if not _has_xpu():
            importlib.import_module("intel_extension_for_pytorch")
    if _has_xpu():
        return torch.device("xpu")
    with contextlib.suppress(Exception):
        return importlib.import_module("torch_directml").device()
    return torch.device("cpu")


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()
