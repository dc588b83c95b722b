"""The house in one picture, made from the code: `python -m tools.picture`.

A line is a part of the library, with the first sentence of its own docstring. Parts stand in the order of pyproject's
layers, which the imports must keep: an arc leads from a part down to one that it imports. An import that is there by
way of another as well has no arc of its own.
"""

from __future__ import annotations

import argparse
import ast
import sys
from html import escape
from pathlib import Path

import grimp

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; import-linter brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = "lib_subquad"
PICTURE = ROOT / "docs" / "architecture.svg"
LEFT, NAME, WORDS, RIGHT, GAP, LINE, INSIDE = 16, 128, 700, 240, 8, 20, 15  # in pixels
MOST_LETTERS = 115
COLOURS = ("#1f6feb", "#b35900", "#1a7f37", "#a0307f", "#6e40c9", "#57606a")


def layers() -> list[list[str]]:
    """The parts of the library, the highest first; those in one list do not know one another."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (found,) = (it["layers"] for it in contracts if it.get("containers") == [PACKAGE])
    return [[name.strip() for name in layer.split("|")] for layer in found]


def imports(parts: list[str]) -> dict[str, set[str]]:
    """Part -> the parts that it imports."""
    graph, found = grimp.build_graph(PACKAGE, cache_dir=None), {part: set() for part in parts}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = (name.split(".")[1] if "." in name else "" for name in (module, imported))
            if one in found and other in found and one != other:
                found[one].add(other)
    return found


def without_detours(known: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same without what is also known by way of another part."""

    def below(part: str) -> set[str]:
        return known[part].union(*map(below, known[part]))

    return {part: direct - set().union(*map(below, direct)) for part, direct in known.items()}


def sentence(part: str) -> str:
    """The first of its docstring."""
    path = ROOT / PACKAGE / part
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    told = " ".join(told.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("`", "")
    return told if len(told) <= MOST_LETTERS else told.split("; ")[0]


def inside(part: str) -> list[str]:
    """What a part that is a folder consists of."""
    folder = ROOT / PACKAGE / part
    found = [it.stem for it in folder.glob("*") if it.suffix == ".py" or (it / "__init__.py").exists()]
    return sorted(name for name in found if not name.startswith("_"))


def draw() -> str:
    """The picture, as SVG."""
    floors = layers()
    parts = [part for floor in floors for part in floor]
    arcs = without_detours(imports(parts))
    shapes, middles, top = [], {}, GAP
    for floor in floors:
        height = sum(LINE + (INSIDE if inside(part) else 0) for part in floor) + GAP
        shapes.append(
            f'<rect x="{LEFT - GAP}" y="{top}" width="{NAME + WORDS}" height="{height}" rx="4" fill="#f6f8fa" '
            'stroke="#d0d7de"/>'
        )
        line = top + GAP // 2
        for part in floor:
            middles[part] = line + LINE // 2
            shapes.append(f'<text x="{LEFT}" y="{line + 15}" font-weight="bold">{escape(part)}</text>')
            shapes.append(f'<text x="{LEFT + NAME}" y="{line + 15}">{escape(sentence(part))}</text>')
            line += LINE
            if inside(part):
                names = escape(", ".join(inside(part)))
                shapes.append(f'<text x="{LEFT + NAME}" y="{line + 9}" fill="#57606a">{names}</text>')
                line += INSIDE
        top += height + GAP // 2
    edge = LEFT - GAP + NAME + WORDS
    for number, part in enumerate(parts):
        for other in sorted(arcs[part], key=parts.index):
            shapes.append(_arc(edge, middles[part], middles[other], top, COLOURS[number % len(COLOURS)]))
    width, height = edge + RIGHT + GAP, top + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12" fill="#1f2328">',
            f"<title>The parts of {PACKAGE}, and what each imports</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _arc(edge: int, start: int, end: int, whole: int, colour: str) -> str:
    """From a line down to another; the farther, the wider."""
    reach = edge + 24 + round((RIGHT - 24) * ((end - start) / whole) ** 0.6 * 4 / 3)
    curve = f"M{edge} {start} C{reach} {start} {reach} {end} {edge + 6} {end}"
    head = f"M{edge} {end} l7 -4 v8 z"
    return f'<path d="{curve}" fill="none" stroke="{colour}"/><path d="{head}" fill="{colour}"/>'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "tools.picture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PICTURE, help="the file (default: docs/architecture.svg)")
    parser.parse_args(argv).output.write_text(draw(), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
