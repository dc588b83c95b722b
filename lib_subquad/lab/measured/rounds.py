"""Time the exact engines on a model's own shapes, for a few seconds, and tell which is fastest for each.

    problems = rounds.unknown([(problem, layers), ...], settings)
    found = rounds.measured(problems, settings, rounds.seconds_for(device))
    file.add(path, order.machine(device), found)

Where too little came of it – another program took the time, or the memory – nothing is found; and where other programs
disturbed it, that nothing is faster is not believed. `tried` knows both: nobody waits for the same again before the
next start, or `forget()`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ... import console, refusals
from ... import device as devices
from ...attention import attention
from ...engines import order
from ...engines.table import AGREEING, CLEAR, FEWEST_ROUNDS, Candidate, Class, Found, Machine, choose, class_of
from ...plan import Plan, plan_problem
from ...problem import Problem
from ...settings import CHUNK_MAX, Settings
from ...tensors import rows_of
from ...trust import tensors
from .. import machine, meter
from ..disturbance import Disturbance
from .words import problem_in_words

# Seconds for all shapes of an image together.
SECONDS_ON_A_CPU, SECONDS = 5.0, 2.0
# What makes less than this share of the work keeps the fixed order: no engine of it moves the whole.
NEGLIGIBLE_SHARE = 0.03
# After a first and a second round, what took this many times as long as the fastest, at its best, is tried no more.
HOPELESS = (2.0, 1.25)
# Nor is what takes this many times as long for a few queries, where all of them would take this share of the time.
VERY_SLOW, COSTLY = 4, 0.1
MOST_ROUNDS = 25
SHORT = 2e-3  # seconds: shorter calls are timed several in a row
SURE = 0.6  # of the time is planned
FEW = 256  # queries
SMALLEST = 64  # chunk that is tried
SYNCHRONIZED = ("cpu", "cuda", "mps", "xpu")

_tried: set[tuple[Machine, Class]] = set()


def seconds_for(device: torch.device) -> float:
    """The most that measuring may take before an image."""
    return SECONDS_ON_A_CPU if device.type == "cpu" else SECONDS


def unknown(problems: Iterable[tuple[Problem, int]], settings: Settings) -> list[Problem]:
    """Of those that are `worth_measuring`, those of whose class nothing certain is known, and that were not tried."""
    new = [it for it in _costly(problems) if not _is_certain(order.found(it)) and not tried(it)]
    return [problem for problem in new if len(candidates(problem, settings)) > 1]


def _is_certain(found: Found | None) -> bool:
    return found is not None and not found.disturbed


def worth_measuring(problems: Iterable[tuple[Problem, int]], settings: Settings) -> list[Problem]:
    """Of these, each with the number of its layers, one of each class, the costliest first: it takes a share of the
    whole, and there is more than one way to compute it."""
    return [problem for problem in _costly(problems) if len(candidates(problem, settings)) > 1]


def _costly(problems: Iterable[tuple[Problem, int]]) -> list[Problem]:
    costs: dict[Problem, float] = {}
    for problem, layers in problems:
        costs[problem] = costs.get(problem, 0.0) + _cost(problem) * layers
    least = NEGLIGIBLE_SHARE * sum(costs.values())
    worth = [problem for problem in costs if costs[problem] and costs[problem] >= least and not problem.grad]
    distinct: dict[Class, Problem] = {}
    for problem in sorted(worth, key=_cost, reverse=True):
        distinct.setdefault(class_of(problem), problem)
    return list(distinct.values())


def tried(problem: Problem) -> bool:
    """Whether this process has measured calls of this class on this device, and nothing certain came of it."""
    return (order.machine(problem.device), class_of(problem)) in _tried


def forget() -> None:
    """Measure anew what was tried in vain."""
    _tried.clear()


def _cost(problem: Problem) -> float:
    return problem.batch * problem.heads * problem.queries * problem.keys * (problem.width + problem.value_width)


@dataclass
class Watch:
    """What other programs do from when it is made on, and the rounds that were measured meanwhile."""

    began: machine.Seconds | None = field(default_factory=lambda: machine.processor_seconds())
    rounds: list[Mapping[Candidate, Sequence[float]]] = field(default_factory=list)

    def disturbance(self) -> Disturbance:
        """Until now."""
        share = machine.share_of_others(self.began, machine.processor_seconds()) if self.began else None
        runs = [its for seconds in self.rounds for its in seconds.values() if its]
        quiet = sum(min(its) * len(its) for its in runs)
        apart = [it for seconds in self.rounds for it in _least_ratios(seconds)]
        return Disturbance(
            share, sum(map(sum, runs)) / quiet if quiet else 1.0, statistics.median(apart) if apart else None
        )


def _least_ratios(seconds: Mapping[Candidate, Sequence[float]]) -> Iterator[float]:
    """How many times as long as each of the others the first must take for enough rounds to say so clearly: what their
    ratios differ by."""
    first, *others = seconds.values()
    for other in others:
        ratios = sorted(its / mine for its, mine in zip(other, first))
        if len(ratios) >= FEWEST_ROUNDS:
            yield ratios[round(AGREEING * (len(ratios) - 1))] / statistics.median(ratios) / CLEAR


def measured(
    problems: Sequence[Problem],
    settings: Settings,
    seconds: float,
    telling: Callable[[str], None] = lambda words: None,
    watch: Watch | None = None,
) -> dict[Class, Found]:
    """What is fastest for each of these problems, as far as `seconds` reach; the costliest first. `watch` sees what
    came of it, beside what it found.

    Queries are fewer than they are where a call would take too long: time goes with their number, whatever computes
    them. Nothing is told of a problem for which there was too little time, or too little memory: that is `tried`. Never
    raises: an engine that fails is none for this problem.
    """
    found: dict[Class, Found] = {}
    until = time.perf_counter() + seconds
    for number, problem in enumerate(problems):
        now = time.perf_counter()
        telling(problem_in_words(problem))
        its = Watch()
        chosen = (
            _chosen(problem, settings, now + (until - now) / (len(problems) - number), its) if now < until else None
        )
        devices.release_cached(problem.device)
        if watch is not None:
            watch.rounds += its.rounds
        if not _is_certain(chosen):
            _tried.add((order.machine(problem.device), class_of(problem)))
        if chosen is not None:
            found[class_of(problem)] = chosen
    return found


def _chosen(problem: Problem, settings: Settings, until: float, watch: Watch) -> Found | None:
    try:
        comparison = _Comparison(problem, settings, until)
        with torch.no_grad():
            comparison.run()
        watch.rounds += [comparison.seconds] * bool(comparison.seconds)
        chosen = comparison.chosen()
        hidden = watch.disturbance().hides_something(problem.device)
        return chosen.beside_others() if chosen is not None and hidden else chosen
    except Exception as error:  # no memory for tensors of these sizes; or a device that computes nothing any more
        if not devices.is_out_of_memory(error):
            console.warn(f"[subquad] engines cannot be measured: {error}")
    return None


def candidates(problem: Problem, settings: Settings) -> dict[Candidate, Settings]:
    """What may compute it inside the memory limit, each with settings that take it: the fixed order's choice, the other
    engines, and then other tiles."""
    plain = replace(settings, engine="automatic", query_chunk=0, kv_chunk=0, measure=False, retry=False)
    first = plan_problem(problem, plain)
    able: dict[Candidate, Settings] = {}
    tiles: dict[Candidate, Settings] = {}
    for engine in (order.named(first.engine), *order.candidates("automatic")):
        named = replace(plain, engine=engine.NAME)
        made = plan_problem(problem, named)
        if made.engine != engine.NAME:
            continue
        able.setdefault(Candidate(engine.NAME), named)
        for queries, keys in _tiles(made, problem.keys) if engine.SPLITS_KEYS else ():
            tiled = replace(named, query_chunk=queries, kv_chunk=keys)
            if plan_problem(problem, tiled).sizes != made.sizes:
                tiles.setdefault(Candidate(engine.NAME, queries, keys), tiled)
    return able | tiles


def _tiles(made: Plan, keys: int) -> Iterator[tuple[int, int]]:
    """Chunks of half and of twice the sizes that an engine picks itself; of queries above all where it takes all keys
    in one go."""
    of_both, of_queries = ((2, 1), (1, 2), (2, 2), (0.5, 1), (1, 0.5)), ((2, 0), (0.5, 0), (0.25, 0), (1, 0.5))
    for times_queries, times_keys in of_both if made.kv_chunk < keys else of_queries:
        yield _chunk(made.query_chunk * times_queries), _chunk(made.kv_chunk * times_keys)


def _chunk(size: float) -> int:
    """In the range of the settings; 0 stays: the size that the engine picks itself."""
    return min(max(round(size), SMALLEST), CHUNK_MAX) if size else 0


class _Comparison:
    """One problem, computed in turn by all that can, until it is clear or its time is over."""

    def __init__(self, problem: Problem, settings: Settings, until: float) -> None:
        self.problem, self.until = problem, until
        self.candidates = candidates(problem, settings)
        self.seconds: dict[Candidate, list[float]] = {}
        self.alone: Candidate | None = None  # the first, where all the others are out of the question

    def chosen(self) -> Found | None:
        """The fastest, the first of what is left being what the fixed order comes to."""
        if self.alone is not None:
            return Found(*self.alone)
        return choose(self.seconds) if self.seconds else None

    def run(self) -> None:
        query, key, value, mask = tensors(self.problem)

        def call(candidate: Candidate, rows: int) -> Callable[[], Tensor | None]:
            its_mask = None if mask is None else rows_of(mask, slice(rows))
            settings = self.candidates[candidate]
            return lambda: _computed(candidate, settings, query[:, :, :rows], key, value, its_mask)

        few = min(FEW, self.problem.queries)
        took = self._first_of_all(call, few)
        if took is None:
            return
        able, rows = self._within_time(took, few)
        calls: dict[Candidate, Callable[[], Tensor | None]] = {}
        for candidate in able:
            if time.perf_counter() + took > self.until:
                return
            seconds = self._time(call(candidate, few))
            if candidate is not able[0] and seconds is not None and self._is_very_slow(seconds, took, rows / few):
                if self._is_very_slow(seconds, took, 1):
                    continue
                seconds = self._time(call(candidate, few))  # its libraries are loaded now
                if seconds is None or self._is_very_slow(seconds, took, rows / few):
                    continue
            # On a CPU a few queries are enough for caches to fill.
            if seconds is not None and self.problem.device.type != "cpu":
                seconds = self._time(call(candidate, rows))
            if seconds is not None:
                calls[candidate] = call(candidate, rows)
        if calls:
            self._rounds(calls)

    def _is_very_slow(self, seconds: float, of_the_first: float, times: float) -> bool:
        """By what a few queries take, and how many times as many there are to be."""
        left = self.until - time.perf_counter()
        return seconds > VERY_SLOW * of_the_first and seconds * times > COSTLY * left

    def _first_of_all(self, call: Callable[[Candidate, int], Callable[[], Tensor | None]], few: int) -> float | None:
        """Seconds of the first candidate that can, for a few queries, once libraries are loaded and caches full; those
        before it are none. None where there is no such candidate, or no time."""
        for candidate in list(self.candidates):
            for once_more in (True, False):
                if time.perf_counter() > self.until:
                    return None
                took = self._time(call(candidate, few))
                if took is None:
                    del self.candidates[candidate]
                    break
                if not once_more:
                    return took
        return None

    def _within_time(self, took: float, few: int) -> tuple[list[Candidate], int]:
        """As many candidates as there is time for, if but on a few queries; and how many queries there is time for."""
        calls_of_few = (self.until - time.perf_counter()) / took
        most = int(calls_of_few / (FEWEST_ROUNDS * 2))
        able = list(self.candidates)[: max(most, 2)]
        # A first call of each of a few queries, two rounds of all, and then of the three that are left on the average;
        # what is left of the time is for those that are slower than the first.
        rows = few * SURE * (calls_of_few - len(able)) / (len(able) * 2 + FEWEST_ROUNDS * 3)
        return able, min(self.problem.queries, max(few, round(rows)))

    def _rounds(self, calls: dict[Candidate, Callable[[], Tensor | None]]) -> None:
        """All of them side by side, every other round backwards; soon without those that are hopeless."""
        left = list(calls)
        for number in range(MOST_ROUNDS):
            if len(left) == 1:
                self.alone = left[0]
                return
            for candidate in left if number % 2 == 0 else left[::-1]:
                took = self.seconds.setdefault(candidate, [])
                if time.perf_counter() + (took[-1] if took else 0.0) > self.until:
                    return self._end_evenly(left)
                seconds = self._time(calls[candidate])
                if seconds is None:  # it computes nothing any more: what was given up beside it may be the fastest
                    self.seconds = {}
                    return self._rounds({other: call for other, call in calls.items() if other is not candidate})
                took.append(seconds)
            if number < len(HOPELESS):
                best = {candidate: min(took) for candidate, took in self.seconds.items()}
                most = HOPELESS[number] * min(best.values())
                left = [it for it in left if it is left[0] or best[it] <= most]
                self._end_evenly(left)

    def _end_evenly(self, left: Sequence[Candidate]) -> None:
        """Only whole rounds count: in them all were measured side by side."""
        whole = min((len(self.seconds.get(candidate, ())) for candidate in left), default=0)
        self.seconds = {candidate: self.seconds.get(candidate, [])[:whole] for candidate in left}

    def _time(self, call: Callable[[], Tensor | None]) -> float | None:
        """Seconds of a call; of a short one, of several in a row. None where the candidate is none."""
        device, calls = self.problem.device, 0
        try:
            meter.synchronize(device)
            start = now = time.perf_counter()
            while now - start < SHORT:
                output = call()
                if output is None:
                    return None
                meter.synchronize(device)
                if device.type not in SYNCHRONIZED:
                    output[..., :1, :1].to("cpu")  # waits for what it is made of
                calls, now = calls + 1, time.perf_counter()
            return (now - start) / calls
        except Exception as error:
            if refusals.is_fatal(error):
                raise
        devices.release_cached(device)  # out of the except block, which holds the tensors that the call had made
        return None


def _computed(
    candidate: Candidate, settings: Settings, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor | None:
    """The call; None where another engine had to do it, because the candidate's own refused or was wrong."""
    plans: list[Plan] = []
    output = attention(query, key, value, mask=mask, settings=settings, report=plans.append)
    return output if plans[0].engine == candidate.engine else None
