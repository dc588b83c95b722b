"""What several measurements of a peer on a shape come to."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .measure import Measurement


@dataclass
class Result:
    """A peer on a shape, or a way on a picture: `rounds` holds one measurement a round, None where a round was broken
    off."""

    shape: Any
    peer: str
    rounds: list[Measurement | None] = field(default_factory=list)

    @property
    def good(self) -> list[Measurement]:
        return [found for found in self.rounds if found is not None and not found.reason]

    @property
    def reason(self) -> str:
        """Why there is nothing, in words."""
        if self.good:
            return ""
        return next((found.reason for found in self.rounds if found is not None), "not measured")

    @property
    def seconds(self) -> float | None:
        return _median(found.seconds for found in self.good)

    @property
    def low(self) -> float | None:
        return min((found.seconds for found in self.good), default=None)

    @property
    def high(self) -> float | None:
        return max((found.seconds for found in self.good), default=None)

    @property
    def peak_bytes(self) -> float | None:
        return _median(found.peak_bytes for found in self.good)

    @property
    def workspace_bytes(self) -> float | None:
        """What was held beside inputs and result."""
        return None if self.peak_bytes is None else max(0, self.peak_bytes - self.good[0].result_bytes)

    @property
    def error(self) -> float | None:
        return _worst(found.error for found in self.good)

    @property
    def gradient_error(self) -> float | None:
        return _worst(found.gradient_error for found in self.good)

    @property
    def processor(self) -> float | None:
        return _median(found.processor for found in self.good)

    def ratio_to(self, other: Result | None) -> float | None:
        """The median of the rounds' ratios: the two stood side by side in each, so that load on the machine that comes
        and goes counts for both."""
        return None if other is None else _median(one.seconds / two.seconds for one, two in self._beside(other))

    def processor_ratio_to(self, other: Result | None) -> float | None:
        """The same of processor time, to which waiting for other programs adds less."""
        if other is None:
            return None
        pairs = ((one.processor, two.processor) for one, two in self._beside(other))
        return _median(one / two for one, two in pairs if one and two)

    def _beside(self, other: Result) -> list[tuple[Measurement, Measurement]]:
        pairs = ((one, two) for one, two in zip(self.rounds, other.rounds) if one and two)
        return [(one, two) for one, two in pairs if not one.reason and not two.reason]

    def memory_ratio_to(self, other: Result | None) -> float | None:
        if other is None or self.peak_bytes is None or not other.peak_bytes:
            return None
        return self.peak_bytes / other.peak_bytes

    def as_json(self) -> dict[str, object]:
        return {
            "shape": dataclasses.asdict(self.shape),
            "peer": self.peer,
            "seconds": self.seconds,
            "processor": self.processor,
            "peak_bytes": self.peak_bytes,
            "error": self.error,
            "reason": self.reason,
            "rounds": [None if found is None else dataclasses.asdict(found) for found in self.rounds],
        }


def find(results: Iterable[Result], shape: Any, peer: str) -> Result | None:
    return next((result for result in results if result.shape == shape and result.peer == peer), None)


def measure_interleaved(
    shapes: Sequence[Any],
    peers: Sequence[str],
    repeats: int,
    measure_one: Callable[[Any, str], Measurement],
    progress: Callable[[str | None], None],
    names: Callable[[str], str] = str,
) -> tuple[list[Result], bool]:
    """(results, whether all of it was measured): shape by shape, in rounds of all peers.

    Every other round runs backwards, so that no peer always follows the same one. A peer that cannot do a shape is not
    asked again; Ctrl-C ends it with what there is.
    """
    results = [[Result(shape, names(peer)) for peer in peers] for shape in shapes]
    everything = [result for group in results for result in group]
    try:
        for group in results:
            for number in range(repeats):
                turns = list(zip(group, peers))
                for result, peer in turns if number % 2 == 0 else reversed(turns):
                    failed = bool(result.rounds) and not result.good
                    progress(f"{result.shape.label}, {result.peer}, {number + 1} of {repeats}")
                    if not failed:
                        result.rounds.append(None)
                        result.rounds[-1] = measure_one(result.shape, peer)
                    progress(None)
    except KeyboardInterrupt:
        return everything, False
    return everything, True


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _worst(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: math.inf if math.isnan(value) else value, default=None)
