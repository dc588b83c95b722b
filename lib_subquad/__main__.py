"""`python -m lib_subquad COMMAND`: each command is a module with add_arguments(parser) and run(args) -> exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys

from .console import UserError
from .lab.commands import bench, doctor, growth, lab, order, plan, report

COMMANDS = {
    "plan": (plan, "how attention will be computed for a checkpoint and an image size"),
    "lab": (lab, "measure a checkpoint's shapes over engines and chunk sizes, recommend the best"),
    "order": (order, "what automatic goes by on this device: show it, measure it, forget it"),
    "bench": (bench, "measure ways to compute attention side by side"),
    "growth": (growth, "measure attention as the number of tokens doubles"),
    "doctor": (doctor, "which engine each kind of call gets on this device, why, and what would help"),
    "report": (report, "what to paste into a report: the device, every engine's reasons, small calls checked"),
}


READER_GONE = 128 + 13  # as a shell tells of a program that SIGPIPE ended


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 2 when something the user gave cannot be used.

    Where nobody reads on (`plan … | head -1`) it ends without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no "×" shows "?" instead of failing
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # here, for what a pipe refuses when Python ends cannot be caught
                sys.stdout.flush()
    except OSError as error:
        if not _nobody_reads(error):
            raise
        _discard_output()
        return READER_GONE


def _run(argv: list[str] | None) -> int:
    args = _parse(argv)
    try:
        return COMMANDS[args.command][0].run(args)
    except UserError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _nobody_reads(error: OSError) -> bool:
    windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def _discard_output() -> None:
    """Let what a closed pipe has not taken go nowhere, so that Python has nothing to complain of when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the command's own usage helps, not this one's
        commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """(the parser, that of each command)."""
    parser = argparse.ArgumentParser("python -m lib_subquad", description="Exact attention in chunks: what it costs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, words) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=words, description=(module.__doc__ or "").replace("`", "")))
    return parser, commands.choices


if __name__ == "__main__":
    sys.exit(main())
