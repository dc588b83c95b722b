"""The file that keeps what was measured. No fault of it is worth an image: what cannot be read or written costs a line.

It is written beside itself and put in its place, so that whoever reads finds a whole one, whatever crashes or fills up
meanwhile; and one process at a time adds to it, so that none takes away what another has found.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from ... import console
from ...engines import order
from ...engines.table import LARGEST_FILE, Class, Found, Machine, Table

NAME = "subquad_measured.json"
PATIENCE = 2.0  # seconds to wait for another process that writes
STALE = 10.0  # seconds after which whoever had begun to write has ended without a word
TRIES = 20  # Windows lets nobody replace a file while somebody reads it


def load(path: Path) -> Table:
    """Go by what this file holds from now on; by nothing where there is none, or it is broken."""
    order.go_by(read(path))
    return order.table()


def add(path: Path | None, machine: Machine, found: Mapping[Class, Found]) -> None:
    """Go by this too, and keep it in the file, if there is one to be."""
    _change(path, lambda table: table.with_found(machine, found))


def forget(path: Path | None, machine: Machine | None = None) -> None:
    """Go by the fixed rules again, on this machine or on all, and forget what was measured there."""
    _change(path, lambda table: table.without(machine) if machine is not None else Table())


def _change(path: Path | None, change: Callable[[Table], Table]) -> None:
    order.go_by(change(order.table()))
    if path is None:
        return
    try:
        with _alone(path):
            _write(path, change(read(path)))
    except OSError as error:
        _warn_once(f"[subquad] what was measured is not kept: {path.name} cannot be written ({_why(error)})")


def read(path: Path) -> Table:
    """What it holds. Never raises."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        return Table.from_json(content.decode("utf-8"))
    except FileNotFoundError:
        return Table()
    except OSError as error:
        _warn_once(f"[subquad] {path.name} cannot be read ({_why(error)}): nothing is known to have been measured")
    except ValueError as error:  # that it is no UTF-8 among them
        _warn_once(f"[subquad] {path.name} is ignored, and written anew when something is measured: {error}")
    return Table()


def _write(path: Path, table: Table) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(table.to_json())
            file.flush()
            os.fsync(file.fileno())
        for left in range(TRIES, -1, -1):
            try:
                os.replace(beside, path)
                break
            except PermissionError:
                if not left:
                    raise
                time.sleep(0.01)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process changes the file; after `PATIENCE` all the same: the worst is that a finding is lost."""
    lock, until, mine = path.with_name(f"{path.name}.lock"), time.monotonic() + PATIENCE, False
    while not mine and time.monotonic() < until:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            mine = True
        except (FileExistsError, PermissionError):  # Windows says the latter of one that is being deleted
            with contextlib.suppress(OSError):
                if time.time() - os.stat(lock).st_mtime > STALE:
                    os.unlink(lock)
                    _tidy(path)
            time.sleep(0.01)
    try:
        yield
    finally:
        if mine:
            with contextlib.suppress(OSError):
                os.unlink(lock)


def _tidy(path: Path) -> None:
    """Remove what processes left that ended in the middle of writing."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__  # and not the path, which may have a name in it


_warn_once = cache(console.warn)
