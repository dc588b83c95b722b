"""What several test files need: attention in float64, a meter of memory, and the demo host."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lib_subquad
from lib_subquad import trust
from lib_subquad.engines import fused, order
from lib_subquad.engines.table import Table
from lib_subquad.problem import Problem
from tests import devices
from tests.threads import torch_threads

STAND_INS = Path(__file__).parent / "stand_ins"
STATUS = pytest.StashKey[int]()
NEED_A_HOST = [Path(__file__).parent / name for name in ("demo", "forge", "host", "webui")]

# everything that keeps hold of the host's `modules`: another test may bring a `modules` of its own
BOUND = (
    "modules",
    "lib_subquad.webui",
    "demo.actions",
    "demo.comparison",
    "demo.generate",
    "demo.once",
    "demo.page",
    "demo.settings_panel",
)


def pytest_addoption(parser):
    words = "only the tests of the library: they need requirements/unit.txt, and neither a page, a host nor a web UI"
    parser.addoption("--unit", action="store_true", help=words)
    parser.addoption("--device", default="cpu", help=f"{devices.HELP} (default: cpu)")


def pytest_configure(config):
    devices.use(config.getoption("device"))


def pytest_unconfigure(config):
    if devices.is_stand_in():  # PyTorch's thread for its gradients would end the process on its way out
        sys.stdout.flush()
        os._exit(config.stash.get(STATUS, pytest.ExitCode.INTERNAL_ERROR))


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = exitstatus


def pytest_collection_finish(session):
    """What all tests together have imported is alive to their end: looking for garbage in it, as the web UI has it done
    after each image, took half the time of those that make images."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path, config):
    if config.getoption("unit") and collection_path in NEED_A_HOST:
        return True
    if collection_path.parent == STAND_INS:  # which tests/test_stand_ins.py runs, each kind in a process of its own
        return None if devices.of_stand_in() in collection_path.stem.split("_") else True
    return None


@pytest.fixture(autouse=True)
def nothing_is_known_yet():
    """Plans are remembered from call to call, and tests change what they depend on."""
    lib_subquad.forget()
    yield
    lib_subquad.forget()
    order.go_by(Table())
    order.machine.cache_clear()


@pytest.fixture
def trusted(monkeypatch):
    """Every engine is trusted: for tests that count an engine's calls, or look at what becomes of their mistakes."""
    monkeypatch.setattr(trust, "why_not", lambda engine, problem: [])
    monkeypatch.setattr(trust, "check", lambda *call: None)


@pytest.fixture
def the_two():
    """Only the engines that these tests name: what they say of reasons holds whatever others there are."""
    before = order.engines()
    order._change(tuple(engine for engine in before if engine.NAME in ("fused", "portable")))
    yield
    order._change(before)


@pytest.fixture(scope="session")
def reference():
    """attention() in float64, written as its definition."""
    return attention_in_float64


@pytest.fixture(scope="session")
def peak_bytes():
    """peak_bytes(call): the most bytes that a call holds at a time on the CPU, by PyTorch's own count."""
    return most_bytes_held


@pytest.fixture
def documented(monkeypatch):
    """documented(main): every option that a command line takes has help, and tells its default unless it has none."""

    class Parsed(Exception):
        pass

    def parse(parser, *arguments, **keywords):
        raise Parsed(parser)

    def check(main, *arguments) -> None:
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
            main(*arguments)
        parsers = list(parsed.value.args)
        for parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers.extend(action.choices.values())
                    assert len(action.choices) == len(action._choices_actions)  # each with help in the list
                    continue
                assert action.help, f"{parser.prog} {action.option_strings}: no help"
                if action.option_strings and not action.required and action.nargs != 0:
                    assert "default" in action.help, f"{parser.prog} {action.option_strings}: no default"
            assert parser.format_help()  # whose "%" are all of argparse's

    return check


@pytest.fixture
def fused_kernel():
    """For what is about the fused engine, or about two engines: with torch 2.0 there is but one on the CPU."""
    query = (1, 2, 64, 8)
    if reasons := fused.why_not(Problem.from_shapes(query, query, query, torch.float32, "cpu")):
        pytest.skip(reasons[0])


@pytest.fixture(scope="module")
def one_thread():
    """For files of small tensors only: they gain nothing from more threads, and lose much on a busy machine."""
    with torch_threads(1):
        yield


def attention_in_float64(query, key, value, mask=None, scale=None):
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0) @ value


def most_bytes_held(call) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    held = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":  # one for each allocation, and one, negative, for each that is freed
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


@pytest.fixture
def host():
    """`demo.host` with a fresh `modules` package; ldm's classes get their own forwards back afterwards."""
    with contextlib.redirect_stdout(io.StringIO()):  # ldm's layers announce themselves
        attention = pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
        model = importlib.import_module("ldm.modules.diffusionmodules.model")
    from demo import host as demo_host

    hijacked = (attention.CrossAttention, model.AttnBlock, model.Decoder, model.Encoder)
    forwards = [cls.forward for cls in hijacked]
    stashed = _take_away()
    demo_host.install_modules()
    yield demo_host
    _take_away()
    sys.modules.update(stashed)
    for cls, forward in zip(hijacked, forwards, strict=True):
        cls.forward = forward


def _take_away() -> dict:
    taken = {}
    within = tuple(f"{name}." for name in BOUND)
    for name in [name for name in sys.modules if name in BOUND or name.startswith(within)]:
        taken[name] = sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # "from package import module" looks at the attribute first
            delattr(sys.modules.get(parent), child)
    return taken


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as running:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if path is None and not os.path.exists(running.chromium.executable_path):
            pytest.skip("there is neither a system Chromium nor Playwright's own")
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
