"""Which engines there are, and which comes first: by a fixed order, or by what was measured on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch

from .. import identity, settings
from ..problem import Problem
from . import cudnn, flash_attn, fused, padded, portable, sage, whole, xformers
from .base import Engine, check_engine, is_installed, version
from .table import LONGEST_NAME, Class, Found, Machine, Table, class_of

_engines: tuple[Engine, ...] = ()
_changes = _engine_changes = 0
_table = Table()


def register(engine: Engine, before: str | None = None) -> None:
    """Add an engine: ahead of the one called `before`, or at the end, where it is taken for what none before it can do.
    Settings offer it from then on.

    Raises:
        ValueError: it lacks something, there is one of that name, or none called `before`.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from lib_subquad import Settings, attention
        >>> from lib_subquad.engines import order, portable
        >>> mine = SimpleNamespace(**vars(portable))  # the portable one under another name
        >>> mine.NAME, mine.WHY = "mine", "it is mine"
        >>> order.register(mine, before="portable")
        >>> plans, (query, key, value) = [], torch.randn(3, 1, 8, 64, 40)
        >>> output = attention(query, key, value, settings=Settings(engine="mine"), report=plans.append)
        >>> plans[0].engine
        'mine'
        >>> order.withdraw("mine")
    """
    check_engine(engine)
    if engine.NAME in settings.OPTIONS["engine"].choices:
        raise ValueError(f"there is an engine called {engine.NAME} already")
    place = len(_engines) if before is None else _engines.index(_existing(before))
    _change((*_engines[:place], engine, *_engines[place:]))


def withdraw(name: str) -> None:
    """Take an engine out again.

    Raises:
        ValueError: there is none of that name, or no other.

    Example:
        >>> from lib_subquad.engines import fused, order
        >>> order.withdraw("fused")
        >>> "fused" in order.names()
        False
        >>> order.register(fused, before=order.names()[0])  # where it was
    """
    engine = _existing(name)
    if len(_engines) == 1:
        raise ValueError(f"{name} is the only engine; expected another one to be registered before")
    _change(tuple(other for other in _engines if other is not engine))


def _existing(name: str) -> Engine:
    try:
        return named(name)
    except KeyError:
        raise ValueError(f"there is no engine called {name}; expected one of {', '.join(names())}") from None


def _change(engines: tuple[Engine, ...]) -> None:
    global _engines, _changes, _engine_changes
    _engines, _changes, _engine_changes = engines, _changes + 1, _engine_changes + 1
    machine.cache_clear()
    settings.offer_engines(names())


def engines() -> tuple[Engine, ...]:
    """All of them, the most wanted first; the last one can do what none before it could."""
    return _engines


def changes() -> int:
    """How often there has been another engine, one less, or another table: plans made before may be wrong."""
    return _changes


def engine_changes() -> int:
    """How often there has been another engine, or one less: what was found out about them before may be wrong."""
    return _engine_changes


def names() -> list[str]:
    return [engine.NAME for engine in _engines]


def named(name: str) -> Engine:
    """The engine of this name.

    Raises:
        KeyError: there is none.
    """
    for engine in _engines:
        if engine.NAME == name:
            return engine
    raise KeyError(name)


def go_by(table: Table) -> None:
    """What *automatic* goes by from now on where the fixed order would leave a choice."""
    global _table, _changes
    if table != _table:
        _table, _changes = table, _changes + 1


def table() -> Table:
    """What it goes by now."""
    return _table


def found(problem: Problem) -> Found | None:
    """What was measured for calls of this class on this very machine; None where nothing was, or for one of which
    gradients are wanted: whoever recomputes them must find the same engine."""
    if problem.grad or not _table.machines:
        return None
    it = _table.found(machine(problem.device), class_of(problem))
    return it if it is not None and _may_be_taken(it) else None


def all_found(device: torch.device) -> dict[Class, Found]:
    """All that was measured for this device, as it is now."""
    return {calls: it for calls, it in _table.machines.get(machine(device), {}).items() if _may_be_taken(it)}


def _may_be_taken(it: Found) -> bool:
    """Whatever a file says: unasked only an exact engine is taken, and one that takes all keys at once with no part of
    them, nor with fewer queries than its kernel is worth."""
    for engine in _engines:
        if engine.NAME == it.engine:
            fits = not it.kv_chunk and not 0 < it.query_chunk < whole.SMALLEST_QUERY_CHUNK
            return engine.EXACT and (engine.SPLITS_KEYS or fits)
    return False


@cache
def machine(device: torch.device) -> Machine:
    """For whom a finding about this device holds. Never raises."""
    ours = sys.modules[__name__.partition(".")[0]].__version__  # which imports us
    drives = _told(identity.driver, device)
    return Machine(_told(identity.device_name, device), drives, str(torch.__version__), ours, _versions())


def _told(ask: Callable[[torch.device], str], device: torch.device) -> str:
    try:
        told = str(ask(device))
    except Exception as error:  # a driver that does not answer drives all the same
        told = f"not told ({type(error).__name__})"
    return _seen(told)


def _seen(told: str) -> str:
    return "".join(letter for letter in told if letter.isprintable())[:LONGEST_NAME]


def _versions() -> str:
    """The engines that can be had, each with its package's version."""
    return _seen(", ".join(f"{engine.NAME} {version(engine)}".strip() for engine in usable()))


def candidates(wanted: str) -> tuple[Engine, ...]:
    """Those to be asked in turn: the one that the user wants, if it is one's name, and then the exact ones in order
    whose package is there."""
    return tuple(engine for engine in exact(wanted) if engine.NAME == wanted or is_installed(engine))


def exact(wanted: str) -> tuple[Engine, ...]:
    """The same without a look at what is installed, which no compiler can follow."""
    first = [engine for engine in _engines if engine.NAME == wanted]
    return (*first, *(engine for engine in _engines if engine.EXACT and engine not in first))


def inexact() -> list[str]:
    """The names of those that give results of their own, which users must ask for."""
    return [engine.NAME for engine in _engines if not engine.EXACT]


def usable() -> tuple[Engine, ...]:
    """All whose package is there, exact or not."""
    return tuple(engine for engine in _engines if is_installed(engine))


# A fused kernel where the device has one, for wider heads if need be; cuDNN's, and what users may have installed; what
# runs everywhere comes last.
_OURS: tuple[Engine, ...] = (fused, padded, cudnn, xformers, flash_attn, sage, portable)
for _engine in _OURS:
    register(_engine)
