"""A computer of which only the clock is made up: calls take what they take there, and other programs come and go."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from lib_subquad import Settings
from lib_subquad.device import GIB
from lib_subquad.lab.explain.rows import Row
from lib_subquad.lab.tune import exploration as explorations
from lib_subquad.lab.tune.calls import cost, key_of
from lib_subquad.lab.tune.exploration import Exploration, Progress
from lib_subquad.plan import Plan, plan_problem
from lib_subquad.problem import Problem

# By how much another program slows a call, from one machine to the next: threads wait at barriers for those that do not
# run, and engines differ in how many they have.
SLOWED = {"fused": (0.2, 0.6), "portable": (0.3, 1.5)}
AROUND_A_CALL = 0.002  # seconds: tensors are made, and the page is told


@dataclass(frozen=True)
class Load:
    """Seconds that others stay away and stay, on the average, and how many they are at most."""

    away: float
    stay: float
    most: int = 1


@dataclass
class BusyMachine:
    """Every call takes `factor(plan)` times what goes with its size; longer while others run, never quite the same."""

    seed: int
    factor: Callable[[Plan], float]
    load: Load | None = None
    seconds_of_cost: float = 1e-9
    jitter: float = 0.01
    now: float = 0.0
    _until: float = 0.0
    _others: int = 0
    _slowed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._slowed = {engine: self._dice.uniform(*span) for engine, span in SLOWED.items()}

    def clock(self) -> float:
        return self.now

    def call(self, problem: Problem, plan: Plan) -> float:
        """Let it run: its seconds."""
        self.now += AROUND_A_CALL
        began, left = self.now, cost(problem) * self.seconds_of_cost * self.factor(plan)
        left *= 1 + abs(self._dice.gauss(0, self.jitter))
        while left > 1e-12:
            self._come_and_go()
            slowed = 1 + self._others * self._slowed[plan.engine]
            before, self.now = self.now, min(self._until, self.now + left * slowed)
            left -= (self.now - before) / slowed
        return self.now - began

    def _come_and_go(self) -> None:
        if self.load is None:
            self._until = math.inf
        while self.now >= self._until:
            self._others = 0 if self._others else self._dice.randint(1, self.load.most)
            self._until += self._dice.expovariate(1 / (self.load.stay if self._others else self.load.away))

    def exploring(self, monkeypatch, rows: list[Row], settings: Settings) -> Exploration:
        """An exploration on this machine, not begun."""

        def measure(explored: Exploration, problem: Problem, plan: Plan) -> None:
            run = self.call(problem, plan), plan.workspace_bytes
            explored._measured.setdefault(key_of(problem, plan), []).append(run)

        monkeypatch.setattr(Exploration, "_measure", measure)
        monkeypatch.setattr(explorations.time, "perf_counter", self.clock)
        return Exploration(rows, settings, torch.device("cpu"), GIB)

    def explored(self, monkeypatch, rows: list[Row], settings: Settings = Settings()):
        """A whole exploration on this machine, and [(clock, Progress)] of it."""
        exploration = self.exploring(monkeypatch, rows, settings)
        return exploration, list(self._told(exploration.run()))

    def _told(self, steps: Iterable[Progress]) -> Iterator[tuple[float, Progress]]:
        for step in steps:
            yield self.now, step

    def quiet_seconds(self, explored: Exploration, settings: Settings) -> float:
        """What a step takes with a setting, beside nothing."""
        calls = explored._calls(settings)
        return sum(row.layers * cost(problem) * self.factor(plan) for row, (problem, plan) in zip(explored.rows, calls))


def landscape(seed: int, middle: float, spread: float, planted: float | None = None) -> Callable[[Plan], float]:
    """Times of one fused kernel in some chunks, and of tiles of portable, of which the tile of 256 x 512 is planted."""
    dice, known = random.Random(seed), {}

    def factor(plan: Plan) -> float:
        if planted and plan.engine == "portable" and (plan.query_chunk, plan.kv_chunk) == (256, 512):
            return planted
        key = plan.engine, plan.query_chunk, plan.kv_chunk
        if key not in known:
            spread_out = middle * dice.lognormvariate(0, spread)
            known[key] = spread_out if plan.engine == "portable" else 1.0 if not known else dice.uniform(1.0, 1.1)
        return known[key]

    return factor


def rows_of(*shapes: tuple[int, int, int, int]) -> list[Row]:
    """Self attention of these shapes (layers, heads, tokens, width)."""
    rows = []
    for layers, heads, tokens, width in shapes:
        shape = (1, heads, tokens, width)
        problem = Problem.from_shapes(shape, shape, shape, torch.float32, "cpu")
        rows.append(Row("unet", "self", layers, problem, plan_problem(problem, Settings(), GIB)))
    return rows
