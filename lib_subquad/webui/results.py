"""What Measure found, as HTML: the sentence, the table, and how far it is."""

from __future__ import annotations

from html import escape

from ..lab import tables
from ..lab.tune.exploration import Exploration
from ..lab.tune.trials import Trial, about_as_fast
from . import words

MOST_TRIED = 8


def trial_table(exploration: Exploration) -> str:
    """The answer to Measure: all settings that were compared; where none were, the fastest of those tried.

    Today's, if measured once, has a row below: the time of a single run is no comparison.
    """
    today, recommended, automatic = exploration.today(), exploration.recommended(), exploration.automatic()
    known = sorted(exploration.trials, key=lambda trial: trial.seconds)
    compared = [trial for trial in known if trial.rounds] or known[:MOST_TRIED]
    shown = {id(trial): trial for trial in (*compared, automatic, today, recommended) if trial}
    rows = []
    for trial in sorted(shown.values(), key=lambda trial: (not trial.rounds, trial.seconds)):
        marks = [word for mark, word in ((recommended, "recommended"), (today, "today")) if trial is mark]
        marks += exploration.remarks(trial)
        measured = f"{trial.repeats} times" if trial.rounds else "once"
        time = f"{trial.seconds * 1e3:.1f} ms"
        rows.append([trial.label, time, measured, tables.memory(trial.peak_bytes), ", ".join(marks)])
    if not rows:
        return words.CSS + words.warning("Nothing was measured yet.")
    headings = ["Setting", "Time", "Measured", "Peak", ""]
    return words.CSS + verdict(exploration) + words._table(headings, ([escape(cell) for cell in row] for row in rows))


def verdict(exploration: Exploration) -> str:
    """What the measurement comes to, in a sentence or two, as HTML."""
    today, recommended = exploration.today(), exploration.recommended()
    if recommended is None:
        nothing = "Nothing is recommended yet: every setting was measured once at most, which is no comparison."
        return words.line(nothing)
    why = "This computer was too busy to tell" if exploration.complete else "It ended before it was clear"
    told = [words.line(_advice(today, recommended, why))]
    if undecided := exploration.undecided():
        again = " Measure again when nothing else runs." if exploration.complete else ""
        labels = ", ".join(trial.label for trial in undecided)
        told.append(words.warning(f"{why} whether these are faster: {labels}.{again}"))
    return "".join(told)


def _advice(today: Trial | None, recommended: Trial, unclear: str) -> str:
    if today is None:
        return f"Recommended: <b>{escape(recommended.label)}</b>. Your setting ran out of memory."
    if not recommended.fits:
        return f"Nothing stays inside the memory limit here: <b>{escape(recommended.label)}</b> takes the least."
    if today.label == recommended.label:
        return f"Your setting, <b>{escape(today.label)}</b>, is the best one here: nothing is clearly faster."
    yours = escape(today.label)
    if not today.rounds:
        beside = f"many times as fast as yours, {yours}, was when tried once"
    elif not today.fits:
        beside = f"which stays inside the memory limit as yours, {yours}, does not"
    elif recommended.faster_than(today):
        beside = f"{today.seconds / recommended.seconds:.2f} times as fast as yours, {yours}"
    elif about_as_fast(recommended, today):
        beside = f"but yours, {yours}, is as fast within what repeats differ by"
    else:
        return f"Recommended: <b>{escape(recommended.label)}</b>. {unclear} whether it is faster than yours, {yours}."
    return f"Recommended: <b>{escape(recommended.label)}</b>, {beside}."


def progress(done: int, total: int, seconds_left: float | None, what: str) -> str:
    left = "" if seconds_left is None else f", about {max(1, round(seconds_left))} s left"
    bar = f'<progress max="{total}" value="{done}" style="width: 100%"></progress>'
    return words.line(f"{bar}<br>{done} of {total} measured{left}: {escape(what)}")
