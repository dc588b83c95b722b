"""What an engine is, and what engines share.

An engine is a module, or any object, with the names of `Engine`, where it is not DIFFERENTIABLE with that of
`RecomputingEngine`, where a package brings its kernels with that of `PackagedEngine`, and where it is not always to be
taken unasked with that of `ReservedEngine`. To add one, write it and put it into `order`, or `order.register` it while
a program runs.
tests/test_engines.py has a whole one, small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from .. import device as devices
from .. import memory
from ..problem import Problem, item_bytes
from ..settings import Settings, shown


class Sizes(NamedTuple):
    """How much of a problem is scored at a time: queries, keys and heads, of one entry of the batch or of several. No
    queries where the problem has none; its gradients are asked for all the same."""

    queries: int
    keys: int
    heads: int


class Kept(NamedTuple):
    """What is kept of a call for its gradients: its tensors in four dimensions, and each row's statistics."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    output: Tensor
    statistics: Tensor


class Engine(Protocol):
    """One way to attend. Every size is in tokens or heads, every amount of memory in bytes."""

    NAME: str  # in Settings and in a Plan
    EXACT: bool  # the same result within rounding: only such engines are taken unasked
    SPLITS_KEYS: bool  # it can score some of the keys, and some of the heads, at a time
    DIFFERENTIABLE: bool  # PyTorch itself gives the gradients of `attend`, and what it keeps is small
    WHY: str  # why it is taken where it can be, in words for the user

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason, in words, why it cannot do `problem`; empty if it can."""

    def fitting(self, problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
        """The sizes that it prefers, the user's among them, made smaller until a call takes at most `limit`, as far as
        it can; and which of the user's had to give way, in words."""

    def smaller(self, problem: Problem, sizes: Sizes) -> Sizes | None:
        """What to try where memory ran out with `sizes`; None where it has nothing smaller that is worth it."""

    def taking_over(self, problem: Problem, sizes: Sizes) -> Sizes:
        """What to begin with where another engine, whose `sizes` these are, could not go on."""

    def rows_at_once(self, problem: Problem, sizes: Sizes) -> int:
        """How many queries `attend` is given: those of `sizes`, or more where it divides them itself."""

    def least_bytes(self, problem: Problem, settings: Settings) -> int:
        """What the smallest call takes that is still efficient: no limit goes below it until memory really runs out.
        Only the engine that comes last is asked; one that holds no scores says 0."""

    def workspace_bytes(self, problem: Problem, sizes: Sizes) -> int:
        """The most that a call allocates beside its output; where gradients will be recomputed, the statistics of all
        queries are part of it."""

    def kept_bytes(self, problem: Problem, sizes: Sizes) -> int | None:
        """The same where scores are kept for the backward pass, that pass included; None if it never keeps any. One
        that does and is not DIFFERENTIABLE is asked to `attend` with gradients recorded (`torch.is_grad_enabled()`)
        then, in operators that PyTorch differentiates, and gives no statistics; at other times nothing is recorded."""

    def attend(
        self,
        problem: Problem,
        sizes: Sizes,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """One query chunk, or several at once.

        Args:
            query: [batch, heads, query chunk, width], `key` [batch, heads, keys, width], `value` [batch, heads, keys,
                value width], any strides; dtypes are those of `problem`.
            mask: [batch, heads, query chunk, keys], any of these one where it is the same for all; bool (True = may
                attend) or of any floating-point dtype, added to the scores. An engine that gives no masked results, or
                none for this one, says so in `why_not`: what it is given it must apply.
            scale: of the scores, which are scale * query . key^T.

        Returns:
            [batch, heads, query chunk, value width] in value's dtype, where a row that may attend to nothing (all of it
            False, or -inf) is zeros; and where gradients will be recomputed (`problem.grad`, and the engine is not
            DIFFERENTIABLE) each row's largest score and its sum of exp(score - largest), [batch, heads, query chunk, 2]
            in the dtype of the computation, else None.
        """

    def why_not_traced(self, device: torch.device, mask: Tensor | None) -> list[str]:
        """Every reason why `attend_traced` would not do on this device; asks PyTorch nothing. One that cannot be traced
        at all says so here, and another takes the call."""

    def attend_traced(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """All of a call whose tensors have one dtype, [..., tokens, width], in operators that torch.compile,
        torch.export and torch.func see through: no chunks, no limit. The mask broadcasts, and counts as in `attend`."""


class RecomputingEngine(Engine, Protocol):
    """One that is not DIFFERENTIABLE, and so has a function more."""

    def gradients(
        self, kept: Kept, grad_output: Tensor, scale: float, sizes: Sizes, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of query, key, value and mask, each in its tensor's dtype, None where it is not `wanted`; from the
        statistics, where PyTorch does not give them."""


class PackagedEngine(Engine, Protocol):
    """One whose kernels another package brings. While that is not there, only those who name the engine hear of it."""

    def installed(self) -> bool:
        """Whether the package is there; imports nothing."""

    def version(self) -> str:
        """Which version of it is there, where it has one; imports nothing. What was measured with another holds no
        more."""


class ReservedEngine(Engine, Protocol):
    """One that is not taken unasked for every problem that it can do: those who name it, or a measurement, still do.
    Of others it is then not spoken."""

    def unasked(self, problem: Problem) -> bool:
        """Whether the fixed order has it for this problem's device."""


class UselessResult(RuntimeError):
    """Raised by `attend` where a result is of no use, such as NaN, though nothing that was given is to blame: the next
    exact engine does this call, and nothing is held against the engine for the calls that follow."""


def is_installed(engine: Engine) -> bool:
    """Whether what the engine needs is there."""
    return bool(getattr(engine, "installed", _always)())


def version(engine: Engine) -> str:
    """Which version of its package is there; "" where there is none that has one, or it does not tell."""
    try:
        return str(getattr(engine, "version", str)())
    except Exception:  # it came without its metadata, or whoever finds modules here cannot find that
        return ""


def is_unasked(engine: Engine, problem: Problem) -> bool:
    """Whether the fixed order has the engine for such a problem."""
    return bool(getattr(engine, "unasked", _always)(problem))


def _always(*problem: Problem) -> bool:
    return True


def recomputes(engine: Engine) -> TypeGuard[RecomputingEngine]:
    """Whether gradients come from the engine, and not from PyTorch."""
    return not engine.DIFFERENTIABLE


def check_engine(engine: Any) -> None:
    """Say what `engine` lacks to be one.

    Raises:
        ValueError: it lacks a name of `Engine`, or has something else there; the message tells all of them.
    """
    kinds = {"NAME": str, "EXACT": bool, "SPLITS_KEYS": bool, "DIFFERENTIABLE": bool, "WHY": str}
    lacks = [
        f"{name} ({kind.__name__})" for name, kind in kinds.items() if type(getattr(engine, name, None)) is not kind
    ]
    of_all, of_some = (_functions(kind) for kind in (Engine, RecomputingEngine))
    needed = of_all if getattr(engine, "DIFFERENTIABLE", False) is True else of_all + of_some
    lacks += [f"{name}()" for name in needed if not callable(getattr(engine, name, None))]
    lacks += [
        f"{name}()" for name in ("installed", "version", "unasked") if not callable(getattr(engine, name, _always))
    ]
    if lacks:
        called = shown(getattr(engine, "NAME", engine))
        raise ValueError(f"the engine {called} lacks {', '.join(lacks)}; engines/base.py says what each is")


def _functions(protocol: type) -> list[str]:
    return [name for name, it in vars(protocol).items() if callable(it) and not name.startswith("_")]


class ContractError(TypeError):
    """An engine gave what `Engine.attend` does not return; the message says what, and what was expected."""


def attended(
    engine: Engine,
    problem: Problem,
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """`engine.attend`, and a look at what it gives.

    Raises:
        ContractError: it is not what `Engine.attend` returns.
    """
    found = engine.attend(problem, sizes, query, key, value, mask, scale)
    wrong = _wrong(engine, problem, found, query.shape[:3], value.shape[3])
    if wrong:
        memory.forget()  # so that the next call is not taken for one that is known
        raise ContractError(f"the engine {engine.NAME} gave {wrong}")
    return found


def _wrong(engine: Engine, problem: Problem, found: Any, rows: tuple[int, ...], value_width: int) -> str:
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
        return f"a {type(found).__name__}; expected (result, statistics or None)"
    expected = [("result", found[0], (*rows, value_width), problem.value_dtype)]
    if problem.grad and not engine.DIFFERENTIABLE and not torch.is_grad_enabled():  # and they will be recomputed
        expected.append(("statistics", found[1], (*rows, 2), devices.compute_dtype(problem.dtype)))
    for name, it, shape, dtype in expected:
        if not isinstance(it, Tensor) or it.shape != shape or it.dtype != dtype:
            given = f"{list(it.shape)} in {it.dtype}" if isinstance(it, Tensor) else f"a {type(it).__name__}"
            return f"{given} as its {name}; expected {list(shape)} in {dtype}"
    return ""


def call_bytes(problem: Problem, chunk: int, attend_bytes: Callable[[int], int]) -> int:
    """The most that a call in chunks of `chunk` queries holds at a time beside its output.

    `attend_bytes(queries)` is the most that attending one chunk holds, its result included. A chunk that is all the
    queries is the output itself; otherwise the output is made when the first result is there, and a result stays until
    the next one takes its place.
    """
    first = attend_bytes(min(chunk, problem.queries)) - problem.output_bytes
    if chunk >= problem.queries:
        return first
    result = problem.batch * problem.heads * chunk * problem.value_width * item_bytes(problem.value_dtype)
    return max(first, result + attend_bytes(min(chunk, problem.queries - chunk)))


def half(size: int, smallest: int) -> int:
    return max(size // 2, smallest)


def overruled(which: str, wanted: int, used: int, by: str) -> str:
    """The sentence for a size that the user set and that is not used."""
    return f"the {which} chunk size of {wanted} is {used} here: {by}"
