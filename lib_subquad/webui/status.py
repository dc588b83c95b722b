"""What attention did during the last generation: for the status line, the API and the infotext."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from ..engines.table import Found
from ..plan import Plan, why_another
from ..retry import RETRY_REASON
from ..vae import BandPlan
from ..vae.fallbacks import ON_PROCESSOR

AUTOMATIC = "automatic"  # no engine is set


@dataclass(frozen=True)
class Standing:
    """Whether subquad computes attention here, in words: what is so, why, and what to do about it. All plain text."""

    is_so: str
    why: str = ""
    step: str = ""

    def __str__(self) -> str:
        told = ": ".join(filter(None, (self.is_so, self.why)))
        return f"{told} {self.step}".rstrip()


class Images(NamedTuple):
    """The size, in pixels, and the number of those that are made at once."""

    width: int
    height: int
    batch: int


@dataclass(frozen=True)
class Reach:
    """How many places of a model attend, and whose are those that did not come to us: owner -> how many."""

    places: int = 0
    what: str = "layers"
    owners: dict[str, int] = field(default_factory=dict)


@dataclass
class Generation:
    """What was seen since a generation began. A live preview that decodes on another thread may add to it as well.

    `remembered`: some call began with the smaller chunks that an earlier out-of-memory had led to. `served` holds the
    `id` of every place that made a call: a cross-attention layer, or a function that the web UI holds somewhere.
    `begun`: there was one, so that silence says that nothing of it was ours. `wanted` is the engine that was set for
    it, `computed` how many calls each engine did, and `first` the plan of the first of them. `passed_on` counts the
    calls that came to us and that the web UI's own attention computed, by the reason; `reruns` those of which an
    inexact engine's result was of no use, so that an exact one computed them again. `measuring` says what is measured
    before it, and then what was found; `measured` holds the findings that its calls went by instead of by the fixed
    order. `number` tells it from those before; `images` are what was asked for, as far as that can be told. `bands` is
    the largest plan by which the VAE was computed in bands, `lower_bands` whether memory ran out in some,
    `on_processor` whether a card had no room even for the lowest; `kept` says where there is what could not be decoded;
    `sketched`: an interrupt is why, and images are sketches.
    """

    begun: bool = False
    number: int = 0
    images: Images | None = None
    wanted: str = AUTOMATIC
    computed: Counter[str] = field(default_factory=Counter)
    first: dict[str, Plan] = field(default_factory=dict)
    calls: int = 0
    retries: int = 0
    reruns: int = 0
    remembered: bool = False
    largest: Plan | None = None
    served: set[int] = field(default_factory=set)
    passed_on: Counter[str] = field(default_factory=Counter)
    reach: Reach = Reach()
    measuring: str = ""
    measured: set[Found] = field(default_factory=set)
    bands: BandPlan | None = None
    lower_bands: bool = False
    on_processor: bool = False
    kept: str = ""
    sketched: bool = False

    def record(self, plan: Plan, place: object | None) -> None:
        self.calls += 1
        self.computed[plan.engine] += 1
        self.first.setdefault(plan.engine, plan)
        if place is not None:
            self.served.add(id(place))
        self.retries += plan.retries
        self.reruns += plan.reruns
        self.remembered = self.remembered or not plan.retries and RETRY_REASON in plan.reasons
        if self.largest is None or plan.workspace_bytes >= self.largest.workspace_bytes:
            self.largest = plan
        if plan.measured is not None:
            self.measured.add(plan.measured)

    def record_bands(self, plan: BandPlan) -> None:
        self.on_processor = self.on_processor or ON_PROCESSOR in plan.reasons
        self.lower_bands = self.lower_bands or plan.retries > 0
        if self.bands is None or plan.bytes >= self.bands.bytes:
            self.bands = plan


_generation = Generation()
_apart: ContextVar[Generation | None] = ContextVar("subquad_apart", default=None)


def _seen() -> Generation:
    """What is to be told of what this thread computes."""
    return _apart.get() or _generation


def begin(images: Images | None = None, wanted: str = AUTOMATIC) -> None:
    """A generation begins, for which this engine is set: forget the one before."""
    global _generation
    _generation = Generation(begun=True, number=_generation.number + 1, images=images, wanted=wanted)


def record(plan: Plan, place: object | None = None) -> None:
    """One call of attention was carried out by `plan`, for this place of the model if it is known."""
    _seen().record(plan, place)


def record_bands(plan: BandPlan) -> None:
    """Half of a VAE was computed in bands by `plan`."""
    _seen().record_bands(plan)


def kept(sentence: str, sketched: bool = False) -> None:
    """Where there is what was sampled and not decoded."""
    _generation.kept, _generation.sketched = sentence, sketched


@contextlib.contextmanager
def apart() -> Iterator[Generation]:
    """What this thread computes meanwhile belongs to no generation that anybody is told of."""
    seen = Generation()
    token = _apart.set(seen)
    try:
        yield seen
    finally:
        _apart.reset(token)


def pass_on(reason: str) -> None:
    """One call was left to the web UI's own attention."""
    _seen().passed_on[reason] += 1


