"""install.py, which the web UI runs before it starts: it says at most a line, and installs nothing."""

from __future__ import annotations

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[1] / "install.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs install.py beside a torch of the version given, or none; returns what it printed."""

    def forbidden(*args, **kwargs):
        raise AssertionError(f"install.py starts a process: {args}")

    def run(torch: str | None) -> str:
        def version(name: str) -> str:
            assert name == "torch"
            if torch is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return torch

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(subprocess, "Popen", forbidden)
        monkeypatch.setattr("os.system", forbidden)
        runpy.run_path(str(INSTALL), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_here_it_does_nothing():
    done = subprocess.run([sys.executable, INSTALL], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_any_package_it_says_so_and_lets_the_web_ui_start():
    done = subprocess.run([sys.executable, "-I", "-S", INSTALL], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[subquad] torch is not installed; it needs torch 2.0 or newer.\n"


@pytest.mark.parametrize("version", ["2.0.0", "2.1.2+cu121", "2.13.0", "3.0", "2.0.0a0+gitc0ffee", "10.1.0"])
def test_new_enough(run, version):
    assert run(version) == ""


@pytest.mark.parametrize("version", ["1.13.1", "1.13.1+rocm5.2", "0.4.1"])
def test_too_old(run, version):
    assert (
        run(version) == f"[subquad] torch {version} is too old: it needs 2.0 or newer. The web UI starts without it.\n"
    )


def test_no_torch(run):
    assert run(None).count("\n") == 1


def test_it_imports_neither_torch_nor_pip():
    """Importing torch takes seconds at every start."""
    code = f"import runpy, sys; runpy.run_path({str(INSTALL)!r}, run_name='__main__'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert {"torch", "pip"}.isdisjoint(done.stdout.split())
