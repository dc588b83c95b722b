"""What attention did during the last generation: for the status line, the API and the infotext."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..plan import Plan
from ..retry import RETRY_REASON


@dataclass
class Generation:
    """What was seen since a generation began. A live preview that decodes on another thread may add to it as well.

    `remembered`: some call began with the smaller chunks that an earlier out-of-memory had led to. `served` holds the
    `id` of every cross-attention layer that made a call, `layers` how many the model has, and `out_of_reach` whose are
    those that made none: owner -> layers.
    """

    calls: int = 0
    retries: int = 0
    remembered: bool = False
    largest: Plan | None = None
    served: set[int] = field(default_factory=set)
    layers: int = 0
    out_of_reach: dict[str, int] = field(default_factory=dict)

    def record(self, plan: Plan, layer: nn.Module | None) -> None:
        self.calls += 1
        if layer is not None:
            self.served.add(id(layer))
        self.retries += plan.retries
        self.remembered = self.remembered or not plan.retries and RETRY_REASON in plan.reasons
        if self.largest is None or plan.workspace_bytes >= self.largest.workspace_bytes:
            self.largest = plan


_generation = Generation()


def begin() -> None:
    """A generation begins: forget the one before."""
    global _generation
    _generation = Generation()


def record(plan: Plan, layer: nn.Module | None = None) -> None:
    """One call of attention was carried out by `plan`, for this cross-attention layer if it is one's."""
    _generation.record(plan, layer)


def generation() -> Generation:
    """The generation now under way, or the last one."""
    return _generation


def summary() -> str:
    """The last generation in a line."""
    seen = _generation
    if seen.largest is None:
        return " ".join(["No image has been made with subquad yet.", *missed(seen)])
    retries = f", {seen.retries} retries after running out of memory" if seen.retries else ", no retries"
    return " ".join([f"Last generation: {seen.calls} calls{retries}. Largest: {seen.largest}", *missed(seen)])


def missed(seen: Generation) -> list[str]:
    """A sentence about the layers that others computed, if any did."""
    if not seen.out_of_reach:
        return []
    whose = ", ".join(f"{owner} ({count})" for owner, count in seen.out_of_reach.items())
    return [f"{sum(seen.out_of_reach.values())} of {seen.layers} layers were out of reach: {whose} computed them."]
