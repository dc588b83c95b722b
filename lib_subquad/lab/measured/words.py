"""What was measured, in words."""

from __future__ import annotations

from collections.abc import Mapping

from ...engines.table import Class, Found, class_of
from ...problem import Problem


def calls_in_words(calls: Class) -> str:
    """Such as "about 16 heads and 4096 x 4096 tokens, 40 wide, float16"."""
    return f"about {_heads(1 << calls.heads)} and {1 << calls.queries} x {1 << calls.keys} tokens, {_rest(calls)}"


def problem_in_words(problem: Problem) -> str:
    """The same of calls that are known exactly: "2 x 8 heads and 4096 x 77 tokens, 40 wide, float16"."""
    batch = f"{problem.batch} x " if problem.batch > 1 else ""
    sizes = f"{batch}{_heads(problem.heads)} and {problem.queries} x {problem.keys} tokens"
    return f"{sizes}, {_rest(class_of(problem))}"


def _heads(count: int) -> str:
    return f"{count} {'head' if count == 1 else 'heads'}"


def _rest(calls: Class) -> str:
    values = "" if calls.value_width == calls.width else f" with values {calls.value_width} wide"
    dtypes = calls.dtype if calls.value_dtype == calls.dtype else f"{calls.dtype} with values in {calls.value_dtype}"
    mask = "" if calls.mask == "none" else f", with a mask in {calls.mask}"
    return f"{calls.width} wide{values}, {dtypes}{mask}"


def found_in_words(found: Found) -> str:
    """Such as "portable in tiles of 512 x 1024, 1.30 times as fast as the rules' choice"."""
    if found.margin <= 1:
        again = " while other programs ran: it is measured again" if found.disturbed else ""
        return f"nothing was clearly faster than the rules' choice{again}"
    return f"{found.engine}{_tiles(found)}, {found.margin:.2f} times as fast as the rules' choice"


def to_be_measured_again(found: Mapping[Class, Found]) -> str:
    """A sentence about those that other programs disturbed; empty where there are none."""
    count = sum(it.disturbed for it in found.values())
    if not count:
        return ""
    kinds = "1 kind of call was" if count == 1 else f"{count} kinds of call were"
    return (
        f"{kinds} disturbed by other programs: before an image {'it is' if count == 1 else 'they are'} measured again."
    )


def _tiles(found: Found) -> str:
    if found.query_chunk and found.kv_chunk:
        return f" in tiles of {found.query_chunk} x {found.kv_chunk}"
    if found.has_tile:
        return f" in chunks of {found.query_chunk or found.kv_chunk} {'queries' if found.query_chunk else 'keys'}"
    return ""
