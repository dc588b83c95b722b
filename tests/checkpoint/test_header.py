"""Files that lie, or are something else."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc

import pytest

from lib_subquad.checkpoint import CheckpointError, read_attention_layers
from lib_subquad.checkpoint.header import HEADER_LIMIT
from tests.checkpoint.making import entries, tensor, unet, write

pytest.importorskip("safetensors")


@pytest.mark.parametrize(
    "header, data, says",
    [
        (b"\xff\xfe\x00", 0, "no intact"),
        (b"{not json", 0, "no intact"),
        (b"", 0, "no intact"),
        (b"[]", 0, "no intact"),
        (b"null", 0, "no intact"),
        (b'"text"', 0, "no intact"),
        (b"[" * 100_000, 0, "no intact"),
        (b'{"a":' * 100_000, 0, "no intact"),
        (b'{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,0]}}', 0, "no intact"),
        (b'{"a":{"dtype":"F16","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}', 0, "no intact"),
        (b'{"a":1,"a":2}', 0, "no intact"),
        (b'{"a":{"dtype":"F16","dtype":"F32"}}', 0, "no intact"),
        ({"a": 1}, 0, "no intact"),
        ({"a": {"dtype": "F16", "shape": [1]}}, 0, "no intact"),
        ({"a": tensor(shape=(-2, -2))}, 8, "no intact"),
        ({"a": tensor(shape=(2.0, 2))}, 8, "no intact"),
        ({"a": tensor(shape=(True, 4))}, 8, "no intact"),
        ({"a": tensor(shape=("2", 2))}, 8, "no intact"),
        ({"a": tensor() | {"shape": 4}}, 8, "no intact"),
        ({"a": tensor(shape=(2**62, 2**62))}, 8, "no intact"),
        ({"a": tensor(shape=(3, 2))}, 8, "no intact"),
        ({"a": tensor() | {"data_offsets": [0]}}, 8, "no intact"),
        ({"a": tensor(begin=-8, end=0)}, 8, "8 bytes at its end"),
        ({"a": tensor(begin=8, end=0)}, 8, "8 bytes at its end"),
        ({"a": tensor() | {"data_offsets": {"0": 8}}}, 8, "no intact"),
        ({"a": tensor(shape=(2**40,), end=2**41)}, 8, "cut short"),
        ({"a": tensor(), "b": tensor(begin=4, end=12)}, 12, "no intact"),
        ({"a": tensor(), "b": tensor()}, 8, "no intact"),
        ({"a": tensor(), "b": tensor(begin=10, end=18)}, 18, "no intact"),
        ({"a": tensor(begin=2, end=10)}, 10, "no intact"),
        ({"a": tensor()}, 9, "1 bytes at its end"),
        ({"a": tensor(dtype="F17")}, 8, "does not know"),
        ({"a": tensor(dtype=["F16"])}, 8, "no intact"),
        ({"a": tensor(), "__metadata__": {"x": 1}}, 8, "no intact"),
        ({"a": tensor(), "__metadata__": "x"}, 8, "no intact"),
        ({"\ud800": tensor()}, 8, "no intact"),
    ],
)  # fmt: skip
def test_headers_that_lie(file, header, data, says):
    with pytest.raises(CheckpointError, match=says) as error:
        read_attention_layers(write(file, header, data))
    assert str(error.value).startswith("'model.safetensors': ")
    assert len(str(error.value)) < 300
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "it is empty"),
        (b"\x02\0\0", "only 3 bytes"),
        (b"\x02\0\0\0\0\0\0\0", "claims a header of 2 bytes and has 8 in all"),
        (b"\x03\0\0\0\0\0\0\0{}", "claims a header of 3 bytes"),
        (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
        (b"PK\x03\x04\0\0\0\x08" + b"archive/data.pkl" * 9, "a PyTorch pickle"),
        (b"\x80\x02}q\0(X\x0a\0\0\0state_dictq\x01", "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0", "GGUF"),
    ],
)
def test_other_files(file, content, says):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_attention_layers(file)


def test_a_pickle_is_not_executed(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"model{protocol}.ckpt"
        path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
        with pytest.raises(CheckpointError):
            read_attention_layers(path)
    assert not (tmp_path / "trap").exists()


def test_no_file_to_read(tmp_path):
    for path, says in [
        (tmp_path, "it is a folder"),
        (tmp_path / "missing.safetensors", "there is no such file"),
        (tmp_path / "a\0b.safetensors", "cannot be opened"),
        (tmp_path / ("x" * 5000), "cannot be opened"),
    ]:
        with pytest.raises(CheckpointError, match=says) as error:
            read_attention_layers(path)
        assert str(tmp_path) not in str(error.value)  # a shared web UI shows this message to strangers


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_not_waited_for(file):
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="it is not a file"):
        read_attention_layers(file)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="needs sparse files")
@pytest.mark.parametrize("length", [10**10, HEADER_LIMIT + 1])
def test_a_header_of_10_gigabytes_is_not_allocated(file, length):
    write(file, b"{}", data=11 * 10**9, length=length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes; more than"):
            read_attention_layers(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_longest_header_is_read(file):
    header, data = entries(unet(channels=32))
    raw = json.dumps(header).encode()
    raw += b" " * (HEADER_LIMIT - len(raw))  # the format pads with spaces
    assert len(read_attention_layers(write(file, raw, data)).layers) == 32


def test_a_header_of_very_many_tensors_takes_no_quadratic_time(file):
    empty = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}  # get_slice needs 68 s for 20,000 of them
    checkpoint = read_attention_layers(write(file, {str(i): empty for i in range(100_000)}))
    assert checkpoint.family == "unknown" and "99992 others" in checkpoint.notes[0]


def test_without_safetensors_the_error_names_it(file, monkeypatch):
    write(file, *entries({"a": [2]}))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="needs the Python package safetensors"):
        read_attention_layers(file)
