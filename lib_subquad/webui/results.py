"""What Measure found, as HTML: the sentence, the table, and how far it is."""

from __future__ import annotations

from html import escape

from ..lab import tables
from ..lab.tune.exploration import Exploration, Progress
from ..lab.tune.trials import Trial, about_as_fast
from . import words

MOST_TRIED = 8


def trial_table(exploration: Exploration) -> str:
    """The answer to Measure: a sentence, the settings that were compared, and folded away those that were only tried,
    whose times are no comparison; open where there is nothing else."""
    compared = [trial for trial in exploration.trials if trial.rounds]
    tried = [trial for trial in (*exploration.trials, *exploration.tried) if not trial.rounds]
    if not (compared or tried):
        return words.warning("Nothing was measured yet.")
    told = verdict(exploration)
    if disturbed := exploration.disturbance().sentence(past=True):
        told += words.warning(disturbed)
    if compared:
        how = words.term(f"Measured {exploration.rounds} times", "Measured")
        told += words.line(f"{how} each, in turn:") + _table(compared, exploration)
    tried.sort(key=lambda trial: (trial is not exploration.today(), trial.seconds))
    kept = sorted(tried[:MOST_TRIED], key=lambda trial: trial.seconds)
    return told + _tried_once(kept, len(tried), bool(compared), exploration)


def _tried_once(shown: list[Trial], count: int, folded: bool, exploration: Exploration) -> str:
    if not shown:
        return ""
    how_many = f"{count} settings" if count > 1 else "1 setting"
    fastest = f"; the fastest {len(shown)}" if count > len(shown) else ""
    title = f"{words.term('Measured once', 'Measured')}, to see what is worth comparing: {how_many}{fastest}"
    is_open = "" if folded else " open"
    table = _table(shown, exploration)
    return f'<details class="subquad-line"{is_open}><summary>{title}</summary>{table}</details>'


def _table(shown: list[Trial], exploration: Exploration) -> str:
    rows = (
        [
            trial.label,
            tables.seconds(trial.seconds),
            tables.memory(trial.peak_bytes),
            ", ".join(_marks(trial, exploration)),
        ]
        for trial in shown
    )
    return words._table(["Setting", "Time", "Peak", ""], ([words._html(cell) for cell in row] for row in rows))


def _marks(trial: Trial, exploration: Exploration) -> list[str]:
    named = (("recommended", exploration.recommended()), ("today", exploration.today()))
    return [word for word, other in named if other is trial] + exploration.remarks(trial)


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


def progress(step: Progress) -> str:
    """One bar for the whole, how long it still takes, and what disturbs it."""
    left = "" if step.seconds_left is None else f"About {tables.duration(step.seconds_left)} left. "
    bar = (
        f'<progress max="{step.total}" value="{step.done}" style="width: 100%" aria-label="Measuring">'
        f"{step.done / step.total:.0%}</progress>"
    )
    disturbed = step.disturbance.sentence(past=False)
    return words.line(f"{bar}<br>{left}{escape(step.what)}") + (words.warning(disturbed) if disturbed else "")
