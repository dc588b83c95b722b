"""Where the host's complaints go: stderr, marked so that they stand out."""

import sys
import textwrap
import traceback


def report(message: str, *, exc_info: bool = False) -> None:
    """Print `message`, and the exception being handled if `exc_info`."""
    for line in message.splitlines():
        print("***", line, file=sys.stderr)
    if exc_info:
        print(textwrap.indent(traceback.format_exc(), "    "), file=sys.stderr)


def display(e: Exception, task: str, *, full_traceback: bool = False) -> None:
    """Print that `task` failed with `e`."""
    report(f"{task}: {type(e).__name__}: {e}")
    if full_traceback:
        traceback.print_exception(type(e), e, e.__traceback__)
