"""Whether other programs mislead Measure: `python -m tools.busy`.

Measures one shape again and again while another program comes and goes at random. Every other time one is planted:
a setting of which a call is as it is; all others compute half of their queries once more, and take 1.5 times as long.
When the program has gone, what was recommended is measured again in turn with Automatic. Told are how often the planted
one was found, the slowest recommendation, and whether the estimate of the time left held.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from lib_subquad import Settings
from lib_subquad.console import say
from lib_subquad.lab import tables
from lib_subquad.lab.bench.shapes import parse_shape
from lib_subquad.lab.commands import arguments
from lib_subquad.lab.explain.rows import Row
from lib_subquad.lab.tune.calls import key_of, measure
from lib_subquad.lab.tune.exploration import Exploration
from lib_subquad.plan import Plan, plan_problem
from lib_subquad.problem import Problem

PLANTED = Settings(query_chunk=1024, retry=False)
PLANTED_LABEL = "1024 x auto"
LOAD = """
import os, random, sys, time
parent, dice = os.getppid(), random.Random(int(sys.argv[1]))
while os.getppid() == parent:
    until = time.perf_counter() + dice.expovariate(1 / float(sys.argv[3]))
    while time.perf_counter() < until: sum(range(100_000))
    time.sleep(dice.expovariate(1 / float(sys.argv[2])))
"""


class WithPlanted(Exploration):
    """An exploration in which all settings but PLANTED compute half of their queries once more."""

    def _measure(self, problem: Problem, plan: Plan) -> None:
        seconds, peak = measure(problem, plan, self.settings, self.device)
        if plan.sizes != plan_problem(problem, PLANTED, self.free_bytes).sizes:
            half = replace(problem, queries=problem.queries // 2)
            seconds += measure(half, plan, self.settings, self.device)[0]
        self._measured.setdefault(key_of(problem, plan), []).append((seconds, peak))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.busy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shape",
        type=parse_shape,
        default=parse_shape("1,4,2048,2048,40"),
        help="as in bench (default: 1,4,2048,2048,40)",
    )
    parser.add_argument("--times", type=arguments.positive, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--begin", type=arguments.count, default=0, help="how many have been (default: %(default)s)")
    parser.add_argument("--away", type=float, default=2.0, help="seconds, on the average (default: %(default)s)")
    parser.add_argument("--stay", type=float, default=1.0, help="seconds, on the average (default: %(default)s)")
    parser.add_argument("--again", type=arguments.positive, default=15, help="quiet rounds (default: %(default)s)")
    given = parser.parse_args(argv)
    shape = given.shape
    query, key = ((shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys))
    problem = Problem.from_shapes(query, key, key, torch.float32, "cpu")
    rows, explored = [Row("unet", "self", 1, problem, plan_problem(problem, Settings()))], []
    for number in range(given.begin, given.begin + given.times):
        made = (Exploration if number % 2 else WithPlanted)(rows, Settings(), problem.device)
        load = subprocess.Popen([sys.executable, "-c", LOAD, str(number), str(given.away), str(given.stay)])
        try:
            told = [(time.perf_counter(), step.seconds_left) for step in made.run()]
        finally:
            load.kill()
            load.wait()
        explored.append(_told(number, made, told, time.perf_counter(), given.again))
        say(", ".join(f"{name}: {value}" for name, value in explored[-1].items()))
    print(tables.of_cells(explored))
    planted = [row["Recommended"] for row in explored if "planted" in row[""]]
    print(f"\nThe planted one was recommended {sum(PLANTED_LABEL in it for it in planted)} of {len(planted)} times.")
    return 0


def _told(
    number: int, made: Exploration, told: Sequence[tuple[float, float | None]], ended: float, again: int
) -> dict[str, str]:
    """A row of the table; `told` are the clock and the seconds left at every step."""
    best, automatic = made.recommended(), made.automatic()
    known = [(now, left) for now, left in told if left is not None]
    began = told[0][0]
    held = [2 / 3 <= (now + left - began) / (ended - began) <= 4 / 3 for now, left in known]
    contradicted = [it for it in made.trials if it.fits and (it.seconds < best.seconds or it.faster_than(best))]
    quiet = "–"
    if best is not automatic:
        one, other = made.measured_again((best.settings, automatic.settings), again)
        quiet = tables.ratio(one.seconds / other.seconds)
    return {
        "": f"{number + 1}{' planted' if isinstance(made, WithPlanted) else ''}",
        "Recommended": best.label,
        "Quiet, of Automatic's time": quiet,
        "Contradicted by": str(len(contradicted) + (not any(it is best for it in made.pareto_front()))),
        "Rounds": str(made.rounds),
        "Took": tables.seconds(ended - began),
        "Estimates held": f"{sum(held)}/{len(held)}",
        "Others": f"{made.disturbance().share or 0:.0%}",
    }


if __name__ == "__main__":
    sys.exit(main())
