"""What `bench` and `growth` do alike: measure peers on shapes, save what came of it and print it."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import machine
from ..bench.halves import HalfJob
from ..bench.measure import Measurement, measure
from ..bench.peers import PEERS, find
from ..bench.report import others
from ..bench.results import Result, measure_interleaved
from ..bench.work import Job
from ..process import busy_programs
from . import files
from .arguments import DTYPES, argument, device, percent, positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measured:
    """What came of it: in results and, with all that it depends on, as JSON; `complete` unless Ctrl-C ended it."""

    results: list[Result]
    record: dict[str, object]
    complete: bool


def add_arguments(parser: argparse.ArgumentParser, repeats: int, timeout: int) -> None:
    """Where and how often to measure, with these defaults."""
    parser.add_argument(
        "--device", type=device, default="cpu", help="such as cpu, cuda, cuda:1, xpu (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=positive, default=repeats, metavar="N", help="rounds of all peers (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the processor (default: torch's choice)")
    parser.add_argument(
        "--calm",
        type=percent,
        metavar="PERCENT",
        help="measure again, up to ten times, while other programs take more than this of the processors "
        "(default: never again)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=timeout,
        metavar="SECONDS",
        help="the longest that one measurement may take (default: %(default)s)",
    )


@argument
def peers_argument(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        find(name)
    if not names:
        raise ValueError(f"{text!r}; expected names of peers")
    return [whole_path(name) for name in names]


def whole_path(name: str) -> str:
    return name if name in PEERS else str(Path(name).resolve())


def command() -> str:
    return "python -m lib_subquad " + shlex.join(sys.argv[1:])


def measured(
    arguments: argparse.Namespace,
    shapes: Sequence[Any],
    peers: Sequence[str],
    job: Callable[[Any, str], Job | HalfJob],
    busy: int = 0,
    names: Callable[[str], str] = lambda peer: find(peer).name,
    **about: object,
) -> Measured:
    """`job(shape, peer)` of every shape and peer, measured in rounds beside so many `busy` programs; `about` is what
    the record says of it beside, `names` gives a peer's."""
    before = machine.environment(arguments.device, arguments.threads)

    def measure_one(shape: Any, peer: str) -> Measurement:
        calm = None if arguments.calm is None else arguments.calm / 100
        return measure(job(shape, peer), arguments.timeout, calm)

    total = len(shapes) * len(peers) * arguments.repeats
    with busy_programs(busy), _progress_bar(total) as progress:
        results, complete = measure_interleaved(shapes, peers, arguments.repeats, measure_one, progress, names)
    record = {
        "command": command(),
        **before,
        "others": others(results),
        "load_after": machine.load(),
        "dtype": arguments.dtype,
        "busy": busy,
        **about,
        "results": [result.as_json() for result in results],
    }
    return Measured(results, record, complete)


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[str | None], None]]:
    """Gives a function that shows what is being done, or with None counts it as done."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("tqdm is not installed: no progress bar", file=sys.stderr)
        yield lambda what: None
        return
    with tqdm(total=total, unit="run", dynamic_ncols=True, leave=False, file=sys.stderr) as bar:
        yield lambda what: bar.update() if what is None else bar.set_description(what)


def tell(arguments: argparse.Namespace, found: Measured, draw: Callable[[], Figure], text: str) -> int:
    """Save and print it; the exit status of the command. Where that is no success, stderr says why."""
    try:  # files first: who reads only the first lines closes the pipe
        files.save(arguments, found.record, draw)
    finally:
        print(text)
    if not found.complete:
        print("stopped: the table holds what was measured until then", file=sys.stderr)
        return 130
    if any(result.good for result in found.results):
        return 0
    reasons = list(dict.fromkeys(result.reason for result in found.results))
    why = reasons[0] if len(reasons) == 1 else "the table's notes say why"
    print(f"{arguments.command}: nothing was measured: {why}", file=sys.stderr)
    return 1
