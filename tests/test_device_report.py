"""`make device`: one report of what all this does on the accelerator that is here, whatever goes wrong on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lib_subquad import __main__ as command_line
from tools import device as tool
from tools import grid
from tools.device import DONE, ROOT, Step

CPU = torch.device("cpu")
SLOW = """
import time
print("so far", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("and this")
"""


def python(title: str, program: str, seconds: int = 60) -> Step:
    return Step(title, ("-c", program), seconds)


def test_a_step_that_fails_is_told_and_the_others_go_on():
    home = str(Path.home())
    wanted = [
        python("One", "print('# first')"),
        python(
            "Two",
            f"import sys; print('half'); print('no kernel, says {home}/libcuda.so', file=sys.stderr); sys.exit(3)",
        ),
        python("Three", "print('last')"),
    ]
    outcomes = tool.run_all(wanted, 300)
    assert [outcome.said for outcome in outcomes] == [DONE, "failed with status 3", DONE]
    text = tool.report(CPU, outcomes)
    for told in ("## One", "\n## first", "half", "no kernel, says", "**Failed with status 3.**", "last", "| Two "):
        assert told in text
    assert len(home) < 4 or home not in text
    assert text.index("## One") < text.index("## Two") < text.index("## Three")


def test_a_step_that_takes_too_long_is_ended_and_what_it_had_is_told():
    slow, after = tool.run_all([python("Slow", SLOW, seconds=8), python("After", "print(1)")], 300)
    assert slow.said.startswith("stopped after 8 s") and "so far" in slow.printed and after.good
    if hasattr(os, "killpg") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in a shell's background
        assert "and this" in slow.printed


def test_what_a_step_has_begun_ends_with_it(tmp_path):
    """A measurement that hangs on the card would be in the way of the next."""
    begun = tmp_path / "begun"
    program = f"""
import pathlib, subprocess, sys
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(120)"
child = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path({str(begun)!r}).write_text(str(child.pid), encoding="utf-8")
child.wait()
"""
    tool.run(python("Parent", program), 8)
    psutil = pytest.importorskip("psutil")
    child = int(begun.read_text(encoding="utf-8"))
    # It has been killed, which takes the system a moment; nobody here may reap it.
    ended = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < ended
            time.sleep(0.1)


def test_all_of_it_ends_within_the_time():
    outcomes = tool.run_all([python("One", "print(1)"), python("Two", "print(2)")], tool.GRACE_SECONDS)
    assert [outcome.said for outcome in outcomes] == ["not begun: the time was over"] * 2
    assert "**Not begun: the time was over.**" in tool.report(CPU, outcomes)
    assert sum(step.seconds for step in tool.steps("cuda", tiny=False)) <= tool.TOTAL_SECONDS


def test_where_there_is_no_accelerator_one_sentence_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tool.arguments, "best_device", lambda: CPU)
    monkeypatch.setattr(tool, "run_all", lambda *_: pytest.fail("nothing is to be measured"))
    assert tool.main(["--out", str(tmp_path / "report.md")]) != 0
    out, err = capsys.readouterr()
    assert err.strip() == tool.NO_ACCELERATOR and not out and not list(tmp_path.iterdir())


def test_one_may_ask_for_the_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "steps", lambda device, tiny: [python("On " + device, "print('here')")])
    out = tmp_path / "report.md"
    assert tool.main(["--device", "cpu", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# subquad") and tool.identity.device_name(CPU) in text and "## On cpu" in text
    monkeypatch.setattr(tool, "steps", lambda device, tiny: [python("Fails", "1 / 0")])
    assert tool.main(["--device", "cpu", "--out", str(out)]) == 1
    assert "ZeroDivisionError" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("tiny", [False, True])
def test_each_step_is_a_command_that_there_is(tiny, pytestconfig):
    for step in tool.steps("cpu", tiny):
        module, *rest = step.command[1:]
        if module == "lib_subquad":
            command_line._parse(rest)
            continue
        if module == "tools.grid":
            grid.parser().parse_args(rest)
            continue
        assert module == "pytest" and all((ROOT / name).is_file() for name in rest if name.endswith(".py"))
        assert "--device" in rest and pytestconfig.getoption("device")


def test_its_options_are_documented(documented):
    documented(tool.main, [])
