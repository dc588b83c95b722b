"""Names and shapes out of a `.safetensors` file. Nothing in it is executed and no tensor is loaded.

The file starts with eight bytes (a little-endian length N) and N bytes of JSON that map every tensor's name to its
type, shape and place. The `safetensors` package has the last word on whether it is intact. What it would wait for, read
without a limit or call by a name that no user knows is looked at here before and after.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from .layers import CheckpointError
from .tensors import Tensors, named

HEADER_LIMIT = 16 * 2**20  # bytes; SDXL's header has 0.3 MiB, metadata such as a preview picture may add a few

# Tensor types that every version of the package knows.
TYPES = frozenset("BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 I64 U64 F64".split())

# What else ends up under the name of a checkpoint, by its first bytes.
OTHER_FILES = (
    (b"PK\x03\x04", "a PyTorch pickle (.ckpt, .pt); only .safetensors is read, because a pickle can run code"),
    (b"\x80", "a pickle (.ckpt, .pt); only .safetensors is read, because a pickle can run code"),
    (b"version https://git-lfs", "a Git LFS pointer: the checkpoint itself was never downloaded"),
    (b"<", "a web page: the download went wrong"),
    (b"GGUF", "a GGUF file; only .safetensors is read"),
)


def read(path: Path) -> Tensors:
    """Name -> shape of every tensor in the file.

    The shapes are those of the JSON: asking the package for them (`get_slice(name).get_shape()`) takes a time that
    grows with the square of the number of tensors, 0.5 s for SDXL's 2,515, and at that rate hours for a hostile header.

    Raises:
        CheckpointError: there is no such file, it is no intact `.safetensors` file, or the package is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError("reading a checkpoint needs the Python package safetensors") from error
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            raise CheckpointError("it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _header(file, size)
        with safe_open(path, framework="numpy"):  # raises if it finds a fault
            pass
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        return Tensors({name: entry["shape"] for name, entry in entries.items()})
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file") from error
    except SafetensorError as error:
        raise CheckpointError(_in_words(error, header, size)) from error
    except CheckpointError:
        raise
    except OSError as error:
        # strerror, because str() of an OSError would show a stranger the whole path.
        raise CheckpointError(f"it cannot be opened ({error.strerror or error})") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:  # such as a path that no file system can have
        raise CheckpointError(f"it cannot be opened ({error})") from error


def _header(file: BinaryIO, size: int) -> bytes:
    """The JSON of a file of `size` bytes."""
    start = file.read(24)
    if not start:
        raise CheckpointError("it is empty")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > min(HEADER_LIMIT, size - 8):
        for magic, what in OTHER_FILES:
            if start.startswith(magic):
                raise CheckpointError(f"it is {what}")
        if len(start) < 8:
            raise CheckpointError(f"it is only {size} bytes long")
        if length > size - 8:
            raise CheckpointError(
                f"it is no .safetensors file, or cut short: it claims a header of {length} bytes and has {size} in all"
            )
        raise CheckpointError(f"it claims a header of {length} bytes; more than {HEADER_LIMIT} is not read")
    file.seek(8)
    return file.read(length)


def _in_words(error: Exception, header: bytes, size: int) -> str:
    """What is wrong with a file that the package refuses, as far as a user can do something about it."""
    import safetensors

    data = size - 8 - len(header)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in entries.values())
        if end > data:
            return f"it is cut short: its tensors take {end} bytes, and it has {data}"
        if end < data:
            return f"{data - end} bytes at its end belong to no tensor"
        for name, entry in entries.items():
            if entry["dtype"] not in TYPES:
                kind = f"{named(name)} is of the type {named(entry['dtype'])}"
                return f"{kind}, which safetensors {safetensors.__version__} does not know; a newer one may"
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    return f"it is no intact .safetensors file; the safetensors package says: {named(str(error))}"
