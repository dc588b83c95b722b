"""What the commands share: checking what was typed, running measurements, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..console import UserError
from .results import Result

DTYPES = ("float32", "float16", "bfloat16")
PICTURES = (".png", ".svg", ".pdf")


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


@argument
def percent(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 100:
        raise ValueError(f"{text!r}; expected a whole number from 1 to 100")
    return int(text)


def add_measuring_arguments(parser: argparse.ArgumentParser, repeats: int, timeout: int) -> None:
    """Where and how often to measure, with these defaults."""
    parser.add_argument(
        "--device", type=device, default="cpu", help="such as cpu, cuda, cuda:1, xpu (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=positive, default=repeats, metavar="N", help="rounds of all peers (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the processor (default: torch's choice)")
    parser.add_argument(
        "--calm",
        type=percent,
        metavar="PERCENT",
        help="measure again, up to ten times, while other programs take more than this of the processors "
        "(default: never again)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=timeout,
        metavar="SECONDS",
        help="the longest that one measurement may take (default: %(default)s)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=argument(writable_file),
        help="write every measurement to FILE (default: to none)",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=picture_file, help="draw a picture; needs matplotlib (default: none)"
    )


def writable_file(text: str) -> Path:
    """A file that can be written: tried now, and left as it was.

    Raises:
        ValueError: it cannot; the message says why.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise ValueError(f"{text!r} is a folder; expected a file to write")
        if not path.parent.is_dir():
            raise ValueError(f"{text!r}: there is no folder {str(path.parent)!r}")
        new = not path.exists()
        if new or path.is_file():  # a pipe would wait for its reader
            with open(path, "ab"):
                pass
    except OSError as error:
        raise ValueError(f"{text!r} cannot be written: {error.strerror or error}") from error
    if new:
        with contextlib.suppress(OSError):
            os.remove(os.path.realpath(path))  # what a link leads to, not the link
    return path


@argument
def picture_file(text: str) -> Path:
    if not text.lower().endswith(PICTURES):
        raise ValueError(f"{text!r}; expected a file that ends in {', '.join(PICTURES)}")
    return writable_file(text)


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
    with writing(path):
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say it in words where a file that could be written before cannot be now: a disk that is full, say."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def exit_status(command: str, results: Sequence[Result], complete: bool) -> int:
    """How a command that measured ends; where it is no success, stderr says why."""
    if not complete:
        print("stopped: the table holds what was measured until then", file=sys.stderr)
        return 130
    if any(result.good for result in results):
        return 0
    reasons = list(dict.fromkeys(result.reason for result in results))
    why = reasons[0] if len(reasons) == 1 else "the table's notes say why"
    print(f"{command}: nothing was measured: {why}", file=sys.stderr)
    return 1


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
