"""`python -m lib_subquad plan` and `lab`, as a user runs them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib_subquad.console import UserError
from lib_subquad.engines import fused, order
from lib_subquad.engines.table import Table
from lib_subquad.lab.commands import question
from tests.checkpoint.making import entries, write
from tests.checkpoint.public_models import tensors

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lib_subquad"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, by whichever variable a system has for it."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setitem(ENVIRONMENT, name, str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A full-size SD 1.5 file to whoever reads its header only: the rest of it is a hole."""
    return write(tmp_path_factory.mktemp("checkpoint") / "model.safetensors", *entries(tensors("sd15")))


def run(*arguments) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8")


def test_plan(checkpoint):
    done = run("plan", "--checkpoint", checkpoint, "--size", "512x768", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    best = "fused" if fused.TAKES_SCALE else "portable"
    assert "32 attention layers in the U-Net, 2 in the VAE" in done.stdout
    assert "6144" in done.stdout and best in done.stdout and "argest image" in done.stdout


def test_lab_measures_recommends_verifies_and_writes(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    found, picture = tmp_path / "lab.json", tmp_path / "lab.png"
    table = tmp_path / "table.json"
    output = ["--json", found, "--plot", picture, "--table", table]
    given = ["--query-chunk", "128", "--vae", "off", "--verify", "2"]
    done = run("lab", "--checkpoint", checkpoint, "--size", "128", "--device", "cpu", *given, *output)
    assert done.returncode == 0, done.stderr
    assert "recommended" in done.stdout
    assert "Measured again, 2 times in turn" in done.stdout or "Automatic itself is recommended" in done.stdout
    trials = json.loads(found.read_text(encoding="utf-8"))["trials"]
    (recommended,) = [trial for trial in trials if trial["recommended"]]
    assert recommended["fits"] and recommended["pareto"] and recommended["repeats"] >= 7
    assert any(trial["query_chunk"] == 128 for trial in trials)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Kept in {table}: automatic goes by it" in done.stdout
    (its,) = Table.from_json(table.read_text(encoding="utf-8")).machines.values()
    assert {calls.dtype for calls in its} == {"float32"} and {found.engine for found in its.values()} <= {
        *order.names()
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a console, not to a process")
@pytest.mark.usefixtures("fused_kernel")
def test_ctrl_c_keeps_what_was_measured(checkpoint, tmp_path):
    found = tmp_path / "lab.json"
    given = ["--size", "512", "--vae", "off", "--device", "cpu", "--json", str(found)]
    lab = subprocess.Popen(
        [*COMMAND, "lab", "--checkpoint", str(checkpoint), *given],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # A shell starts what runs in its background with interrupts ignored, the tests too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    while "portable" not in said:  # the bar says what is measured; Automatic, measured first, is done by then
        part = lab.stderr.read(1)
        assert part, said
        said += part
    lab.send_signal(signal.SIGINT)
    output, errors = lab.communicate(timeout=120)
    assert lab.returncode == 130, errors
    assert "Traceback" not in errors and "Nothing is recommended: it ended before" in output
    trials = json.loads(found.read_text(encoding="utf-8"))["trials"]
    assert trials and {trial["repeats"] for trial in trials} == {1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["plan", "--checkpoint", "no/such/model.safetensors"],
            "plan: --checkpoint no/such/model.safetensors: there is",
        ),
        (["lab", "--checkpoint", "no/such/model"], "lab: --checkpoint no/such/model: there is no such file\n"),
        (["plan", "--checkpoint", __file__], "safetensors"),
        (["lab", "--checkpoint", "CHECKPOINT", "--size", "huge"], "expected pixels such as 512"),
        (["lab", "--checkpoint", "CHECKPOINT", "--device", "gameboy"], "cannot be used here. Available: "),
        (["lab", "--checkpoint", "CHECKPOINT", "--plot", "no/such/folder.png"], "there is no folder"),
        (["lab", "--checkpoint", "CHECKPOINT", "--query-chunk", "-5"], "query_chunk"),
        (
            ["order", "--table", "TABLE", "--measure", "no/such/model"],
            "order: --measure no/such/model: there is no such",
        ),
        (
            ["order", "--table", "TABLE", "--measure", "CHECKPOINT", "--forget"],
            "order: --forget and --measure are two things: give one",
        ),
        (["order", "--table", "TABLE", "--device", "gameboy"], "cannot be used here. Available: "),
        (["bench", "--busy", "-1"], "'-1'; expected a whole number of at least 0"),
        (["bench", "--busy", "2", "--calm", "8"], "--busy has no meaning with --calm"),
        (["bench", "--busy", "1", "--overhead"], "--busy has no meaning with --overhead"),
    ],
)
def test_what_cannot_be_used_is_said_in_words(checkpoint, arguments, words, tmp_path):
    places = {"CHECKPOINT": checkpoint, "TABLE": tmp_path / "table.json"}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_that_fails_without_a_word(monkeypatch):
    """As PyTorch's assertions may."""

    def failing(*given, **more):
        raise AssertionError

    monkeypatch.setattr(torch, "empty", failing)
    with pytest.raises(UserError, match="device 'cuda' cannot be used here. Available: "):
        question.read_device(argparse.Namespace(device="cuda"))
