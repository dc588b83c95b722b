"""A soak: random images while another thread changes settings, each compared with the one made without subquad.

python -m tools.soak --images 1000                        on the demo host
python -m tools.soak --url http://127.0.0.1:7860 --minutes 15 --pid PID    on a running web UI (--api)
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
from PIL import Image

from lib_subquad.settings import OPTIONS

FARTHEST = 2  # of 255, anywhere
REFERENCE = "None"
BROKEN = ("text", "", "64", -1, 10**9, 0.5, True, None, [], {"a": 1}, float("nan"), float("inf"))
LEGAL = {
    "query_chunk": (0, 7, 16, 64, 1000, 16384),
    "kv_chunk": (0, 7, 16, 64, 100, 16384),
    "memory_limit": (1, 20, 70, 100),
} | {name: option.choices or (True, False) for name, option in OPTIONS.items() if not option.maximum}


@dataclass(frozen=True)
class Request:
    prompt: str
    seed: int
    width: int
    height: int
    steps: int


@dataclass
class Report:
    """What a soak saw. `resident` holds the host's resident memory, in bytes, after every image."""

    images: int = 0
    farthest: int = 0
    changes: int = 0
    selections: int = 0
    failures: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes that the last quarter keeps more than the second, when everything has been warm for a while."""
        quarter = max(len(self.resident) // 4, 1)
        second, last = self.resident[quarter : 2 * quarter], self.resident[-quarter:]
        return int(np.median(last) - np.median(second)) if second else 0

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.changes} settings changed meanwhile, {self.selections} optimizers selected, "
            f"farthest {self.farthest}/255, {len(self.failures)} failures, "
            f"memory {self.resident[-1] / 2**20:.0f} MiB, growth {self.growth / 2**20:+.1f} MiB"
        )


class DemoHost:
    """The demo in this process."""

    def __init__(self) -> None:
        from demo import host

        host.start(optimizer="subquad")
        self._host = host
        self.ours = host.title_of("subquad")
        self.others = [host.title_of("sdp"), REFERENCE]
        self.process = psutil.Process()

    def generate(self, request: Request, override: dict) -> np.ndarray:
        from demo.generate import generate

        return np.asarray(generate(**vars(request), override_settings=override).image)

    def set(self, key: str, value) -> None:
        from modules import shared

        shared.opts.set(key, value)

    def select(self, title: str) -> None:
        self._host.use_optimizer(title)


class WebUI:
    """A running web UI, over its API."""

    def __init__(self, url: str, pid: int | None) -> None:
        self.url = url.rstrip("/")
        self.process = psutil.Process(pid) if pid else None
        self.ours = "subquad - fast attention within a memory limit"
        self.others = ["sdp - scaled dot product", "sub-quadratic", "Doggettx", REFERENCE]

    def generate(self, request: Request, override: dict) -> np.ndarray:
        # the web UI answers with the request itself, in JSON, which has no words for these numbers
        override = {key: value for key, value in override.items() if str(value) not in ("nan", "inf")}
        body = {**vars(request), "sampler_name": "Euler", "override_settings": override}
        answer = self._post("/sdapi/v1/txt2img", body)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB"))

    def set(self, key: str, value) -> None:
        self._post("/sdapi/v1/options", {key: value})

    def select(self, title: str) -> None:
        self._post("/sdapi/v1/options", {"cross_attention_optimization": title})

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)


def soak(host, rounds: Iterator[int], pause: float = 0.005, seed: int = 0, side: int = 128) -> Report:
    """Make an image for every one of `rounds`; `pause` is the time in seconds from one change of settings to the next.

    `side` is the longest of an image. A failure of the host is recorded, and the soak goes on.
    """
    report, draw = Report(), random.Random(seed)
    sides = range(64, side + 1, 64)
    pool = [
        Request(f"prompt {i}", i, width, height, steps=1 + i % 2)
        for i, (width, height, _) in enumerate(itertools.product(sides, sides, range(2)))
    ]
    host.select(REFERENCE)
    expected = {request: host.generate(request, {}).astype(int) for request in pool}
    host.select(host.ours)
    done = threading.Event()
    changing = threading.Thread(target=_change_settings, args=(host, report, done, pause, random.Random(seed + 1)))
    changing.start()
    try:
        for round_ in rounds:
            request = draw.choice(pool)
            override = dict([_random_setting(draw)]) if draw.random() < 0.3 else {}
            try:
                if round_ % 10 == 9:
                    for title in (draw.choice(host.others), host.ours):
                        host.select(title)
                        report.selections += 1
                apart = np.abs(host.generate(request, override) - expected[request]).max()
            except Exception as error:
                report.failures.append(f"{request}, {override}: {type(error).__name__}: {error}")
                continue
            report.images += 1
            report.farthest = max(report.farthest, int(apart))
            if apart > FARTHEST:
                report.failures.append(f"{request}, {override}: {apart}/255 from the one made without subquad")
            report.resident.append(host.process.memory_info().rss if host.process else 0)
            if round_ % 100 == 99:
                print(report, flush=True)
    finally:
        done.set()
        changing.join()
    return report


def _change_settings(host, report: Report, done: threading.Event, pause: float, draw: random.Random) -> None:
    while not done.wait(draw.uniform(0, 2 * pause)):
        key, value = _random_setting(draw)
        try:
            host.set(key, value)
            report.changes += 1
        except Exception as error:
            report.failures.append(f"setting {key} to {value!r}: {type(error).__name__}: {error}")


def _random_setting(draw: random.Random) -> tuple[str, object]:
    name = draw.choice(list(OPTIONS))
    return f"subquad_{name}", draw.choice(BROKEN if draw.random() < 0.2 else LEGAL[name])


def _for_minutes(minutes: float) -> Iterator[int]:
    end = time.monotonic() + 60 * minutes
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="how many to make on the demo host (default: 1000)")
    parser.add_argument("--url", help="of a running web UI (default: the demo host)")
    parser.add_argument("--minutes", type=float, default=15, help="how long to drive the web UI (default: 15)")
    parser.add_argument("--pid", type=int, help="of the web UI, to watch its memory (default: not watched)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done at random (default: 0)")
    args = parser.parse_args(argv)
    if args.url:
        report = soak(WebUI(args.url, args.pid), _for_minutes(args.minutes), pause=0.1, seed=args.seed)
    else:
        report = soak(DemoHost(), iter(range(args.images)), seed=args.seed)
    print(report, *report.failures, sep="\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
