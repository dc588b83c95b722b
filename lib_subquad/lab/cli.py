"""What `python -m lib_subquad bench` and `growth` share: checking what was typed, and running measurements."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

DTYPES = ("float32", "float16", "bfloat16")


class UserError(ValueError):
    """Something the user gave cannot be used; the message is for them."""


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
def device(text: str) -> str:
    """A device that this torch can put a tensor on."""
    try:
        torch.empty(1, device=text)
    except Exception as error:  # what a missing backend raises differs from one to the next
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{text!r} is no device of this torch: {first}") from error
    return text


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="of the processor (default: torch's choice)")
    parser.add_argument(
        "--calm",
        type=positive,
        metavar="PERCENT",
        help="measure again, up to ten times, while other programs take more than this of the processors",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write every measurement to a file")
    parser.add_argument("--plot", metavar="FILE.png", type=output_file, help="draw a picture (needs matplotlib)")


@argument
def output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"{text!r} is a folder; expected a file to write")
    if not path.parent.is_dir():
        raise ValueError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


def need(module: str, why: str) -> None:
    """Say what is missing before anything slow begins.

    Raises:
        UserError: the module cannot be imported.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{why} needs {module}: pip install {module}") from error


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str | None], None]]:
    """Gives a function that shows what is being done, or with None counts it as done."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("tqdm is not installed: no progress bar", file=sys.stderr)
        yield lambda what: None
        return
    with tqdm(total=total, unit="run", dynamic_ncols=True, leave=False, file=sys.stderr) as bar:
        yield lambda what: bar.update() if what is None else bar.set_description(what)


def environment(device: str, threads: int | None = None) -> dict[str, object]:
    """What a measurement depends on beside its arguments."""
    return {
        "device": device_name(device),
        "threads": (threads or torch.get_num_threads()) if torch.device(device).type == "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": load(),
    }


def device_name(device: str) -> str:
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).get_device_name(device)
    return _processor() if kind == "cpu" else kind


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load() -> float | None:
    """How many processes wanted to run in the last minute, where the system tells: what else a CPU was doing."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
