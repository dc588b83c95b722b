"""Measure engines and chunk sizes on a checkpoint's own attention shapes, and recommend the best setting.

First every candidate once; then the fastest of them and Automatic again, in rounds that alternate between them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .. import device as devices
from ..attention import attention
from ..engines import Sizes, fused
from ..plan import Plan, plan_problem
from ..problem import Problem
from ..settings import CHUNK_MAX, Settings
from . import meter
from .explain import Row

QUERY_CHUNKS = (256, 512, 1024, 2048, 4096)
KV_CHUNKS = (256, 512, 1024, 4096)
FINALISTS = 3
FINAL_REPEATS = 5
# Shapes that together make less than this share of the work take their time from Automatic: no setting moves them.
NEGLIGIBLE_SHARE = 0.03
# Automatic stays recommended unless something is faster by more than what repeats differ by, in the medians and in the
# fastest runs alike: what else a machine does in between seldom slows both that much.
WORTH_CHANGING = 0.97

AUTOMATIC = {"query_chunk": 0, "kv_chunk": 0, "engine": "automatic"}
TUNED = tuple(AUTOMATIC)  # the fields that a recommendation sets


@dataclass(frozen=True)
class Trial:
    """A setting measured on every shape: seconds of attention in one step, and the largest peak of any call.

    `seconds` are the medians of every call's repeats, `fastest_seconds` their minima, `repeats` the fewest of any call.
    `peak_bytes` is the plan's estimate, or what was measured where that is more (a high-water mark does not see memory
    that the process already held); the call's result is not counted.
    """

    settings: Settings
    seconds: float
    fastest_seconds: float
    peak_bytes: int
    fits: bool
    repeats: int

    def clearly_faster_than(self, other: Trial) -> bool:
        return (
            self.seconds <= other.seconds * WORTH_CHANGING
            and self.fastest_seconds <= other.fastest_seconds * WORTH_CHANGING
        )

    @property
    def label(self) -> str:
        chosen = self.settings
        if all(getattr(chosen, name) == value for name, value in AUTOMATIC.items()):
            return "automatic"
        sizes = [f"{size or 'auto'}" for size in (chosen.query_chunk, chosen.kv_chunk)]
        return f"{chosen.engine} {sizes[0]} x {sizes[1]}"


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

    Args:
        rows: the shapes, as `explain()` gives them for the user's present settings.
        settings: the user's present settings; memory limit and upcast hold for every candidate.
        device: where to measure.
    """

    rows: list[Row]
    settings: Settings
    device: torch.device
    free_bytes: int = 0
    trials: list[Trial] = field(default_factory=list)
    _measured: dict[tuple[Problem, str, Sizes], list[tuple[float, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free_bytes = self.free_bytes or devices.free_bytes(self.device)

    @property
    def limit_bytes(self) -> int:
        return self.free_bytes * self.settings.memory_limit // 100

    def run(self) -> Iterator[Progress]:
        """Measure, telling after every call how far it is. Stop iterating to stop measuring."""
        started = time.perf_counter()
        pending = self._pending(self._candidates())
        # What is known of the rest when Automatic has been timed: time goes with scores, whatever computes them.
        total_cost = sum(_cost(problem) for problem, _ in pending)
        done_cost = 0.0
        for number, (problem, plan) in enumerate(pending):
            yield Progress(number, len(pending), _left(started, done_cost, total_cost), _describe(problem, plan))
            self._measure(problem, plan)
            done_cost += _cost(problem)
            self._tally()
        finalists = self._pending(self._finalists(), again=True)
        for repeat in range(FINAL_REPEATS - 1):
            for number, (problem, plan) in enumerate(finalists if repeat % 2 else reversed(finalists)):
                done = repeat * len(finalists) + number
                yield Progress(done, len(finalists) * (FINAL_REPEATS - 1), None, "again: " + _describe(problem, plan))
                self._measure(problem, plan)
        self._tally()

    def automatic(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.label == "automatic"), None)

    def today(self) -> Trial | None:
        """The user's present setting, measured."""
        wanted = replace(self.settings, retry=False)
        return next((trial for trial in self.trials if _same_choice(trial.settings, wanted)), None)

    def recommended(self) -> Trial | None:
        """The fastest setting inside the memory limit; Automatic unless another is clearly faster."""
        fitting = [trial for trial in self.trials if trial.fits]
        if not fitting:
            return min(self.trials, key=lambda trial: trial.peak_bytes, default=None)
        automatic = self.automatic()
        if automatic is None or not automatic.fits:
            most = max(trial.repeats for trial in fitting)
            return min((trial for trial in fitting if trial.repeats == most), key=lambda trial: trial.seconds)
        better = (trial for trial in fitting if trial.repeats >= automatic.repeats)
        better = (trial for trial in better if trial.clearly_faster_than(automatic))
        return min(better, key=lambda trial: trial.seconds, default=automatic)

    def measured_again(self, chosen: Sequence[Settings], repeats: int) -> list[Trial]:
        """Trials of these settings from new measurements alone, in rounds that alternate between them."""
        again = Exploration(self.rows, self.settings, self.device, self.free_bytes)
        calls = again._pending(chosen)
        for number in range(repeats):
            for problem, plan in calls if number % 2 == 0 else reversed(calls):
                again._measure(problem, plan)
        return [again._trial(settings) for settings in chosen]

    def pareto_front(self) -> list[Trial]:
        """The trials that no other beats in both time and memory, the fastest first."""
        front, least = [], float("inf")
        for trial in sorted(self.trials, key=lambda trial: (trial.seconds, trial.peak_bytes)):
            if trial.peak_bytes < least:
                front.append(trial)
                least = trial.peak_bytes
        return front

    def _candidates(self) -> list[Settings]:
        def candidate(**choice) -> Settings:
            return replace(self.settings, retry=False, **choice)  # a retry would measure something else

        most = max((row.problem.queries for row in self.rows), default=0)
        queries = [size for size in QUERY_CHUNKS if size < most] + [0]
        keys = [size for size in KV_CHUNKS if size < most] + [0]
        found = [candidate(**AUTOMATIC), replace(self.settings, retry=False)]
        if any(not fused.why_not(row.problem) for row in self.rows):
            found += [candidate(engine="automatic", query_chunk=size, kv_chunk=0) for size in queries if size >= 1024]
        found += [candidate(engine="portable", query_chunk=q, kv_chunk=k) for q in queries for k in keys]
        return list(dict.fromkeys(found))

    def _finalists(self) -> list[Settings]:
        fitting = sorted((trial for trial in self.trials if trial.fits), key=lambda trial: trial.seconds)
        chosen = [trial.settings for trial in fitting[:FINALISTS]]
        today = replace(self.settings, retry=False)
        return list(dict.fromkeys([replace(today, **AUTOMATIC), today, *chosen]))

    def _pending(self, candidates: Iterable[Settings], again: bool = False) -> list[tuple[Problem, Plan]]:
        """The distinct calls that the candidates come to, Automatic's first."""
        calls = {}
        for settings in candidates:
            for problem, plan in self._calls(settings):
                key = problem, plan.engine, plan.sizes
                if again or key not in self._measured:
                    calls.setdefault(key, (problem, plan))
        return list(calls.values())

    def _calls(self, settings: Settings) -> Iterator[tuple[Problem, Plan]]:
        for row in self.rows:
            chosen = settings if self._matters(row) else replace(settings, **AUTOMATIC)
            yield row.problem, plan_problem(row.problem, chosen, self.free_bytes)

    def _matters(self, row: Row) -> bool:
        whole = sum(_cost(other.problem) * other.layers for other in self.rows)
        return _cost(row.problem) * row.layers >= NEGLIGIBLE_SHARE * whole

    def _measure(self, problem: Problem, plan: Plan) -> None:
        whole = plan.engine == fused.NAME and plan.query_chunk >= problem.queries
        settings = replace(
            self.settings,
            retry=False,
            engine=plan.engine,
            query_chunk=0 if whole else min(plan.query_chunk, CHUNK_MAX),
            kv_chunk=0 if plan.engine == fused.NAME else min(plan.kv_chunk, CHUNK_MAX),
        )
        try:
            query, key, value = _tensors(problem)
            small = query[..., :64, :]
            attention(small, key, value, settings=settings)  # libraries load and caches fill outside the measurement
            seconds, peak = meter.measure(lambda: attention(query, key, value, settings=settings), self.device)
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            seconds, peak = math.inf, None
        if math.isinf(seconds):  # out of the except block, which holds the tensors that the call had made
            devices.release_cached(self.device)
        peak = max(plan.workspace_bytes, (peak or 0) - problem.output_bytes)
        self._measured.setdefault((problem, plan.engine, plan.sizes), []).append((seconds, peak))

    def _tally(self) -> None:
        """Make trials of all candidates whose every shape has been measured."""
        trials = (self._trial(settings) for settings in self._candidates())
        self.trials = [trial for trial in trials if trial is not None]

    def _trial(self, settings: Settings) -> Trial | None:
        calls = self._calls(settings)
        found = [self._measured.get((problem, plan.engine, plan.sizes)) for problem, plan in calls]
        if not all(found) or any(math.isinf(seconds) for runs in found for seconds, _ in runs):  # ran out of memory
            return None
        medians, minima = (
            sum(row.layers * of(seconds for seconds, _ in runs) for row, runs in zip(self.rows, found))
            for of in (statistics.median, min)
        )
        peak = max(statistics.median(peak for _, peak in runs) for runs in found)
        return Trial(settings, medians, minima, int(peak), peak <= self.limit_bytes, min(map(len, found)))


def _same_choice(one: Settings, other: Settings) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in TUNED)


def _cost(problem: Problem) -> float:
    return problem.batch * problem.heads * problem.queries * problem.keys * (problem.width + problem.value_width)


def _left(started: float, done: float, total: float) -> float | None:
    return None if not done else (time.perf_counter() - started) * (total - done) / done


def _describe(problem: Problem, plan: Plan) -> str:
    return f"{problem.queries} x {problem.keys} tokens, {plan.engine} {plan.query_chunk} x {plan.kv_chunk}"


def _tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values, tokens before heads in memory as a layer's projections have them."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (problem.batch, tokens, problem.heads, width)
        return torch.randn(shape, generator=generator).to(problem.device, dtype).transpose(1, 2)

    return (
        random(problem.queries, problem.width, problem.dtype),
        random(problem.keys, problem.width, problem.dtype),
        random(problem.keys, problem.value_width, problem.value_dtype),
    )
