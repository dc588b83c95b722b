"""One name for a thing, and one class for what the user can put right."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What came of a measurement that could not be made: it stands in a table, and nobody is to put anything right.
# So does what is said of an engine's result: another engine goes on, or whoever writes the engine sees it; and that an
# image is wanted no more.
RESULTS = {
    "Unsupported",
    "Failed",
    "UselessResult",
    "WrongResult",
    "ContractError",
    "_Dropped",
    "_Interrupted",
    "Interrupted",
    "_CannotLook",
}


def classes() -> dict[str, list[tuple[str, list[str]]]]:
    """name -> (file, names of the classes it is made of) of every class of the library, the demo and the tools."""
    found = defaultdict(list)
    for path in sorted(path for folder in ("lib_subquad", "demo", "tools") for path in (ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith("demo/modules/"):  # which play the host, under its names
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name].append((file, [ast.unparse(base) for base in node.bases]))
    return found


def test_no_two_classes_have_one_name():
    assert {name: places for name, places in classes().items() if len(places) > 1} == {}


def test_what_the_user_can_put_right_is_a_user_error():
    errors = {
        name: bases
        for name, ((_, bases), *_) in classes().items()
        if name not in RESULTS and any(base.endswith(("Error", "Exception")) for base in bases)
    }
    assert errors == {"UserError": ["ValueError"], "CheckpointError": ["UserError"]}


def test_programs_are_no_tests():
    """What is run as `python -m` stands in tools/ or the demo, where a test run does not look for it."""
    programs = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if any(
            ast.unparse(node).startswith("if __name__ ==") for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]
    assert programs == []
