"""From a problem, its device and the user's settings to an engine and its chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from . import device as devices
from . import memory, refusals, trust
from .engines import order
from .engines.base import Engine, Sizes, is_unasked
from .engines.table import Found
from .problem import Problem, as_count, checked_shape
from .settings import Settings, check_settings, shown


@dataclass(frozen=True)
class Plan:
    """How one call is computed.

    `query_chunk` and `kv_chunk` are in tokens, `head_chunk` in heads scored at a time (all where keys are not split; if
    an entry of the batch has fewer, one head of several). `workspace_bytes` is the most that a call allocates beside
    its output (recomputing gradients takes up to three times that, beside the gradients). `reasons` says in words why
    this engine, and which sliders were overruled; `retries` how often sizes were halved after an out-of-memory.
    `keeps_scores`: they are kept for the backward pass rather than recomputed in it. `reruns`: an inexact engine's
    result was of no use, and an exact one did the call. `measured`: by which measurement it is faster than in the way
    that the fixed order would have taken; None where that is this one.

    Example:
        >>> import torch
        >>> from lib_subquad import Plan, Settings, plan
        >>> shape = (1, 8, 64, 40)
        >>> made = plan(shape, shape, shape, torch.float32, "cpu", Settings(engine="portable", query_chunk=32))
        >>> isinstance(made, Plan), made.kv_chunk, made.reasons
        (True, 64, ('the engine is set to portable',))
    """

    engine: str
    query_chunk: int
    kv_chunk: int
    head_chunk: int
    workspace_bytes: int
    reasons: tuple[str, ...] = ()
    retries: int = 0
    keeps_scores: bool = False
    reruns: int = 0
    measured: Found | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.query_chunk, self.kv_chunk, self.head_chunk)

    def __str__(self) -> str:
        splits = order.named(self.engine).SPLITS_KEYS
        heads = f", {self.head_chunk} heads at a time" if splits else ""
        retries = f", {self.retries} retries" if self.retries else ""
        retries += ", computed again exactly" if self.reruns else ""
        reasons = f": {'; '.join(self.reasons)}" if self.reasons else ""
        workspace = self.workspace_bytes / devices.MIB
        return (
            f"{self.engine}, {self.query_chunk} x {self.kv_chunk} tokens{heads}, "
            f"{workspace:.1f} MiB workspace{retries}{reasons}"
        )


def plan(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    settings: Settings = Settings(),
    *,
    free_bytes: int | None = None,
    **more: Any,
) -> Plan:
    """How `attention()` would compute tensors of these shapes.

    Args:
        query_shape: [..., queries, width], `key_shape` [..., keys, width], `value_shape` [..., keys, value width].
        dtype: of query and key.
        device: where they are.
        settings: the user's.
        free_bytes: the device's free memory, asked of the device if None; with gradients, all memory that it has.
        more: `value_dtype`, `mask_shape`, `mask_dtype`, `grad`, `mask_grad`, as `Problem.from_shapes` takes them.

    Raises:
        ValueError: shapes or dtypes that make no attention, a count that is none, no device, settings that are no
            `Settings`.

    Example:
        >>> import torch
        >>> from lib_subquad import Settings, plan
        >>> shape = (2, 8, 4096, 40)  # [batch, heads, tokens, width], on a card with 4 GiB free
        >>> settings = Settings(engine="portable", query_chunk=512)
        >>> made = plan(shape, shape, shape, torch.float16, "cuda", settings, free_bytes=4 * 2**30)
        >>> made.engine, made.query_chunk, made.workspace_bytes < 0.7 * 4 * 2**30
        ('portable', 512, True)
    """
    check_settings(settings)
    if free_bytes is not None and as_count(free_bytes) is None:
        raise ValueError(f"free_bytes is {shown(free_bytes)}; expected a whole number of at least 0")
    query_shape, key_shape = checked_shape("query", query_shape), checked_shape("key", key_shape)
    value_shape = checked_shape("value", value_shape)
    if more.get("mask_shape") is not None:
        more["mask_shape"] = checked_shape("mask", more["mask_shape"])
    problem = Problem.from_shapes(query_shape, key_shape, value_shape, dtype, device, **more)
    return plan_problem(problem, settings, free_bytes)


def check_report(report: Any) -> None:
    """Say it in words where nothing can be called with a plan.

    Raises:
        ValueError: it cannot be called.
    """
    if not callable(report):
        raise ValueError(f"report is {shown(report)}; expected a function that takes a Plan")


def plan_problem(problem: Problem, settings: Settings, free_bytes: int | None = None) -> Plan:
    """The plan for a problem; see `plan`."""
    if free_bytes is None:
        free_bytes = memory.reading(problem.device, problem.grad).bytes
    share, limit = free_bytes * settings.memory_limit // 100, limit_bytes(problem, settings, free_bytes)
    made, passed_over = _walk(problem, settings, limit)
    if made.workspace_bytes > share:
        made = replace(made, reasons=(*made.reasons, _floor_won(limit)))
    if problem.grad and problem.queries and settings.checkpointing == "never":
        made = _keeping_scores(problem, made, share)
    why = passed_over or [order.named(made.engine).WHY]
    return replace(made, reasons=(*why, *_tie(problem, settings), *made.reasons))


def _walk(problem: Problem, settings: Settings, limit: int) -> tuple[Plan, list[str]]:
    """The plan of the first engine that can do it, and why those before it cannot; if none can, of the last."""
    found = measured(problem, settings)
    wanted = candidates(problem, settings)
    if found is not None:
        passed_over = [f"measured on this device: {found.margin:.2f} times as fast as what rules would take"]
    else:
        passed_over = [_set_to(wanted[0].NAME)] if wanted[0] is not order.engines()[0] else []
    for engine in wanted:
        reasons = why_not(engine, problem, settings)
        made = _of(engine, problem, settings, limit, found)
        if not reasons and made.workspace_bytes > limit and not engine.SPLITS_KEYS:
            reasons = [f"the {engine.NAME} kernel does not fit the memory limit"]
        if not reasons:
            break
        passed_over += [reason for reason in reasons if reason not in passed_over]
    taken = found is not None and found.engine == made.engine and _is_its_tile(found, made, problem)
    return replace(made, measured=found if taken else None), passed_over


def _is_its_tile(found: Found, made: Plan, problem: Problem) -> bool:
    """Whether the tile that was measured fits: the memory limit may leave less."""
    queries, keys = min(found.query_chunk, problem.queries), min(found.kv_chunk, problem.keys)
    return queries in (0, made.query_chunk) and keys in (0, made.kv_chunk)


def measured(problem: Problem, settings: Settings) -> Found | None:
    """What was measured on this device to be faster for such calls than the fixed order's choice, unless the user has
    chosen otherwise."""
    found = _known(problem, settings)
    return found if found is not None and found.margin > 1 else None


def _known(problem: Problem, settings: Settings) -> Found | None:
    return order.found(problem) if goes_by_measurements(settings) else None


def _tie(problem: Problem, settings: Settings) -> list[str]:
    """That it was measured and came to what rules take, in words; nothing where it did not."""
    found = _known(problem, settings)
    if found is None or found.margin > 1:
        return []
    others = " beside other programs" if found.disturbed else ""
    return [f"measured on this device{others}: nothing is clearly faster"]


def _set_to(engine: str) -> str:
    return f"the engine is set to {engine}"


def why_another(made: Plan, engine: str) -> str:
    """Why this plan's engine computes and not the one that is set, in words; empty where it does, or none is set."""
    if engine in ("automatic", made.engine):
        return ""
    own = [
        _set_to(engine),
        *(it.WHY for it in order.engines() if it.NAME == engine),
    ]  # of one that gave way: the latter
    reasons = [reason for reason in made.reasons if reason not in own] or ["it gave way"]
    return reasons[-1] if made.retries or made.reruns else reasons[0]


