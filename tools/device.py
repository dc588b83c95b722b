"""What all this does on the accelerator that is here, in one report: `python -m tools.device`, or `make device`.

A list of steps, each a program of its own with a time limit, within ten minutes in all. What fails, or takes too long,
is told, and the next one goes on. The report, in Markdown, names the card and nothing personal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lib_subquad import __version__, identity
from lib_subquad.console import say
from lib_subquad.lab import tables
from lib_subquad.lab.anonymous import anonymous
from lib_subquad.lab.commands import arguments

ROOT = Path(__file__).parents[1]
TOTAL_SECONDS = 600
GRACE_SECONDS = 10  # for a step that has been told to end to say what it has
LEAST_SECONDS = 15  # a step that has less does not begin
MOST_LINES = 60
NO_ACCELERATOR = (
    "There is no accelerator here that this PyTorch can use; DEVICE=cpu makes the report for the processor."
)

SUITE = tuple(f"tests/test_{name}.py" for name in ("accelerators", "attention", "any_input", "backward", "numbers"))
SHAPES, TINY_SHAPE = ("sd15-512", "sdxl-1024", "vae-1024"), "1,2,64,64,40"


class Step(NamedTuple):
    """A program of Python's, and the most seconds that it may take; `markdown` says whether that is what it prints."""

    title: str
    command: tuple[str, ...]
    seconds: int
    markdown: bool = True


class StepResult(NamedTuple):
    """What came of a step: "done", or what is wrong in words; what it printed, and its last words on stderr."""

    step: Step
    said: str
    seconds: float
    printed: str = ""
    complaints: str = ""

    @property
    def good(self) -> bool:
        return self.said == DONE


DONE = "done"


def steps(device: str, tiny: bool) -> list[Step]:
    """In their order; what else is to be found out on a card is a line here."""
    library, on = ("-m", "lib_subquad"), ("--device", device)
    xformers = ("xformers",) if importlib.util.find_spec("xformers") else ()
    variants = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn")
    few = ("sdpa", "automatic", "portable", *xformers)

    def bench(dtype: str, peers: Sequence[str], seconds: int) -> Step:
        shapes = [f"--shape={shape}" for shape in ([TINY_SHAPE] if tiny else SHAPES)]
        how = ("--dtype", dtype, "--peers", ",".join(peers[:2] if tiny else peers), "--repeats", "1" if tiny else "3")
        return Step(f"Time and memory, {dtype}", (*library, "bench", *shapes, *how, *on), seconds)

    grid = ("--dtype=float32", f"--shape={TINY_SHAPE}", "--rounds=2") if tiny else ("--dtype=float16",)
    tests = ("tests/test_accelerators.py",) if tiny else SUITE
    return [
        Step("The device and its engines", (*library, "report", *on), 75),
        Step("Tests of numbers", ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *on, *tests), 150, False),
        bench("float16", ("sdpa", "automatic", "portable", *variants, *xformers), 105),
        bench("bfloat16", few, 70),
        bench("float32", few, 70),
        Step(
            "Whether measuring finds what is fastest", ("-m", "tools.grid", "--dtype", "float16", *on, *grid), 70, False
        ),
        Step("What a small call costs beside PyTorch's", (*library, "bench", "--overhead", *on), 40),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 if every step was done, 1 if one was not, 2 where there is no accelerator."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device) if args.device else arguments.best_device()
    if device.type == "cpu" and not args.device:
        say(NO_ACCELERATOR, sys.stderr)
        return 2
    outcomes = run_all(steps(str(device), args.tiny), args.seconds)
    text = report(device, outcomes)
    args.out.write_text(text, encoding="utf-8")
    say(f"The report is in {args.out}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.device", description="A report of what all this does on a card.")
    parser.add_argument(
        "--device", type=arguments.device, help="such as cuda:1, mps, xpu, cpu (default: the best accelerator here)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("device-report.md"), metavar="FILE.md", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=arguments.positive, default=TOTAL_SECONDS, help="that all may take (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: to try the report itself")
    return parser


def run_all(wanted: Sequence[Step], seconds: float) -> list[StepResult]:
    """Every step in turn. Ctrl-C ends it with what was found until then."""
    outcomes: list[StepResult] = []
    end = time.monotonic() + seconds
    for number, step in enumerate(wanted, 1):
        limit = min(step.seconds, end - time.monotonic() - GRACE_SECONDS)
        if limit < min(LEAST_SECONDS, step.seconds):
            outcomes.append(StepResult(step, "not begun: the time was over", 0.0))
            continue
        say(f"{number} of {len(wanted)}: {step.title}, at most {limit:.0f} s", sys.stderr)
        try:
            outcomes.append(run(step, limit))
        except KeyboardInterrupt:
            outcomes.append(StepResult(step, "stopped by hand", 0.0))
            break
        say(f"  {outcomes[-1].said}, {outcomes[-1].seconds:.0f} s", sys.stderr)
    return outcomes


def run(step: Step, limit: float) -> StepResult:
    """The step, ended after `limit` seconds: first as Ctrl-C would, which leaves it time to say what it has."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "120"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        try:
            status = process.wait(limit)
            said = DONE if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            said = f"stopped after {limit:.0f} s: this is what there was until then"
            _interrupt(process)
        finally:
            _end(process)
        printed, complaints = map(_written, (out, err))
    return StepResult(step, said, time.monotonic() - start, printed, "" if said == DONE else complaints)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):  # Windows has no such signal for one program
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and what it has begun."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        elif process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    process.wait()


def _written(file) -> str:
    file.seek(0)
    return anonymous(file.read().decode("utf-8", "replace").replace("\r", "\n"))


def report(device: torch.device, outcomes: Sequence[StepResult]) -> str:
    """Everything, in Markdown."""
    name = device.type
    with contextlib.suppress(Exception):  # a driver that does not answer is worth a report above all
        name = identity.device_name(device)
    rows = [[outcome.step.title, outcome.said, f"{outcome.seconds:.0f} s"] for outcome in outcomes]
    table = tables.table(["Step", "What came of it", "Time"], rows, left={"Step", "What came of it"})
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    head = f"# subquad {__version__} on {name}\n\ntorch {torch.__version__}; {minutes:.1f} minutes.\n\n{table}"
    return "\n\n".join([head, *map(_section, outcomes)]) + "\n"


def _section(outcome: StepResult) -> str:
    command = f"`python {anonymous(' '.join(outcome.step.command))}`"
    parts = [f"## {outcome.step.title}", *([] if command in outcome.printed else [command])]
    if not outcome.good:
        parts.append(f"**{outcome.said[0].upper()}{outcome.said[1:]}.**")
    if printed := outcome.printed.strip():
        parts.append(re.sub(r"^(#+ )", r"#\1", printed, flags=re.M) if outcome.step.markdown else _fenced(printed))
    if complaints := outcome.complaints.strip():
        parts.append(_fenced(complaints))
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    lines = text.splitlines()
    cut = ["…"] if len(lines) > MOST_LINES else []
    return "\n".join(["```", *cut, *lines[-MOST_LINES:], "```"])


if __name__ == "__main__":
    sys.exit(main())
