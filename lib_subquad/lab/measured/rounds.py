"""Time the exact engines on a model's own shapes, for a few seconds, and tell which is fastest for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ... import device as devices
from ...attention import attention
from ...engines import order
from ...engines.table import FEWEST_ROUNDS, Candidate, Class, Found, choose, class_of
from ...plan import Plan, plan_problem
from ...problem import Problem
from ...settings import CHUNK_MAX, Settings
from ...tensors import rows_of
from ...trust import tensors
from .. import meter

# Seconds for all shapes of an image together.
SECONDS_ON_A_CPU, SECONDS = 5.0, 2.0
# What makes less than this share of the work keeps the fixed order: no engine of it moves the whole.
NEGLIGIBLE_SHARE = 0.03
# After a first call each, whatever took this many times as long as the fastest is tried no more.
HOPELESS = 1.25
MOST_ROUNDS = 25
SHORT = 2e-3  # seconds: shorter calls are timed several in a row
FEW = 256  # queries
SYNCHRONIZED = ("cpu", "cuda", "mps", "xpu")


def seconds_for(device: torch.device) -> float:
    """The most that measuring may take before an image."""
    return SECONDS_ON_A_CPU if device.type == "cpu" else SECONDS


def unknown(problems: Iterable[tuple[Problem, int]], settings: Settings) -> list[Problem]:
    """Of these, each with the number of its layers, the ones that are worth measuring, the costliest first: nothing is
    known of their class yet, more than one way to compute them is at hand, and they take a share of the whole."""
    costs: dict[Problem, float] = {}
    for problem, layers in problems:
        costs[problem] = costs.get(problem, 0.0) + _cost(problem) * layers
    worth = [problem for problem in costs if costs[problem] >= NEGLIGIBLE_SHARE * sum(costs.values())]
    distinct = {class_of(problem): problem for problem in sorted(worth, key=_cost)}
    new = [problem for problem in distinct.values() if not problem.grad and order.found(problem) is None]
    return [problem for problem in reversed(new) if len(candidates(problem, settings)) > 1]


def _cost(problem: Problem) -> float:
    return problem.batch * problem.heads * problem.queries * problem.keys * (problem.width + problem.value_width)


def measured(
    problems: Sequence[Problem],
    settings: Settings,
    seconds: float,
    telling: Callable[[str], None] = lambda words: None,
) -> dict[Class, Found]:
    """What is fastest for each of these problems, as far as `seconds` reach; the costliest first.

    Queries are fewer than they are where a call would take too long: time goes with their number, whatever computes
    them. Nothing is told of a problem for which there was too little time, or too little memory.
    """
    found: dict[Class, Found] = {}
    until = time.perf_counter() + seconds
    for number, problem in enumerate(problems):
        now = time.perf_counter()
        its = _Comparison(problem, settings, now + (until - now) / (len(problems) - number))
        telling(f"{problem.queries} x {problem.keys} tokens")
        if now < until and (chosen := its.chosen()) is not None:
            found[class_of(problem)] = chosen
    return found


def candidates(problem: Problem, settings: Settings) -> dict[Candidate, Settings]:
    """What may compute it inside the memory limit, each with settings that take it: the fixed order's choice, the other
    engines, and then other tiles."""
    plain = replace(settings, engine="automatic", query_chunk=0, kv_chunk=0, measure=False)
    first = plan_problem(problem, plain)
    able: dict[Candidate, Settings] = {}
    tiles: dict[Candidate, Settings] = {}
    for engine in (order.named(first.engine), *order.candidates("automatic")):
        named = replace(plain, engine=engine.NAME)
        made = plan_problem(problem, named)
        if made.engine != engine.NAME:
            continue
        able.setdefault(Candidate(engine.NAME), named)
        for queries, keys in _tiles(made) if engine.SPLITS_KEYS else ():
            tiled = replace(named, query_chunk=queries, kv_chunk=keys)
            if plan_problem(problem, tiled).sizes != made.sizes:
                tiles.setdefault(Candidate(engine.NAME, queries, keys), tiled)
    return able | tiles


def _tiles(made: Plan) -> Iterator[tuple[int, int]]:
    """Chunks of half and of twice the sizes that an engine picks itself."""
    for queries, keys in ((2, 1), (1, 2), (2, 2), (0.5, 1), (1, 0.5)):
        yield (
            min(max(round(made.query_chunk * queries), 64), CHUNK_MAX),
            min(max(round(made.kv_chunk * keys), 64), CHUNK_MAX),
        )


class _Comparison:
    """One problem, computed in turn by all that can, until it is clear or its time is over."""

    def __init__(self, problem: Problem, settings: Settings, until: float) -> None:
        self.problem, self.until = problem, until
        self.candidates = candidates(problem, settings)
        self.seconds: dict[Candidate, list[float]] = {}

    def chosen(self) -> Found | None:
        try:
            with torch.no_grad():
                self._run()
        except Exception as error:  # no memory for tensors of these sizes
            if not devices.is_out_of_memory(error):
                raise
        devices.release_cached(self.problem.device)
        return choose(self.seconds) if self.seconds else None

    def _run(self) -> None:
        query, key, value, mask = tensors(self.problem)

        def call(settings: Settings, rows: int) -> Callable[[], Tensor]:
            its_mask = None if mask is None else rows_of(mask, slice(rows))
            return lambda: attention(query[:, :, :rows], key, value, mask=its_mask, settings=settings)

        few = min(FEW, self.problem.queries)
        first = call(next(iter(self.candidates.values())), few)
        self._time(first)  # libraries load and caches fill
        took = self._time(first)
        able, rows = self._within_time(took, few)
        calls = {candidate: call(settings, rows) for candidate, settings in able.items()}
        for candidate, settings in able.items():
            if time.perf_counter() + took > self.until:
                return
            self._time(call(settings, few) if self.problem.device.type == "cpu" else calls[candidate])
        self._rounds(calls)

    def _within_time(self, took: float, few: int) -> tuple[dict[Candidate, Settings], int]:
        """As many candidates as there is time for, if but on a few queries; and how many queries there is time for."""
        calls_of_few = (self.until - time.perf_counter()) / took
        most = int(calls_of_few / (FEWEST_ROUNDS + 2))
        able = dict(list(self.candidates.items())[: max(most, 2)])
        rows = few * calls_of_few / (len(able) * 2 + FEWEST_ROUNDS * 3)
        return able, min(self.problem.queries, max(few, round(rows)))

    def _rounds(self, calls: dict[Candidate, Callable[[], Tensor]]) -> None:
        """All of them side by side, every other round backwards; after the first without those that are hopeless."""
        first, *_ = left = list(calls)
        for number in range(MOST_ROUNDS):
            for candidate in left if number % 2 == 0 else left[::-1]:
                took = self.seconds.setdefault(candidate, [])
                if time.perf_counter() + (took[-1] if took else 0.0) > self.until:
                    return self._end_evenly(left)
                took.append(self._time(calls[candidate]))
            if number == 0:
                fastest = min(took[0] for took in self.seconds.values())
                left = [it for it in left if it is first or self.seconds[it][0] <= HOPELESS * fastest]
                self._end_evenly(left)

    def _end_evenly(self, left: Sequence[Candidate]) -> None:
        """Only whole rounds count: in them all were measured side by side."""
        whole = min(len(self.seconds.get(candidate, ())) for candidate in left)
        self.seconds = {candidate: self.seconds.get(candidate, [])[:whole] for candidate in left}

    def _time(self, call: Callable[[], Tensor]) -> float:
        """Seconds of a call; of a short one, of several in a row."""
        device, calls = self.problem.device, 0
        meter.synchronize(device)
        start = now = time.perf_counter()
        while now - start < SHORT:
            output = call()
            meter.synchronize(device)
            if device.type not in SYNCHRONIZED:
                output[..., :1, :1].to("cpu")  # waits for what it is made of
            calls, now = calls + 1, time.perf_counter()
        return (now - start) / calls
