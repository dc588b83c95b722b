"""The tests of tests/stand_ins, each kind of device in a process of its own: its name holds for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stand_in

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(bool(stand_in.why_not()), reason=stand_in.why_not())
@pytest.mark.parametrize(
    "device, files",
    [
        ("right", ["tests/stand_ins"]),
        ("directml", ["tests/stand_ins", "tests/test_any_input.py", "-k", "not many_heads"]),
    ],
)
def test_on(device, files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", device, *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, encoding="utf-8", timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
