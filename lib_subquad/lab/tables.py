"""Tables that read well in a terminal and paste as Markdown."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence

from .. import device as devices

NOTHING = "–"
LONGEST_NOTE = 72
NARROWEST = 20  # columns


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()) -> str:
    """A Markdown table with columns of even width: those named in `left` aligned left, the others right."""
    cells = [[_cell(text) for text in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headings))]
    aligned = [str.ljust if heading in left else str.rjust for heading in headings]
    lines = [[align(text, width) for align, text, width in zip(aligned, row, widths)] for row in cells]
    rule = ["-" * width if align is str.ljust else "-" * (width - 1) + ":" for align, width in zip(aligned, widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def of_cells(rows: Sequence[Mapping[str, str]], left: Collection[str] = ()) -> str:
    """The same from rows that name their cells, all of them alike."""
    return table(list(rows[0]), [list(row.values()) for row in rows], left)


def for_reading(rows: Sequence[Mapping[str, str]], left: Collection[str] = ()) -> str:
    """The same; on a terminal that is too narrow for it, the cells of each row below one another, in lines that fit."""
    told, columns = of_cells(rows, left), shutil.get_terminal_size((0, 0)).columns  # 0: it goes to no terminal
    if not columns or len(told.partition("\n")[0]) <= columns:
        return told
    return "\n\n".join("\n".join(_below_one_another(row, max(columns, NARROWEST))) for row in rows)


def _below_one_another(row: Mapping[str, str], columns: int) -> list[str]:
    (_, title), *others = row.items()
    lines = textwrap.wrap(title, columns)
    for name, text in others:
        said = f"{name}: {text}" if name and text else text
        lines += textwrap.wrap(said, columns, initial_indent="  ", subsequent_indent="    ")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    if value >= 10:
        return f"{value:.1f}".removesuffix(".0") + " s" if value < 100 else f"{value:.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.{1 if value < 0.1 else 0}f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def duration(value: float) -> str:
    """How long one has to wait: no more digits than are known."""
    if value < 10:
        return f"{max(1, round(value))} s"
    return f"{5 * round(value / 5)} s" if value < 90 else f"{round(value / 60)} min"


def spread(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{seconds(low)} – {seconds(high)}"


def ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def memory(count: float | None) -> str:
    """A number of bytes, none so small a part of its unit that nothing is left of it."""
    if count is None:
        return NOTHING
    if not count:
        return "0"
    if count < devices.MIB / 10:
        return f"{_digits(max(count / devices.KIB, 0.1))} KiB"
    if count < 10 * devices.GIB:
        return f"{_digits(count / devices.MIB)} MiB"
    return f"{_digits(count / devices.GIB)} GiB"


def _digits(value: float) -> str:
    """As many as tell anything."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def short(text: str) -> str:
    """Words for a cell: all of them where they fit."""
    return text if len(text) <= LONGEST_NOTE else text[: LONGEST_NOTE - 1].rstrip() + "…"
