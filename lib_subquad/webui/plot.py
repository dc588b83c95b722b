"""What Measure compared, as a picture that a page draws itself: time against memory, in the page's own letters.

Places are shares of the width, letters and marks are of the same size on every screen; colours are lighter where the
page is dark. Marks differ in shape and in lightness as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from .. import device as devices
from ..lab import tables
from ..lab.tune.exploration import Exploration
from ..lab.tune.trials import Trial

HEIGHT = 240  # pixels between the axes; in all, the same in every width
LOWEST, HIGHEST = 5, 95  # per cent of it, and of the width, that marks take
MOST_TICKS, APART = 5, 12  # and how many per cent they are apart at least
LABEL = 48  # pixels that the words at a tick need from left to right
ROOMS = range(60, 421, 40)  # widths of the plot, in pixels: in the last there is room for words that are APART
LINEAR = 4  # an axis of times begins at zero where the longest is at most so many times the shortest
SMALLEST = 1024  # bytes: a logarithmic axis has no zero

# Around (0, 0), in pixels.
MARKS = {
    "recommended": '<circle r="9" class="subquad-ring"/><circle r="5" class="subquad-best"/>',
    "today": '<path d="M-9 -9h18v18h-18z" class="subquad-today"/>',
    "front": '<circle r="5" class="subquad-front"/>',
    "other": '<circle r="4" class="subquad-other"/>',
    "over": '<path d="M-5 -5L5 5M-5 5L5 -5" class="subquad-over"/>',
    "range": '<path d="M-9 0h18" class="subquad-range"/>',
    "limit": '<path d="M-9 0h18" class="subquad-limit"/>',
}

# Words at a tick for which a plot is too narrow are left out.
NARROW = "".join(
    f"@container subquad-plot (max-width: {room - 1}px) {{.subquad-from-{room} {{display: none}}}}\n" for room in ROOMS
)

LOOKS = """
.subquad-plot {--subquad-strong: #1d4ed8; --subquad-good: #15803d; --subquad-own: #92400e; --subquad-bad: #b91c1c;
               container: subquad-plot / inline-size; direction: ltr; max-width: 720px; padding: 0 12px 0 64px;
               font-size: 12px; line-height: 1.5}
