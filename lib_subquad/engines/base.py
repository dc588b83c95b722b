"""What an engine is, and what engines share.

An engine is a module, or any object, with the names of `Engine`. To add one, write it and put it into `order`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Problem, item_bytes
from ..settings import Settings


class Sizes(NamedTuple):
    """How much of a problem is scored at a time: queries, keys and heads."""

    queries: int
    keys: int
    heads: int


class Engine(Protocol):
    """One way to attend. Every size is in tokens or heads, every amount of memory in bytes."""

    NAME: str  # in Settings and in a Plan
    EXACT: bool  # the same result within rounding: only such engines are taken unasked
    SPLITS_KEYS: bool  # it can score some of the keys, and some of the heads, at a time
    DIFFERENTIABLE: bool  # PyTorch itself gives the gradients of `attend`, and what it keeps is small
    WHY: str  # why it is taken where it can be, in words for the user

    @staticmethod
    def why_not(problem: Problem) -> list[str]:
        """Every reason, in words, why it cannot do `problem`; empty if it can."""

    @staticmethod
    def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
        """The sizes that it prefers, the user's among them, made smaller until a call takes at most `limit`, as far as
        it can; and which of the user's had to give way, in words."""

    @staticmethod
    def smaller(problem: Problem, sizes: Sizes) -> Sizes | None:
        """What to try where memory ran out with `sizes`; None where it has nothing smaller that is worth it."""

    @staticmethod
    def taking_over(problem: Problem, sizes: Sizes) -> Sizes:
        """What to begin with where another engine, whose `sizes` these are, could not go on."""

    @staticmethod
    def rows_at_once(problem: Problem, sizes: Sizes) -> int:
        """How many queries `attend` is given: those of `sizes`, or more where it divides them itself."""

    @staticmethod
    def least_bytes(problem: Problem, settings: Settings) -> int:
        """What the smallest call takes that is still efficient: no limit goes below it until memory really runs out."""

    @staticmethod
    def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
        """The most that a call allocates beside its output."""

    @staticmethod
    def kept_bytes(problem: Problem, sizes: Sizes) -> int | None:
        """The same where scores are kept for the backward pass, that pass included; None if it never keeps any."""

    @staticmethod
    def attend(
        problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """One query chunk, or several at once.

        Args:
            query: [batch, heads, query chunk, width], `key` and `value` [batch, heads, keys, width], any strides.
            mask: its sizes full or one.

        Returns:
            [batch, heads, query chunk, value width] in value's dtype; and where gradients will be recomputed each row's
            largest score and its sum of exp(score - largest), [batch, heads, query chunk, 2] in the dtype of the
            computation.
        """

    @staticmethod
    def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
        """Every reason why `attend_traced` would not do on this device; asks PyTorch nothing."""

    @staticmethod
    def attend_traced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """All of a call whose tensors have one dtype, in operators that torch.compile, torch.export and torch.func see
        through: no chunks, no limit."""

    @staticmethod
    def gradients(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        output: Tensor,
        statistics: Tensor,
        grad_output: Tensor,
        scale: float,
        sizes: Sizes,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of query, key, value and mask from the statistics, where PyTorch does not give them. An engine that
        is DIFFERENTIABLE has no such function."""


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
