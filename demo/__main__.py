"""The demo's command line."""

from __future__ import annotations

import argparse
import os
import sys

from demo.host import cache_folder, change_setting, install_modules, keep_data_in, start
from demo.inputs import check_output, check_steps, parse_setting, parse_size
from lib_subquad.console import UserError, say

PROMPT = "a lighthouse by the sea"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status is 1 when something the user gave cannot be used."""
    install_modules()
    args = _parser().parse_args(argv)
    try:
        run(args)
    except UserError as e:
        say(f"demo: {e}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Check what was typed before anything slow begins, then start the host and the page or the one generation."""
    size = parse_size(args.size)
    check_steps(args.steps)
    output = check_output(args.once) if args.once else None
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UserError(f"checkpoint {args.checkpoint!r}: there is no such file")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from modules.shared_cmd_options import cmd_opts

    vars(cmd_opts).update((name, value) for name, value in vars(args).items() if hasattr(cmd_opts, name))
    keep_data_in(args.data_dir or cache_folder())
    start(args.checkpoint, args.optimizer)
    from modules import shared

    for text in args.set:
        change_setting(*parse_setting(text, shared.opts))
    if output:
        from demo.once import once

        once(output, args.prompt, args.seed, size, args.steps)
    else:
        from demo.page import serve

        serve(args.port, args.prompt, args.seed, size, args.steps)


def _parser() -> argparse.ArgumentParser:
    from modules import cmd_args

    parser = argparse.ArgumentParser(
        "demo", description="A small host for the extension: loads it as the web UI does and makes images with it."
    )
    parser.add_argument(
        "--once", metavar="OUT.png", help="make one image without a browser, and exit (default: serve a page)"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a .safetensors file in the SD 1 layout (default: random weights)"
    )
    parser.add_argument("--optimizer", default="subquad", metavar="NAME", help="the entry to use (default: subquad)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting; may be repeated (default: every setting has its own)",
    )
    parser.add_argument(
        "--prompt",
        default=PROMPT,
        help="any text: with no text encoder, it only picks the image (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="another seed, another image (default: %(default)s)"
    )
    parser.add_argument("--size", default="256", help="256 or 512x384, multiples of 64 (default: 256)")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps (default: 8)")
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="where what was measured is kept for the next time (default: your cache folder, where the command line "
        "keeps it; without platformdirs it is not kept)",
    )
    parser.add_argument("--port", type=int, default=7861, help="of the page (default: 7861)")
    cmd_args.add_arguments(parser.add_argument_group("flags of the web UI"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
