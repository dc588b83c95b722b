"""One call of attention, measured: what a setting comes to on one shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from ... import device as devices
from ...attention import attention
from ...engines import order
from ...engines.base import Sizes
from ...plan import Plan
from ...problem import Problem
from ...settings import CHUNK_MAX, Settings
from ...trust import tensors
from .. import meter

Call = tuple[Problem, Plan]
Key = tuple[Problem, str, Sizes]  # what distinguishes calls: their plans' words do not


def key_of(problem: Problem, plan: Plan) -> Key:
    return problem, plan.engine, plan.sizes


def cost(problem: Problem) -> float:
    """What its time goes with, whatever computes it."""
    return problem.batch * problem.heads * problem.queries * problem.keys * (problem.width + problem.value_width)


def describe(problem: Problem, plan: Plan) -> str:
    return f"{problem.queries} x {problem.keys} tokens, {plan.engine} {plan.query_chunk} x {plan.kv_chunk}"


def ran_out(runs: Iterable[tuple[float, int]]) -> bool:
    return any(math.isinf(seconds) for seconds, _ in runs)


def measure(problem: Problem, plan: Plan, settings: Settings, device: torch.device) -> tuple[float, int]:
    """(seconds, peak bytes beside inputs and result) of the call as planned; infinite seconds if memory ran out."""
    splits = order.named(plan.engine).SPLITS_KEYS
    whole = not splits and plan.query_chunk >= problem.queries
    settings = replace(
        settings,
        retry=False,
        engine=plan.engine,
        query_chunk=0 if whole else min(plan.query_chunk, CHUNK_MAX),
        kv_chunk=min(plan.kv_chunk, CHUNK_MAX) if splits else 0,
    )
    try:
        query, key, value, _ = tensors(problem)
        # Libraries load and caches fill outside the measurement; an accelerator's may prepare for these very sizes.
        first = query[..., :64, :] if device.type == "cpu" else query
        attention(first, key, value, settings=settings)
        seconds, peak = meter.measure(lambda: attention(query, key, value, settings=settings), device)
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        seconds, peak = math.inf, None
    if math.isinf(seconds):  # out of the except block, which holds the tensors that the call had made
        devices.release_cached(device)
    return seconds, max(plan.workspace_bytes, (peak or 0) - problem.output_bytes)
