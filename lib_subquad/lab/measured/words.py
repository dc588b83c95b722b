"""What was measured, in words."""

from __future__ import annotations

from ...engines.table import Class, Found


def calls_in_words(calls: Class) -> str:
    """Such as "about 16 heads and 4096 x 4096 tokens, 40 wide, float16"."""
    values = "" if calls.value_width == calls.width else f" with values {calls.value_width} wide"
    dtypes = calls.dtype if calls.value_dtype == calls.dtype else f"{calls.dtype} with values in {calls.value_dtype}"
    mask = "" if calls.mask == "none" else f", with a mask in {calls.mask}"
    heads = "1 head" if calls.heads == 0 else f"{1 << calls.heads} heads"
    tokens = f"{1 << calls.queries} x {1 << calls.keys} tokens"
    return f"about {heads} and {tokens}, {calls.width} wide{values}, {dtypes}{mask}"


def found_in_words(found: Found) -> str:
    """Such as "portable in tiles of 512 x 1024, 1.30 times as fast as the rules' choice"."""
    if found.margin <= 1:
        return "measured, the rules' choice is the fastest"
    return f"{found.engine}{_tiles(found)}, {found.margin:.2f} times as fast as the rules' choice"


def _tiles(found: Found) -> str:
    if found.query_chunk and found.kv_chunk:
        return f" in tiles of {found.query_chunk} x {found.kv_chunk}"
    if found.has_tile:
        return f" in chunks of {found.query_chunk or found.kv_chunk} {'queries' if found.query_chunk else 'keys'}"
    return ""