def measuring(sentence: str) -> None:
    """What is measured before this generation, or was."""
    _generation.measuring = sentence


def generation() -> Generation:
    """The generation now under way, or the last one."""
    return _generation


def summary() -> str:
    """The last generation in a line."""
    seen = _generation
    if seen.largest is None:
        return " ".join(filter(None, [nothing(seen), *in_bands(seen), seen.kept, *missed(seen)]))
    retries = (
        f"{counted(seen.retries, 'retry', 'retries')} after running out of memory" if seen.retries else "no retries"
    )
    calls = counted(seen.calls, "call", "calls")
    calls = ", ".join([calls, retries, *again(seen)])
    told = [f"Last generation: {calls}. Largest: {seen.largest}.", *missed(seen)]
    return " ".join(filter(None, [*told, *in_bands(seen), seen.kept, seen.measuring]))


def in_bands(seen: Generation) -> list[str]:
    """A sentence about the VAE, if it was computed in bands."""
    if seen.bands is None:
        return []
    return [f"The VAE: {seen.bands}."]


def again(seen: Generation) -> list[str]:
    """How many calls an exact engine computed again, if any."""
    return [f"{seen.reruns} computed again exactly"] if seen.reruns else []


def instead(seen: Generation) -> str:
    """That others than the engine that is set did its calls, and why, as part of a sentence; empty where none did."""
    others = {name: why for name, made in list(seen.first.items()) if (why := why_another(made, seen.wanted))}
    if not others:
        return ""
    what = "some of the calls" if seen.computed[seen.wanted] else "every call"  # as many as the next image's: told once
    why = "; ".join(dict.fromkeys(others.values()))
    return f"the engine is set to {seen.wanted}, but {' and '.join(sorted(others))} computed {what}: {why}"


def counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def nothing(seen: Generation) -> str:
    """The sentence for a generation in which nothing was computed here, or nothing yet."""
    if seen.measuring:
        return seen.measuring
    if seen.begun:
        return "The last generation used nothing of subquad."
    return "No image has been made with subquad yet."


def missed(seen: Generation) -> list[str]:
    """A sentence about the layers that others computed, and one about the calls that were none of ours, if any."""
    sentences = []
    if owners := seen.reach.owners:
        whose = ", ".join(f"{owner} ({count})" for owner, count in owners.items())
        missing = f"{sum(owners.values())} of {seen.reach.places} {seen.reach.what}"
        sentences.append(f"{missing} were out of reach: {whose} computed them.")
    if passed := seen.passed_on:
        why = ", ".join(f"{reason} ({count})" for reason, count in passed.most_common())
        sentences.append(
            f"{counted(sum(passed.values()), 'call was', 'calls were')} left to the web UI's own attention: {why}."
        )
    return sentences
