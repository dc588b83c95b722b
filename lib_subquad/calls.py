"""Calls as they come again, a hundred in every step: checked and planned once, and then known by their tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import device as devices
from . import memory, retry
from .engines import order
from .engines.base import Engine
from .plan import Plan
from .problem import Problem
from .settings import Settings

MOST_KNOWN = 1024


Facts = tuple[object, ...]


class Call(NamedTuple):
    """A call that is planned. `engine` attends all of its queries at once; it is None where that takes the loop.
    `facts` are what the first of a kind is known by."""

    problem: Problem
    plan: Plan
    engine: Engine | None
    reading: memory.Reading
    facts: Facts | None = None


_known: dict[Facts, Call] = {}


def call_for(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: Settings) -> Call:
    """The call that these tensors make.

    Its plan is that of free memory as it was last read. Settings are part of what a call is known by, so that a change
    of them acts at once.

    Raises:
        ValueError: tensors that make no attention; the message names the argument, its shape and what was expected.
    """
    try:
        facts = _facts(query, key, value, mask, settings)
    except (AttributeError, RuntimeError):  # something is no tensor, or one without a shape, and is told so
        return _planned(_problem(query, key, value, mask, settings), settings)._replace(engine=None)
    call = _known.get(facts)
    if call is not None and call.reading is memory.reading(call.problem.device, call.problem.grad):
        return call
    # The first of its kind takes the loop, which looks at what an engine gives.
    return _planned(_problem(query, key, value, mask, settings), settings)._replace(engine=None, facts=facts)


def done(call: Call) -> None:
    """It has taken the loop: the next ones of its kind are known. Not before, or they would pass by unseen on other
    threads while the first is looked at."""
    if call.facts is None:
        return
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[call.facts] = call._replace(engine=_at_once(call.problem, call.plan), facts=None)


def forget() -> None:
    """Plan every call anew, by memory as it is now: what was found to fit, and what was warned of, is forgotten.

    Example:
        >>> from lib_subquad import forget
        >>> forget()  # another program has ended, say, and its memory is free
    """
    _known.clear()
    retry.forget()


def _facts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: Settings) -> Facts:
    """What a plan depends on, but for free memory and what has been found to fit; and strides, which only dense tensors
    have: the first call of each is looked at."""
    return (
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        None if mask is None else _facts_of_mask(mask),
        devices.switches(),
        order.changes(),
        torch.get_num_threads(),  # of which each has a workspace on the CPU
        settings,
    )


def _facts_of_mask(mask: Tensor) -> Facts:
    return (
        mask.shape,
        mask.stride(),
        mask.dtype,
        mask.device,
        mask.layout,
        torch.is_grad_enabled() and mask.requires_grad,
    )


def _problem(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: Settings) -> Problem:
    return Problem.of(query, key, value, mask, upcast=settings.upcast == "always")


def _planned(problem: Problem, settings: Settings) -> Call:
    reading = memory.reading(problem.device, problem.grad)
    plan = retry.plan_for(problem, settings, reading.bytes)
    return Call(problem, plan, _at_once(problem, plan), reading)


def _at_once(problem: Problem, plan: Plan) -> Engine | None:
    """The plan's engine, where it attends all queries in one go."""
    engine = order.named(plan.engine)
    whole = engine.rows_at_once(problem, plan.sizes) >= problem.queries > 0
    return engine if whole and (engine.DIFFERENTIABLE or not problem.grad) else None
