"""A row of the plan table: one distinct attention shape, and how it is computed; and those that are computed alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...plan import Plan, why_another
from ...problem import Problem, item_bytes
from .. import tables

PART_NAMES = {
    "unet": "U-Net",
    "transformer": "Transformer",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
}
VAE = "VAE"  # both of its parts
KIND_NAMES = {"joint": "image and text together"}
ALL, WHOLE = "all", "all at once"  # of a shape's tokens


@dataclass(frozen=True)
class Row:
    """One distinct attention shape: how many layers have it, and how each of their calls is computed."""

    part: str
    kind: str
    layers: int
    problem: Problem
    plan: Plan

    @property
    def is_vae(self) -> bool:
        return self.part.startswith("vae")

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
        same = problem.queries == problem.keys and self.kind != "cross"
        return {
            "Where": f"{PART_NAMES[self.part]}, {KIND_NAMES.get(self.kind, self.kind)}",
            "Layers": str(self.layers),
            "Tokens": str(problem.queries) if same else f"{problem.queries} x {problem.keys}",
            "Heads": f"{problem.heads} x {problem.width}",
            "Engine": plan.engine,
            "Query chunk": str(plan.query_chunk),
            "KV chunk": str(plan.kv_chunk),
            "Workspace": tables.memory(plan.workspace_bytes),
            "Why": "; ".join(plan.reasons),
        }


@dataclass(frozen=True)
class Group:
    """Rows that are told as one: layers of one part of the model, computed by one engine in the same way and for the
    same reasons. The one of the most tokens comes first."""

    rows: tuple[Row, ...]

    @property
    def layers(self) -> int:
        return sum(row.layers for row in self.rows)

    @property
    def workspace_bytes(self) -> int:
        """Of the call that needs the most."""
        return max(row.plan.workspace_bytes for row in self.rows)

    def cells(self) -> dict[str, str]:
        """What a table shows of it."""
        first = self.rows[0]
        part, kind = _where(first)
        problems = [row.problem for row in self.rows]
        told = {row.plan.workspace_bytes for row in self.rows}
        tokens = _range([_tokens(problem.queries) for problem in problems])
        cross = f", prompt {_range([str(problem.keys) for problem in problems])}" if first.kind == "cross" else ""
        return {
            "Where": f"{part}, {kind}",
            "Layers": str(self.layers),
            "Tokens": tokens + cross,
            "Heads": _heads(problems),
            "Engine": first.plan.engine,
            "At a time": _at_a_time(first),
            "Memory": tables.memory(self.workspace_bytes) + " at most" * (len(told) > 1),
            "Why": "; ".join(first.plan.reasons),
        }


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Rows that share a plan together, in the order of the first of each."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (_where(row), row.plan.engine, _at_a_time(row), row.plan.reasons)
        found.setdefault(key, []).append(row)
    return [Group(tuple(sorted(alike, key=lambda row: -row.problem.queries))) for alike in found.values()]


def not_by(engine: str, rows: Iterable[Row]) -> tuple[int, str]:
    """In how many layers another engine computes than this one, which is set, and why, in words; (0, "") where none
    does, or none is set."""
    others = [(row.layers, why) for row in rows if (why := why_another(row.plan, engine))]
    return sum(layers for layers, _ in others), others[0][1] if others else ""


def _where(row: Row) -> tuple[str, str]:
    return VAE if row.is_vae else PART_NAMES[row.part], KIND_NAMES.get(row.kind, row.kind)


def _at_a_time(row: Row) -> str:
    """How many tokens ask and how many are looked at in one go."""
    problem, plan = row.problem, row.plan
    asks = ALL if plan.query_chunk >= problem.queries else str(plan.query_chunk)
    seen = ALL if plan.kv_chunk >= problem.keys else str(plan.kv_chunk)
    return WHOLE if asks == seen == ALL else f"{asks} × {seen}"


def _tokens(count: int) -> str:
    """Those of a square as people know its side."""
    side = math.isqrt(count)
    return f"{side}²" if side * side == count and side > 1 else str(count)


def _heads(problems: list[Problem]) -> str:
    counts = list(dict.fromkeys(str(problem.heads) for problem in problems))
    widths = list(dict.fromkeys(str(problem.width) for problem in problems))
    if len(counts) > 1 and len(widths) > 1:
        return ", ".join(dict.fromkeys(f"{problem.heads} × {problem.width}" for problem in problems))
    return f"{_range(counts)} × {_range(widths)}"


def _range(told: list[str]) -> str:
    """From the first to the last of them."""
    return told[0] if told[0] == told[-1] else f"{told[0]} to {told[-1]}"
