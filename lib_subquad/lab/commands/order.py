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
from ...engines.table import Class, Found, Machine
from ..measured import file, rounds
from ..measured.words import calls_in_words, found_in_words, problem_in_words, to_be_measured_again
from . import kept, question

MEASURE = "--measure"
OF_MEASURING = (*question.OF_A_CHECKPOINT, "--dtype", *question.SETTINGS)
CHOSEN = ("--engine", "--query-chunk", "--kv-chunk", "--checkpointing", "--retry")


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
    if arguments.checkpoint:
        question.refuse(arguments, CHOSEN, f"with {MEASURE}, which tries every exact engine and its chunk sizes")
        if why_not := kept.why_not(arguments):
            raise UserError(why_not)
    else:
        question.refuse(arguments, OF_MEASURING, f"without {MEASURE} CHECKPOINT")
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
            say(f"Not used here: {_kinds(len(others))}, measured on {_machine_in_words(machine)}")


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
    each = rounds.seconds_for(asked.device)
    many = f" each, {each * len(problems):.0f} s in all" if len(problems) > 1 else ""
    say(f"Measuring {_kinds(len(problems))}, for at most {each:.0f} s{many}:")
    start, watch = time.perf_counter(), rounds.Watch()
    found: dict[Class, Found] = {}
    for number, problem in enumerate(problems, 1):
        say(f"  {problem_in_words(problem)}: ", end="")
        left = each * number - (time.perf_counter() - start)  # what the others have left is its own as well
        its = rounds.measured([problem], asked.settings, left, watch=watch)
        say(", ".join(map(found_in_words, its.values())) or "too little time or memory to tell")
        found |= its
    said = (watch.disturbance().sentence(past=True), to_be_measured_again(found))
    say(" ".join(filter(None, (f"Measured in {time.perf_counter() - start:.1f} s.", *said))))
    if not found or not file.add(path, order.machine(asked.device), found):
        return 1
    say(f"Kept in {path}")
    return 0