.dark .subquad-plot {--subquad-strong: #93c5fd; --subquad-good: #86efac; --subquad-own: #fcd34d; --subquad-bad: #fca5a5}
.subquad-plot svg {overflow: visible; display: block}
.subquad-plot text {font: inherit; fill: currentColor}
.subquad-plot .subquad-grid {stroke: currentColor; opacity: .2}
.subquad-plot .subquad-front {fill: var(--subquad-strong)}
.subquad-plot .subquad-line {stroke: var(--subquad-strong); stroke-width: 2; margin: 0}
.subquad-plot .subquad-other {fill: none; stroke: currentColor; stroke-width: 1.5}
.subquad-plot .subquad-over {stroke: var(--subquad-bad); stroke-width: 2}
.subquad-plot .subquad-range {stroke: currentColor; opacity: .5}
.subquad-plot .subquad-limit {stroke: var(--subquad-bad); stroke-width: 2; stroke-dasharray: 6 4}
.subquad-plot .subquad-best {fill: var(--subquad-good)}
.subquad-plot .subquad-ring {fill: none; stroke: var(--subquad-good); stroke-width: 3}
.subquad-plot .subquad-today {fill: none; stroke: var(--subquad-own); stroke-width: 2.5}
.subquad-plot .subquad-touch {fill: transparent}
.subquad-plot .subquad-value {visibility: hidden; pointer-events: none; font-weight: 600}
.subquad-plot .subquad-value span {background: var(--background-fill-primary, Canvas)}
.subquad-plot g:hover > .subquad-value {visibility: visible}
.subquad-plot svg:has(g:hover) g:not(:hover) {opacity: .2}  /* so that no mark hides a value */
.subquad-plot ul {display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 8px 0 8px -52px; padding: 0}
.subquad-plot li {display: flex; gap: 8px; align-items: center; margin: 0; max-width: 100%}
.subquad-plot li span {min-width: 0; overflow-wrap: anywhere}
.subquad-plot li svg {flex: none}
.subquad-plot p {margin: 8px 0 2px -52px}
.subquad-plot p.subquad-across {margin-top: 0; text-align: end}
"""
CSS = f"\n<style>{LOOKS}{NARROW}</style>\n"

Scale = Callable[[float], float]  # to per cent


def svg(exploration: Exploration) -> str:
    """HTML: every setting that was compared a mark, with its values under the pointer; nothing where none was."""
    compared = [trial for trial in exploration.trials if trial.rounds]
    best = exploration.recommended()
    if best is None or not compared:
        return ""
    front, limit = exploration.pareto_front(), exploration.limit_bytes
    sizes = [max(trial.peak_bytes, SMALLEST) for trial in compared]
    limited = limit <= max(sizes) * 2
    across, times = _times([seconds for trial in compared for seconds in (trial.low, trial.seconds, trial.high)])
    up, bytes_ = _logarithmic(sizes + [limit] * limited, _binary(min(sizes)))

    def at(trial: Trial) -> tuple[float, float]:
        return across(trial.seconds), 100 - up(max(trial.peak_bytes, SMALLEST))

    shown = [
        *_ticks_across([across(value) for value in times], map(_moment, times)),
        *(_tick_up(100 - up(value), _whole(value)) for value in bytes_),
        *(_line(0, 100 - up(limit), 100, 100 - up(limit), "limit") for _ in range(limited)),
        *(_line(across(trial.low), at(trial)[1], across(trial.high), at(trial)[1], "range") for trial in compared),
        *(_line(*at(one), *at(other), "line") for one, other in zip(front, front[1:])),
        *(_mark(trial, *at(trial), list(_kinds(trial, exploration))) for trial in compared[::-1]),
    ]
    told = f"{len(compared)} settings, time against memory. Recommended: {_value(best)}. A table has all values."
    return (
        f'{CSS}<div class="subquad-plot"><p>Peak memory of a call (lower is smaller)</p>'
        f'<svg width="100%" height="{HEIGHT + 22}" role="img" aria-label="{escape(told, quote=True)}">'
        f'<svg width="100%" height="{HEIGHT}" overflow="visible">{"".join(shown)}</svg></svg>'
        '<p class="subquad-across">Attention in one sampling step (left is faster)</p>'
        f"<ul>{''.join(_legend(exploration, compared, limited))}</ul></div>"
    )


def _kinds(trial: Trial, exploration: Exploration) -> Iterator[str]:
    """The marks that a trial has."""
    if trial is exploration.today():
        yield "today"
    if trial is exploration.recommended():
        yield "recommended"
    elif any(trial is other for other in exploration.pareto_front()):
        yield "front"
    else:
        yield "other" if trial.fits else "over"


def _legend(exploration: Exploration, compared: Sequence[Trial], limited: bool) -> Iterator[str]:
    best, today = exploration.recommended(), exploration.today()
    used = {kind for trial in compared for kind in _kinds(trial, exploration)}
    words = {
        "recommended": f"recommended: {_value(best)}",
        "today": f"today: {_value(today)}" if today is not None else "",
        "front": "less memory than anything faster",
        "other": "other settings",
        "over": "over the memory limit",
        "range": f"from the fastest to the seventh of {exploration.rounds} rounds",
        "limit": f"memory limit: {tables.memory(exploration.limit_bytes)}",
    }
    for kind in MARKS:
        if kind in used or kind == "range" or (kind == "limit" and limited):
            mark = f'<svg width="20" height="20" viewBox="-10 -10 20 20" aria-hidden="true">{MARKS[kind]}</svg>'
            yield f"<li>{mark}<span>{escape(words[kind])}</span></li>"


def _value(trial: Trial) -> str:
    return f"{trial.label}, {tables.seconds(trial.seconds)}, {tables.memory(trial.peak_bytes)}"


def _mark(trial: Trial, x: float, y: float, kinds: Sequence[str]) -> str:
    marks = "".join(MARKS[kind] for kind in kinds)
    value = escape(_value(trial))
    return (
        f'<g><title>{value}</title><svg x="{x:.2f}%" y="{y:.2f}%" width="1" height="1" overflow="visible">{marks}'
        '<circle r="14" class="subquad-touch"/></svg>'
        f'<foreignObject width="100%" height="100%" class="subquad-value"><span>{value}</span></foreignObject></g>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%" class="subquad-{kind}"/>'


def _ticks_across(places: Sequence[float], words: Iterable[str]) -> Iterator[str]:
    rooms = _rooms(places)
    for x, text in zip(places, words):
        attributes = f'x="{x:.2f}%" y="100%" dy="16" text-anchor="middle" class="subquad-from-{rooms[x]}"'
        yield f"{_line(x, 0, x, 100, 'grid')}<text {attributes}>{text}</text>"


def _rooms(places: Sequence[float]) -> dict[float, int]:
    """The narrowest plot, in pixels, that has room for the words at each tick; those far from all others come first."""
    first, *left = places
    found = {first: 0}
    while left:
        apart, place = max((min(abs(place - other) for other in found), place) for place in left)
        found[place] = next((room for room in ROOMS if room * apart >= LABEL * 100), ROOMS[-1])
        left.remove(place)
    return found


def _tick_up(y: float, words: str) -> str:
    return _line(0, y, 100, y, "grid") + f'<text x="-6" y="{y:.2f}%" dy="4" text-anchor="end">{words}</text>'


def _moment(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds * 1e6:g} µs" if seconds else "0"


def _whole(count: float) -> str:
    """Bytes at a tick."""
    for unit, name in ((devices.GIB, "GiB"), (devices.MIB, "MiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count / 1024:g} KiB"


def _times(seconds: Sequence[float]) -> tuple[Scale, list[float]]:
    """From zero on; logarithmic, which has none, where they are too far apart."""
    least, most = min(seconds), max(seconds)
    if most > LINEAR * least:
        return _logarithmic(seconds, _decimal(least))

    def scale(value: float) -> float:
        return HIGHEST * value / most

    step = next(step for step in _decimal(most / MOST_TICKS) if most / step <= MOST_TICKS)
    return scale, [step * number for number in range(MOST_TICKS + 1) if step * number <= most]


def _logarithmic(values: Sequence[float], candidates: Iterator[float]) -> tuple[Scale, list[float]]:
    """With ticks at some of these, as far apart as letters need."""
    low, high = math.log(min(values)), math.log(max(values))
    if high - low < math.log(2):  # what differs by little looks so
        low, high = low - math.log(1.5), high + math.log(1.5)

    def scale(value: float) -> float:
        return LOWEST + (HIGHEST - LOWEST) * (math.log(value) - low) / (high - low)

    ticks: list[float] = []
    for value in candidates:
        if scale(value) > 100:
            break
        if scale(value) >= 0 and (not ticks or scale(value) - scale(ticks[-1]) >= APART):
            ticks.append(value)
    return scale, ticks


def _decimal(least: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten, the first of them less."""
    for exponent in itertools.count(math.floor(math.log10(least)) - 1):
        yield from (factor * 10.0**exponent for factor in (1, 2, 5))


def _binary(least: float) -> Iterator[float]:
    """Powers of two, the first of them less."""
    return (2.0**exponent for exponent in itertools.count(math.floor(math.log2(least)) - 1))
