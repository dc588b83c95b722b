"""`python -m demo`, as a user runs it."""

import importlib
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """run(arguments): the demo, which keeps nothing in the user's folder."""
    return partial(_run, "--data-dir", tmp_path / "data")


def _run(*args):
    return subprocess.run(
        [sys.executable, "-m", "demo", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8"},
    )


def test_once_makes_an_image_and_a_line_per_optimizer(tmp_path, run):
    out = tmp_path / "out.png"
    done = run(
        "--once", str(out), "--size", "64", "--steps", "1", "--optimizer", "subquad", "--set", "subquad_query_chunk=64"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("None", "sdp", "subquad"):
        line = next(line for line in lines if line.split()[0] == name)
        assert " s, " in line and "MiB" in line
    with Image.open(out) as image:
        assert image.size == (64, 64)
        assert "Size: 64x64" in image.text["parameters"]
    assert lines[-1].startswith(f"{out}: made with subquad")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--size", "100"], "Width is 100; it must be a multiple of 64"),
        (["--steps", "0"], "steps is 0"),
        (["--checkpoint", "missing.safetensors"], "there is no such file"),
        (["--optimizer", "fastest", "--once", "out.png"], "expected one of Automatic"),
        (["--set", "nothing=1", "--once", "out.png"], "expected key=value"),
        (["--set", "upcast_attn=true", "--freeze-settings", "--optimizer", "None"], "changing settings is disabled"),
        (["--once", "out.jpg"], "must end in .png"),
        (["--port", "99999"], "port 99999 cannot be used"),
    ],
)
def test_wrong_input_is_one_line(args, says, run):
    done = run(*args)
    assert done.returncode == 1
    complaint = [line for line in done.stderr.splitlines() if line.startswith("demo: ")]
    assert len(complaint) == 1 and says in complaint[0]
    assert "Traceback" not in done.stderr


def test_the_demo_speaks_on_a_console_of_code_page_1252(tmp_path):
    output = tmp_path / "自動.png"
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--once", str(output), "--size", "64", "--steps", "1", "--data-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"\\u81ea\\u52d5.png: made with subquad" in done.stdout and output.exists()


@pytest.mark.parametrize(
    "module", ["demo.__main__", "demo.pictures", "tools.busy", "tools.images", "tools.picture", "tools.soak"]
)
def test_every_option_has_help_and_tells_its_default(module, host, documented):
    documented(importlib.import_module(module).main)


def test_a_port_in_use_is_one_line(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 1
    assert f"demo: port {port} cannot be used" in done.stderr


@pytest.mark.parametrize("where", ["given", "the user's cache folder", "nowhere"])
def test_what_was_measured_is_kept_for_the_next_time(where, host, tmp_path, monkeypatch):
    """The same file as the command line's, where the system has a folder for such."""
    from demo.__main__ import main

    cache = SimpleNamespace(user_cache_dir=lambda name, appauthor: str(tmp_path / "cache" / name))
    monkeypatch.setitem(sys.modules, "platformdirs", None if where == "nowhere" else cache)
    given = ["--data-dir", str(tmp_path / "given")] if where == "given" else []
    assert main(["--once", str(tmp_path / "out.png"), "--size", "64", "--steps", "1", *given]) == 0
    from lib_subquad.engines.table import Class, Found
    from lib_subquad.webui import measuring

    measuring.keep({Class("float32", "float32", 40, 40, "none", 4, 12, 6): Found("portable", margin=2.0)})
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("subquad_measured.json")}
    expected = {"given": "given", "the user's cache folder": "cache/subquad"}.get(where)
    assert kept == ({f"{expected}/subquad_measured.json"} if expected else set())
