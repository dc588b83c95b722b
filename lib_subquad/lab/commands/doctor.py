"""python -m lib_subquad doctor: which engine each kind of call gets on this device, why, and what would help."""

from __future__ import annotations

import argparse

import torch

from ...console import say
from ...settings import Settings
from .. import tables
from ..survey import checks, doctor, reasons
from . import kept
from .arguments import DTYPES, best_device, device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, help="such as cpu, cuda:1, xpu, mps (default: the best this machine has)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the model computes in (default: float16 on a GPU, float32 on the CPU)"
    )
    kept.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    kept.load(arguments)
    on = torch.device(arguments.device) if arguments.device else best_device()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else checks.dtypes(on)[0]
    calls = [*((shape, False) for shape in reasons.SHAPES), *((shape, True) for shape in reasons.MASKED)]
    found = doctor.diagnosis([reasons.problem_of(shape, on, dtype, masked) for shape, masked in calls], Settings())
    cells = [
        {"Call": reasons.label(*call), "Engine": made.engine, "Why": "; ".join(made.reasons)}
        for call, made in zip(calls, found.plans)
    ]
    say(tables.of_cells(cells, left={"Call", "Engine", "Why"}))
    say("\n" + "\n".join(found.sentences))
    return 0
