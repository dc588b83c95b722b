"""`python -m lib_subquad bench`: ways to compute attention, side by side, in one run.

Every measurement is made in a process of its own; rounds of all peers alternate, and medians are shown.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import cli, overhead, tables
from .capture import capture
from .measure import Job, Measurement, measure
from .peers import PEERS, REFERENCE
from .peers import find as find_peer
from .process import busy_programs
from .results import Result, find, geometric_mean, measure_interleaved
from .shapes import DEFAULT, SHAPE_HELP, Shape, parse_shape

# A whole layer of SD 1.5 at 512²: 4,096 tokens of 320 channels.
LAYER_SHAPES = ("sd15-512", "sd15-512-cross77")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        type=cli.argument(parse_shape),
        metavar="SHAPE",
        help=f"{SHAPE_HELP}; may be repeated (default: {', '.join(DEFAULT)}; with --layer {', '.join(LAYER_SHAPES)})",
    )
    parser.add_argument(
        "--peers",
        type=peers_argument,
        default=list(PEERS),
        metavar="A,B",
        help=f"only these of {', '.join(PEERS)} (default: all)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        type=_file_peer,
        default=[],
        metavar="FILE.py",
        help="a file with an efficient_dot_product_attention, such as the web UI's modules/sub_quadratic_attention.py; "
        "may be repeated (default: none)",
    )
    parser.add_argument(
        "--against",
        action="append",
        metavar="PEER",
        help=f"compare with this peer (a file's name without .py); may be repeated (default: {REFERENCE})",
    )
    parser.add_argument(
        "--scores",
        choices=("normal", "peaky"),
        default="normal",
        help="peaky: queries and keys five times as large, so that most weights underflow (default: %(default)s)",
    )
    cli.add_measuring_arguments(parser, repeats=5, timeout=600)
    parser.add_argument(
        "--busy",
        type=_count,
        default=0,
        metavar="N",
        help="run N other programs meanwhile, each of which keeps a core busy (default: %(default)s)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--training", action="store_true", help="measure the forward and backward pass")
    what.add_argument(
        "--layer", action="store_true", help="measure the whole forward of ldm's CrossAttention, projections included"
    )
    what.add_argument(
        "--overhead", action="store_true", help="measure what a small call costs beside PyTorch's function, and no more"
    )
    what.add_argument(
        "--capture",
        metavar="CHECKPOINT.safetensors",
        help="measure with queries, keys and values out of this model's U-Net (SD 1 or 2; needs ldm and safetensors; "
        "default: random ones)",
    )
    parser.add_argument(
        "--size",
        type=cli.positive,
        default=512,
        metavar="PIXELS",
        help="side of the image for --capture (default: %(default)s)",
    )
    cli.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.busy and (args.calm is not None or args.overhead):
        raise cli.UserError(f"--busy has no meaning with --{'overhead' if args.overhead else 'calm'}")
    if args.overhead:
        print(f"{overhead.report(overhead.measured(args.device))}\n\n`{command()}`")
        return 0
    peers = list(dict.fromkeys(args.peers + args.peer))
    names = [find_peer(peer).name for peer in peers]
    against = list(dict.fromkeys(args.against or [REFERENCE]))
    if len(set(names)) < len(names):
        raise cli.UserError("two peers have the same name; rename a file")
    for name in against if args.against else ():
        if name not in names:
            raise cli.UserError(f"--against {name}: it is not measured; expected one of {', '.join(names)}")
    if args.shape and args.capture:
        raise cli.UserError("--shape has no meaning with --capture: the model's own shapes are measured")
    if args.plot:
        cli.need("matplotlib", "--plot")
    with tempfile.TemporaryDirectory(prefix="subquad_bench_") as folder:
        if args.capture:
            captured = capture(args.capture, args.size, Path(folder))
        else:
            defaults = LAYER_SHAPES if args.layer else DEFAULT
            captured = dict.fromkeys(args.shape or map(parse_shape, defaults))
        before = cli.environment(args.device, args.threads)
        with busy_programs(args.busy):
            results, complete = _measure_all(args, captured, peers)
    record = {
        "command": command(),
        **before,
        "others": others(results),
        "load_after": cli.load(),
        **{name: getattr(args, name) for name in ("dtype", "scores", "repeats", "busy")},
        "mode": _mode(args),
        "results": [result.as_json() for result in results],
    }
    try:  # files first: who reads only the first lines closes the pipe
        if args.json:
            cli.write_json(args.json, record)
        if args.plot:
            from .plot import draw_bench

            with cli.writing(args.plot):
                draw_bench(results, heading(record)).savefig(args.plot)
    finally:
        print(report(record, results, against))
    return cli.exit_status("bench", results, complete)


def _measure_all(
    args: argparse.Namespace, captured: dict[Shape, str | None], peers: Sequence[str]
) -> tuple[list[Result], bool]:
    def measure_one(shape: Shape, peer: str) -> Measurement:
        mode, file = _mode(args), captured[shape]
        job = Job(peer, shape, args.dtype, args.device, args.scores, mode, file, args.threads)
        return measure(job, args.timeout, None if args.calm is None else args.calm / 100)

    with cli.progress_bar(len(captured) * len(peers) * args.repeats) as progress:
        return measure_interleaved(
            list(captured), peers, args.repeats, measure_one, progress, lambda peer: find_peer(peer).name
        )


def _mode(args: argparse.Namespace) -> str:
    return "training" if args.training else "layer" if args.layer else "attention"


@cli.argument
def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r}; expected a whole number of at least 0")
    return int(text)


@cli.argument
def peers_argument(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        find_peer(name)
    if not names:
        raise ValueError(f"{text!r}; expected names of peers")
    return [_whole_path(name) for name in names]


@cli.argument
def _file_peer(text: str) -> str:
    if text in PEERS:
        raise ValueError(f"{text!r} is no file; name it in --peers")
    find_peer(text)
    return _whole_path(text)


def _whole_path(name: str) -> str:
    return name if name in PEERS else str(Path(name).resolve())


def command() -> str:
    return "python -m lib_subquad " + shlex.join(sys.argv[1:])


# --------------------------------------------------------------------------------------------------------- the report


def heading(record: dict) -> str:
    what = {"attention": "attention", "training": "forward and backward", "layer": "a whole CrossAttention layer"}
    parts = [what[record["mode"]], record["dtype"]]
    if record["scores"] != "normal":
        parts.append(f"{record['scores']} scores")
    if record.get("busy"):
        parts.append(f"beside {record['busy']} busy program{'s' * (record['busy'] > 1)}")
    threads = f", {record['threads']} thread{'s' * (record['threads'] > 1)}" if record["threads"] else ""
    return f"{', '.join(parts)}; {record['device']}{threads}, torch {record['torch']}"


def report(record: dict, results: Sequence[Result], against: Sequence[str]) -> str:
    """Everything that is printed when measuring is over."""
    lines = [heading(record), ""]
    lines.append(main_table(results, against))
    summary = summary_table(results, against)
    if summary:
        lines += ["", summary]
    lines += ["", _legend(record, results), "", f"`{record['command']}`"]
    return "\n".join(lines)


def main_table(results: Sequence[Result], against: Sequence[str]) -> str:
    notes = any(result.reason for result in results)
    gradients = any(result.gradient_error is not None for result in results)
    headings = ["shape", "peer", "time", "spread", *(f"× {name}" for name in against), "peak memory", "error"]
    headings += ["gradient error"] * gradients + ["note"] * notes
    rows, previous = [], None
    for result in results:
        row = [
            "" if result.shape == previous else result.shape.label,
            result.peer,
            tables.seconds(result.seconds),
            tables.spread(result.low, result.high),
            *(tables.ratio(result.ratio_to(find(results, result.shape, name))) for name in against),
            tables.mebibytes(result.peak_bytes),
            tables.error(result.error),
        ]
        rows.append(row + [tables.error(result.gradient_error)] * gradients + [tables.short(result.reason)] * notes)
        previous = result.shape
    return tables.table(headings, rows, left={"shape", "peer", "note"})


def summary_table(results: Sequence[Result], against: Sequence[str]) -> str:
    """Over all shapes: the geometric mean and the worst of each peer's ratios; empty where there is but one shape."""
    if len({result.shape for result in results}) < 2:
        return ""
    headings, rows = ["all shapes"], []
    for name in against:
        headings += [f"× {name}, mean", "worst", f"memory × {name}, worst"]
    for peer in dict.fromkeys(result.peer for result in results):
        row = [peer]
        for name in against:
            pairs = [(one, find(results, one.shape, name)) for one in results if one.peer == peer]
            times = [ratio for one, two in pairs if (ratio := one.ratio_to(two)) is not None]
            memory = [ratio for one, two in pairs if (ratio := one.memory_ratio_to(two)) is not None]
            row += [tables.ratio(geometric_mean(times)), tables.ratio(max(times, default=None))]
            row.append(tables.ratio(max(memory, default=None)))
        rows.append(row)
    return tables.table(headings, rows, left={headings[0]})


