"""`python -m lib_subquad growth`: how workspace and time per score change as the number of tokens doubles.

Scores grow with the square of the tokens; a chunked attention's workspace must not grow at all.
"""

from __future__ import annotations

import argparse

from ...console import UserError
from ...engines import order
from ..bench.plot import draw_growth
from ..bench.report import growth_report, heading
from ..bench.shapes import Shape
from ..bench.work import Job
from . import files, measuring
from .arguments import positive

PEERS = ("automatic", order.names()[-1])  # the latter splits keys, so that its workspace does not grow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, metavar, words in (
        ("--heads", 16, "N", "heads of the batch; fewer take less time"),
        ("--width", 40, "CHANNELS", "of a head"),
        ("--smallest", 1024, "TOKENS", "where to begin"),
        ("--largest", 65536, "TOKENS", "where to end; 65536 are a 2048² image in SD 1.5"),
    ):
        words += " (default: %(default)s)"
        parser.add_argument(name, type=positive, default=default, metavar=metavar, help=words)
    parser.add_argument(
        "--peers",
        type=measuring.peers_argument,
        default=list(PEERS),
        metavar="A,B",
        help=f"what to measure, as in bench (default: {','.join(PEERS)})",
    )
    measuring.add_arguments(parser, repeats=3, timeout=1800)
    files.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.smallest > args.largest:
        raise UserError(f"--smallest {args.smallest} is more than --largest {args.largest}")
    files.check(args)
    shapes = [Shape("", 1, args.heads, tokens, tokens, args.width) for tokens in doubling(args.smallest, args.largest)]

    def job(shape: Shape, peer: str) -> Job:
        return Job(peer, shape, args.dtype, args.device, threads=args.threads)

    found = measuring.measured(args, shapes, args.peers, job, scores="normal", mode="attention")
    title = f"{args.heads} heads × {args.width}, {heading(found.record)}"
    text = growth_report(found.record, found.results)
    return measuring.tell(args, found, lambda: draw_growth(found.results, title), text)


def doubling(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes
