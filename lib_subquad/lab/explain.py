"""What attention will do for a checkpoint and an image size: a row for every distinct shape, and the largest image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .. import device as devices
from ..checkpoint import AttentionLayer, Checkpoint
from ..plan import Plan, plan_problem
from ..problem import Problem, item_bytes
from ..settings import Settings

SIZE_STEP = 64  # pixels; the web UI's sizes are multiples of it or are rounded to 8
LARGEST_SIDE = 16384

PART_NAMES = {"unet": "U-Net", "vae_encoder": "VAE encoder", "vae_decoder": "VAE decoder"}


@dataclass(frozen=True)
class Row:
    """One distinct attention shape: how many layers have it, and how each of their calls is computed."""

    part: str
    kind: str
    layers: int
    problem: Problem
    plan: Plan

    @property
    def call_bytes(self) -> int:
        """Everything a call of such a layer holds: queries, keys, values, the result and the workspace."""
        problem = self.problem
        rows = problem.batch * problem.heads
        queries_and_keys = rows * (problem.queries + problem.keys) * problem.width * item_bytes(problem.dtype)
        values = rows * problem.keys * problem.value_width * item_bytes(problem.value_dtype)
        return queries_and_keys + values + problem.output_bytes + self.plan.workspace_bytes

    def cells(self) -> dict[str, str]:
        """What a table shows of it."""
        problem, plan = self.problem, self.plan
        return {
            "Where": f"{PART_NAMES[self.part]}, {self.kind}",
            "Layers": str(self.layers),
            "Tokens": f"{problem.queries} x {problem.keys}" if self.kind == "cross" else str(problem.queries),
            "Heads": f"{problem.batch * problem.heads} x {problem.width}",
            "Engine": plan.engine,
            "Query chunk": str(plan.query_chunk),
            "KV chunk": str(plan.kv_chunk),
            "Workspace": megabytes(plan.workspace_bytes),
            "Why": "; ".join(plan.reasons),
        }


def explain(
    layers: Iterable[AttentionLayer],
    width: int,
    height: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
    free_bytes: int | None = None,
) -> list[Row]:
    """A row for every distinct shape among `layers` for images of width x height pixels, the costliest first.

    Raises:
        ValueError: a size or batch that makes no image.
    """
    if free_bytes is None:
        free_bytes = devices.free_bytes(device)
    counted = Counter()
    for layer in layers:
        problem = Problem.from_shapes(
            *layer.shapes(width, height, batch), dtype, device, upcast=settings.upcast == "always"
        )
        counted[layer.part, layer.kind, problem] += 1
    rows = [
        Row(part, kind, count, problem, plan_problem(problem, settings, free_bytes))
        for (part, kind, problem), count in counted.items()
    ]
    return sorted(rows, key=lambda row: row.problem.queries * row.problem.keys * row.problem.heads, reverse=True)


def with_size_note(checkpoint: Checkpoint, width: int, height: int) -> Checkpoint:
    """The checkpoint, with a sentence among its notes where an image of this size is not computed as asked for."""
    factor = max((layer.latent_factor for layer in checkpoint.layers), default=1)
    computed = [side // factor * factor for side in (width, height)]
    if computed == [width, height]:
        return checkpoint
    note = f"Sizes go in steps of {factor} pixels: {width} x {height} is computed as {computed[0]} x {computed[1]}."
    return replace(checkpoint, notes=(*checkpoint.notes, note))


def largest_image(
    layers: Iterable[AttentionLayer],
    width: int,
    height: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
    free_bytes: int | None = None,
) -> tuple[int, int] | None:
    """(width, height) of the largest image in these proportions whose every attention call, its queries, keys, values
    and result included, stays inside the memory limit; None where not even the smallest does.

    Multiples of `SIZE_STEP`, at most `LARGEST_SIDE`. What the model needs beside attention is not known here.
    """
    if free_bytes is None:
        free_bytes = devices.free_bytes(device)
    layers = tuple(layers)
    limit = free_bytes * settings.memory_limit // 100

    def fits(size: tuple[int, int]) -> bool:
        rows = explain(layers, *size, batch, dtype, device, settings, free_bytes)
        return all(row.call_bytes <= limit for row in rows)

    sizes = _sizes_in_proportion(width, height)
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def _sizes_in_proportion(width: int, height: int) -> list[tuple[int, int]]:
    longer = max(width, height)
    sides = range(SIZE_STEP, LARGEST_SIDE + 1, SIZE_STEP)
    return [
        tuple(max(SIZE_STEP, round(side * length / longer / SIZE_STEP) * SIZE_STEP) for length in (width, height))
        for side in sides
    ]


def megabytes(count: int) -> str:
    return f"{count / devices.MIB:.1f} MiB" if count < 10 * devices.GIB else f"{count / devices.GIB:.1f} GiB"
