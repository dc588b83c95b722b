"""What attention did during the last generation: for the status line, the API and the infotext."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan
from ..retry import RETRY_REASON


@dataclass
class Generation:
    """What was seen since a generation began. A live preview that decodes on another thread may add to it as well.

    `remembered`: some call began with the smaller chunks that an earlier out-of-memory had led to.
    """

    calls: int = 0
    retries: int = 0
    remembered: bool = False
    largest: Plan | None = None

    def record(self, plan: Plan) -> None:
        self.calls += 1
        self.retries += plan.retries
        self.remembered = self.remembered or not plan.retries and RETRY_REASON in plan.reasons
        if self.largest is None or plan.workspace_bytes >= self.largest.workspace_bytes:
            self.largest = plan


_generation = Generation()


def begin() -> None:
    """A generation begins: forget the one before."""
    global _generation
    _generation = Generation()


def record(plan: Plan) -> None:
    """One call of attention was carried out by `plan`."""
    _generation.record(plan)


def generation() -> Generation:
    """The generation now under way, or the last one."""
    return _generation


def summary() -> str:
    """The last generation in a line."""
    seen = _generation
    if seen.largest is None:
        return "No image has been made with subquad yet."
    retries = f", {seen.retries} retries after running out of memory" if seen.retries else ", no retries"
    return f"Last generation: {seen.calls} calls{retries}. Largest: {seen.largest}"
