"""Where the commands keep what was measured: in the user's cache folder, or in a file that they are given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ...engines.table import Class, Found, Machine
from ..measured import file
from ..measured.words import to_be_measured_again

MISSING = "platformdirs, which knows where your cache folder is, is not installed"
INSTEAD = f"add --table FILE (the web UI's own is {file.NAME} in its data folder), or: pip install platformdirs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        metavar="FILE",
        type=Path,
        help=f"what was measured is kept in FILE; the web UI's own is {file.NAME} in its data folder (default: "
        f"{file.NAME} in your cache folder, which needs platformdirs)",
    )


def path(arguments: argparse.Namespace) -> Path | None:
    """The file; None where nobody says which."""
    if arguments.table is not None:
        return arguments.table
    try:
        import platformdirs
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("subquad", appauthor=False), file.NAME)


def why_not(arguments: argparse.Namespace) -> str:
    """Why nothing that is measured could be kept, in a sentence, before anything is; empty where it could."""
    its = path(arguments)
    if its is None:
        return f"{MISSING}; {INSTEAD}"
    try:
        file.try_to_write(its)
    except OSError as error:
        return f"{its.absolute()} cannot be written: {file.why(error)}"
    return ""


def load(arguments: argparse.Namespace) -> None:
    """Go by what is in it, where there is one."""
    if (its := path(arguments)) is not None:
        file.load(its)


def add(arguments: argparse.Namespace, machine: Machine, found: Mapping[Class, Found]) -> str:
    """Keep this as well, and tell so in a sentence."""
    its = path(arguments)
    kept = file.add(its, machine, found)
    if kept:
        again = to_be_measured_again(found)
        return f"Kept in {its}: automatic goes by it, and `python -m lib_subquad order` shows it. {again}".rstrip()
    return f"What was measured is not kept: {'see above' if its else f'{MISSING}; {INSTEAD}'}."
