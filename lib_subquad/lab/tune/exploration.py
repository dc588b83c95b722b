"""Measure engines and chunk sizes on a checkpoint's own attention shapes, and recommend the best setting.

First every candidate is tried once, to leave out what is too slow; then the others are compared, in rounds of all of
them, until it is clear whether one is faster than Automatic. Only these are shown beside one another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

import torch

from ... import device as devices
from ...engines import order
from ...engines.table import Candidate, Class, Found, choose, class_of
from ...plan import Plan, limit_bytes, measured, plan_problem, why_it_cannot
from ...problem import Problem
from ...settings import Settings
from ..explain.rows import Row
from . import trials
from .calls import Call, Key, cost, describe, key_of, measure, ran_out
from .candidates import candidates
from .trials import AUTOMATIC, TUNED, Trial, about_as_fast

# Shapes that together make less than this share of the work take their time from Automatic: no setting moves them.
NEGLIGIBLE_SHARE = 0.03

# A candidate is compared if its only try took at most this much more than the fastest's, times what Automatic's own
# tries differ by; on a machine so busy that these are many, the slower of them are tried again first.
PROMISING = 1.1
REFERENCES = 4  # tries of Automatic among those of the candidates
FEWEST_FINALISTS, MOST_FINALISTS = 3, 8
MOST_TRIES = 3
# What takes less memory than anything faster is compared as well, unless it takes this many times as long.
WORTH_MEMORY = 2
# The present setting is compared too, unless it is hopeless.
HOPELESS = 10
FEWEST_ROUNDS, MOST_ROUNDS = 7, 25  # fewer than seven can show nothing: see trials.CHANCE


@dataclass(frozen=True)
class Progress:
    """How far an exploration is."""

    done: int
    total: int
    seconds_left: float | None
    what: str


@dataclass
class Exploration:
    """What was measured so far; complete once `run()` is exhausted, and of use whenever it is stopped.

    All of `trials` were measured as often as one another: side by side in as many rounds as are done, or, before the
    second is, once each. `tried` were measured only to see whether they are worth comparing. What ran out of memory is
    in neither.

    Args:
        rows: the shapes, as a `Question` gives them for the user's present settings.
        settings: the user's present settings; memory limit and upcast hold for every candidate.
        device: where to measure.
    """

    rows: list[Row]
    settings: Settings
    device: torch.device
    free_bytes: int = 0
    trials: list[Trial] = field(default_factory=list)
    tried: list[Trial] = field(default_factory=list)
    rounds: int = 0
    complete: bool = False
    _finalists: list[Settings] = field(default_factory=list)
    _measured: dict[Key, list[tuple[float, int]]] = field(default_factory=dict)
    _in_rounds: dict[Key, list[float]] = field(default_factory=dict)  # seconds; the same number of each
    _plans: dict[Settings, list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free_bytes = self.free_bytes or devices.free_bytes(self.device)

    @property
    def limit_bytes(self) -> int:
        """What a call may take, as plans have it."""
        limits = (limit_bytes(row.problem, self.settings, self.free_bytes) for row in self.rows)
        return max(limits, default=self.free_bytes * self.settings.memory_limit // 100)

    def run(self) -> Iterator[Progress]:
        """Measure, telling before every call how far it is. Stop iterating to stop measuring."""
        yield from self._try()
        self._finalists = self._choose_finalists()
        yield from self._compare()
        self.complete = True

    def automatic(self) -> Trial | None:
        return self._find(AUTOMATIC)

    def today(self) -> Trial | None:
        """The user's present setting, measured."""
        return self._find({name: getattr(self.settings, name) for name in TUNED})

    def recommended(self) -> Trial | None:
        """The fastest setting inside the memory limit; Automatic unless another is clearly faster. None before all have
        been compared in enough rounds."""
        return trials.recommended(self.trials, self.automatic()) if self.rounds >= FEWEST_ROUNDS else None

    def undecided(self) -> list[Trial]:
        """The settings of which repeats do not tell whether they are faster than the recommended one: once complete,
        because the machine was too busy."""
        best = self.recommended()
        if best is None:
            return []
        others = [trial for trial in self.trials if trial.fits and trial is not best]
        return [trial for trial in others if trial.faster_than(best) is None]

    def remarks(self, trial: Trial) -> list[str]:
        """What a table says of a trial beside the recommended one."""
        best = self.recommended()
        close = best and trial.rounds and trial is not best and about_as_fast(trial, best)
        unclear = any(trial is other for other in self.undecided())
        ahead = best and trial.rounds and trial.seconds < best.seconds and not (close or unclear)
        said = (
            ("about as fast", close),
            ("too unsteady to tell", unclear),
            ("faster by too little to change", ahead and trial.fits),
            ("over the memory limit", not trial.fits),
            ("inexact", trial.settings.engine in order.inexact()),
        )
        return [words for words, true in said if true]

    def _unclear(self) -> bool:
        """Whether more rounds may tell more: which is the fastest, or whether it is faster than the present setting."""
        best, today = self.recommended(), self.today()
        if self.undecided():
            return True
        if best is None or today is None or not today.rounds or today is best:
            return False
        return best.faster_than(today) is None

    def pareto_front(self) -> list[Trial]:
        """Of the trials that were compared, those that no other beats in both time and memory, the fastest first."""
        return trials.pareto_front([trial for trial in self.trials if trial.rounds], self.recommended())

    def measured_again(self, chosen: Sequence[Settings], repeats: int) -> list[Trial | None]:
        """Trials of these settings from new measurements alone, in rounds that alternate between them; None for what
        ran out of memory."""
        again = Exploration(self.rows, self.settings, self.device, self.free_bytes, _finalists=list(chosen))
        for _ in range(repeats):
            calls = again._round()
            for problem, plan in calls:
                again._measure(problem, plan)
            again._end_round(calls)
        return [again._trial(settings) for settings in chosen]

    def found(self) -> dict[Class, Found]:
        """What is fastest for each shape, of what was compared with the fixed order's choice in as many rounds. Nothing
        before it is complete."""
        found: dict[Class, Found] = {}
        for row in self.rows[::-1] if self.complete else ():  # of a class the costliest shape
            seconds = self._seconds_of_candidates(row.problem)
            chosen = choose(seconds) if len(seconds) > 1 else None
            if chosen is not None:
                found[class_of(row.problem)] = chosen
        return found

    def _seconds_of_candidates(self, problem: Problem) -> dict[Candidate, list[float]]:
        """Seconds in every round, the fixed order's choice first; nothing where that was not compared, and of no other
        that takes more than it may, or whose engine refused and had it computed by the next."""
        by_rules = plan_problem(problem, replace(self.settings, **AUTOMATIC, measure=False), self.free_bytes)
        limit = limit_bytes(problem, self.settings, self.free_bytes)
        candidates = {key_of(problem, by_rules): Candidate(by_rules.engine)}
        for settings in self._finalists:
            plan = next(plan for its, plan in self._calls(settings) if its == problem)
            if why_it_cannot(order.named(plan.engine), problem):
                continue
            of_table = measured(problem, settings)
            tile = settings if of_table is None else of_table
            candidates.setdefault(key_of(problem, plan), Candidate(plan.engine, tile.query_chunk, tile.kv_chunk))
        known = {
            candidate: self._in_rounds[key]
            for key, candidate in candidates.items()
            if key in self._in_rounds
            and not ran_out(self._measured[key])
            and statistics.median(peak for _, peak in self._measured[key]) <= limit
        }
        return known if Candidate(by_rules.engine) in known else {}

    def _find(self, choice: dict[str, object]) -> Trial | None:
        known = (*self.trials, *self.tried)
        return next((trial for trial in known if all(getattr(trial.settings, n) == v for n, v in choice.items())), None)

    # ------------------------------------------------------------------------------- first every candidate, once each

    def _candidates(self) -> list[Settings]:
        """Automatic, the present setting, and others of which no two come to the same calls."""

        found = list(candidates(self.rows, self.settings))
        distinct: dict[tuple[Key, ...], Settings] = {}
        for settings in found:
            distinct.setdefault(tuple(key_of(*call) for call in self._calls(settings)), settings)
        return list(dict.fromkeys([*found[:2], *distinct.values()]))

    def _try(self) -> Iterator[Progress]:
        left = self._candidates()
        calls = self._distinct(left)
        for _ in range(MOST_TRIES):
            yield from self._one_by_one(self._with_references(calls))
            left = self._promising(left)
            if len(left) <= MOST_FINALISTS or self._unsteadiness() <= PROMISING:
                break
            calls = self._distinct(left)

    def _one_by_one(self, calls: list[Call]) -> Iterator[Progress]:
        started = time.perf_counter()
        # What is known of the rest when Automatic has been timed: time goes with scores, whatever computes them.
        total_cost = sum(cost(problem) for problem, _ in calls)
        done_cost = 0.0
        for number, (problem, plan) in enumerate(calls):
            yield Progress(number, len(calls), _left(started, done_cost, total_cost), describe(problem, plan))
            self._measure(problem, plan)
            done_cost += cost(problem)
            self._tally()

    def _with_references(self, calls: list[Call]) -> list[Call]:
        """The costliest call of Automatic between these, again and again: what its times differ by is the machine's."""
        apart = -(-len(calls) // REFERENCES)
        parts = [calls[start : start + apart] for start in range(0, len(calls), apart)]
        return [call for part in parts for call in (*part, self._reference())]

    def _reference(self) -> Call:
        return max(self._calls(replace(self.settings, **AUTOMATIC)), key=lambda call: cost(call[0]))

    def _unsteadiness(self) -> float:
        """How many times as long as the fastest try of the reference the slowest took."""
        seconds = [seconds for seconds, _ in self._measured[key_of(*self._reference())]]
        return max(seconds) / min(seconds) if math.isfinite(max(seconds)) else 1.0

    def _promising(self, candidates: Iterable[Settings]) -> list[Settings]:
        """Those that may be among the fastest, the fastest first."""
        found = [trial for trial in map(self._trial, candidates) if trial is not None and trial.fits]
        found.sort(key=lambda trial: trial.fastest_seconds)
        enough = found[0].fastest_seconds * PROMISING * self._unsteadiness() if found else 0.0
        promising = sum(trial.fastest_seconds <= enough for trial in found)
        return [trial.settings for trial in found[: max(promising, FEWEST_FINALISTS)]]

    def _choose_finalists(self) -> list[Settings]:
        """Automatic, the present setting, what may be among the fastest, and what takes less memory than they do."""
        fastest = min((trial.fastest_seconds for trial in self.trials), default=0.0)
        near = [trial for trial in self.trials if trial.fits and trial.fastest_seconds <= fastest * WORTH_MEMORY]
        given = [trial for trial in (self.automatic(), self.today()) if trial is not None]
        given = [trial for trial in given if trial.fastest_seconds <= fastest * HOPELESS]
        if not near and self.trials:  # nothing fits: what takes the least
            near = [min(self.trials, key=lambda trial: trial.peak_bytes)]
        chosen = [trial.settings for trial in (*given, *trials.pareto_front(near))]
        return list(dict.fromkeys([*chosen, *self._promising(self._candidates())[:MOST_FINALISTS]]))

    # ------------------------------------------------------------------------- then what is left of them, side by side

    def _compare(self) -> Iterator[Progress]:
        while self.rounds < FEWEST_ROUNDS or (self.rounds < MOST_ROUNDS and self._unclear()):
            planned = FEWEST_ROUNDS if self.rounds < FEWEST_ROUNDS else MOST_ROUNDS
            calls = self._round()
            for number, (problem, plan) in enumerate(calls):
                done = self.rounds * len(calls) + number
                yield Progress(done, planned * len(calls), None, "again: " + describe(problem, plan))
                self._measure(problem, plan)
            self._end_round(calls)
            self._tally()

    def _round(self) -> list[Call]:
        """The finalists' calls, those on one shape side by side; every other round runs backwards, so that none always
        follows the same one."""
        calls = [call for call in self._distinct(self._finalists) if not ran_out(self._measured.get(key_of(*call), ()))]
        order = {row.problem: number for number, row in enumerate(self.rows)}
        calls.sort(key=lambda call: order[call[0]])
        return calls if self.rounds % 2 == 0 else calls[::-1]

    def _end_round(self, calls: Iterable[Call]) -> None:
        for key in (key_of(*call) for call in calls):
            self._in_rounds.setdefault(key, []).append(self._measured[key][-1][0])
        self.rounds += 1

    def _distinct(self, candidates: Iterable[Settings]) -> list[Call]:
        """The distinct calls that the candidates come to, the first one's first."""
        calls: dict[Key, Call] = {}
        for settings in candidates:
            for call in self._calls(settings):
                calls.setdefault(key_of(*call), call)
        return list(calls.values())

    def _calls(self, settings: Settings) -> list[Call]:
        if settings not in self._plans:
            chosen = [settings if self._matters(row) else replace(settings, **AUTOMATIC) for row in self.rows]
            pairs = [
                (row.problem, plan_problem(row.problem, it, self.free_bytes)) for row, it in zip(self.rows, chosen)
            ]
            self._plans[settings] = pairs
        return self._plans[settings]

    def _matters(self, row: Row) -> bool:
        whole = sum(cost(other.problem) * other.layers for other in self.rows)
        return cost(row.problem) * row.layers >= NEGLIGIBLE_SHARE * whole

    def _measure(self, problem: Problem, plan: Plan) -> None:
        run = measure(problem, plan, self.settings, self.device)
        self._measured.setdefault(key_of(problem, plan), []).append(run)

    def _tally(self) -> None:
        """Make trials of what has been measured on every shape."""
        found = [trial for trial in map(self._trial, self._candidates()) if trial is not None]
        compared = [trial for trial in found if trial.rounds]
        self.trials = compared or found
        self.tried = [trial for trial in found if compared and not trial.rounds]

    def _trial(self, settings: Settings) -> Trial | None:
        """What its measurements come to; None where some are missing, or it ran out of memory."""
        calls = self._calls(settings)
        runs = [self._measured.get(key_of(*call), []) for call in calls]
        if not all(runs) or any(map(ran_out, runs)):
            return None
        first, fastest = (self._step(of(runs_of_call)[0] for runs_of_call in runs) for of in (itemgetter(0), min))
        peaks = [statistics.median(peak for _, peak in runs_of_call) for runs_of_call in runs]
        limits = [limit_bytes(problem, self.settings, self.free_bytes) for problem, _ in calls]
        fits = all(peak <= limit for peak, limit in zip(peaks, limits))
        trial = Trial(settings, first, first, first, fastest, int(max(peaks)), fits)
        rounds = self._rounds(settings)
        if len(rounds) < 2:
            return trial
        whole = (seconds for seconds in map(self._rounds, self._finalists) if len(seconds) == self.rounds)
        return trial.in_rounds(rounds, next(whole, rounds))

    def _rounds(self, settings: Settings) -> list[float]:
        """Seconds of a step in every round."""
        calls = (self._in_rounds.get(key_of(*call), ()) for call in self._calls(settings))
        return [self._step(seconds) for seconds in zip(*calls) if math.isfinite(sum(seconds))]

    def _step(self, seconds: Iterable[float]) -> float:
        """From seconds of every row's call to those of a whole sampling step."""
        return sum(row.layers * of_call for row, of_call in zip(self.rows, seconds))


def _left(started: float, done: float, total: float) -> float | None:
    return None if not done else (time.perf_counter() - started) * (total - done) / done
