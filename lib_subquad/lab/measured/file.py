"""The file that keeps what was measured. No fault of it is worth an image: what cannot be read or written costs a line.

It is written beside itself and put in its place, so that whoever reads finds a whole one, whatever crashes or fills up
meanwhile; and one process at a time adds to it, so that none takes away what another has found.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ... import console
from ...engines import order
from ...engines.table import LARGEST_FILE, Class, Found, Machine, Table
from ..whole import beside, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

NAME = "subquad_measured.json"
PATIENCE = 5.0  # seconds to wait for another process that writes
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what a lock says that another has


def load(path: Path) -> Table:
    """Go by what this file holds from now on; by nothing where there is none, or it is broken."""
    order.go_by(read(path))
    return order.table()


def add(path: Path | None, machine: Machine, found: Mapping[Class, Found]) -> bool:
    """Go by this too, and keep it in the file, if there is one to be; whether it is kept."""
    return _change(path, lambda table: table.with_found(machine, found), "what was measured is not kept")


def forget(path: Path | None, machine: Machine | None = None) -> bool:
    """Go by the fixed rules again, on this machine or on all, and forget what was measured there; whether the file has
    forgotten it."""

    def without(table: Table) -> Table:
        return Table() if machine is None else table.without(machine)

    return _change(path, without, "nothing is forgotten for good")


def try_to_write(path: Path) -> None:
    """Find out, before anything slow begins, whether it can be kept there. What is there stays as it is.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt" and path.exists() and not os.access(path, os.W_OK):  # elsewhere only its folder matters
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with _alone(path):
        _read(path, to_replace=True)
        with beside(path) as other, open(other, "x"):
            pass


def _change(path: Path | None, change: Callable[[Table], Table], otherwise: str) -> bool:
    order.go_by(change(order.table()))
    if path is None:
        return False
    try:
        if change(Table()) == Table() and not path.exists():  # nothing to forget, and no folder is made for that
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            _tidy(path)
            before = _read(path, to_replace=True)
            after = change(before)
            if before.machines or after.machines:
                write_whole(path, after.to_json().encode())
    except OSError as error:
        _warn_once(f"[subquad] {otherwise}: {path.name} cannot be written ({why(error)})")
        return False
    return True


def read(path: Path) -> Table:
    """What it holds. Never raises."""
    try:
        return _read(path)
    except OSError as error:
        _warn_once(f"[subquad] {path.name} cannot be read ({why(error)}): nothing is known to have been measured")
    return Table()


def _read(path: Path, to_replace: bool = False) -> Table:
    """What it holds; nothing where it is broken.

    Raises:
        OSError: it is there, and cannot be read, or it is to be replaced and is another program's: whoever wrote it
            anew would take away what it holds.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for its writer
            raise OSError("it is no file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        return Table.from_json(content.decode("utf-8"))
    except FileNotFoundError:
        return Table()
    except ValueError as error:
        told = "it is no text" if isinstance(error, UnicodeDecodeError) else error
        if path.name == NAME:
            _warn_once(f"[subquad] {path.name} is ignored, and written anew when something is measured: {told}")
        elif to_replace and content.strip():
            raise OSError("it is no file of measurements, and stays as it is") from error
        else:
            _warn_once(f"[subquad] {path.name} is no file of measurements, and is ignored: {told}")
    return Table()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process changes the file; after `PATIENCE` all the same: the worst is that a finding is lost.

    The lock is the system's, which takes it back from a process that ends. Its file stays: whoever deleted it would
    take it from those who wait.
    """
    with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
        until = time.monotonic() + PATIENCE
        while not _locked(lock) and time.monotonic() < until:
            time.sleep(0.003)
        yield


def _locked(lock: BinaryIO) -> bool:
    """Whether this process has it now, until the file is closed; also where there are no locks on this disk."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in HELD
    return True


def _tidy(path: Path) -> None:
    """Remove what processes left that ended in the middle of writing."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def why(error: OSError) -> str:
    """In words."""
    return error.strerror or str(error) or type(error).__name__  # and not the path, which may have a name in it


_warn_once = cache(console.warn)
