"""How long the calls that are still to be measured will take, by those that were."""

from __future__ import annotations

from collections.abc import Iterable

from ...engines import order
from .calls import Call, Key, key_of

# How many times as long as Automatic a call takes on the average, of which nothing is known yet: engines that split
# keys, and others. What takes longer than this is no example of its engine: someone has set a chunk of a few tokens.
SPLITTING, WHOLE = 1.5, 1.1
NO_EXAMPLE = 10


class Estimate:
    """Seconds of calls, everything around them included: tensors are made, and whoever looks on is told.

    A call that was run once takes as long again, one that was run more often its fastest run, times what other programs
    have slowed repeated calls by so far. One that was never run takes what Automatic takes on the same shape, times
    what the calls of its engine took of that.
    """

    def __init__(self, automatic: Iterable[Call]) -> None:
        self._base = {problem: key_of(problem, plan) for problem, plan in automatic}
        self._runs: dict[Key, list[float]] = {}

    def learn(self, call: Call, seconds: float) -> None:
        self._runs.setdefault(key_of(*call), []).append(seconds)

    def of(self, calls: Iterable[Call]) -> float | None:
        """None before Automatic was measured on every shape."""
        if not all(key in self._runs for key in self._base.values()):
            return None
        slowed = self.slowed()
        known = {key: min(runs) * (slowed if len(runs) > 1 else 1.0) for key, runs in self._runs.items()}
        seconds = 0.0
        for problem, plan in calls:
            key = key_of(problem, plan)
            if key not in known:
                known[key] = known[self._base[problem]] * self._of_engine(plan.engine)
            seconds += known[key]
        return seconds

    def _of_engine(self, name: str) -> float:
        took = [(min(runs), min(self._runs[self._base[key[0]]])) for key, runs in self._runs.items() if key[1] == name]
        took = [(its, automatics) for its, automatics in took if its < automatics * NO_EXAMPLE]
        if not took:
            return SPLITTING if order.named(name).SPLITS_KEYS else WHOLE
        return sum(its for its, _ in took) / sum(automatics for _, automatics in took)

    def slowed(self) -> float:
        """How many times as long as at their best the calls took that were repeated."""
        again = [runs for runs in self._runs.values() if len(runs) > 1]
        quiet = sum(min(runs) * len(runs) for runs in again)
        return sum(map(sum, again)) / quiet if quiet else 1.0