def goes_by_measurements(settings: Settings) -> bool:
    """Whether the user leaves engine and sizes to what was measured."""
    chosen = settings.engine != "automatic" or settings.query_chunk or settings.kv_chunk
    return settings.measure and not chosen


def candidates(problem: Problem, settings: Settings) -> tuple[Engine, ...]:
    """The engines to be asked in turn."""
    found = measured(problem, settings)
    wanted = settings.engine if found is None else found.engine
    return tuple(engine for engine in order.candidates(wanted) if engine.NAME == wanted or is_unasked(engine, problem))


def why_not(engine: Engine, problem: Problem, settings: Settings) -> list[str]:
    """Every reason why this engine cannot do the problem as the user wants it; empty if it can."""
    splits = 0 < settings.kv_chunk < problem.keys and not engine.SPLITS_KEYS
    by_the_user = [f"the key/value chunk size of {settings.kv_chunk} splits {problem.keys} keys"] if splits else []
    # Whoever is not called makes no node of PyTorch's graph, and so no gradients either.
    empty = ["there are no queries"] if engine.DIFFERENTIABLE and not problem.queries else []
    return by_the_user or empty or why_it_cannot(engine, problem)


def why_it_cannot(engine: Engine, problem: Problem) -> list[str]:
    """Every reason that is the engine's own: what it says of itself, or what has been found out about it."""
    return engine.why_not(problem) or refusals.of(problem, engine.NAME) or trust.why_not(engine, problem)


