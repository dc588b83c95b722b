"""`bench --overhead`: what a call of attention() costs beside PyTorch's function, whose kernel it calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention
from ..settings import Settings
from . import tables

ROUNDS, CALLS = 7, 400
SMALL, LARGER = (1, 8, 16, 40), (2, 8, 64, 40)
# An image of 64 x 64 pixels in SDXL, as its layers come: of itself and of the prompt, at two resolutions.
SDXL = [((2, 10, 16, 64), 16), ((2, 10, 16, 64), 77), ((2, 20, 4, 64), 4), ((2, 20, 4, 64), 77)]
CALLS_OF_A_STEP = {"SD 1.5": 32, "SDXL": 140}

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Overhead:
    """Processor time of one call in seconds: of PyTorch's function, and of ours beside it."""

    what: str
    theirs: float
    beside: float

    @property
    def ratio(self) -> float:
        return (self.theirs + self.beside) / self.theirs


def measured(device: str = "cpu", rounds: int = ROUNDS, calls: int = CALLS) -> list[Overhead]:
    """Every case, on one thread and without gradients: the least of the rounds' medians of interleaved pairs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [_one(what, pairs(device), rounds, calls) for what, pairs in CASES.items()]
    finally:
        torch.set_num_threads(threads)


def report(found: Sequence[Overhead]) -> str:
    rows = [[it.what, _microseconds(it.theirs), _microseconds(it.beside), tables.ratio(it.ratio)] for it in found]
    table = tables.table(["call", "PyTorch", "beside it", "ratio"], rows, left={"call"})
    steps = ", ".join(
        f"{name} ({count} calls) {count * found[0].beside * 1e3:.1f} ms" for name, count in CALLS_OF_A_STEP.items()
    )
    legend = (
        f"processor time of one call, one thread, no gradients; the least of {ROUNDS} medians of {CALLS} interleaved "
        f"pairs. A step comes to: {steps}."
    )
    return f"{table}\n\n{legend}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def _one(what: str, pairs: Iterator[Pair], rounds: int, calls: int) -> Overhead:
    best = (float("inf"), 0.0)
    for _ in range(rounds):
        times = [tuple(map(_seconds, next(pairs))) for _ in range(calls)]
        beside = statistics.median(ours - theirs for theirs, ours in times)
        best = min(best, (beside, statistics.median(theirs for theirs, _ in times)))
    return Overhead(what, theirs=best[1], beside=best[0])


def _seconds(call: Callable[[], Tensor]) -> float:
    started = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started) / 1e9


# ------------------------------------------------------------------------------------------------------------ the cases


def _pairs(shapes=((SMALL, SMALL[2]),), masked: bool = False, **ours) -> Callable[[str], Iterator[Pair]]:
    """Theirs and ours on tensors that are new at every call; what of `ours` is a function is called for each."""

    def pairs(device: str) -> Iterator[Pair]:
        for shape, keys in cycle(shapes):
            query = torch.randn(shape, device=device)
            key, value = (torch.randn(*shape[:2], keys, shape[3], device=device) for _ in range(2))
            mask = torch.rand(shape[2], keys, device=device) > 0.3 if masked else None
            more = {name: value() for name, value in ours.items()}
            yield (
                lambda q=query, k=key, v=value, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
                lambda q=query, k=key, v=value, m=mask, more=more: attention(q, k, v, mask=m, **more),
            )

    return pairs


CASES = {
    f"{list(SMALL)}": _pairs(),
    "… with equal settings, not identical": _pairs(settings=Settings),
    "… with a report": _pairs(report=lambda: [].append),
    "… with a bool mask": _pairs(masked=True),
    "SDXL's layers in turn, 64 x 64 pixels": _pairs(SDXL),
    f"{list(LARGER)}": _pairs(((LARGER, LARGER[2]),)),
}
