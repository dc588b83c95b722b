"""What was measured on a device: which engine, and which tile of it, is fastest for a class of calls. Pure.

A table is a value: the same one gives the same choice. It holds findings of several machines, for a file moves with its
folder from one to the next, and the same computer may have two cards and two versions of torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..problem import Problem
from ..settings import CHUNK_MAX, shown

# The fixed order is changed for what takes less than this share of its choice's time, in as many rounds.
CLEAR = 0.95
AGREEING = 0.8
FEWEST_ROUNDS, FEW_ROUNDS = 5, 7  # where there are fewer than the latter, all must agree

FORMAT = 1
LARGEST_FILE = 4 << 20  # bytes; the most that a table takes is less
MOST_MACHINES, MOST_FOUND = 16, 256
LONGEST_NAME, LONGEST_WORD, LONGEST_NUMBER = 200, 40, 20  # characters
LARGEST_CLASS, WIDEST, GREATEST_MARGIN = 40, 1 << 16, 1e6
SMALLEST_CHUNK = 16  # smaller ones are for when memory runs out


class Machine(NamedTuple):
    """For whom a finding holds: measured again when any of this changes. `engines` are those that can be had, each with
    its version where it has one of its own."""

    device: str
    driver: str
    torch: str
    subquad: str
    engines: str


class Class(NamedTuple):
    """Calls that one finding holds for: dtypes by name, widths as they are; numbers of heads (of a whole batch) and of
    tokens by the nearest power of two, as its exponent."""

    dtype: str
    value_dtype: str
    width: int
    value_width: int
    mask: str
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Found:
    """The fastest engine, its chunk sizes (0: those that it picks itself), and how many times as fast it is as what the
    fixed order would take: 1 where that is the fastest, or none is clearly faster. `disturbed`: nothing was, beside
    other programs that may have hidden it, so that it is to be measured again."""

    engine: str
    query_chunk: int = 0
    kv_chunk: int = 0
    margin: float = 1.0
    disturbed: bool = False

    @property
    def has_tile(self) -> bool:
        return bool(self.query_chunk or self.kv_chunk)

    def beside_others(self) -> Found:
        """The same of a measurement that other programs disturbed: what was clearly faster all the same stays so."""
        return dataclasses.replace(self, disturbed=True) if self.margin <= 1 else self


class Candidate(NamedTuple):
    engine: str
    query_chunk: int = 0
    kv_chunk: int = 0


def class_of(problem: Problem) -> Class:
    return Class(
        _name(problem.upcast_dtype),
        _name(problem.value_dtype),
        problem.width,
        problem.value_width,
        _of_mask(problem),
        _power(problem.batch * problem.heads),
        _power(problem.queries),
        _power(problem.keys),
    )


def _of_mask(problem: Problem) -> str:
    """A mask with rows of its own is read as often as there are queries, one for all of them once."""
    if problem.mask is None:
        return "none"
    return _name(problem.mask_dtype) + " rows" * (problem.mask[2] > 1)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _power(number: int) -> int:
    return round(math.log2(max(number, 1)))


def choose(seconds: Mapping[Candidate, Sequence[float]]) -> Found | None:
    """The fastest of what was measured in rounds, the fixed order's choice first; None where there were too few rounds.

    Another one is taken if it is clearly faster than the first: by the median of the rounds' ratios, and in nearly all
    of them, so that load which comes and goes decides nothing.
    """
    first, *others = seconds
    if len(seconds[first]) < FEWEST_ROUNDS:
        return None
    best, best_ratio = first, 1.0
    for other in others:
        ratios = [mine / its for mine, its in zip(seconds[other], seconds[first])]
        agreeing = 1.0 if len(ratios) < FEW_ROUNDS else AGREEING
        clear = len(ratios) >= FEWEST_ROUNDS and sum(ratio <= CLEAR for ratio in ratios) >= agreeing * len(ratios)
        if clear and statistics.median(ratios) < min(best_ratio, CLEAR):
            best, best_ratio = other, statistics.median(ratios)
    return Found(*best, margin=min(round(1 / best_ratio, 2), GREATEST_MARGIN))


@dataclass(frozen=True)
class Table:
    """What was found, by machine and class of call; the machine that was measured last comes last."""

    machines: dict[Machine, dict[Class, Found]] = field(default_factory=dict)

    def found(self, machine: Machine, calls: Class) -> Found | None:
        return self.machines.get(machine, {}).get(calls)

    def with_found(self, machine: Machine, found: Mapping[Class, Found]) -> Table:
        """A table that has these as well; the oldest go where there are too many, and what no file could hold. What
        was disturbed takes the place of nothing that was not."""
        known = self.machines.get(machine, {})
        new = {
            calls: it
            for calls, it in found.items()
            if _can_be_kept(calls, it) and not (it.disturbed and calls in known and not known[calls].disturbed)
        }
        its = {calls: it for calls, it in known.items() if calls not in new} | new
        its = dict(list(its.items())[-MOST_FOUND:])
        others = [(other, them) for other, them in self.machines.items() if other != machine]
        return Table(dict([*others[1 - MOST_MACHINES :], (machine, its)]))

    def without(self, machine: Machine) -> Table:
        return Table({other: found for other, found in self.machines.items() if other != machine})

    def to_json(self) -> str:
        machines = [
            machine._asdict() | {"found": [_fields_of(calls, it) for calls, it in found.items()]}
            for machine, found in self.machines.items()
        ]
        return json.dumps({"format": FORMAT, "machines": machines}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table that `to_json` wrote.

        Raises:
            ValueError: it is no such text, or has a value out of its range; the message says which.
        """
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        try:
            read = json.loads(text, parse_int=_number)
        except (ValueError, RecursionError):
            raise ValueError("it is damaged, or something else wrote it") from None
        given = _fields(read, "the file", format=int, machines=list)
        if given["format"] != FORMAT:
            raise ValueError(f"its format is {shown(given['format'])}; expected {FORMAT}")
        if len(given["machines"]) > MOST_MACHINES:
            raise ValueError(f"it has more than {MOST_MACHINES} machines")
        return cls(dict(_machine(it) for it in given["machines"]))


