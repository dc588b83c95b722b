"""Nothing that we say may raise, on any console, in any language."""

from __future__ import annotations

import ast
import io
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import Settings, attention, console
from tests.personality import FailOver, alone

ROOT = Path(__file__).parents[1]
WORDS = ("plain", "größer ×", "自動", "🙂", "\ud800 half a character", "\x00\x1b[31m", "x" * 100_000)


class Terminal(io.TextIOWrapper):
    """A console of one encoding, as Windows and launchers have them."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")

    @property
    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


class Wrapper:
    """What a launcher puts in place of stdout: it calls itself one encoding and writes another."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.inner = Terminal("cp1252")

    def write(self, text: str) -> int:
        return self.inner.write(text)

    def flush(self) -> None:
        self.inner.flush()


class Broken(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "gbk", "shift_jis", "koi8_r", "utf-8", "utf-16"])
@pytest.mark.parametrize("text", WORDS, ids=ascii)
def test_a_console_shows_what_it_can(monkeypatch, encoding, text):
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    console.say(f"[subquad] {text}, in ASCII again")
    line = terminal.shown
    assert line.startswith("[subquad] ") and line.endswith(", in ASCII again\n") and line.count("\n") == 1
    try:
        text.encode(encoding)
    except UnicodeError:
        assert "\\x" in line or "\\u" in line or "\\U" in line
    else:
        assert text in line


def test_a_wrapper_that_is_wrong_about_its_encoding(monkeypatch):
    wrapper = Wrapper()
    monkeypatch.setattr(sys, "stdout", wrapper)
    console.say("größer 自動")
    assert wrapper.inner.shown == "gr\\xf6\\xdfer \\u81ea\\u52d5\n"


def test_a_wrapper_that_is_no_whole_stream_gets_it_once(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, encoding="no such encoding"))
    console.say("自動")
    assert "".join(written) == "\\u81ea\\u52d5\n"


@pytest.mark.parametrize("stream", [None, closed(), Broken(), object()], ids=["none", "closed", "pipe", "no stream"])
@pytest.mark.parametrize("words", WORDS, ids=ascii)
def test_without_a_console_it_is_silent(monkeypatch, stream, words):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    console.say(words)
    console.say(words, sys.stderr)
    console.warn(words)


def test_a_warning_is_in_the_log_and_prints_no_traceback(monkeypatch, caplog):
    terminal = Terminal("cp1252")
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger("subquad").addHandler(handler)
    try:
        console.warn("自動 %s")
    finally:
        logging.getLogger("subquad").removeHandler(handler)
    assert terminal.shown == "\\u81ea\\u52d5 %s\n" and len(caplog.records) == 1


@pytest.mark.parametrize("stream", [None, closed(), Broken()], ids=["none", "closed", "pipe"])
def test_going_on_after_an_out_of_memory_needs_no_console(monkeypatch, stream):
    """Logging to a console that was closed raises."""
    handler = logging.StreamHandler(stream)
    logging.getLogger("subquad").addHandler(handler)
    monkeypatch.setattr(sys, "stderr", stream)
    tensors, plans = [torch.randn(1, 2, tokens, 8) for tokens in (64, 256, 256)], []
    try:
        with alone(), FailOver(17_000) as device:
            attention(*tensors, settings=Settings(engine="portable"), report=plans.append)
    finally:
        logging.getLogger("subquad").removeHandler(handler)
    assert device.failures and plans[0].retries == device.failures


@pytest.mark.parametrize("version", [None, "1.13.1+größer自動"])
def test_install_speaks_on_any_console(monkeypatch, version):
    import importlib.metadata

    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    terminal = Terminal("cp1252")
    for stream in (terminal, None, closed(), Broken()):
        monkeypatch.setattr(sys, "stdout", stream)
        runpy.run_path(str(ROOT / "install.py"), run_name="__main__")
    assert terminal.shown.startswith("[subquad] torch ") and terminal.shown.count("\n") == 1


# Commands of their own process, whose streams __main__ has made forgiving; and what plays the host in the demo.
COMMANDS = {
    "lib_subquad/__main__.py",
    *(f"lib_subquad/lab/commands/{name}.py" for name in ("bench", "lab", "measuring", "plan")),
    "lib_subquad/lab/process.py",
    "demo/modules/errors.py",
}
LOUD = ("print(", "builtins.print(", "logging.", "getLogger(", "warnings.", "sys.stdout.", "sys.stderr.", "sys.__std")


def test_everything_is_said_through_the_console():
    found = set()
    for path in (ROOT / "install.py", *(path for name in ("lib_subquad", "scripts", "demo") for path in every(name))):
        if path != ROOT / "lib_subquad" / "console.py":
            found |= {f"{path.relative_to(ROOT).as_posix()}:{line}" for line in loud_lines(path)}
    assert {place for place in found if place.split(":")[0] not in COMMANDS} == set()
    assert found, "the commands print; this test sees nothing"


def every(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def loud_lines(path: Path) -> list[int]:
    """Lines that print, log, warn or write on a stream of the process by themselves."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if f"{ast.unparse(call.func)}(".startswith(LOUD)]
