"""A row of the plan table: one distinct attention shape, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ...plan import Plan
from ...problem import Problem, item_bytes
from .. import tables

PART_NAMES = {
    "unet": "U-Net",
    "transformer": "Transformer",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
}
KIND_NAMES = {"joint": "image and text together"}


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
            "Heads": f"{problem.batch * problem.heads} x {problem.width}",
            "Engine": plan.engine,
            "Query chunk": str(plan.query_chunk),
            "KV chunk": str(plan.kv_chunk),
            "Workspace": tables.memory(plan.workspace_bytes),
            "Why": "; ".join(plan.reasons),
        }
