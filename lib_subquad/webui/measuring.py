"""Before an image of a new size: measure which engine is fastest for it, tell what was found, and keep it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from .. import memory
from ..console import UserError, say
from ..engines import order
from ..engines.table import Class, Found, class_of
from ..lab.explain.rows import Row
from ..lab.measured import file, rounds
from ..plan import goes_by_measurements
from ..problem import Problem
from ..settings import Settings
from . import infotext, models, status
from .hosts import host

_said: set[str] = set()
_failed = False


class _Interrupted(Exception):
    """The user wants this image no more."""


def start() -> None:
    """Go by what the web UI's data folder has. Where there is none, what is measured is known until the web UI ends."""
    if (path := _path()) is not None:
        file.load(path)
    _begin_anew()


def before(p) -> None:
    """At `process`: the request's overrides are in force, its turn has come, and nothing of it is computed yet.

    Measures what is new about its calls, once and for a few seconds. Never raises: no measurement is worth an image.
    """
    try:
        if not _failed:
            _before(p)
    except _Interrupted:
        status.measuring("")  # it is measured before the next image
    except UserError as error:  # a checkpoint that cannot be read, or a size that nobody can ask about
        first = str(error).split(". ")[0].rstrip(".")  # what follows is for whoever asked about it on the tab
        _say_once(f"nothing is measured before an image, and rules decide: {first}")
    except Exception as error:
        status.measuring("")
        _say_once(f"measuring failed, and rules go on to decide: {type(error).__name__}: {error}")


def keep(found: Mapping[Class, Found]) -> None:
    """Go by this from now on, and keep it in the data folder, if anything was found."""
    if found:
        file.add(_path(), order.machine(host().device()), found)


def known() -> dict[Class, Found]:
    """What was measured on this device."""
    return order.all_found(host().device())


def forget() -> int:
    """Go by the fixed rules until it is measured anew: how many findings there were."""
    count = len(known())
    file.forget(_path(), order.machine(host().device()))
    status.measuring("")  # what the status line told of it
    _begin_anew()
    return count


def _begin_anew() -> None:
    global _failed
    _failed = False
    rounds.forget()


def _before(p) -> None:
    settings = host().settings()
    if not (host().active and goes_by_measurements(settings)) or host().interrupted():
        return
    sizes = infotext.sizes(p)
    rows = [row for size in sizes for row in models.question(models.LOADED, *size, p.batch_size).rows()]
    new = rounds.unknown([(row.problem, row.layers) for row in rows], settings)
    if new:
        images = " and ".join(f"{width} x {height}" for width, height in sizes)
        seconds = rounds.seconds_for(host().device())
        _tell(f"measuring which engine is fastest for {images}: up to {seconds:.0f} seconds, once")
        found = _measured(new, settings, seconds)
        _tell(f"measured for {images}: {_in_words(found, len(new), rows)}")


def _measured(new: list[Problem], settings: Settings, seconds: float) -> dict[Class, Found]:
    global _failed
    before = host().announce(status.generation().measuring)
    try:
        found = rounds.measured(new, settings, seconds, _go_on)
        keep(found)
        return found
    except _Interrupted:
        raise
    except Exception:
        _failed = True  # it would fail, and take its time, before the next image too
        raise
    finally:
        host().announce(before)
        memory.forget()  # it was read while there were tensors that are gone now


def _go_on(_what: str) -> None:
    if host().interrupted():
        raise _Interrupted


def _in_words(found: Mapping[Class, Found], asked: int, rows: Iterable[Row]) -> str:
    """What is faster than by rules, and in how many of the layers."""
    layers: Counter[Class] = Counter()
    for row in rows:
        layers[class_of(row.problem)] += row.layers
    faster: dict[str, list[Class]] = defaultdict(list)
    for calls, it in found.items():
        if it.margin > 1:
            tiles = f" in tiles of {it.query_chunk or 'auto'} x {it.kv_chunk or 'auto'}" if it.has_tile else ""
            faster[it.engine + tiles].append(calls)
    told = []
    for how, them in faster.items():
        least, most = min(found[it].margin for it in them), max(found[it].margin for it in them)
        times = f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"
        among = sum(layers[it] for it in them)
        told.append(f"{how} is {times} times as fast for {among} of {sum(layers.values())} layers")
    if not told:
        told.append(
            "nothing is clearly faster than what rules take" if found else "nothing could be told, so rules decide"
        )
    if disturbed := sum(it.disturbed for it in found.values()):
        again = "are measured again after the next start"
        told.append(f"other programs disturbed {disturbed} of {asked} kinds of calls, which {again}")
    if 0 < len(found) < asked:
        told.append(f"there was no time for {asked - len(found)} of {asked} kinds of calls, which go on by rules")
    return "; ".join(told)


def _tell(text: str) -> None:
    say(f"[subquad] {text}")
    status.measuring(f"{text[0].upper()}{text[1:]}.")


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(f"[subquad] {text}")


def _path() -> Path | None:
    folder = host().data_folder()
    return None if folder is None else folder / file.NAME
