"""Trust before use: what an engine gives is compared with the truth before it is taken for a kind of call.

Kernels are reported and absent (ComfyUI #15647), wrong by driver, size, batch and stride. A small call of an engine is
compared before the engine is first taken for a device, dtype, width and kind of mask; then a few rows of the first real
call of each problem. The engine that comes last is taken as it is: there is none behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import console, refusals, truth
from . import device as devices
from .engines import order
from .engines.base import ContractError, Engine, attended, recomputes
from .problem import Problem
from .settings import Settings

# A small call: more than one of everything, and no number that tiles are made of.
BATCH, HEADS, QUERIES, KEYS = 2, 2, 72, 88
ROOM = 1 << 40  # bytes: what a small call takes is no question of the memory limit
LARGE = 256.0  # whose square is past the largest float16
MOST_GOOD = 4096  # calls that are known to be right
LONGEST_PAUSE = 256  # plans between two tries of a look that cannot be had
SAMPLED_ROWS = 4  # of each of three heads, the first and the last among them


class Kind(NamedTuple):
    """The problems of which one small call tells enough."""

    engine: str
    problem: Problem  # a small one
    state: tuple[object, ...]  # PyTorch's switches, and how often engines have changed


class Sample(NamedTuple):
    """A real call of which a few rows were looked at: kernels go wrong by size and by stride."""

    engine: str
    problem: Problem
    rows: int
    strides: tuple[tuple[int, ...], ...]
    state: tuple[object, ...]


class _Pauses:
    """Looks that could not be had, such as for want of memory on the host: each is tried again at the next plan, then
    at the second after that, the fourth, and so on; never given up, and never what every plan waits for."""

    def __init__(self) -> None:
        self._waiting: dict[Kind | Sample, tuple[int, int]] = {}  # plans yet to pass, and how many those were at first

    def is_due(self, look: Kind | Sample) -> bool:
        """Whether it is to be tried by the plan that asks."""
        left, pause = self._waiting.get(look, (0, 0))
        if left:
            self._waiting[look] = left - 1, pause
        return not left

    def tried(self, look: Kind | Sample, in_vain: bool) -> None:
        _, pause = self._waiting.pop(look, (0, 0))
        if in_vain:
            if len(self._waiting) >= MOST_GOOD:
                self._waiting.clear()
            self._waiting[look] = pause, min(2 * pause + 1, LONGEST_PAUSE)

    def clear(self) -> None:
        self._waiting.clear()


class _CannotLook(Exception):
    """The rows of a result cannot be had: no memory for their copies, or a device that gives no rows."""


_verdicts: dict[Kind, tuple[str, ...]] = {}
_good: set[Sample] = set()
_pauses = _Pauses()


def why_not(engine: Engine, problem: Problem) -> list[str]:
    """Why this engine, which says that it can do `problem`, is not to be trusted with it; empty where it can be.

    Asked for the first time it computes a small call of that kind. Neither running out of memory nor a device that
    cannot be used from here is an answer to remember: it is tried again, the longer in vain the less often.
    """
    if _is_taken_as_it_is(engine):
        return []
    kind = Kind(engine.NAME, _small(problem), _state())
    verdict = _verdicts.get(kind)
    if verdict is None and not engine.why_not(kind.problem) and _can_be_tried() and _pauses.is_due(kind):
        verdict = _tried(engine, kind.problem)
        _pauses.tried(kind, in_vain=verdict is None)
        if verdict is not None:
            _verdicts[kind] = verdict
            if verdict:
                _warn_once(f"[subquad] {verdict[0]}. It is not used for such calls, {_in_words(problem)}")
    return list(verdict or ())


def check(
    engine: Engine,
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
) -> None:
    """Look at a few rows of what an engine gave for these, all in four dimensions, unless it was done before.

    Where the rows cannot be had nothing is said of the call, and a later one that is planned is looked at.

    Raises:
        refusals.WrongResult: they are not what they should be.
    """
    if _is_taken_as_it_is(engine):
        return
    strides = tuple(tensor.stride() for tensor in (query, key, value, mask) if tensor is not None)
    sample = Sample(engine.NAME, problem, query.shape[2], strides, _state())
    if sample in _good or not output.numel() or not _can_be_tried() or not _pauses.is_due(sample):
        return
    try:
        with _unseen(problem.device):
            wrong = _wrong(query, key, value, mask, scale, output)
    except _CannotLook:
        return _pauses.tried(sample, in_vain=True)
    _pauses.tried(sample, in_vain=False)
    if wrong:
        raise refusals.WrongResult(f"the {engine.NAME} kernel gave wrong results for these sizes: {_by(wrong)}")
    if len(_good) >= MOST_GOOD:
        _good.clear()
    _good.add(sample)


def _is_taken_as_it_is(engine: Engine) -> bool:
    return not engine.EXACT or engine is order.engines()[-1]


def is_distrusted(engine: Engine, device: torch.device) -> bool:
    """Whether it has been found wrong on this device, in whatever kind of call."""
    return any(
        verdict and kind.engine == engine.NAME and kind.problem.device == device
        for kind, verdict in list(_verdicts.items())  # another thread may add to it
    )


def forget() -> None:
    """Compare again, whatever was found."""
    _verdicts.clear()
    _good.clear()
    _pauses.clear()
    _warn_once.cache_clear()


_warn_once = cache(console.warn)


def _state() -> tuple[object, ...]:
    return devices.switches(), order.engine_changes()


def _small(problem: Problem) -> Problem:
    mask = None
    if problem.mask is not None:
        batch, heads, rows, keys = (size > 1 for size in problem.mask)
        mask = BATCH if batch else 1, HEADS if heads else 1, QUERIES if rows else 1, KEYS if keys else 1
    return replace(problem, batch=BATCH, heads=HEADS, queries=QUERIES, keys=KEYS, mask=mask)


def _can_be_tried() -> bool:
    """Not while a CUDA graph is captured, which any look at a number ends, nor where tensors have no numbers."""
    with devices.without_modes():
        return not devices.is_captured() and type(torch.zeros(0, device="cpu")) is Tensor


def _tried(engine: Engine, problem: Problem) -> tuple[str, ...] | None:
    """What a small call says against it; None where it says nothing."""
    with _unseen(problem.device), torch.inference_mode(False):  # which would leave gradients out
        try:
            query, key, value, mask = tensors(problem)
        except Exception:  # the device, or a dtype of it, cannot be had: not the engine's fault
            return None
        try:
            with torch.set_grad_enabled(problem.grad):
                wrong = _wrong_small(engine, problem, query, key, value, mask)
            if not wrong and problem.dtype == torch.float16:
                wrong = _overflows(engine, problem, query, key, value)
        except (ContractError, _CannotLook):  # whoever writes an engine wants to see the first
            return None
        except Exception as error:
            if devices.is_out_of_memory(error) or refusals.is_fatal(error):
                return None
            return (f"a small call of the {engine.NAME} kernel failed: {console.first_line(error)}",)
    return (f"a small call of the {engine.NAME} kernel gave wrong results: {_by(wrong)}",) if wrong else ()


def _in_words(problem: Problem) -> str:
    dtype = str(problem.upcast_dtype).removeprefix("torch.")
    masked, grad = ", with a mask" * (problem.mask is not None), ", with gradients" * problem.grad
    return f"{dtype} with heads {problem.width} wide{masked}{grad}"


def _by(wrong: float) -> str:
    return "NaN" if wrong != wrong else f"off by {wrong:.2g}"


def tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value and mask of a problem, with tokens before heads in memory, as layers have them. No state of
    PyTorch's random numbers is touched."""
    generator = torch.Generator("cpu").manual_seed(0)
    here: dict[str, Any] = {
        "generator": generator,
        "dtype": torch.float32,
        "device": "cpu",
    }  # whatever the defaults are

    def made(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
        numbers = torch.randn(problem.batch, tokens, problem.heads, width, **here)
        return numbers.to(problem.device, dtype).transpose(1, 2).requires_grad_(problem.grad)

    query = made(problem.queries, problem.width, problem.dtype)
    key = made(problem.keys, problem.width, problem.dtype)
    value = made(problem.keys, problem.value_width, problem.value_dtype)
    if problem.mask is None:
        return query, key, value, None
    seen = torch.rand(problem.mask, **here) < 0.7
    if problem.mask[2] > 1:
        seen[:, :, 1] = False  # a row that may attend to nothing
    elif problem.mask[3] == 1:
        seen[:] = True
    mask = seen
    if problem.mask_dtype != torch.bool:
        mask = torch.zeros(problem.mask, dtype=problem.mask_dtype, device="cpu").masked_fill(~seen, -torch.inf)
    return query, key, value, mask.to(problem.device)


def _wrong_small(
    engine: Engine, problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> float:
    scale = problem.width**-0.5
    sizes = engine.fitting(problem, Settings(), ROOM)[0]
    output, _ = attended(engine, problem, sizes, query, key, value, mask, scale)
    wrong = _wrong(query, key, value, mask, scale, output)
    if wrong or not problem.grad or recomputes(engine):
        return wrong
    grad_output = output.detach()  # as good as any, and neither even nor random
    found = torch.autograd.grad(output, (query, key, value), grad_output)
    differences = (
        truth.wrong_gradient(mine, expected, truth.unit(value))
        for mine, expected in zip(found, truth.gradients(query, key, value, mask, scale, grad_output))
    )
    return next((difference for difference in differences if difference), 0.0)


def _overflows(engine: Engine, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> float:
    """NaN where scores past the largest float16 come out as none, as those of SD 2.1 768 do: black images."""
    problem, scale = replace(problem, mask=None, mask_dtype=None, grad=False), 1.0
    query, key = (torch.full_like(tensor, LARGE, requires_grad=False) for tensor in (query, key))
    if engine.why_not(problem):
        return 0.0
    with torch.no_grad():
        sizes = engine.fitting(problem, Settings(), ROOM)[0]
        output, _ = attended(engine, problem, sizes, query, key, value, None, scale)
        return _wrong(query, key, value, None, scale, output)


def _wrong(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor) -> float:
    """By how much some rows of the first, a middle and the last head are wrong; NaN where they have no numbers.

    Raises:
        _CannotLook: there is no memory for a look, or the device has no operator for one.
    """
    try:
        return _wrong_rows(query, key, value, mask, scale, output)
    except Exception as error:
        if not (devices.is_out_of_memory(error) or isinstance(error, NotImplementedError)):
            raise
    raise _CannotLook


def _wrong_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor) -> float:
    batch, heads, queries, _ = query.shape
    rows = sorted({number * (queries - 1) // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)})
    for head in sorted({0, batch * heads // 2, batch * heads - 1}):
        at = divmod(head, heads)
        its_mask = None if mask is None else mask.expand(batch, heads, -1, -1)[at]
        if its_mask is not None and its_mask.shape[0] > 1:
            its_mask = its_mask[rows]
        with torch.no_grad():
            wrong = truth.attend(query[at][rows], key[at], value[at], its_mask, scale).wrong_by(output[at][rows])
        if wrong:
            return wrong
    return 0.0


@contextlib.contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    """Nobody who counts, traces or keeps what PyTorch does sees what is done here."""

    def itself(tensor: Tensor) -> Tensor:
        return tensor

    with devices.without_modes(), devices.without_autocast(device):
        if not _hooks_are_allowed():  # nobody has any, then
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(itself, itself):
            yield


# Private.
_hooks_are_allowed = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
