"""What a setting's measurements come to, and whether one is faster than another in spite of what else the machine did.

Two settings are compared by rounds. In a round both are measured side by side, so that load that lasts slows both; what
load that comes and goes does to one of them, it does to the other in another round, so that rounds are counted rather
than averaged. And no load makes anything faster: the fastest run of many is what a quiet machine would show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...settings import Settings

AUTOMATIC: dict[str, Any] = {"query_chunk": 0, "kv_chunk": 0, "engine": "automatic"}
TUNED = tuple(AUTOMATIC)  # the fields that a recommendation sets

# A setting is worth changing to if it takes less than this share of the other's time, and worth more rounds of
# measuring only while it may take less than that.
WORTH_CHANGING = 0.97
WORTH_MEASURING = 0.9
# More rounds agree than chance would give in one of so many comparisons of equals.
CHANCE = 1 / 100


@dataclass(frozen=True)
class Trial:
    """A setting measured on every shape: seconds of attention in one step, and the largest peak of any call.

    `rounds` are the seconds in each round in which it was measured beside the others; none if it was only tried once,
    to see whether it is worth that. `seconds` is the typical time: the reference's median times the median of the
    rounds' ratios to it, `low` and `high` the same of their quartiles; of what was only tried, the time of that.
    `fastest_seconds` is the sum of every call's fastest run.
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

    @property
    def repeats(self) -> int:
        """How often it was measured beside the others; 1 if it was only tried."""
        return len(self.rounds) or 1

    @property
    def label(self) -> str:
        chosen = self.settings
        if all(getattr(chosen, name) == value for name, value in AUTOMATIC.items()):
            return "automatic"
        sizes = [f"{size or 'auto'}" for size in (chosen.query_chunk, chosen.kv_chunk)]
        return f"{chosen.engine} {sizes[0]} x {sizes[1]}"

    def in_rounds(self, seconds: Sequence[float], reference: Sequence[float]) -> Trial:
        """The same, measured in rounds beside a reference."""
        scale = statistics.median(reference)
        typical = [scale * mine / others for mine, others in zip(seconds, reference)]
        typical = typical if len(typical) > 1 else typical * 2
        low, middle, high = statistics.quantiles(typical, n=4, method="inclusive")
        return replace(self, seconds=middle, low=low, high=high, rounds=tuple(seconds))

    def faster_than(self, other: Trial) -> bool | None:
        """Whether it is clearly faster: rounds and fastest runs must agree. None: they do not tell."""
        ratios = [mine / others for mine, others in zip(self.rounds, other.rounds)]
        fastest = self.fastest_seconds / other.fastest_seconds
        if fastest <= WORTH_CHANGING and _more_than_chance(ratio <= WORTH_CHANGING for ratio in ratios):
            return True
        if fastest > WORTH_MEASURING and ratios and statistics.median(ratios) > WORTH_MEASURING:
            return False
        return None


def recommended(trials: Iterable[Trial], automatic: Trial | None) -> Trial | None:
    """The setting inside the memory limit that none is clearly faster than; Automatic unless another is.

    Where nothing fits it is what takes the least memory. What was only tried is not recommended.
    """
    trials = [trial for trial in trials if trial.rounds]
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return min(trials, key=lambda trial: trial.peak_bytes, default=None)
    best = automatic if automatic in fitting else min(fitting, key=lambda trial: trial.seconds)
    while better := [trial for trial in fitting if trial.faster_than(best) and trial.seconds < best.seconds]:
        best = min(better, key=lambda trial: trial.seconds)
    return best


def about_as_fast(trial: Trial, other: Trial) -> bool:
    """Whether it is clear that neither is faster."""
    return trial.faster_than(other) is False and other.faster_than(trial) is False


def pareto_front(trials: Iterable[Trial], best: Trial | None = None) -> list[Trial]:
    """The trials that no other beats in both time and memory, the fastest first.

    What is not clearly faster than `best`, the recommended one, does not beat it.
    """
    front, least = [], math.inf
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.peak_bytes)):
        if trial.peak_bytes < least or trial is best:
            front.append(trial)
            least = min(least, trial.peak_bytes)
    return front


def _more_than_chance(outcomes: Iterable[bool]) -> bool:
    """Whether so many are true that a coin would seldom do it."""
    outcomes = list(outcomes)
    count, agreeing = len(outcomes), sum(outcomes)
    likely = sum(math.comb(count, number) for number in range(agreeing, count + 1)) / 2**count
    return likely <= CHANCE
