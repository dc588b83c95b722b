"""Files that a command writes: tried before anything slow begins, written when it is done."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...console import UserError
from .arguments import argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        UserError: it cannot; the message says why.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise UserError(f"{text!r} is a folder; expected a file to write")
        if not path.parent.is_dir():
            raise UserError(f"{text!r}: there is no folder {str(path.parent)!r}")
        new = not path.exists()
        if new or path.is_file():  # a pipe would wait for its reader
            with open(path, "ab"):
                pass
    except OSError as error:
        raise UserError(f"{text!r} cannot be written: {error.strerror or error}") from error
    if new:
        with contextlib.suppress(OSError):
            os.remove(os.path.realpath(path))  # what a link leads to, not the link
    return path


@argument
def picture_file(text: str) -> Path:
    if not text.lower().endswith(PICTURES):
        raise ValueError(f"{text!r}; expected a file that ends in {', '.join(PICTURES)}")
    return writable_file(text)


def check(arguments: argparse.Namespace) -> None:
    """Say what is missing before anything slow begins.

    Raises:
        UserError: a picture is wanted, and there is nothing to draw it with.
    """
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from error


def save(arguments: argparse.Namespace, record: object, draw: Callable[[], Figure]) -> None:
    """Write what was measured, and the matplotlib figure that `draw` makes of it, where they were asked for.

    Raises:
        UserError: a file that could be written before cannot be now.
    """
    if arguments.json:
        with _writing(arguments.json):
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            arguments.json.write_text(text, encoding="utf-8")
    if arguments.plot:
        with _writing(arguments.plot):
            draw().savefig(arguments.plot)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a disk that is full, say
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
