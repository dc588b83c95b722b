"""What we say to the user. Nothing that is said on the console may raise: no line is worth an image.

Imports nothing of ours, so that install.py can run it by itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(ValueError):
    """What was asked for cannot be; the message is a sentence for the user, who can put it right.

    `step`: how, in a sentence of its own, where there is one thing to do.
    """

    def __init__(self, message: str = "", step: str = "") -> None:
        super().__init__(f"{message} {step}".rstrip())
        self.message, self.step = message, step


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_a_line(error: BaseException) -> str:
    """Its class, and the first line of what it says."""
    kind, first = type(error).__name__, first_line(error)
    return kind if first == kind else f"{kind}: {first}"


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a line, by default on stdout; characters that it cannot show are escaped."""
    stream = sys.stdout if stream is None else stream
    _tell(lambda line: print(line, end=end, file=stream, flush=True), text, stream)


def warn(text: str) -> None:
    """The same through the log "subquad", where a host or a program that uses us may collect it."""
    _tell(logging.getLogger("subquad").warning, text, sys.stderr)


def _tell(tell: Callable[[str], None], text: str, stream: TextIO) -> None:
    # The stream's own encoding is a guess where a launcher has put a wrapper in place of it: then ASCII.
    for encoding in (getattr(stream, "encoding", None) or "utf-8", "ascii"):
        try:
            return tell(text.encode(encoding, "backslashreplace").decode(encoding))
        except (UnicodeError, LookupError):
            continue
        except Exception:  # no console: it is closed, or a pipe that nobody reads, or somebody's half a stream
            return
