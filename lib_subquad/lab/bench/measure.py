"""One measurement: a peer, a shape, in a process of its own (`python -m lib_subquad.lab.bench.measure`).

A call on a small problem loads libraries; the next one, at full size, tells the peak memory and is the warm-up of those
that are timed. A call that takes seconds needs no warm-up, and its time is taken at once.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import console
from ... import device as devices
from .. import meter
from ..machine import bring_backend, processor_seconds, share_of_others
from ..process import Failed, ask, serve, stay_within_memory
from .halves import HalfJob, HalfWork
from .peers import Unsupported
from .work import Job, Work

JOBS: dict[str, type[Job] | type[HalfJob]] = {"attention": Job, "vae": HalfJob}
LONG_SECONDS = 2.0
CALM_TRIES = 10
TIMED_SECONDS, FEWEST_CALLS, MOST_CALLS = 0.5, 3, 100


@dataclass(frozen=True)
class Measurement:
    """What came of it; with a `reason` nothing was measured.

    `seconds` is the median of the calls that were timed, `processor` the processor time of one of them, of all threads,
    `peak_bytes` the peak beside the inputs, result included. Errors are the largest absolute ones of a sample of rows,
    or of a small picture, against float64. `plan_bytes` is the workspace that the
    plan promised, `plan` the plan in words; both only for this library's own engines. `others` is the share of the
    processors' time that other programs took while calls were timed, None where the system does not tell. `tries` says
    how often it was made until it was calm enough.
    """

    seconds: float = 0.0
    calls: int = 0
    peak_bytes: int | None = None
    result_bytes: int = 0
    error: float = 0.0
    gradient_error: float | None = None
    plan: str = ""
    plan_bytes: int | None = None
    others: float | None = None
    reason: str = ""
    tries: int = 1
    processor: float | None = None


def measure(job: Job | HalfJob, timeout: float | None = None, calm: float | None = None) -> Measurement:
    """The measurement, made in a process of its own.

    Where other programs took more than the share `calm` of the processors meanwhile, it is made again, and the calmest
    of `CALM_TRIES` counts: threads that wait for one another suffer far more from a busy machine than their share.
    """
    found, tries = _measure_apart(job, timeout), 1
    while tries < CALM_TRIES:
        if calm is None or found.reason or found.others is None or found.others <= calm:
            break
        again, tries = _measure_apart(job, timeout), tries + 1
        if not again.reason and again.others is not None and again.others < found.others:
            found = again
    return dataclasses.replace(found, tries=tries)


def _measure_apart(job: Job | HalfJob, timeout: float | None) -> Measurement:
    kind = next(name for name, made in JOBS.items() if isinstance(job, made))
    try:
        return Measurement(**ask(__name__, {"kind": kind, "job": dataclasses.asdict(job)}, timeout))
    except Failed as error:
        return Measurement(reason=str(error))


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    job = JOBS[question["kind"]].of(question["job"])
    bring_backend(job.device)
    stay_within_memory(torch.device(job.device))
    return dataclasses.asdict(_measure_or_reason(job))


def _measure_or_reason(job: Job | HalfJob) -> Measurement:
    try:
        return _measure(job)
    except Unsupported as error:
        return Measurement(reason=str(error))
    except Exception as error:  # a peer may fail in any way: that is its result
        if devices.is_out_of_memory(error):
            return Measurement(reason="out of memory")
        return Measurement(reason=console.in_a_line(error))


def _measure(job: Job | HalfJob) -> Measurement:
    device = torch.device(job.device)
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    work = job.work()
    work.small()()
    before = processor_seconds()
    first, processor, peak = _peak_call(work, device)
    timed = [(first, processor)]
    if first < LONG_SECONDS:
        before, timed = processor_seconds(), []
        while len(timed) < FEWEST_CALLS or (_sum(timed) < TIMED_SECONDS and len(timed) < MOST_CALLS):
            timed.append(_timed(work, device)[:2])
    others = share_of_others(before, processor_seconds())
    error, gradient_error = work.errors()
    plan, plan_bytes = work.promise
    return Measurement(
        seconds=statistics.median(seconds for seconds, _ in timed),
        calls=len(timed),
        peak_bytes=peak,
        result_bytes=work.result_bytes,
        error=error,
        gradient_error=gradient_error,
        plan=plan,
        plan_bytes=plan_bytes,
        others=others,
        processor=statistics.median(processor for _, processor in timed),
    )


def _sum(timed: Sequence[tuple[float, float]]) -> float:
    return sum(seconds for seconds, _ in timed)


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, float, int | None]:
    """(seconds, seconds of all processors, peak bytes) of a call."""
    before = time.process_time()
    seconds, peak = meter.measure(call, device)
    return seconds, time.process_time() - before, peak


def _peak_call(work: Work | HalfWork, device: torch.device) -> tuple[float, float, int | None]:
    """The same of a first call at full size."""

    def call() -> object:
        result = work()
        work.keep(result)
        return result

    meter.give_back_freed_memory()
    seconds, processor, peak = _timed(call, device)
    if peak is None and device.type == "cpu":
        with meter.PeakMemory(device, sampled=True) as sampled:  # a call of its own: looking takes time
            work()
        peak = sampled.bytes
    return seconds, processor, peak


if __name__ == "__main__":
    serve(_answer)
