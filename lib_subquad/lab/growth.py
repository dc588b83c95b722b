"""`python -m lib_subquad growth`: how workspace and time per score change as the number of tokens doubles.

Scores grow with the square of the tokens; a chunked attention's workspace must not grow at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..engines import order
from . import cli, tables
from .bench import busyness, command, heading, how_often, others, peers_argument
from .measure import Job, Measurement, measure
from .peers import find as find_peer
from .results import Result, measure_interleaved
from .shapes import Shape

PEERS = ("automatic", order.names()[-1])  # the latter splits keys, so that its workspace does not grow
BASE_TOKENS = 4096  # what time per score is compared with: a 512² image in SD 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, metavar, words in (
        ("--heads", 16, "N", "heads of the batch; fewer take less time"),
        ("--width", 40, "CHANNELS", "of a head"),
        ("--smallest", 1024, "TOKENS", "where to begin"),
        ("--largest", 65536, "TOKENS", "where to end; 65536 are a 2048² image in SD 1.5"),
    ):
        words += " (default: %(default)s)"
        parser.add_argument(name, type=cli.positive, default=default, metavar=metavar, help=words)
    parser.add_argument(
        "--peers",
        type=peers_argument,
        default=list(PEERS),
        metavar="A,B",
        help=f"what to measure, as in bench (default: {','.join(PEERS)})",
    )
    cli.add_measuring_arguments(parser, repeats=3, timeout=1800)
    cli.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.smallest > args.largest:
        raise cli.UserError(f"--smallest {args.smallest} is more than --largest {args.largest}")
    if args.plot:
        cli.need("matplotlib", "--plot")
    shapes = [Shape("", 1, args.heads, tokens, tokens, args.width) for tokens in doubling(args.smallest, args.largest)]
    before = cli.environment(args.device, args.threads)

    def measure_one(shape: Shape, peer: str) -> Measurement:
        job = Job(peer, shape, args.dtype, args.device, threads=args.threads)
        return measure(job, args.timeout, None if args.calm is None else args.calm / 100)

    with cli.progress_bar(len(shapes) * len(args.peers) * args.repeats) as progress:
        results, complete = measure_interleaved(
            shapes, args.peers, args.repeats, measure_one, progress, lambda peer: find_peer(peer).name
        )
    record = {
        "command": command(),
        **before,
        "others": others(results),
        "load_after": cli.load(),
        "dtype": args.dtype,
        "scores": "normal",
        "mode": "attention",
        "results": [result.as_json() for result in results],
    }
    try:  # files first: who reads only the first lines closes the pipe
        if args.json:
            cli.write_json(args.json, record)
        if args.plot:
            from .plot import draw_growth

            title = f"{args.heads} heads × {args.width}, {heading(record)}"
            with cli.writing(args.plot):
                draw_growth(results, title).savefig(args.plot)
    finally:
        legend = f"{how_often(results)}workspace: beside inputs and result; planned: what the plan promised."
        print(heading(record), "", growth_table(results), "", legend + busyness(record), "", sep="\n")
        print(f"`{record['command']}`")
    return cli.exit_status("growth", results, complete)


def doubling(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes


def growth_table(results: Sequence[Result]) -> str:
    """Peer by peer, the tokens doubling."""
    notes = any(result.reason for result in results)
    headings = ["peer", "tokens", "time", "spread", "ns a score", f"beside {BASE_TOKENS}", "workspace", "planned"]
    rows = []
    for peer in dict.fromkeys(result.peer for result in results):
        found = [result for result in results if result.peer == peer]
        base = next((result for result in found if result.shape.queries == BASE_TOKENS), None)
        for result in found:
            first = result is found[0]
            planned = result.good[0].plan_bytes if result.good else None
            row = [
                peer if first else "",
                f"{result.shape.queries:,}",
                tables.seconds(result.seconds),
                tables.spread(result.low, result.high),
                _number(_nanoseconds(result)),
                _change(_nanoseconds(result), None if base is None else _nanoseconds(base)),
                tables.mebibytes(result.workspace_bytes),
                tables.mebibytes(planned),
            ]
            rows.append(row + [tables.short(result.reason)] * notes)
    return tables.table(headings + ["note"] * notes, rows, left={"peer", "note"})


def _nanoseconds(result: Result) -> float | None:
    return None if result.seconds is None else result.seconds / result.shape.scores * 1e9


def _number(value: float | None) -> str:
    return tables.NOTHING if value is None else f"{value:.3f}"


def _change(value: float | None, base: float | None) -> str:
    return tables.NOTHING if value is None or base is None else f"{(value / base - 1) * 100:+.0f} %"
