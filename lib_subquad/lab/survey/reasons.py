"""What every engine says of the calls that real models make: why it can, and each reason why it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ... import console
from ...engines import order
from ...engines.base import Engine
from ...plan import plan_problem, why_not
from ...problem import Problem
from ...settings import Settings
from .. import tables
from ..anonymous import anonymous
from ..bench.shapes import Shape, parse_shape

PROMPT = 77
SHAPES = (
    parse_shape("sd15-512"),
    parse_shape(f"sd15-512-cross{PROMPT}"),
    parse_shape("sdxl-1024"),
    parse_shape("vae-1024"),
    Shape("SD 3 1024², joint", 2, 24, 4096 + 2 * PROMPT, 4096 + 2 * PROMPT, 64),
    Shape("Flux 1024², joint", 1, 24, 4096 + 512, 4096 + 512, 128),
)
MASKED = (parse_shape("sd15-512"), parse_shape(f"sd15-512-cross{PROMPT}"))


def rows(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, str]]:
    """A row for each problem and engine whose package is there, in the order in which they are asked. Never raises."""
    for shape, masked in [*((shape, False) for shape in SHAPES), *((shape, True) for shape in MASKED)]:
        problem = problem_of(shape, device, dtype, masked)
        taken = ""
        with contextlib.suppress(Exception):  # each engine is asked below, and what it raises told
            taken = plan_problem(problem, Settings()).engine
        for engine in order.usable():
            can, why = answer(engine, problem)
            yield {
                "call": label(shape, masked),
                "engine": engine.NAME,
                "": "taken" if taken == engine.NAME else can,
                "why": why,
            }


def label(shape: Shape, masked: bool) -> str:
    return shape.label + ", with a mask" * masked


def problem_of(shape: Shape, device: torch.device, dtype: torch.dtype, masked: bool = False) -> Problem:
    """A mask is a bool for each key, as for the padding of a prompt."""
    query, keys = ((shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys))
    if not masked:
        return Problem.from_shapes(query, keys, keys, dtype, device)
    return Problem.from_shapes(
        query, keys, keys, dtype, device, mask_shape=(1, 1, 1, shape.keys), mask_dtype=torch.bool
    )


def answer(engine: Engine, problem: Problem) -> tuple[str, str]:
    """(whether this engine can: "can", "no" or "raised"; why, in words). Never raises."""
    try:
        if reasons := why_not(engine, problem, Settings()):
            return "no", anonymous("; ".join(reasons))
        made = plan_problem(problem, Settings(engine=engine.NAME))
        if made.engine != engine.NAME:
            return "no", anonymous("; ".join(made.reasons))
        exact = "" if engine.EXACT else ", inexact"
        return (
            "can",
            f"{engine.WHY}{exact}; {made.query_chunk} x {made.kv_chunk} tokens, {_bytes(made.workspace_bytes)}",
        )
    except Exception as error:
        return "raised", words(error)


def words(error: Exception) -> str:
    """An error in one line that names nobody."""
    return anonymous(console.in_a_line(error))


def _bytes(count: int) -> str:
    return f"{tables.memory(count)} workspace"
