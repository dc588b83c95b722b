"""What the forge runs: the oldest that is claimed, commands that exist, and no package that it does not install."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib_subquad.__main__ import build_parser

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NAMES = {"PyYAML": "yaml"}  # packages that are imported by another name


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.search(r"\d+\.\d+", text).group().split("."))


def test_the_oldest_python_and_torch_that_are_claimed_are_run_and_the_newest():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python, torch = (re.search(pattern, project).group() for pattern in (r"requires-python.*", r'"torch>=.*"'))
    jobs = workflow("tests")["jobs"]["unit"]["strategy"]["matrix"]
    assert {system.split("-")[0] for system in jobs["system"]} == {"ubuntu", "windows", "macos"}
    assert min(version(of["python"]) for of in jobs["of"]) == version(python)
    assert min(version(of["torch"]) for of in jobs["of"] if of["torch"]) == version(torch)
    assert any(of["torch"] == "" and version(of["python"]) >= (3, 13) for of in jobs["of"])


def commands():
    """Each command of a workflow as words; what its shell reads into a file or another program is left out."""
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                for line in step.get("run", "").splitlines():
                    yield shlex.split(re.split(r" (\||>>) ", line)[0])


def test_commands_exist():
    ran = list(commands())
    parser, _ = build_parser()
    for words in ran:
        if words[:3] == ["python", "-m", "lib_subquad"]:
            parser.parse_args(["cpu" if word == "mps" else word for word in words[3:]])  # not every torch has mps
        for word in words:
            if "/" in word and "$" not in word:
                assert (ROOT / word).exists(), word
    starts = [words[:3] for words in ran]
    assert [".ci/run"] in starts and ["python", "-m", "pytest"] in starts and ["python", "-m", "lib_subquad"] in starts


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_lint_checks_each_file_of_the_forge_by_the_schema_of_its_kind():
    listed = subprocess.run(
        ["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    checked = {}
    for line in listed.stdout.splitlines():
        if "check-jsonschema --builtin-schema" in line:
            schema, *paths = line.split("--builtin-schema ")[1].split()
            checked |= dict.fromkeys(paths, schema)
    files = [path for path in (ROOT / ".github").rglob("*") if path.suffix in (".yml", ".yaml")]
    assert checked == {path.relative_to(ROOT).as_posix(): schema_of(path) for path in files}


def schema_of(path: Path) -> str:
    if path.parent.name == "workflows":
        return "vendor.github-workflows"
    return "vendor.github-issue-config" if path.name == "config.yml" else "vendor.github-issue-forms"


UNIT = [
    path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.parent.name in ("tests", "lab", "checkpoint")
]


@pytest.mark.parametrize("path", UNIT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_unit_tests_need_no_package_that_is_not_installed_for_them(path):
    listed = (ROOT / "requirements" / "unit.txt").read_text(encoding="utf-8").splitlines()
    packages = {re.split("[=<>]", line)[0] for line in listed if not line.startswith("#")}
    known = {
        "torch",
        "lib_subquad",
        "tests",
        "tools",
        *sys.stdlib_module_names,
        *(NAMES.get(name, name) for name in packages),
    }
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in imported(node):
            assert name.split(".")[0] in known, f"line {node.lineno}: {name}"


def imported(node) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    return [name.name for name in node.names] if isinstance(node, ast.Import) else []
