"""`python -m lib_subquad order`: what automatic goes by on this device, as far as it was measured.

It shows, measures with the shapes of a checkpoint, or forgets.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ...console import UserError, say
from ...engines import order
from ...engines.table import Machine
from ..measured import file, rounds
from ..measured.words import calls_in_words, found_in_words
from . import kept, question

MEASURE = "--measure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kept.add_arguments(parser)
    parser.add_argument(
        "--forget",
        nargs="?",
        const="here",
        choices=("here", "all"),
        help="forget what was measured on this device, or with all on every one (default: forget nothing)",
    )
    question.add_arguments(
        parser,
        MEASURE,
        required=False,
        metavar="CHECKPOINT",
        help="measure with the shapes of this .safetensors file, whose header is read, and keep what comes of it "
        "(default: measure nothing)",
    )


def run(arguments: argparse.Namespace) -> int:
    path = kept.path(arguments)
    if path is None:
        raise UserError(f"{kept.MISSING}: {kept.INSTEAD}")
    if arguments.forget and arguments.checkpoint:
        raise UserError(f"--forget and {MEASURE} are two things: give one of them")
    file.load(path)
    if arguments.checkpoint:
        return _measure(arguments, path)
    device = question.read_device(arguments)
    if arguments.forget:
        return _forget(device, path, everywhere=arguments.forget == "all")
    _show(device, path)
    return 0


def _show(device: torch.device, path: Path) -> None:
    here, found = order.machine(device), order.all_found(device)
    say(f"On {_machine_in_words(here)}, by {path}:")
    for calls, its in found.items():
        say(f"  {calls_in_words(calls)}: {found_in_words(its)}")
    if not found:
        say("  nothing has been measured: automatic follows fixed rules")
    for machine, others in order.table().machines.items():
        if machine != here and others:
            say(f"Not gone by here: {_kinds(len(others))}, on {_machine_in_words(machine)}")


def _kinds(count: int) -> str:
    return f"{count} {'kind' if count == 1 else 'kinds'} of call"


def _machine_in_words(machine: Machine) -> str:
    driver = "" if machine.driver in ("", "none") else f", {machine.driver}"
    return f"{machine.device}{driver}, torch {machine.torch}, subquad {machine.subquad} ({machine.engines})"


def _forget(device: torch.device, path: Path, everywhere: bool) -> int:
    here = order.machine(device)
    machines = order.table().machines
    count = sum(map(len, machines.values())) if everywhere else len(machines.get(here, {}))
    if not file.forget(path, None if everywhere else here):
        return 1
    say(f"Forgotten: {_kinds(count)}. Automatic follows fixed rules{'' if everywhere else ' on this device'}.")
    return 0


def _measure(arguments: argparse.Namespace, path: Path) -> int:
    asked = question.read(arguments, MEASURE)
    problems = rounds.worth_measuring([(row.problem, row.layers) for row in asked.rows()], asked.settings)
    if not problems:
        say("There is one way only to compute these calls here: nothing to measure.")
        return 0
    most = rounds.seconds_for(asked.device) * len(problems)
    say(f"Measuring {_kinds(len(problems))}, for {most:.0f} s at the most")
    start = time.perf_counter()
    found = rounds.measured(problems, asked.settings, most, lambda words: say(f"  {words}"))
    say(f"Measured in {time.perf_counter() - start:.1f} s:")
    for calls, its in found.items():
        say(f"  {calls_in_words(calls)}: {found_in_words(its)}")
    if missing := len(problems) - len(found):
        say(f"  of {_kinds(missing)} nothing is known: there was too little time or memory")
    if not found:
        return 1
    if not file.add(path, order.machine(asked.device), found):
        return 1
    say(f"Kept in {path}")
    return 0
