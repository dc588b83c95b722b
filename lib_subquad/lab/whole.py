"""Files that whoever reads them finds whole, whatever crashes or fills up meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

TRIES = 20  # Windows lets nobody replace a file while somebody reads it


def write_whole(path: Path, content: bytes) -> None:
    """Write it beside the file, and put it in its place.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    with beside(path) as other:
        with open(other, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for left in range(TRIES, -1, -1):
            try:
                os.replace(other, path)
                break
            except PermissionError:
                if not left:
                    raise
                time.sleep(0.01)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name for a new file in the same folder, `<name>.<anything>.tmp`, which is gone afterwards."""
    other = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield other
    finally:
        with contextlib.suppress(OSError):
            os.unlink(other)
