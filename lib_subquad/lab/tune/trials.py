"""What a setting's measurements come to, and whether one is faster than another in spite of what else the machine did.

Two settings are compared in rounds. In a round both are measured side by side, so that load that lasts slows both. And
no load makes anything faster: the fastest rounds of many are what a quiet machine would show, however much more it
slows one of them than another. So a setting is faster if its COUNTING fastest rounds are all faster than the other's
fastest one. Were they equal, each of these would be the one's or the other's as a coin falls.

What is recommended, what a table says and what a plot draws come from one judgement: `judged`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...settings import Settings

AUTOMATIC: dict[str, Any] = {"query_chunk": 0, "kv_chunk": 0, "engine": "automatic"}
TUNED = tuple(AUTOMATIC)  # the fields that a recommendation sets

# A setting is worth changing to if it takes less than this share of the other's time, and worth more rounds of
# measuring only while it may take less than that.
WORTH_CHANGING = 0.97
WORTH_MEASURING = 0.9
# So many rounds count, the fastest: in less than one of a hundred comparisons of equals chance has them all be one's.
COUNTING = 7


@dataclass(frozen=True)
class Trial:
    """A setting measured on every shape: seconds of attention in one step, and the largest peak of any call.

    `rounds` are the seconds of the COUNTING fastest rounds in which it was measured beside the others, in ascending
    order; none if it was only tried once, to see whether it is worth that. `repeats`: in how many rounds it was
    measured, or 1. `seconds` is the median of those rounds, `low` and `high` their least and greatest; of what was only
    tried, the time of that. `fastest_seconds` is the sum of every call's fastest run, its tries among them.
    `computed` are the engines that did it, which may not be the one that is set.
    `peak_bytes` is the plan's estimate, or what was measured where that is more (a high-water mark does not see memory
    that the process already held); the call's result is not counted.
    """

    settings: Settings
    seconds: float
    low: float
    high: float
    fastest_seconds: float
    peak_bytes: int
    fits: bool
    rounds: tuple[float, ...] = ()
    repeats: int = 1
    computed: tuple[str, ...] = ()

    @property
    def set_in_vain(self) -> bool:
        """Whether the engine that is set computed none of it."""
        return bool(self.computed) and self.settings.engine not in ("automatic", *self.computed)

    @property
    def label(self) -> str:
        chosen = self.settings
        if all(getattr(chosen, name) == value for name, value in AUTOMATIC.items()):
            return "automatic"
        sizes = [f"{size or 'auto'}" for size in (chosen.query_chunk, chosen.kv_chunk)]
        engine = " + ".join(self.computed) if self.set_in_vain else chosen.engine
        return f"{engine} {sizes[0]} x {sizes[1]}"

    def in_rounds(self, seconds: Iterable[float]) -> Trial:
        """The same, measured in so many rounds beside the others."""
        every = sorted(seconds)
        rounds = tuple(every[:COUNTING])
        middle = statistics.median(rounds)
        return replace(self, seconds=middle, low=rounds[0], high=rounds[-1], rounds=rounds, repeats=len(every))

    def faster_than(self, other: Trial) -> bool | None:
        """Whether it is clearly faster: rounds and fastest runs must agree. None: what was measured does not tell, or
        not as often as the other."""
        if self.repeats != other.repeats or min(len(self.rounds), len(other.rounds)) < COUNTING:
            return None
        fastest = self.fastest_seconds / other.fastest_seconds
        if max(fastest, self.rounds[-1] / other.rounds[0]) <= WORTH_CHANGING:
            return True
        may_be = min(self.rounds[0] / other.rounds[0], self.rounds[-1] / other.rounds[-1])
        return None if min(fastest, may_be) <= WORTH_MEASURING else False


@dataclass(frozen=True)
class Judgement:
    """What was compared, the fastest first; the recommended one; and the front, the fastest first: what takes less
    memory than everything faster.

    Of what stays inside the memory limit nothing has a shorter time than the recommended one: where repeats do not tell
    that a trial is faster, its `seconds` are the recommended one's. Nothing over the limit is on the front, unless
    everything is over it.
    """

    trials: tuple[Trial, ...] = ()
    recommended: Trial | None = None
    front: tuple[Trial, ...] = ()


def judged(trials: Iterable[Trial], automatic: Trial | None) -> Judgement:
    """The setting inside the memory limit that none is clearly faster than, Automatic unless another is; where nothing
    fits, what takes the least memory. What was only tried is not judged."""
    compared = [trial for trial in trials if trial.rounds]
    fitting = [trial for trial in compared if trial.fits]
    if not compared:
        return Judgement()
    if fitting:
        best = _fastest(fitting, automatic)
        compared = [
            replace(trial, seconds=best.seconds) if trial.fits and trial.seconds < best.seconds else trial
            for trial in compared
        ]
    else:
        best = min(compared, key=lambda trial: (trial.peak_bytes, trial.seconds))
    compared.sort(key=lambda trial: (trial.seconds, trial is not best, trial.peak_bytes))
    usable = [trial for trial in compared if trial.fits] or compared
    return Judgement(tuple(compared), best, tuple(front(usable)))


def _fastest(fitting: Sequence[Trial], automatic: Trial | None) -> Trial:
    """From Automatic on, if it fits, to what is clearly faster, until nothing is."""
    best = next((trial for trial in fitting if trial == automatic), None) or min(fitting, key=lambda it: it.seconds)
    while better := [trial for trial in fitting if trial.faster_than(best)]:
        best = min(better, key=lambda trial: trial.seconds)
    return best


def front(trials: Iterable[Trial]) -> Iterator[Trial]:
    """Of trials in the order of their times, those that take less memory than all before them."""
    least = math.inf
    for trial in trials:
        if trial.peak_bytes < least:
            least = trial.peak_bytes
            yield trial


def about_as_fast(trial: Trial, other: Trial) -> bool:
    """Whether it is clear that neither is faster."""
    return trial.faster_than(other) is False and other.faster_than(trial) is False


def least_difference(compared: Iterable[Trial]) -> float | None:
    """How many times as long as another a setting must take for all rounds that count to say so: what they differ by
    among themselves, as a rule, and what is worth a change."""
    spreads = [trial.rounds[-1] / trial.rounds[0] for trial in compared if trial.rounds]
    return statistics.median(spreads) / WORTH_CHANGING if spreads else None
