"""Sizes of an engine that takes all keys of all heads at once, and so has only query chunks to make smaller."""

from __future__ import annotations

from collections.abc import Callable

from ..problem import Problem
from ..settings import Settings
from .base import Sizes, half, overruled

SMALLEST_QUERY_CHUNK = 256  # fewer rows are not worth a fused kernel


def fitting(
    workspace_bytes: Callable[[Problem, Sizes], float], problem: Problem, settings: Settings, limit: int
) -> tuple[Sizes, list[str]]:
    """`Engine.fitting` of an engine whose workspace this is."""
    wanted = min(settings.query_chunk or problem.queries, problem.queries)
    chosen = Sizes(wanted, problem.keys, problem.heads)
    while workspace_bytes(problem, chosen) > limit and (fewer := smaller(problem, chosen)):
        chosen = fewer
    overruled_by_limit = settings.query_chunk and chosen.queries < wanted
    return chosen, [overruled("query", wanted, chosen.queries, "the memory limit")] if overruled_by_limit else []


def smaller(problem: Problem, sizes: Sizes) -> Sizes | None:
    if sizes.queries <= SMALLEST_QUERY_CHUNK:
        return None
    return sizes._replace(queries=half(sizes.queries, SMALLEST_QUERY_CHUNK))


def taking_over(problem: Problem, sizes: Sizes) -> Sizes:
    return Sizes(sizes.queries, problem.keys, problem.heads)


def rows_at_once(problem: Problem, sizes: Sizes) -> int:
    return sizes.queries


def least_bytes(problem: Problem, settings: Settings) -> int:
    return 0  # it holds no scores


def kept_bytes(problem: Problem, sizes: Sizes) -> None:
    return None  # nor are any kept for the backward pass
