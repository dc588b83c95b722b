"""python -m lib_subquad doctor: which engine each kind of call gets on this device, why, and what would help.

The calls are those of a checkpoint, or without one what models make that many people have.
"""

from __future__ import annotations

import argparse

from ...console import say
from .. import tables
from ..explain.rows import grouped
from ..explain.words import engine_in_words, layers_in_words, size_in_words
from ..survey import doctor, reasons
from . import kept, question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    question.add_arguments(
        parser,
        required=False,
        help="a .safetensors file, whose header is read (default: calls that models make which many people have)",
    )
    kept.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    kept.load(arguments)
    if arguments.checkpoint:
        return _of_checkpoint(arguments)
    question.refuse(arguments, question.OF_A_CHECKPOINT, "without --checkpoint FILE")
    device = question.read_device(arguments)
    dtype, settings = question.read_dtype(arguments, device), question.read_settings(arguments)
    calls = [*((shape, False) for shape in reasons.SHAPES), *((shape, True) for shape in reasons.MASKED)]
    found = doctor.diagnosis([reasons.problem_of(shape, device, dtype, masked) for shape, masked in calls], settings)
    cells = [
        {"Call": reasons.label(*call), "Engine": made.engine, "Why": "; ".join(made.reasons)}
        for call, made in zip(calls, found.plans)
    ]
    return _tell(cells, found)


def _of_checkpoint(arguments: argparse.Namespace) -> int:
    asked = question.read(arguments)
    rows = asked.rows()
    found = doctor.diagnosis([row.problem for row in rows], asked.settings, asked.free_bytes)
    say(f"{asked.checkpoint.family}: {layers_in_words(rows)}\n")
    shown = ("Where", "Layers", "Tokens", "Heads", "Engine", "Why")
    told = [*(group.cells() for group in grouped(rows)), *(half.group_cells() for half in asked.halves())]
    cells = [{name: text for name, text in group.items() if name in shown} for group in told]
    return _tell(cells, found, size_in_words(asked), *engine_in_words(asked.settings.engine, rows), *asked.notes)


def _tell(cells: list[dict[str, str]], found: doctor.Diagnosis, *notes: str) -> int:
    say(tables.for_reading(cells, left={"Call", "Where", "Engine", "Why"}))
    say("\n" + "\n".join([*found.sentences, *notes]))
    return 0