def _legend(record: dict, results: Sequence[Result]) -> str:
    once = any(len(result.good) == 1 for result in results)
    warning = " What was measured once is not to be trusted: times change from one round to the next." if once else ""
    return (
        f"{how_often(results)}ratios: medians of each round's own; peak memory: beside the inputs, result included; "
        f"error: the largest absolute one of a sample of rows against float64.{warning}{busyness(record)}"
    )


def how_often(results: Sequence[Result]) -> str:
    """How many measurements stand behind the times, in words; empty where there are none."""
    counts = sorted(len(result.good) for result in results if result.good)
    if not counts:
        return ""
    many = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
    again = sum(found.tries - 1 for result in results for found in result.good)
    calm = f" ({again} more were disturbed and made again)" if again else ""
    return f"time: median of {many} process{'es' * (counts[-1] > 1)}{calm}, spread: their least and most; "


def others(results: Sequence[Result]) -> list[float] | None:
    """The least, median and largest share of the processors that other programs took during a measurement."""
    shares = [found.others for result in results for found in result.good if found.others is not None]
    return [min(shares), statistics.median(shares), max(shares)] if shares else None


def busyness(record: dict) -> str:
    """What else the machine was doing, in words."""
    if record["threads"] is None or record["others"] is None:
        return ""
    least, median, most = (f"{share:.0%}" for share in record["others"])
    return (
        f" Other programs took {least} to {most} of the processors during a measurement ({median} in the median); load "
        f"average {record['load']} before, {record['load_after']} after."
    )