def _number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:  # of a million it would take seconds
        raise ValueError
    return int(digits)


def _fields_of(calls: Class, found: Found) -> dict[str, Any]:
    return calls._asdict() | dataclasses.asdict(found)


def _can_be_kept(calls: Class, found: Found) -> bool:
    """Whether a file would give it back: an engine may have any name, and a call be larger than any that is known."""
    try:
        return _found(_fields_of(calls, found)) == (calls, found)
    except ValueError:
        return False


def _machine(given: Any) -> tuple[Machine, dict[Class, Found]]:
    names = dict.fromkeys(Machine._fields, str)
    read = _fields(given, "a machine", **names, found=list)
    if len(read["found"]) > MOST_FOUND:
        raise ValueError(f"a machine has more than {MOST_FOUND} findings")
    return Machine(*(_word(read[name], name) for name in names)), dict(_found(it) for it in read["found"])


def _found(given: Any) -> tuple[Class, Found]:
    kinds = {"dtype": str, "value_dtype": str, "mask": str, "engine": str}
    whole = ("width", "value_width", "heads", "queries", "keys", "query_chunk", "kv_chunk")
    read = _fields(given, "a finding", **kinds, **dict.fromkeys(whole, int), margin=(int, float))
    for name in kinds:
        _word(read[name], name, LONGEST_WORD)
    most = dict.fromkeys(whole, LARGEST_CLASS) | {"width": WIDEST, "value_width": WIDEST}
    most |= {"query_chunk": CHUNK_MAX, "kv_chunk": CHUNK_MAX}
    for name in whole:
        if not 0 <= read[name] <= most[name]:
            raise ValueError(f"{name} is {shown(read[name])}; expected 0 to {most[name]}")
    for name in ("query_chunk", "kv_chunk"):
        if 0 < read[name] < SMALLEST_CHUNK:
            raise ValueError(f"{name} is {read[name]}; expected 0 or at least {SMALLEST_CHUNK}")
    if not 1 <= read["margin"] <= GREATEST_MARGIN:  # NaN is not either
        raise ValueError(f"margin is {shown(read['margin'])}; expected 1 to {GREATEST_MARGIN:.0f}")
    if not isinstance(disturbed := read.get("disturbed", False), bool):  # which older versions do not write
        raise ValueError(f"disturbed is {shown(disturbed)}; expected true or false")
    calls = Class(*(read[name] for name in Class._fields))
    return calls, Found(read["engine"], read["query_chunk"], read["kv_chunk"], float(read["margin"]), disturbed)


def _fields(given: Any, what: str, **kinds: Any) -> dict[str, Any]:
    """Those fields of a dictionary, each of its kind.

    Raises:
        ValueError: it is none, or one is missing or of another kind.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{what} is {shown(given)}; expected fields with names")
    for name, kind in kinds.items():
        if not isinstance(given.get(name), kind) or isinstance(given.get(name), bool):
            raise ValueError(f"{name} of {what} is {shown(given.get(name))}")
    return given


def _word(text: str, name: str, longest: int = LONGEST_NAME) -> str:
    if len(text) > longest or not text.isprintable():
        raise ValueError(f"{name} is {shown(text)}; expected at most {longest} characters, all to be seen")
    return text
