"""What of the web UI the extension may name, and where."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVERYWHERE = {"shared", "scripts", "script_callbacks"}  # what each web UI has that loads extensions of this kind


def imported(file: Path) -> set[str]:
    """The web UI's modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("modules.")}


def test_only_hosts_name_what_another_web_ui_may_lack():
    files = [ROOT / "scripts" / "subquad.py", *(ROOT / "lib_subquad").rglob("*.py")]
    hosts = ROOT / "lib_subquad" / "webui" / "hosts"
    named = {file: imported(file) for file in files}
    assert any("sd_hijack" in names for names in named.values())  # or this looks at nothing
    assert {
        file: names - EVERYWHERE for file, names in named.items() if file.parent != hosts and names - EVERYWHERE
    } == {}


def test_what_every_host_shares_names_no_more():
    """`a1111.py` alone may: it is left out where its names are absent."""
    hosts = ROOT / "lib_subquad" / "webui" / "hosts"
    needs = {file.name: imported(file) - EVERYWHERE for file in hosts.glob("*.py")}
    assert {name for name, names in needs.items() if names} == {"a1111.py", "pins.py"}
