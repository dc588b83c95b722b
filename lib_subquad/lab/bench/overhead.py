"""`bench --overhead`: what a call of attention() costs beside PyTorch's function, whose kernel it calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attention
from ...layers.ldm import cross_attention
from ...plan import Plan
from ...settings import Settings
from .. import tables
from .work import written_in

ROUNDS, CALLS = 7, 400
SMALL, LARGER = (1, 8, 16, 40), (2, 8, 64, 40)
CHANNELS = SMALL[1] * SMALL[3]
# An image of 64 x 64 pixels in SDXL, as its layers come: of itself and of the prompt, at two resolutions.
SDXL = [((2, 10, 16, 64), 16), ((2, 10, 16, 64), 77), ((2, 20, 4, 64), 4), ((2, 20, 4, 64), 77)]
CALLS_OF_A_STEP = {"SD 1.5": 32, "SDXL": 140}

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]
Case = Callable[[str], Iterator[Pair]]
Forward = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Overhead:
    """Processor time of one call in seconds: of PyTorch's function, and of ours beside it."""

    what: str
    theirs: float
    beside: float

    @property
    def ratio(self) -> float:
        return (self.theirs + self.beside) / self.theirs


def measured(
    device: str = "cpu", rounds: int = ROUNDS, calls: int = CALLS, cases: Mapping[str, Case] | None = None
) -> list[Overhead]:
    """Every case, on one thread and without gradients: the least of the rounds' medians of interleaved pairs."""
    cases = CASES if cases is None else cases
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [_one(what, pairs(device), rounds, calls) for what, pairs in cases.items()]
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


def of_a_layer(layer: Callable[[int], Any], forward: Forward) -> Case:
    """`forward` of the layer with so many channels, beside the same layer with PyTorch's function written in."""

    def pairs(device: str) -> Iterator[Pair]:
        made = layer(CHANNELS).eval().to(device)
        while True:
            x = torch.randn(1, SMALL[2], CHANNELS, device=device)

            def theirs(x: Tensor = x) -> Tensor:
                return written_in(made, x, None, F.scaled_dot_product_attention)

            def ours(x: Tensor = x) -> Tensor:
                return forward(made, x)

            yield theirs, ours

    return pairs


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


def _pairs(
    shapes: Sequence[tuple[tuple[int, ...], int]] = ((SMALL, SMALL[2]),),
    masked: bool = False,
    **settings: Callable[[], Any],
) -> Case:
    """Theirs and ours on tensors that are new at every call; each of ours is given what `settings` give."""

    def pairs(device: str) -> Iterator[Pair]:
        for shape, keys in cycle(shapes):
            query = torch.randn(shape, device=device)
            key, value = (torch.randn(*shape[:2], keys, shape[3], device=device) for _ in range(2))
            mask = torch.rand(shape[2], keys, device=device) > 0.3 if masked else None
            made = {name: make() for name, make in settings.items()}

            def theirs(q: Tensor = query, k: Tensor = key, v: Tensor = value, m: Tensor | None = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

            def ours(
                q: Tensor = query,
                k: Tensor = key,
                v: Tensor = value,
                m: Tensor | None = mask,
                more: dict[str, Any] = made,
            ) -> Tensor:
                return attention(q, k, v, mask=m, **more)

            yield theirs, ours

    return pairs


class _CrossAttention(nn.Module):
    """What ldm's layer of that name comes to without dropout."""

    heads, scale = SMALL[1], SMALL[3] ** -0.5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)


def _reporting(layer: Any, x: Tensor) -> Tensor:
    told: list[Plan] = []
    return cross_attention(layer, x, settings=Settings(), report=told.append)


CASES = {
    f"{list(SMALL)}": _pairs(),
    "… with equal settings, not identical": _pairs(settings=Settings),
    "… with a report": _pairs(report=lambda: [].append),
    "… with a bool mask": _pairs(masked=True),
    "SDXL's layers in turn, 64 x 64 pixels": _pairs(SDXL),
    f"{list(LARGER)}": _pairs(((LARGER, LARGER[2]),)),
    f"a CrossAttention layer, [1, {SMALL[2]}, {CHANNELS}]": of_a_layer(_CrossAttention, _reporting),
}
