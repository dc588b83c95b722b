"""What each optimizer took so far, as a table."""

from __future__ import annotations

from html import escape

from modules.shared_items import cross_attention_optimizations

from demo.generate import MadeImage
from lib_subquad.lab import tables

_latest: dict[str, tuple[MadeImage, str]] = {}


def optimizers() -> list[str]:
    """The titles to compare; "Automatic" is one of them under another name."""
    return [title for title in cross_attention_optimizations() if title != "Automatic"]


def record(generation: MadeImage, steps: int) -> None:
    """Remember the latest image of its optimizer."""
    width, height = generation.image.size
    _latest[generation.optimizer] = generation, f"{width}×{height}, {steps} steps"


def table() -> str:
    """HTML with a line per optimizer; a dash where it has not been tried."""
    rows = "".join(_row(title) for title in optimizers())
    head = "".join(f"<th>{name}</th>" for name in ("Optimizer", "Image", "Time", "Peak memory"))
    return f"<table class='comparison'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(title: str) -> str:
    cells = [title, "–", "–", "–"]
    if title in _latest:
        generation, what = _latest[title]
        cells[1:] = what, f"{generation.seconds:.2f} s", tables.memory(generation.peak_bytes)
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
