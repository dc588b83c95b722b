"""The settings that are worth a try: every engine that can, with chunks from small to whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...engines import order
from ...settings import Settings
from ..explain.rows import Row
from .trials import AUTOMATIC

QUERY_CHUNKS = (256, 512, 1024, 2048, 4096)
KV_CHUNKS = (256, 512, 1024, 4096)
SMALLEST_WHOLE = 1024  # queries at a time, of an engine that does not split keys


def candidates(rows: Sequence[Row], settings: Settings) -> Iterator[Settings]:
    """Automatic, the present settings, and others; some may come to the same calls. Memory limit and upcast are the
    present ones."""
    settings = replace(settings, retry=False)  # a retry would measure something else
    yield replace(settings, **AUTOMATIC)
    yield settings
    most = max((row.problem.queries for row in rows), default=0)
    queries = [size for size in QUERY_CHUNKS if size < most] + [0]
    keys = [size for size in KV_CHUNKS if size < most] + [0]
    for engine in order.usable():
        if not engine.EXACT or all(engine.why_not(row.problem) for row in rows):
            continue
        if engine.SPLITS_KEYS:
            sizes = [(query, key) for query in queries for key in keys]
        else:
            sizes = [(query, 0) for query in queries if query >= SMALLEST_WHOLE or not query]
        for query, key in sizes:
            # Whoever sets sizes gets the first engine from automatic; without any it may be what was measured.
            automatic = engine is order.engines()[0] and (query or key)
            yield replace(settings, engine="automatic" if automatic else engine.NAME, query_chunk=query, kv_chunk=key)