def _of(engine: Engine, problem: Problem, settings: Settings, limit: int, found: Found | None) -> Plan:
    tile = found if found is not None and found.engine == engine.NAME and found.has_tile else None
    if tile is not None:
        settings = replace(settings, query_chunk=tile.query_chunk, kv_chunk=tile.kv_chunk)
    sizes, reasons = engine.fitting(problem, settings, limit)
    # Whoever set no sizes need not read that they had to give way.
    return Plan(engine.NAME, *sizes, engine.workspace_bytes(problem, sizes), () if tile else tuple(reasons))


def limit_bytes(problem: Problem, settings: Settings, free_bytes: int) -> int:
    """What a call may allocate beside its output: the user's share of free memory, and never less than the smallest
    tiles that are still efficient need.

    Counts of free memory can be wrong (what an allocator or a page cache would give back reads as used), and smaller
    tiles take a hundred times as long. Whether so little is really too much shows: the call is tried again with less.
    """
    needed = order.engines()[-1].least_bytes(problem, settings)
    return max(free_bytes * settings.memory_limit // 100, needed)


def with_sizes(problem: Problem, made: Plan, engine: Engine, sizes: Sizes) -> Plan:
    """The same plan with another engine or other sizes, and without scores that are kept."""
    return replace(
        made,
        engine=engine.NAME,
        query_chunk=sizes.queries,
        kv_chunk=sizes.keys,
        head_chunk=sizes.heads,
        workspace_bytes=engine.workspace_bytes(problem, sizes),
        keeps_scores=False,
        measured=None,
    )


def _keeping_scores(problem: Problem, made: Plan, limit: int) -> Plan:
    """The plan with scores kept for the backward pass, or the reason why they are recomputed all the same."""
    kept = order.named(made.engine).kept_bytes(problem, made.sizes)
    if kept is None:
        return made
    if not devices.rules(problem.device).keeps_scores:
        why = "this device could not hold them in one tensor"
    elif kept > limit:
        why = "keeping them exceeds the memory limit"
    else:
        return replace(made, workspace_bytes=kept, keeps_scores=True)
    return replace(made, reasons=(*made.reasons, f"scores are recomputed in the backward pass: {why}"))


def _floor_won(limit: int) -> str:
    least = max(limit / devices.MIB, 0.1)
    return (
        f"the memory limit leaves less than the {least:.1f} MiB that efficient chunks need; smaller ones are for when "
        "memory really runs out"
    )
