"""`python -m lib_subquad COMMAND`: each command is a module with add_arguments(parser) and run(args) -> exit status."""

from __future__ import annotations

import argparse
import sys

from .lab import bench, growth, lab_command, plan_command

COMMANDS = {
    "plan": (plan_command, "how attention will be computed for a checkpoint and an image size"),
    "lab": (lab_command, "measure a checkpoint's shapes over engines and chunk sizes, recommend the best"),
    "bench": (bench, "measure ways to compute attention side by side"),
    "growth": (growth, "measure attention as the number of tokens doubles"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 2 when something the user gave cannot be used."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no "×" shows "?" instead of failing
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        return COMMANDS[args.command][0].run(args)
    except ValueError as error:  # something the user gave; the message is a sentence for them
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lib_subquad", description="Exact attention in chunks: what it costs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, words) in COMMANDS.items():
        module.add_arguments(
            commands.add_parser(
                name,
                help=words,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
