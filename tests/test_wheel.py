"""`pip install .`: a wheel that holds the library and nothing else, and works where there is nothing but torch."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import lib_subquad

ROOT = Path(__file__).parents[1]
NOT_IN_A_CLONE = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")
ONE_CALL = """
import torch, lib_subquad
query, key, value = torch.randn(3, 2, 4, 100, 40)
expected = (query @ key.transpose(-1, -2) * 40**-0.5).softmax(-1) @ value
torch.testing.assert_close(lib_subquad.attention(query, key, value), expected)
print(lib_subquad.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, for setuptools leaves folders behind where it builds; without the network."""
    pytest.importorskip("setuptools", "77", reason="setuptools is too old to build the wheel")
    checkout, built = tmp_path_factory.mktemp("checkout") / "subquad", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, checkout, ignore=NOT_IN_A_CLONE)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", built, checkout], cwd=built)
    (wheel,) = built.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel, and torch by way of the one that runs this."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    offline = ["--no-index", "--no-deps", "--disable-pip-version-check", "--no-warn-script-location"]
    run([sys.executable, "-m", "pip", "install", *offline, "--prefix", environment, wheel], cwd=environment)
    (site,) = {path.parent for path in environment.rglob("lib_subquad")}
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    return python


def run(command, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONIOENCODING"] = "utf-8"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_library_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "lib_subquad").rglob("*.py")}
    about = f"subquad-{lib_subquad.__version__}.dist-info/"
    files = {name for name in names if not name.startswith(about)}
    assert files - {"lib_subquad/py.typed"} == modules
    assert f"{about}licenses/LICENSE" in names


def test_what_it_says_of_itself(wheel):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    about = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert about["Name"] == "subquad" and about["Version"] == lib_subquad.__version__
    needed = [it for it in about.get_all("Requires-Dist") if "extra ==" not in it]
    assert needed == ["torch>=2.0"] and about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "MIT" and about["Description-Content-Type"] == "text/markdown"
    assert about["Summary"] and about.get_payload().startswith("# subquad")


def test_a_program_elsewhere_imports_it_and_calls_it(installed, tmp_path):
    where = Path(run([installed, "-c", ONE_CALL], tmp_path).strip())
    assert installed.parents[1] in where.parents


def test_a_report_of_it(installed, tmp_path):
    report = run([installed, "-m", "lib_subquad", "report", "--device", "cpu"], tmp_path)
    assert f"| subquad             | {lib_subquad.__version__} " in report and "### Small calls, checked" in report
    assert str(installed.parents[1]) not in report and str(tmp_path) not in report
