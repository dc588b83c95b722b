"""python -m lib_subquad report: what to paste when you tell of a device or a bug. It names neither you nor your
files."""

from __future__ import annotations

import argparse
import sys

import torch

from ...console import say
from .. import machine, tables
from ..survey import checks, facts, reasons
from .arguments import best_device, device

LEGEND = (
    "Calls one after another, in rounds; time is the median, peak memory beside the inputs and with the result, error "
    "the largest beside float64."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, help="such as cpu, cuda:1, xpu, mps (default: the best this machine has)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Each part is told when it is there: should a kernel take the process with it, the parts before are not lost."""
    on = torch.device(arguments.device) if arguments.device else best_device()
    _tell("## Device report", tables.table(["What", "Here"], facts.facts(on), left={"What", "Here"}))
    dtype = checks.dtypes(on)[0]
    asked = list(reasons.rows(on, dtype))
    _tell(
        f"### What each engine says of the calls of models, in {str(dtype).removeprefix('torch.')}",
        tables.of_cells(asked, left=set(asked[0])),
    )
    before = machine.processor_seconds()
    measured = list(checks.rows(on, lambda what: say(f"checking {what}", sys.stderr)))
    others = machine.share_of_others(before, machine.processor_seconds())
    busy = "" if others is None else f" Other programs took {others:.0%} of the processors meanwhile."
    _tell("### Small calls, checked", tables.of_cells(measured, left={"call", "engine", "note"}), LEGEND + busy)
    return 0


def _tell(*paragraphs: str) -> None:
    for paragraph in paragraphs:
        say(f"{paragraph}\n")
