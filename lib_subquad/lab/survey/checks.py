"""Small calls of every engine that can, on the device itself: are they right, and how long do they take."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import device as devices
from ...attention import attention
from ...engines import order, pytorch
from ...engines.base import Engine
from ...plan import Plan
from ...settings import Settings
from ...trust import tensors
from .. import meter, tables
from ..anonymous import anonymous
from ..bench import reference
from ..bench.peers import Unsupported
from ..bench.shapes import Shape
from .reasons import answer, label, problem_of, words

PYTORCH = "PyTorch"
FEWEST_ROUNDS, MOST_ROUNDS, TIMED_SECONDS = 3, 15, 0.5
SHORT_SECONDS, MOST_CALLS = 5e-3, 50  # shorter calls are timed many together: clocks and launches are coarse
LONG_SECONDS = 2.0  # a call that takes longer is made no more
# Values are about one in size. Rounding comes to a tenth of this; a kernel that is wrong, to many times of it.
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Attend = Callable[[], Tensor]


@dataclass
class Outcome:
    """One way to compute a call, and what came of it; where there is a `note`, what is wrong."""

    name: str
    attend: Attend
    first_seconds: float = math.inf
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    half = (torch.float16, torch.bfloat16)
    return (torch.float32, *half) if device.type == "cpu" else (*half, torch.float32)


def shapes(device: torch.device) -> tuple[tuple[Shape, bool], ...]:
    """(shape, whether masked) of each check: a 512² image, or a quarter of one on a CPU, which takes seconds for it."""
    side = 256 if device.type == "cpu" else 512
    tokens = (side // 8) ** 2
    return (
        (Shape(f"SD 1.5 {side}²", 2, 8, tokens, tokens, 40), False),
        (Shape(f"SD 1.5 {side}²", 2, 8, tokens, tokens, 40), True),
        (Shape(f"VAE {side}²", 1, 1, tokens, tokens, 512), False),
    )


def rows(device: torch.device, telling: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """A row for each call, dtype and engine; `telling` is told what is being checked. Never raises."""
    for dtype in dtypes(device):
        for shape, masked in shapes(device):
            what = f"{label(shape, masked)}, {str(dtype).removeprefix('torch.')}"
            telling(what)
            try:
                outcomes = check(shape, masked, dtype, device)
            except Exception as error:  # the device has no such dtype, or no room for the tensors
                outcomes = [Outcome("all", _nothing, note=words(error))]
            pytorchs = outcomes[0].median
            for outcome in outcomes:
                yield _cells(what, outcome, pytorchs)


def _nothing() -> Tensor:
    raise Unsupported("there are no tensors")


def _cells(what: str, outcome: Outcome, pytorchs: float | None) -> dict[str, str]:
    compared = outcome.median / pytorchs if outcome.median and pytorchs else None
    return {
        "call": what,
        "engine": outcome.name,
        "time": tables.seconds(outcome.median),
        "× PyTorch": tables.ratio(compared),
        "peak memory": tables.memory(outcome.peak_bytes),
        "error": tables.error(outcome.error),
        "note": outcome.note,
    }


def check(shape: Shape, masked: bool, dtype: torch.dtype, device: torch.device) -> list[Outcome]:
    """PyTorch's function and every engine on one problem, in rounds; those that cannot say why."""
    problem = problem_of(shape, device, dtype, masked)
    query, key, value, mask = tensors(problem)
    expected = _expected(query, key, value, mask)
    outcomes = [Outcome(PYTORCH, lambda: pytorch.OWN(query, key, value, attn_mask=mask))]
    for engine in order.usable():
        can, why = answer(engine, problem)
        attend = _only(engine, query, key, value, mask)
        outcomes.append(Outcome(engine.NAME, attend, note="" if can == "can" else why))
    with torch.no_grad():
        for outcome in outcomes:
            if not outcome.note:
                _guarded(outcome, device, functools.partial(_first_calls, outcome, device, expected, dtype))
        _rounds(outcomes, device)
    return outcomes


def _expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = map(reference.exact, (query, key, value))
    if mask is not None:  # keys that nobody may see might as well not be there
        seen = mask.flatten().to("cpu")
        key, value = key[:, :, seen], value[:, :, seen]
    return reference.expected(query, key, value, reference.sampled_rows(query.shape[2]))


def _only(engine: Engine, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Attend:
    """A call of this engine, which raises `Unsupported` where another one would do it."""
    settings = Settings(engine=engine.NAME, retry=False)

    def attend() -> Tensor:
        done: list[Plan] = []
        result = attention(query, key, value, mask=mask, settings=settings, report=done.append)
        if done[-1].engine != engine.NAME:
            raise Unsupported("; ".join(done[-1].reasons))
        return result

    return attend


def _first_calls(outcome: Outcome, device: torch.device, expected: Tensor, dtype: torch.dtype) -> None:
    """One that loads libraries, and one that tells the peak memory and the error."""
    outcome.attend()
    meter.give_back_freed_memory()
    kept: list[Tensor] = []
    seconds, outcome.peak_bytes = meter.measure(lambda: kept.append(outcome.attend()), device)
    rows = reference.sampled_rows(kept[0].shape[2])
    outcome.error = reference.largest_difference(reference.chosen_rows(kept[0], rows), expected)
    if not outcome.error <= ALLOWED[dtype]:  # NaN is not either
        outcome.note = "wrong: more than rounding explains"
    outcome.first_seconds = seconds
    if seconds > LONG_SECONDS:
        outcome.seconds = [seconds]


def _rounds(outcomes: list[Outcome], device: torch.device) -> None:
    """Time them side by side, so that load which lasts slows all of them."""
    start, rounds = time.perf_counter(), 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - start < TIMED_SECONDS):
        for outcome in outcomes:
            if outcome.first_seconds <= LONG_SECONDS:
                _guarded(outcome, device, functools.partial(_time, outcome, device))
        rounds += 1


def _time(outcome: Outcome, device: torch.device) -> None:
    calls = min(MOST_CALLS, max(1, math.ceil(SHORT_SECONDS / max(outcome.first_seconds, 1e-6))))
    meter.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        outcome.attend()
    meter.synchronize(device)
    outcome.seconds.append((time.perf_counter() - start) / calls)


def _guarded(outcome: Outcome, device: torch.device, work: Callable[[], object]) -> None:
    """An engine may fail in any way: that is its outcome, and it is asked no more."""
    try:
        work()
        return
    except Unsupported as error:
        outcome.note = anonymous(str(error))
    except Exception as error:
        outcome.note = "out of memory" if devices.is_out_of_memory(error) else words(error)
    outcome.first_seconds = math.inf
    devices.release_cached(device)  # out of the except block, which holds the call's tensors
