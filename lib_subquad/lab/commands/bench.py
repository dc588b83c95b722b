"""`python -m lib_subquad bench`: ways to compute attention, or the VAE, side by side, in one run.

Every measurement is made in a process of its own; rounds of all peers alternate, and medians are shown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ...console import UserError
from ..bench import halves, overhead
from ..bench.capture import capture
from ..bench.peers import KERNELS, PEERS, REFERENCE, find
from ..bench.plot import draw_bench
from ..bench.report import heading, report, vae_report
from ..bench.shapes import DEFAULT, SHAPE_HELP, Shape, parse_shape
from ..bench.work import Job
from ..explain import sizes
from . import files, measuring
from .arguments import argument, count

# A whole layer of SD 1.5 at 512²: 4,096 tokens of 320 channels.
LAYER_SHAPES = ("sd15-512", "sd15-512-cross77")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        type=argument(parse_shape),
        metavar="SHAPE",
        help=f"{SHAPE_HELP}; may be repeated (default: {', '.join(DEFAULT)}; with --layer {', '.join(LAYER_SHAPES)})",
    )
    parser.add_argument(
        "--peers",
        type=measuring.peers_argument,
        default=[name for name in PEERS if name not in KERNELS],
        metavar="A,B",
        help=f"only these of {', '.join(PEERS)} (default: all but {', '.join(KERNELS)})",
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
        "--ways",
        type=_ways,
        default=list(halves.WAYS),
        metavar="A,B",
        help=f"with --vae only these of {', '.join(halves.WAYS)} (default: all)",
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
    measuring.add_arguments(parser, repeats=5, timeout=600)
    parser.add_argument(
        "--busy",
        type=count,
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
        "--vae",
        action="append",
        nargs="?",
        type=argument(halves.parse_picture),
        metavar="SIZE",
        help="measure Stable Diffusion's VAE all at once and in bands: SIZE is "
        f"{halves.PICTURE_HELP}; may be repeated (default: {', '.join(halves.DEFAULT)})",
    )
    what.add_argument(
        "--capture",
        metavar="CHECKPOINT.safetensors",
        help="measure with queries, keys and values out of this model's U-Net (SD 1 or 2; needs ldm and safetensors; "
        "default: random ones)",
    )
    parser.add_argument(
        "--size",
        default="512",
        metavar="PIXELS",
        help="of the image for --capture: 512 or 512x768 (default: %(default)s)",
    )
    files.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.busy and (args.calm is not None or args.overhead):
        raise UserError(f"--busy has no meaning with --{'overhead' if args.overhead else 'calm'}")
    if args.overhead:
        print(f"{overhead.report(overhead.measured(args.device))}\n\n`{measuring.command()}`")
        return 0
    peers = list(dict.fromkeys(args.peers + args.peer))
    names = [find(peer).name for peer in peers]
    against = list(dict.fromkeys(args.against or [REFERENCE]))
    if len(set(names)) < len(names):
        raise UserError("two peers have the same name; rename a file")
    for name in against if args.against else ():
        if name not in names:
            raise UserError(f"--against {name}: it is not measured; expected one of {', '.join(names)}")
    if args.vae:
        return _run_vae(args)
    if args.shape and args.capture:
        raise UserError("--shape has no meaning with --capture: the model's own shapes are measured")
    files.check(args)
    mode = "training" if args.training else "layer" if args.layer else "attention"
    about = {name: getattr(args, name) for name in ("scores", "repeats")}
    with tempfile.TemporaryDirectory(prefix="subquad_bench_") as folder:
        captured = _shapes(args, Path(folder))

        def job(shape: Shape, peer: str) -> Job:
            return Job(peer, shape, args.dtype, args.device, args.scores, mode, captured[shape], args.threads)

        found = measuring.measured(args, list(captured), peers, job, busy=args.busy, **about, mode=mode)
    title, text = heading(found.record), report(found.record, found.results, against)
    return measuring.tell(args, found, lambda: draw_bench(found.results, title), text)


def _run_vae(args: argparse.Namespace) -> int:
    if args.shape:
        raise UserError("--shape has no meaning with --vae, which takes the size of a picture itself")
    files.check(args)
    named = [picture for picture in args.vae if picture is not None]
    pictures = list(dict.fromkeys(named or map(halves.parse_picture, halves.DEFAULT)))

    def job(picture: halves.Picture, way: str) -> halves.HalfJob:
        return halves.HalfJob(way, picture, args.dtype, args.device, args.threads)

    about = {"scores": "normal", "mode": "vae", "repeats": args.repeats}
    found = measuring.measured(args, pictures, args.ways, job, busy=args.busy, names=str, **about)
    title, text = heading(found.record), vae_report(found.record, found.results)
    return measuring.tell(args, found, lambda: draw_bench(found.results, title), text)


@argument
def _ways(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or not set(names) <= set(halves.WAYS):
        raise ValueError(f"{text!r}; expected some of {', '.join(halves.WAYS)}")
    return names


def _shapes(args: argparse.Namespace, folder: Path) -> Mapping[Shape, str | None]:
    """What to measure: shape -> a file of its tensors, None for random ones."""
    size = sizes.parse_size(args.size, sizes.STEP)
    if args.capture:
        return capture(args.capture, size, folder)
    defaults = LAYER_SHAPES if args.layer else DEFAULT
    return dict.fromkeys(args.shape or map(parse_shape, defaults))


@argument
def _file_peer(text: str) -> str:
    if text in PEERS:
        raise ValueError(f"{text!r} is no file; name it in --peers")
    find(text)
    return measuring.whole_path(text)
