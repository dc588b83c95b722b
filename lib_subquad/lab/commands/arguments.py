"""What may be typed: each a `type=` for argparse that says what was expected."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable

import torch

from ... import console
from ...console import UserError
from ...settings import shown
from .. import machine

DTYPES = ("float32", "float16", "bfloat16")
HAVE_DRIVERS = ("cuda", "xpu", "mps")  # kinds of devices; what PyTorch says of one may help
LONGEST_REASON = 72  # characters


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
    usable(text)
    return text


def usable(text: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: no tensor can be put on it; the message, a line, names those that there are.
    """
    machine.bring_backend(text)
    try:
        found = torch.device(text)
    except Exception:  # which names all that PyTorch has ever heard of
        raise UserError(_cannot_be_used(text)) from None
    try:
        torch.empty(1, device=found)
    except Exception as error:  # what a missing backend raises differs from one to the next
        why = console.first_line(error).split(". ")[0].rstrip(".")
        told = found.type in HAVE_DRIVERS and why != type(error).__name__ and len(why) <= LONGEST_REASON
        raise UserError(_cannot_be_used(text, f" ({why})" if told else "")) from error
    return found


def _cannot_be_used(text: str, why: str = "") -> str:
    return f"device {shown(text)} cannot be used here{why}. Available: {', '.join(available())}"


def available() -> list[str]:
    """The devices of this computer, by the names that PyTorch has for them."""
    found = []
    for kind in HAVE_DRIVERS:
        with contextlib.suppress(Exception):  # this torch knows none of the kind, or its driver is broken
            if kind == "mps":
                found += [kind] * torch.backends.mps.is_available()
                continue
            its = getattr(torch, kind)
            count = its.device_count() if its.is_available() else 0
            found += [kind] if count == 1 else [f"{kind}:{number}" for number in range(count)]
    with contextlib.suppress(Exception):
        directml = importlib.import_module("torch_directml")
        found += [str(directml.device(number)) for number in range(directml.device_count())]
    return [*found, "cpu"]


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
