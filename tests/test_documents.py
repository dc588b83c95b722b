"""What the documents promise: links that lead somewhere, one version, and a way back to the one before."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import lib_subquad
from lib_subquad.settings import OPTIONS

ROOT = Path(__file__).parents[1]
NOT_OURS = re.compile(r"\.git$|\.venv|.*cache")


def documents() -> list[Path]:
    found = []
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if not NOT_OURS.match(name)]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchor(heading: str) -> str:
    """The name by which a forge links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(document: Path) -> list[str]:
    text, dead = without_code(document.read_text(encoding="utf-8")), []
    links = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, name = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists():
            dead.append(link)
        elif name:
            headings = re.findall(r"^#+ (.*)$", without_code(target.read_text(encoding="utf-8")), flags=re.M)
            dead += [link] if name not in map(anchor, headings) else []
    return dead


def test_a_dead_link_is_found(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(
        "# One *thing*\n[a](a.md) [b](b.md) [c](#one-thing) [d](a.md#two) ![e](docs/e.png) [f](https://g)\n",
        encoding="utf-8",
    )
    assert dead_links(document) == ["b.md", "a.md#two", "docs/e.png"]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    assert dead_links(document) == []


# ------------------------------------------------------------------------------------------------------- the picture


@pytest.fixture
def picture():
    pytest.importorskip("grimp")  # which import-linter brings
    from tools import picture

    return picture


def test_the_picture_of_the_house_is_that_of_the_code(picture):
    """`python -m tools.picture` makes it anew."""
    assert picture.draw() == picture.PICTURE.read_text(encoding="utf-8")


def test_every_part_of_the_library_is_in_it(picture):
    drawn = [part for floor in picture.layers() for part in floor]
    folder = ROOT / picture.PACKAGE
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(drawn) == there - {"__init__"} and all(map(picture.sentence, drawn))


def test_an_import_that_is_there_by_way_of_another_has_no_arc(picture):
    known = {"roof": {"wall", "floor"}, "wall": {"floor", "window"}, "window": set(), "floor": set()}
    assert picture.without_detours(known) == known | {"roof": {"wall"}}


def test_the_pictures_of_the_page_show_what_it_says():
    """`python -m demo.pictures docs` makes them anew."""
    from demo import pictures

    noted = json.loads((ROOT / "docs" / pictures.NOTE).read_text(encoding="utf-8"))
    assert noted == pictures.said()
    for name in ("settings.png", "explain.png", "measure.png"):
        assert (ROOT / "docs" / name).exists() and f"docs/{name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_other_words_and_other_settings_are_told_apart(monkeypatch, tmp_path):
    from demo import pictures

    before = pictures.said()
    monkeypatch.setattr(pictures, "_texts", lambda path: ["other words"])
    assert pictures.said()["words"] != before["words"] and pictures.said()["settings"] == before["settings"]
    monkeypatch.setattr(pictures, "OPTIONS", {**OPTIONS, "engine": OPTIONS["upcast"]})
    assert pictures.said()["settings"] != before["settings"]
    (tmp_path / "words.py").write_text(
        '"""Docs."""\nA = "one"  # "two"\ndef f():\n    "docs"\n    return f"{A} three"\n',
        encoding="utf-8",
    )
    monkeypatch.undo()
    assert pictures._texts(tmp_path / "words.py") == ["one", " three"]


# ------------------------------------------------------------------------------------------------------- the version


def versions() -> list[str]:
    """Those of the changelog, the newest first."""
    return re.findall(r"^## ([0-9]\S*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)


def test_there_is_one_version():
    """In the library; the project's file asks for it there, and the changelog begins with it."""
    assert versions()[0] == lib_subquad.__version__
    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert "version" not in (ROOT / "metadata.ini").read_text(encoding="utf-8").lower()


def test_every_version_before_has_a_commit_to_go_back_to():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    commits = dict(re.findall(r"^\| ([0-9.]+) \| ([0-9a-f]{7,40}) \|$", text, flags=re.M))
    assert list(commits) == versions()[1:]
    if not (ROOT / ".git").exists() or _git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("the history is not here")
    for version, commit in commits.items():
        assert f'__version__ = "{version}"' in _git("show", f"{commit}:lib_subquad/__init__.py")
        assert _git("merge-base", commit, "HEAD").startswith(commit)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.strip()


# What 1.0.0 takes for each setting. It puts right what it does not know, and so would lose what a user has saved.
TAKEN_BY_1_0_0 = {
    "query_chunk": range(0, 16385),
    "kv_chunk": range(0, 16385),
    "memory_limit": range(1, 101),
    "engine": ("automatic", "fused", "portable"),
    "checkpointing": ("automatic", "always", "never"),
    "upcast": ("web UI", "always", "never"),
    "vae": (True, False),
    "retry": (True, False),
}


def test_settings_that_are_saved_now_can_be_read_by_the_version_before():
    """Another word or a wider range is no fault, but CHANGELOG.md says there is none. An engine is another matter."""
    for name, taken in TAKEN_BY_1_0_0.items():
        option = OPTIONS[name]
        saved = (
            option.choices or (option.minimum, option.maximum) if option.maximum or option.choices else (True, False)
        )
        assert name == "engine" or set(saved) <= set(taken), name
        assert option.default in taken
