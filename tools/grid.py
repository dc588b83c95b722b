"""Whether measuring finds what is fastest: `python -m tools.grid`.

Every engine with a grid of tiles computes each shape, in rounds of all of them. What is chosen by the even rounds, as
*automatic* chooses, is judged by the odd ones: its time over that of the best of the grid. Then *automatic* itself
measures the shapes, as it does before an image, and its choices and its seconds are told beside.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lib_subquad import Settings, attention
from lib_subquad.console import say
from lib_subquad.engines import order
from lib_subquad.engines.table import Candidate, Class, Found, choose, class_of
from lib_subquad.lab import meter, tables
from lib_subquad.lab.bench.shapes import Shape, parse_shape
from lib_subquad.lab.commands import arguments
from lib_subquad.lab.measured import rounds
from lib_subquad.plan import plan_problem
from lib_subquad.problem import Problem
from lib_subquad.settings import CHUNK_MAX
from lib_subquad.trust import tensors

SHAPES = ("sd15-512", "2,8,1024,1024,80", "sd15-512-cross77", "sdxl-1024", "2,20,1024,1024,64", "vae-512")
QUERY_CHUNKS = (256, 512, 1024)
KV_CHUNKS = (256, 512, 1024)
HOPELESS = 1.3  # times as long as the fastest of the first round
SHORT = 0.1  # seconds: of shorter calls a round takes several, and the least counts


@dataclass
class Grid:
    """One shape, and seconds of each candidate in every round; the fixed order's choice first."""

    shape: Shape
    problem: Problem
    seconds: dict[Candidate, list[float]] = field(default_factory=dict)

    def measure(self, count: int, own: Found | None) -> None:
        """So many rounds of the grid, and of what *automatic* has chosen by itself."""
        query, key, value, _ = tensors(self.problem)
        left = candidates(self.problem)
        if own is not None:
            how = Settings(engine=own.engine, query_chunk=own.query_chunk, kv_chunk=own.kv_chunk, measure=False)
            left.setdefault(Candidate(own.engine, own.query_chunk, own.kv_chunk), how)
        for settings in left.values():
            attention(query[:, :, :64], key, value, settings=settings)
        for number in range(count):
            for candidate in list(left)[:: 1 if number % 2 == 0 else -1]:
                call = partial(attention, query, key, value, settings=left[candidate])
                self.seconds.setdefault(candidate, []).append(_seconds(call, self.problem.device))
            if number == 0:
                most = HOPELESS * min(taken[0] for taken in self.seconds.values())
                first = next(iter(left))
                left = {it: left[it] for it in left if it is first or self.seconds[it][0] <= most}
                self.seconds = {it: self.seconds[it] for it in left}

    def chosen(self) -> Found:
        return choose({it: taken[0::2] for it, taken in self.seconds.items()}) or Found(*next(iter(self.seconds)))

    def beside_the_best(self, found: Found) -> float:
        """Its time in the rounds that had no part in choosing, over that of the best of the grid in them."""
        its = Candidate(found.engine, found.query_chunk, found.kv_chunk)
        judged = {it: statistics.median(taken[1::2]) for it, taken in self.seconds.items()}
        return judged[its] / min(judged.values()) if its in judged else math.nan


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; of short ones the least of several, for what disturbs them makes none faster."""
    taken = [meter.measure(call, device)[0]]
    while sum(taken) < SHORT:
        taken.append(meter.measure(call, device)[0])
    return min(taken)


def candidates(problem: Problem) -> dict[Candidate, Settings]:
    """Every exact engine that can, with the sizes that it picks, and with each tile of the grid."""
    able: dict[Candidate, Settings] = {}
    for engine in order.candidates("automatic"):
        plain = Settings(engine=engine.NAME, measure=False)
        if plan_problem(problem, plain).engine != engine.NAME:
            continue
        able[Candidate(engine.NAME)] = plain
        if engine.SPLITS_KEYS:
            for queries in QUERY_CHUNKS:
                for keys in (size for size in KV_CHUNKS if size <= CHUNK_MAX):
                    tiled = Settings(engine=engine.NAME, query_chunk=queries, kv_chunk=keys, measure=False)
                    able[Candidate(engine.NAME, queries, keys)] = tiled
    first = plan_problem(problem, Settings(measure=False)).engine
    return dict(sorted(able.items(), key=lambda item: item[0] != Candidate(first)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.grid", description=(__doc__ or "").replace("`", ""))
    parser.add_argument("--shape", action="append", help=f"as in bench, several times (default: {', '.join(SHAPES)})")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=10, help="of all candidates (default: %(default)s)"
    )
    parser.add_argument("--device", type=arguments.device, help="such as cuda (default: the best this machine has)")
    parser.add_argument("--dtype", choices=arguments.DTYPES, default="float32", help="(default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    device = torch.device(given.device) if given.device else arguments.best_device()
    grids = []
    for text in given.shape or SHAPES:
        shape = parse_shape(text)
        query, keys = ((shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys))
        problem = Problem.from_shapes(query, keys, keys, getattr(torch, given.dtype), device)
        grids.append(Grid(shape, problem))
    start = time.perf_counter()
    found = rounds.measured([grid.problem for grid in grids], Settings(), rounds.seconds_for(device))
    waited = time.perf_counter() - start
    with torch.no_grad():
        for grid in grids:
            grid.measure(given.rounds, found.get(class_of(grid.problem)))
    say(tables.of_cells([_cells(grid, found) for grid in grids], left={"Shape", "Chosen", "Automatic's own"}))
    chosen = [grid.beside_the_best(grid.chosen()) for grid in grids]
    say(f"\nChosen: {statistics.geometric_mean(chosen):.3f} × the best in the mean, {max(chosen):.3f} at most.")
    say(f"Automatic measured for {waited:.1f} s before.")


def _cells(grid: Grid, found: dict[Class, Found]) -> dict[str, str]:
    chosen, own = grid.chosen(), found.get(class_of(grid.problem))
    return {
        "Shape": grid.shape.label,
        "Compared": str(len(grid.seconds)),
        "Best": tables.seconds(min(statistics.median(taken[1::2]) for taken in grid.seconds.values())),
        "Chosen": _words(chosen),
        "× best": tables.ratio(grid.beside_the_best(chosen)),
        "Automatic's own": _words(own) if own else "not enough time",
        "its × best": tables.ratio(grid.beside_the_best(own)) if own else "",
    }


def _words(found: Found) -> str:
    return found.engine + (f" {found.query_chunk} x {found.kv_chunk}" if found.has_tile else "")


if __name__ == "__main__":
    main()
