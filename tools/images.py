"""How long whole images take on a running web UI, and how much memory, with each attention optimization in turn.

python -m tools.images --url http://127.0.0.1:7860 --pid PID --size 512 --steps 4

Rounds of all optimizations alternate; medians are shown, ratios are medians of each round's own. Memory is the most
that was resident during an image beyond what was before it (Linux only); glibc reuses blocks as it likes, and gives
exact peaks to a web UI started with MALLOC_MMAP_THRESHOLD_=262144 (slower).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib_subquad.lab import tables
from tools.soak import Request, WebUI

AGAINST = "sdp"


@dataclass
class Entry:
    """An optimization with the settings to use it with, and what its images took: seconds, and bytes."""

    name: str
    title: str
    settings: dict[str, object] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def entries(webui: WebUI) -> list[Entry]:
    sdp, sub_quadratic, *_ = webui.others
    return [
        Entry(AGAINST, sdp),
        Entry("sub-quadratic", sub_quadratic),
        Entry("subquad, automatic", webui.ours, {"subquad_engine": "automatic"}),
        Entry("subquad, portable", webui.ours, {"subquad_engine": "portable"}),
    ]


def measure(webui: WebUI, entry: Entry, request: Request, status: Path) -> None:
    webui.select(entry.title)
    for name, value in entry.settings.items():
        webui.set(name, value)
    status.with_name("clear_refs").write_text("5", encoding="utf-8")  # forgets the high-water mark: proc(5)
    before, start = _bytes(status, "VmRSS"), time.perf_counter()
    webui.generate(request, {})
    entry.seconds.append(time.perf_counter() - start)
    entry.peaks.append(_bytes(status, "VmHWM") - before)


def _bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def report(measured: list[Entry]) -> str:
    sdp, sub_quadratic = measured[:2]
    rows = [
        [
            entry.name,
            tables.seconds(statistics.median(entry.seconds)),
            tables.spread(min(entry.seconds), max(entry.seconds)),
            tables.ratio(_ratio(entry, sdp)),
            tables.ratio(_ratio(sub_quadratic, entry)),
            tables.memory(statistics.median(entry.peaks)),
        ]
        for entry in measured
    ]
    return tables.table(
        ["entry", "time", "spread", f"× {AGAINST}", "times as fast as sub-quadratic", "peak memory"], rows, {"entry"}
    )


def _ratio(one: Entry, other: Entry) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(one.seconds, other.seconds))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.images", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", required=True, help="of a running web UI, started with --api")
    parser.add_argument("--pid", type=int, required=True, help="of its process")
    parser.add_argument("--size", type=int, default=512, help="side of the image (default: 512)")
    parser.add_argument("--steps", type=int, default=4, help="of sampling (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of all optimizations (default: 3)")
    args = parser.parse_args(argv)
    webui = WebUI(args.url, args.pid)
    request = Request("a cat", 1, args.size, args.size, args.steps)
    status = Path(f"/proc/{args.pid}/status")
    measured = entries(webui)
    webui.generate(Request("warm", 1, args.size, args.size, 1), {})
    for number in range(args.rounds):
        for entry in measured if number % 2 == 0 else reversed(measured):
            measure(webui, entry, request, status)
            print(
                f"{entry.name}: {entry.seconds[-1]:.2f} s, {tables.memory(entry.peaks[-1])}",
                file=sys.stderr,
                flush=True,
            )
    print(f"{args.size}², {args.steps} steps, {args.rounds} rounds\n\n{report(measured)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
