"""Work done in a process of its own: no other work's memory, caches or libraries are in the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import device as devices

ROOT = Path(__file__).resolve().parents[2]
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


class Failed(Exception):
    """The process gave no answer; the message is the reason, for the user."""


def ask(module: str, question: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """What `python -m module`, which calls `serve`, answers.

    Raises:
        Failed: it ended without an answer, or took longer than `timeout` seconds.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(question),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {timeout:g} s") from None
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1])
    raise Failed(_why(done.returncode, done.stderr))


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many other programs run meanwhile, each of which keeps a core busy."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the question on stdin with one line of JSON on stdout; whatever else is printed goes to stderr."""
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answered = answer(question)
    print(json.dumps(answered), flush=True)


def stay_within_memory(device: torch.device) -> None:
    """Make a peer that wants too much fail to allocate, rather than have the system end some process."""
    if device.type != "cpu" or sys.platform != "linux":  # accelerators' drivers map far more than they use
        return
    import resource

    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[5]) * resource.getpagesize()
        limit, hard = used + devices.free_bytes(device), resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _why(code: int, stderr: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with status {code}"
