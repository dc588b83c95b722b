"""From a problem, its device and the user's settings to an engine and its chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import device as devices
from .engines import Sizes, fused, portable
from .problem import Problem, as_count, checked_shape, item_bytes
from .settings import Settings, check_settings, shown

ENGINES = {engine.NAME: engine for engine in (fused, portable)}  # in order of preference

# One row of one head by this many keys is the least that is ever tried.
SMALLEST_KV_CHUNK = 64
# Query chunks of the portable engine shrink to this before key chunks do: fewer rows leave the matrix units idle.
SMALLEST_FAST_QUERY_CHUNK = 256
# Heads of a tile, where there are queries enough: as many as a CPU has memory channels to keep busy.
FEWEST_HEADS = 2


@dataclass(frozen=True)
class Plan:
    """How one call is computed.

    `query_chunk` and `kv_chunk` are in tokens, `head_chunk` in heads scored at a time (all of them for *fused*);
    `workspace_bytes` is the most that a call allocates beside its output (recomputing gradients takes up to three times
    that, beside the gradients). `reasons` says in words why this engine, and
    which sliders were overruled; `retries` how often sizes were halved after an out-of-memory. `keeps_scores`: they are
    kept for the backward pass rather than recomputed in it.
    """

    engine: str
    query_chunk: int
    kv_chunk: int
    head_chunk: int
    workspace_bytes: int
    reasons: tuple[str, ...] = ()
    retries: int = 0
    keeps_scores: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.query_chunk, self.kv_chunk, self.head_chunk)

    def __str__(self) -> str:
        heads = f", {self.head_chunk} heads at a time" if self.engine == portable.NAME else ""
        retries = f", {self.retries} retries" if self.retries else ""
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
    **more,
) -> Plan:
    """How `attention()` would compute tensors of these shapes.

    Args:
        query_shape: [..., queries, width], `key_shape` [..., keys, width], `value_shape` [..., keys, value width].
        dtype: of query and key.
        device: where they are.
        settings: the user's.
        free_bytes: the device's free memory, asked of the device if None.
        more: `value_dtype`, `mask_shape`, `mask_dtype`, `grad`, `mask_grad`, as `Problem.from_shapes` takes them.

    Raises:
        ValueError: shapes or dtypes that make no attention, a count that is none, settings that are no `Settings`.
    """
    check_settings(settings)
    if free_bytes is not None and as_count(free_bytes) is None:
        raise ValueError(f"free_bytes is {shown(free_bytes)}; expected a whole number of at least 0")
    named = (("query", query_shape), ("key", key_shape), ("value", value_shape))
    if more.get("mask_shape") is not None:
        more["mask_shape"] = checked_shape("mask", more["mask_shape"])
    problem = Problem.from_shapes(*(checked_shape(name, shape) for name, shape in named), dtype, device, **more)
    return plan_problem(problem, settings, free_bytes)


def plan_problem(problem: Problem, settings: Settings, free_bytes: int | None = None) -> Plan:
    """The plan for a problem; see `plan`."""
    if free_bytes is None:
        free_bytes = devices.free_bytes(problem.device)
    share, limit = free_bytes * settings.memory_limit // 100, limit_bytes(problem, settings, free_bytes)
    engine, reasons = _choose(problem, settings)
    if engine == fused.NAME:
        made = _plan_fused(problem, settings, limit)
        if made.workspace_bytes > limit:
            reasons, made = ["the fused kernel does not fit the memory limit"], _plan_portable(problem, settings, limit)
    else:
        made = _plan_portable(problem, settings, limit)
    if made.workspace_bytes > share:
        made = replace(made, reasons=(*made.reasons, _floor_won(limit)))
    if made.engine == portable.NAME and problem.grad and problem.queries and settings.checkpointing == "never":
        made = _keeping_scores(problem, made, share)
    return replace(made, reasons=(*reasons, *made.reasons))


def limit_bytes(problem: Problem, settings: Settings, free_bytes: int) -> int:
    """What a call may allocate beside its output: the user's share of free memory, and never less than the smallest
    tiles that are still efficient need.

    Counts of free memory can be wrong (what an allocator or a page cache would give back reads as used), and smaller
    tiles take a hundred times as long. Whether so little is really too much shows: the call is tried again with less.
    """
    least = _preferred_sizes(problem, Settings(), least=True)
    asked = least._replace(  # of several chunks one result stays beside the next
        queries=min(least.queries, settings.query_chunk or least.queries),
        keys=min(least.keys, settings.kv_chunk or least.keys),
    )
    needed = max(portable.workspace_bytes(problem, sizes) for sizes in {least, asked})
    return max(free_bytes * settings.memory_limit // 100, needed)


def with_sizes(problem: Problem, made: Plan, engine: str, sizes: Sizes) -> Plan:
    """The same plan with another engine or other sizes."""
    return replace(
        made,
        engine=engine,
        query_chunk=sizes.queries,
        kv_chunk=sizes.keys,
        head_chunk=sizes.heads,
        workspace_bytes=(portable.kept_bytes if made.keeps_scores else ENGINES[engine].workspace_bytes)(problem, sizes),
    )


def _choose(problem: Problem, settings: Settings) -> tuple[str, list[str]]:
    """The engine, and why."""
    if settings.engine == portable.NAME:
        return portable.NAME, ["the engine is set to portable"]
    if 0 < settings.kv_chunk < problem.keys:
        return portable.NAME, [f"the key/value chunk size of {settings.kv_chunk} splits {problem.keys} keys"]
    reasons = fused.why_not(problem)
    return (portable.NAME, reasons) if reasons else (fused.NAME, ["PyTorch has a fused kernel for these sizes"])


def _plan_fused(problem: Problem, settings: Settings, limit: int) -> Plan:
    rows = min(settings.query_chunk or problem.queries, problem.queries)
    sizes, reasons = Sizes(rows, problem.keys, problem.heads), []
    while fused.workspace_bytes(problem, sizes) > limit and sizes.queries > SMALLEST_FAST_QUERY_CHUNK:
        sizes = sizes._replace(queries=_half(sizes.queries, SMALLEST_FAST_QUERY_CHUNK))
    if sizes.queries < rows and settings.query_chunk:
        reasons.append(_overruled("query", rows, sizes.queries, "the memory limit"))
    return Plan(fused.NAME, *sizes, fused.workspace_bytes(problem, sizes), tuple(reasons))


def _plan_portable(problem: Problem, settings: Settings, limit: int) -> Plan:
    wanted = _preferred_sizes(problem, settings)
    sizes, reasons = wanted, []
    for fits, why in (
        (lambda tried: _device_allows(problem, tried), "the largest tensor this device can hold"),
        (lambda tried: portable.workspace_bytes(problem, tried) <= limit, "the memory limit"),
    ):
        before = sizes
        sizes = _shrink(sizes, fits)
        if settings.query_chunk and sizes.queries < before.queries:
            reasons.append(_overruled("query", before.queries, sizes.queries, why))
        if settings.kv_chunk and sizes.keys < before.keys:
            reasons.append(_overruled("key/value", before.keys, sizes.keys, why))
        if not fits(sizes):
            reasons.append(f"even the smallest chunks exceed {why}")
    return Plan(portable.NAME, *sizes, portable.workspace_bytes(problem, sizes), tuple(reasons))


def _keeping_scores(problem: Problem, made: Plan, limit: int) -> Plan:
    """The plan with scores kept for the backward pass, or the reason why they are recomputed all the same."""
    kept = portable.kept_bytes(problem, made.sizes)
    if not devices.rules(problem.device).keeps_scores:
        why = "this device could not hold them in one tensor"
    elif kept > limit:
        why = "keeping them exceeds the memory limit"
    else:
        return replace(made, workspace_bytes=kept, keeps_scores=True)
    return replace(made, reasons=(*made.reasons, f"scores are recomputed in the backward pass: {why}"))


def _preferred_sizes(problem: Problem, settings: Settings, least: bool = False) -> Sizes:
    """The user's sizes, and for those left automatic the ones that fill the device's tile, or its least one."""
    rules = devices.rules(problem.device)
    tile_bytes = devices.least_tile_bytes(problem.device) if least else rules.tile_bytes
    scores = tile_bytes // item_bytes(devices.compute_dtype(problem.dtype))
    keys = min(settings.kv_chunk or rules.kv_tile, problem.keys)
    heads = max(min(FEWEST_HEADS, problem.heads), 1)  # an empty batch has none, and there may be no queries
    rows = max(min(settings.query_chunk or _multiple_of_64(scores // (keys * heads)), problem.queries), 1)
    heads = max(heads, min(problem.heads, scores // (keys * rows)))
    # Threads take whole heads: a group that is no multiple leaves one of them idle.
    heads = max(heads // FEWEST_HEADS * FEWEST_HEADS, min(FEWEST_HEADS, problem.heads), 1)
    return Sizes(rows, keys, heads)


def _shrink(sizes: Sizes, fits) -> Sizes:
    """Smaller sizes until they fit: heads and queries as far as they stay fast, then one head, keys, queries."""
    for field, least in (
        ("heads", FEWEST_HEADS),
        ("queries", SMALLEST_FAST_QUERY_CHUNK),
        ("heads", 1),
        ("keys", SMALLEST_KV_CHUNK),
        ("queries", 1),
    ):
        while not fits(sizes) and getattr(sizes, field) > least:
            sizes = sizes._replace(**{field: _half(getattr(sizes, field), least)})
    return sizes


def _device_allows(problem: Problem, sizes: Sizes) -> bool:
    rules = devices.rules(problem.device)
    rows = max(sizes.keys, problem.width, problem.value_width)
    elements = sizes.heads * max(sizes.queries * rows, sizes.keys * max(problem.width, problem.value_width))
    if rules.largest_elements is not None and elements > rules.largest_elements:
        return False
    bytes_ = elements * item_bytes(devices.compute_dtype(problem.dtype))
    return rules.largest_bytes is None or bytes_ <= rules.largest_bytes


def _half(size: int, smallest: int) -> int:
    return max(size // 2, smallest)


def _multiple_of_64(size: int) -> int:
    return max(size // 64 * 64, 1)


def _floor_won(limit: int) -> str:
    least = max(limit / devices.MIB, 0.1)
    return (
        f"the memory limit leaves less than the {least:.1f} MiB that efficient chunks need; smaller ones are for when "
        "memory really runs out"
    )


def _overruled(which: str, wanted: int, used: int, by: str) -> str:
    return f"the {which} chunk size of {wanted} is {used} here: {by}"
