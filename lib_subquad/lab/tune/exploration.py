"""Measure engines and chunk sizes on a checkpoint's own attention shapes, and recommend the best setting.

First every candidate is tried once, to leave out what is too slow; then the others are compared, in rounds of all of
them, the more the less steady the machine is. Only these are shown beside one another.
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
from .. import machine
from ..disturbance import Disturbance
from ..explain.rows import Row
from .calls import Call, Key, cost, describe, key_of, measure, ran_out
from .candidates import candidates
from .estimate import Estimate
from .trials import AUTOMATIC, COUNTING, TUNED, Judgement, Trial, front, judged, least_difference

# Shapes that together make less than this share of the work take their time from Automatic: no setting moves them.
NEGLIGIBLE_SHARE = 0.03

# A candidate is compared if its fastest try took at most this much more than the fastest's, times what Automatic's own
# tries differ by; on a machine so busy that these are many, they are tried again first. There even what took SLOWED
# times as long is tried once more: so much more than a fused kernel did one other program slow what splits keys.
PROMISING = 1.1
SLOWED = 4
REFERENCES = 8  # tries of Automatic among those of the candidates
FEWEST_FINALISTS, USUAL_FINALISTS, MOST_FINALISTS = 3, 6, 8
MOST_TRIES = 3
TURNS = 7  # no divisor of the numbers of chunk sizes
# What takes less memory than anything faster is compared as well, unless it takes this many times as long.
WORTH_MEMORY = 2
# The present setting is compared too, unless it is hopeless.
HOPELESS = 10
# Rounds on a machine where Automatic's own times never differ by more than UNSTEADY, and the most where they do.
STEADY_ROUNDS, MOST_ROUNDS = 9, 18
UNSTEADY = 1.1
ENOUGH_TO_TELL = 1 / 6  # of all calls, before it is told how long the whole takes
PARTS = 1000  # of the whole, of which a bar is made


@dataclass(frozen=True)
class Progress:
    """How far an exploration is, in parts of its whole time; `seconds_left` is None before that can be told."""

    done: int
    total: int
    seconds_left: float | None
    what: str
    disturbance: Disturbance = Disturbance()


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
    _judgement: Judgement = Judgement()
    _wanted: list[Settings] = field(default_factory=list)
    _processor: machine.Seconds | None = None
    _ended: machine.Seconds | None = None
    _began: float | None = None
    _done: int = 0

    def __post_init__(self) -> None:
        self.free_bytes = self.free_bytes or devices.free_bytes(self.device)
        self._limits = {it.problem: limit_bytes(it.problem, self.settings, self.free_bytes) for it in self.rows}
        self._estimate = Estimate(self._automatic_calls())

    @property
    def limit_bytes(self) -> int:
        """What a call may take, as plans have it."""
        return max(self._limits.values(), default=self.free_bytes * self.settings.memory_limit // 100)

    def run(self) -> Iterator[Progress]:
        """Measure, telling before every call how far it is. Stop iterating to stop measuring."""
        self._processor = machine.processor_seconds()
        yield from self._try()
        self._finalists = self._choose_finalists()
        yield from self._compare()
        self._ended = machine.processor_seconds()
        self.complete = True

    def automatic(self) -> Trial | None:
        return self._find(AUTOMATIC)

    def today(self) -> Trial | None:
        """The user's present setting, measured."""
        return self._find({name: getattr(self.settings, name) for name in TUNED})

    def recommended(self) -> Trial | None:
        """The fastest setting inside the memory limit; Automatic unless another is clearly faster. None before all have
        been compared in enough rounds."""
        return self._judgement.recommended

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
        beside = best is not None and trial.rounds and trial is not best and trial.fits
        faster = (trial.faster_than(best), best.faster_than(trial)) if best is not None and beside else ()
        said = (
            ("too unsteady to tell", None in faster),
            ("no clear difference", faster == (False, False)),
            ("over the memory limit", not trial.fits),
            ("inexact", trial.settings.engine in order.inexact()),
            (f"{trial.settings.engine} is set, but computed nothing", trial.set_in_vain),
        )
        return [words for words, true in said if true]

    def disturbance(self) -> Disturbance:
        """What other programs did to it so far, or until it was complete."""
        now = self._ended or machine.processor_seconds()
        share = machine.share_of_others(self._processor, now) if self._processor else None
        return Disturbance(share, self._estimate.slowed(), least_difference(self._judgement.trials))

    def pareto_front(self) -> list[Trial]:
        """Of the trials that were compared, those that no other beats in both time and memory, the fastest first."""
        return list(self._judgement.front)

    def measured_again(self, chosen: Sequence[Settings], repeats: int) -> list[Trial | None]:
        """Trials of these settings from new measurements alone, in rounds that alternate between them; None for what
        ran out of memory."""
        again = type(self)(self.rows, self.settings, self.device, self.free_bytes, _finalists=list(chosen))
        for _ in range(repeats):
            calls = again._round()
            for problem, plan in calls:
                again._measure(problem, plan)
            again._end_round(calls)
        return [again._trial(settings) for settings in chosen]

    def found(self) -> dict[Class, Found]:
        """What is fastest for each shape, of what was compared with the fixed order's choice in as many rounds. Nothing
        before it is complete. That nothing was clearly faster is to be measured again where other programs disturbed
        it."""
        found: dict[Class, Found] = {}
        disturbed = self.disturbance().hides_something(self.device)
        for row in self.rows[::-1] if self.complete else ():  # of a class the costliest shape
            seconds = self._seconds_of_candidates(row.problem)
            chosen = choose(seconds) if len(seconds) > 1 else None
            if chosen is not None:
                found[class_of(row.problem)] = chosen.beside_others() if disturbed else chosen
        return found

    def _seconds_of_candidates(self, problem: Problem) -> dict[Candidate, list[float]]:
        """Seconds in every round, the fixed order's choice first; nothing where that was not compared, and of no other
        that takes more than it may, or whose engine refused and had it computed by the next."""
        by_rules = plan_problem(problem, replace(self.settings, **AUTOMATIC, measure=False), self.free_bytes)
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
            and statistics.median(peak for _, peak in self._measured[key]) <= self._limits[problem]
        }
        return known if Candidate(by_rules.engine) in known else {}

    def _find(self, choice: dict[str, object]) -> Trial | None:
        known = (*self.trials, *self.tried)
        return next((trial for trial in known if all(getattr(trial.settings, n) == v for n, v in choice.items())), None)

    # ------------------------------------------------------------------------------- first every candidate, once each

    def _candidates(self) -> list[Settings]:
        """Automatic, the present setting, and others of which no two come to the same calls; small and large tiles in
        turn, so that it is soon known what an engine takes."""
        if not self._wanted:
            found = list(candidates(self.rows, self.settings))
            distinct: dict[tuple[Key, ...], Settings] = {}
            for settings in found:
                distinct.setdefault(tuple(key_of(*call) for call in self._calls(settings)), settings)
            others = list(distinct.values())
            in_turn = [settings for start in range(TURNS) for settings in others[start::TURNS]]
            self._wanted = list(dict.fromkeys([*found[:2], *in_turn]))
        return self._wanted

    def _try(self) -> Iterator[Progress]:
        left, tries = self._candidates(), 0
        while left:
            yield from self._one_by_one(self._with_references(self._distinct(left)), "", tries)
            left, tries = self._tried_again(tries), tries + 1

    def _tried_again(self, tries: int) -> list[Settings]:
        """What is to be tried once more after so many tries, backwards, because the machine is unsteady."""
        if self._unsteadiness() <= PROMISING or tries + 1 >= MOST_TRIES:
            return []
        left = self._promising(PROMISING * self._unsteadiness() if tries else SLOWED)
        return left[::-1] if len(left) > MOST_FINALISTS else []

    def _one_by_one(self, calls: Sequence[Call], again: str, tries: int = 0) -> Iterator[Progress]:
        """Measure these, which were tried so often before."""
        for number, call in enumerate(calls):
            began = time.perf_counter()
            yield self._progress(calls[number:], again + describe(*call), tries)
            self._measure(*call)
            self._estimate.learn(call, time.perf_counter() - began)
            if not self._finalists:
                self._tally()

    def _progress(self, calls: Sequence[Call], what: str, tries: int) -> Progress:
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        left = self._seconds_left(calls, tries)
        if left is not None:
            done = (now - self._began) / (now - self._began + left)
            self._done = min(max(self._done, int(done * PARTS)), PARTS - 1)  # a bar never goes back
        return Progress(self._done, PARTS, left, what, self.disturbance())

    def _seconds_left(self, calls: Sequence[Call], tries: int) -> float | None:
        """Of these calls and of what will come after them, by what is known now."""
        these = self._estimate.of(calls)
        if these is None or len(self._measured) < ENOUGH_TO_TELL * len(self._distinct(self._candidates())):
            return None
        if self._finalists:
            return these + (self._planned_rounds() - self.rounds - 1) * (self._estimate.of(self._round()) or 0.0)
        again = self._distinct(self._tried_again(tries))
        finalists = self._choose_finalists()
        untried = 1 - len(self.trials) / len(self._candidates())
        missing = max(0, USUAL_FINALISTS - len(finalists)) * untried
        of_known, of_automatic, of_again = (
            self._estimate.of(calls) or 0.0 for calls in (self._distinct(finalists), self._automatic_calls(), again)
        )
        return these + of_again + self._planned_rounds() * (of_known + missing * of_automatic)

    def _with_references(self, calls: list[Call]) -> list[Call]:
        """The costliest call of Automatic between these, again and again: what its times differ by is the machine's."""
        apart = -(-len(calls) // REFERENCES)
        parts = [calls[start : start + apart] for start in range(0, len(calls), apart)]
        return [call for part in parts for call in (*part, self._reference())]

    def _reference(self) -> Call:
        return max(self._automatic_calls(), key=lambda call: cost(call[0]))

    def _unsteadiness(self) -> float:
        """How many times as long as the fastest try of the reference the slowest took."""
        seconds = [seconds for seconds, _ in self._measured[key_of(*self._reference())]]
        return max(seconds) / min(seconds) if math.isfinite(max(seconds)) else 1.0

    def _promising(self, times: float) -> list[Settings]:
        """Those that take at most so many times as long as the fastest, which comes first."""
        found = [trial for trial in map(self._trial, self._candidates()) if trial is not None and trial.fits]
        found.sort(key=lambda trial: trial.fastest_seconds)
        promising = sum(trial.fastest_seconds <= found[0].fastest_seconds * times for trial in found)
        return [trial.settings for trial in found[: max(promising, FEWEST_FINALISTS)]]

    def _choose_finalists(self) -> list[Settings]:
        """Automatic, the present setting, what may be among the fastest, and what takes less memory than they do."""
        fastest = min((trial.fastest_seconds for trial in self.trials), default=0.0)
        near = [trial for trial in self.trials if trial.fits and trial.fastest_seconds <= fastest * WORTH_MEMORY]
        given = [trial for trial in (self.automatic(), self.today()) if trial is not None]
        given = [trial for trial in given if trial.fastest_seconds <= fastest * HOPELESS]
        if not near and self.trials:  # nothing fits: what takes the least
            near = [min(self.trials, key=lambda trial: trial.peak_bytes)]
        smaller = front(sorted(near, key=lambda trial: (trial.seconds, trial.peak_bytes)))
        chosen = [trial.settings for trial in (*given, *smaller)]
        promising = self._promising(PROMISING * self._unsteadiness())
        return list(dict.fromkeys([*chosen, *promising[:MOST_FINALISTS]]))

    # ------------------------------------------------------------------------- then what is left of them, side by side

    def _compare(self) -> Iterator[Progress]:
        while self.rounds < self._planned_rounds():
            calls = self._round()
            yield from self._one_by_one(calls, "again: ")
            self._end_round(calls)
            self._tally()

    def _planned_rounds(self) -> int:
        """Enough for some of them to be as quiet as the quietest of Automatic's times so far."""
        runs = [seconds for seconds, _ in self._measured[key_of(*self._reference())]]
        quiet = sum(seconds <= min(runs) * UNSTEADY for seconds in runs) / len(runs)
        return min(MOST_ROUNDS, math.ceil(STEADY_ROUNDS / quiet))

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

    def _automatic_calls(self) -> list[Call]:
        return self._calls(replace(self.settings, **AUTOMATIC))

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
        if self.rounds >= COUNTING:
            self._judgement = judged(compared, self.automatic())
            self.trials = list(self._judgement.trials)

    def _trial(self, settings: Settings) -> Trial | None:
        """What its measurements come to; None where some are missing, or it ran out of memory."""
        calls = self._calls(settings)
        runs = [self._measured.get(key_of(*call), []) for call in calls]
        if not all(runs) or any(map(ran_out, runs)):
            return None
        first, fastest = (self._step(of(runs_of_call)[0] for runs_of_call in runs) for of in (itemgetter(0), min))
        peaks = [statistics.median(peak for _, peak in runs_of_call) for runs_of_call in runs]
        fits = all(peak <= self._limits[problem] for peak, (problem, _) in zip(peaks, calls))
        matter = [plan.engine for row, (_, plan) in zip(self.rows, calls) if self._matters(row)]
        computed = tuple(dict.fromkeys(matter))
        trial = Trial(settings, first, first, first, fastest, int(max(peaks)), fits, computed=computed)
        rounds = self._rounds(calls)
        return trial.in_rounds(rounds) if len(rounds) > 1 else trial

    def _rounds(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of a step in every round, the fastest first: each call's fastest, each call's second, and so on."""
        of_calls = (sorted(self._in_rounds.get(key_of(*call), ())) for call in calls)
        return [self._step(seconds) for seconds in zip(*of_calls)]

    def _step(self, seconds: Iterable[float]) -> float:
        """From seconds of every row's call to those of a whole sampling step."""
        return sum(row.layers * of_call for row, of_call in zip(self.rows, seconds))
