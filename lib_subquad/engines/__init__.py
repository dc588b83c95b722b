"""What computes a chunk: one module an engine, each with the same four names.

    NAME                                            its name in Settings and in a Plan
    why_not(problem) -> list[str]                   the reasons, in words, why it cannot do `problem`; empty if it can
    workspace_bytes(problem, sizes) -> int          what a call with chunks of `sizes` allocates beside its output
    attend(problem, sizes, query, key, value, mask, scale)
                                                    -> (output, statistics or None) of one query chunk

`attend` takes query [batch, heads, query chunk, width], key and value [batch, heads, keys, width] of any strides, and
a mask whose sizes are full or one. Its output is [batch, heads, query chunk, value width] in value's dtype. Where
gradients will be recomputed, its statistics are [batch, heads, query chunk, 2] in the dtype of the computation: each
row's largest score and its sum of exp(score - largest).
"""

from collections.abc import Callable
from typing import NamedTuple

from ..problem import Problem, item_bytes


class Sizes(NamedTuple):
    """How much of a problem is scored at a time: queries, keys and heads."""

    queries: int
    keys: int
    heads: int


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
