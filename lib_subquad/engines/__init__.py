"""What computes a chunk: one module an engine, each with the same four names.

    NAME                                            its name in Settings and in a Plan
    why_not(problem) -> list[str]                   the reasons, in words, why it cannot do `problem`; empty if it can
    workspace_bytes(problem, sizes) -> int          what a call with chunks of `sizes` allocates beside its output
    attend(problem, sizes, query, key, value, mask, scale)
                                                    -> (output, logsumexp or None) of one query chunk

`attend` takes query [batch, heads, query chunk, width], key and value [batch, heads, keys, width] of any strides, and
a mask whose sizes are full or one. Its output is [batch, heads, query chunk, value width] in value's dtype.
"""

from typing import NamedTuple


class Sizes(NamedTuple):
    """How much of a problem is scored at a time: queries, keys and heads."""

    queries: int
    keys: int
    heads: int
