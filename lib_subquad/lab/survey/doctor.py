"""Which engine each call gets, why, and what would help."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ... import device as devices
from ... import identity
from ...engines import order
from ...plan import Plan, plan_problem
from ...problem import Problem
from ...settings import Settings
from . import facts
from .advice import Advice, Situation, advise

NOT_LOADABLE = "is installed but cannot be loaded"  # as `engines.packages` words it
NOTHING = "Nothing to gain by a switch: none is known that would help here."
NO_SWITCH = "No switch is known that would change that."
WITHOUT_KERNEL = "{count} of {calls} kinds of call run without a fused kernel, because {why}."


@dataclass(frozen=True)
class Diagnosis:
    """The plan of each call that was asked about, and all that would help."""

    plans: tuple[Plan, ...]
    advice: tuple[Advice, ...]

    @property
    def sentences(self) -> list[str]:
        """What has no fused kernel, and why; each piece of advice with its source, or that there is none."""
        unfused = [made for made in self.plans if lacks_kernel(made)]
        advice = [f"{it.words} (source: {it.source})." for it in self.advice]
        if not unfused:
            return advice or [NOTHING]
        why = "; ".join(unfused[0].reasons)
        so = WITHOUT_KERNEL.format(count=len(unfused), calls=len(self.plans), why=why)
        return [so, *(advice or [NO_SWITCH])]


def diagnosis(problems: Sequence[Problem], settings: Settings, free_bytes: int | None = None) -> Diagnosis:
    """Of calls that a model makes on one device. Never raises for what a driver does not tell."""
    plans = tuple(plan_problem(problem, settings, free_bytes) for problem in problems)
    if not problems:
        return Diagnosis((), ())
    device = problems[0].device
    here = Situation(
        kind=devices.kind(device),
        name=device_name(device),
        architecture=_told(lambda: facts.architecture(device)),
        torch=_version(torch.__version__),
        unfused=sum(map(lacks_kernel, plans)),
        switched_off=tuple(facts.switched_off()),
        dtype=str(problems[0].dtype).removeprefix("torch."),
        variables=os.environ,
        packages=_broken(problems),
        settings=tuple(_kept_away(problems, plans, settings, free_bytes)),
        threads=torch.get_num_threads(),
        cores=_cores(),
    )
    return Diagnosis(plans, tuple(advise(here)))


def device_name(device: torch.device) -> str:
    """As its driver tells it, or else what kind it is."""
    return _told(lambda: identity.device_name(device)) or devices.kind(device)


def _told(ask: Callable[[], str]) -> str:
    with contextlib.suppress(Exception):  # a driver that does not answer
        return ask()
    return ""


def lacks_kernel(made: Plan) -> bool:
    """Whether scores are kept a tile at a time, for want of a kernel that keeps none."""
    # What was measured to be faster lacks nothing.
    return order.named(made.engine).SPLITS_KEYS and made.measured is None


def _kept_away(
    problems: Sequence[Problem], plans: Sequence[Plan], settings: Settings, free_bytes: int | None
) -> Iterable[str]:
    """Each reason that is the user's own choice."""
    free = Settings(upcast=settings.upcast, memory_limit=settings.memory_limit)
    found = {
        made.reasons[0]: None
        for problem, made in zip(problems, plans)
        if lacks_kernel(made) and made.reasons and not lacks_kernel(plan_problem(problem, free, free_bytes))
    }
    return found


def _version(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in text.split("+")[0].split(".")[:2] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (99, 0)  # one that nobody has heard of is new


def _cores() -> int:
    """Those that this process may use."""
    with contextlib.suppress(AttributeError):  # only Linux has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _broken(problems: Sequence[Problem]) -> dict[str, str]:
    """Packages that are installed and cannot be loaded, each with the reason that its engine gives."""
    found: dict[str, str] = {}
    for engine in order.engines():
        for problem in problems:
            found |= {engine.NAME: reason for reason in engine.why_not(problem) if NOT_LOADABLE in reason}  # noqa: B035
    return found
