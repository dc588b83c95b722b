"""What others wrote, such as an error's words, without what tells who somebody is and where their files are."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PLACE, NAME = "<path>", "<name>"
# A space belongs to a path if a separator follows in the next word.
PATHS = re.compile(
    r"(?P<address>https?://\S+)"
    r"|(?<!\w)(?:[A-Za-z]:[\\/]|\\\\)(?:[^\s'\"<>|?*]| (?=[^\s'\"<>|?*:]*\\))*"
    r"|(?<![\w./])~?/[^\s/'\"<>]+/(?:[^\s'\"<>]| (?=[^\s'\"<>]*/))*"
    rf"|{PLACE}[\\/](?:[^\s'\"<>|?*]| (?=[^\s'\"<>|?*:]*[\\/]))*"
)
SHORTEST_PLACE = 4  # "/" and "C:\" are everybody's


def anonymous(text: str) -> str:
    """The text without paths, and without the names of the user and the computer."""
    for place in sorted(_told(_places), key=len, reverse=True):
        if len(place) >= SHORTEST_PLACE:
            text = re.sub(re.escape(place) + r"(?!\w)", lambda _: PLACE, text, flags=re.IGNORECASE)
    text = PATHS.sub(lambda found: found["address"] or PLACE, text)
    for name in _told(_names):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", NAME, text, flags=re.IGNORECASE)
    return text


def _told(ask: Callable[[], Iterator[Callable[[], str]]]) -> set[str]:
    found = set()
    for question in ask():
        with contextlib.suppress(Exception):  # a user without a name, a folder that is gone
            found.add(question())
    return found - {"", "localhost"}


def _places() -> Iterator[Callable[[], str]]:
    for place in (Path.home, Path.cwd, tempfile.gettempdir, lambda: sys.prefix, lambda: Path(__file__).parents[2]):
        yield functools.partial(_written, place, str)
        yield functools.partial(_written, place, Path.as_posix)


def _written(place: Callable[[], str | Path], how: Callable[[Path], str]) -> str:
    return how(Path(place()))


def _names() -> Iterator[Callable[[], str]]:
    yield getpass.getuser
    yield lambda: Path.home().name
    yield platform.node
    yield lambda: platform.node().partition(".")[0]
    for variable in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME"):
        yield functools.partial(os.environ.__getitem__, variable)
