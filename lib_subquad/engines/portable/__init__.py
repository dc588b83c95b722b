"""Chunked exact attention in plain PyTorch operators, for every device: what `engines.base` asks of an engine."""

import torch
from torch import Tensor

from ... import device as devices
from ...problem import Problem
from .attend import attend
from .attend import attend_keeping_scores as attend_traced
from .gradients import gradients
from .sizes import fitting, kept_bytes, least_bytes, rows_at_once, smaller, taking_over, workspace_bytes

__all__ = [
    "DIFFERENTIABLE",
    "EXACT",
    "NAME",
    "SPLITS_KEYS",
    "WHY",
    "attend",
    "attend_traced",
    "gradients",
    "kept_bytes",
    "least_bytes",
    "fitting",
    "rows_at_once",
    "smaller",
    "taking_over",
    "why_not",
    "why_not_traced",
    "workspace_bytes",
]

NAME = "portable"
EXACT = True
SPLITS_KEYS = True
DIFFERENTIABLE = False
WHY = "it runs everywhere"


def why_not(problem: Problem) -> list[str]:
    if problem.dtype == torch.float64 and not devices.rules(problem.device).float64:
        return [f"{problem.device.type} has no float64"]
    return []


def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
    return []
