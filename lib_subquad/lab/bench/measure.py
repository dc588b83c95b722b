"""One measurement: a peer, a shape, in a process of its own (`python -m lib_subquad.lab.bench.measure`).

A call on a small problem loads libraries; the next one, at full size, tells the peak memory and is the warm-up of those
that are timed. A call that takes seconds needs no warm-up, and its time is taken at once.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ... import console
from ... import device as devices
from ...plan import plan_problem
from .. import meter
from ..machine import bring_backend, processor_seconds, share_of_others
from ..process import Failed, ask, serve, stay_within_memory
from .peers import Unsupported, find
from .shapes import Shape
from .work import WORK, Job, Work

LONG_SECONDS = 2.0
CALM_TRIES = 10
TIMED_SECONDS, FEWEST_CALLS, MOST_CALLS = 0.5, 3, 100


@dataclass(frozen=True)
class Measurement:
    """What came of it; with a `reason` nothing was measured.

    `seconds` is the median of the calls that were timed, `peak_bytes` the peak beside the inputs, result included.
    Errors are the largest absolute ones of a sample of rows against float64. `plan_bytes` is the workspace that the
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


def measure(job: Job, timeout: float | None = None, calm: float | None = None) -> Measurement:
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


def _measure_apart(job: Job, timeout: float | None) -> Measurement:
    try:
        return Measurement(**ask(__name__, dataclasses.asdict(job), timeout))
    except Failed as error:
        return Measurement(reason=str(error))


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    job = Job(**{**question, "shape": Shape(**question["shape"])})
    bring_backend(job.device)
    stay_within_memory(torch.device(job.device))
    return dataclasses.asdict(_measure_or_reason(job))


def _measure_or_reason(job: Job) -> Measurement:
    try:
        return _measure(job)
    except Unsupported as error:
        return Measurement(reason=str(error))
    except Exception as error:  # a peer may fail in any way: that is its result
        if devices.is_out_of_memory(error):
            return Measurement(reason="out of memory")
        return Measurement(reason=console.in_a_line(error))


def _measure(job: Job) -> Measurement:
    problem, peer, device = job.problem(), find(job.peer), torch.device(job.device)
    attend = peer.make(problem)
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    work = WORK[job.mode](job, peer, attend)
    plan = None if peer.settings is None else plan_problem(problem, peer.settings)
    work.small()()
    before = processor_seconds()
    first, peak = _peak_call(work, device)
    timed = [first]
    if first < LONG_SECONDS:
        before, timed = processor_seconds(), []
        while len(timed) < FEWEST_CALLS or (sum(timed) < TIMED_SECONDS and len(timed) < MOST_CALLS):
            timed.append(meter.measure(work, device)[0])
    others = share_of_others(before, processor_seconds())
    error, gradient_error = work.errors()
    return Measurement(
        seconds=statistics.median(timed),
        calls=len(timed),
        peak_bytes=peak,
        result_bytes=problem.output_bytes,
        error=error,
        gradient_error=gradient_error,
        plan="" if plan is None else str(plan),
        plan_bytes=None if plan is None else plan.workspace_bytes,
        others=others,
    )


def _peak_call(work: Work, device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes) of a first call at full size."""

    def call() -> object:
        result = work()
        work.keep(result)
        return result

    meter.give_back_freed_memory()
    seconds, peak = meter.measure(call, device)
    if peak is None and device.type == "cpu":
        with meter.PeakMemory(device, sampled=True) as sampled:  # a call of its own: looking takes time
            work()
        peak = sampled.bytes
    return seconds, peak


if __name__ == "__main__":
    serve(_answer)
