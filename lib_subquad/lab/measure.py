"""One measurement: a peer, a shape, in a process of its own (`python -m lib_subquad.lab.measure`).

A call on a small problem loads libraries; the next one, at full size, tells the peak memory and is the warm-up of those
that are timed. A call that takes seconds needs no warm-up, and its time is taken at once.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import device as devices
from ..layers.ldm import cross_attention
from ..plan import plan_problem
from ..problem import Problem
from . import meter
from .peers import Attention, Peer, Unsupported, find
from .process import Failed, ask, serve
from .shapes import Shape

PEAKY = 5  # what queries and keys are multiplied by: most weights of the softmax then underflow
CONTEXT_WIDTH = 768  # of a prompt's tokens, in SD 1
LONG_SECONDS = 2.0
CALM_TRIES = 10
TIMED_SECONDS, FEWEST_CALLS, MOST_CALLS = 0.5, 3, 100
SMALL_QUERIES, SMALL_KEYS = 512, 1024
SAMPLE_ROWS, SAMPLE_HEADS = 32, 4


@dataclass(frozen=True)
class Job:
    """What to measure. `captured` is a file with query, key and value to use in place of random ones."""

    peer: str
    shape: Shape
    dtype: str = "float32"
    device: str = "cpu"
    scores: str = "normal"
    mode: str = "attention"
    captured: str | None = None
    threads: int | None = None

    def problem(self) -> Problem:
        shape = self.shape
        query, key = ((shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys))
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        return Problem.from_shapes(query, key, key, dtype, device, grad=self.mode == "training")

    @property
    def factor(self) -> int:
        return PEAKY if self.scores == "peaky" else 1


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


def _answer(question: dict) -> dict:
    job = Job(**{**question, "shape": Shape(**question["shape"])})
    _stay_within_memory(torch.device(job.device))
    return dataclasses.asdict(_measure_or_reason(job))


def _measure_or_reason(job: Job) -> Measurement:
    try:
        return _measure(job)
    except Unsupported as error:
        return Measurement(reason=str(error))
    except Exception as error:  # a peer may fail in any way: that is its result
        if devices.is_out_of_memory(error):
            return Measurement(reason="out of memory")
        first = (str(error).strip().splitlines() or [""])[0]
        return Measurement(reason=f"{type(error).__name__}: {first}")


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


# ---------------------------------------------------------------------------------------------------------- the work


class Inference:
    """Attention of three tensors. Called, it does the work and returns what came of it."""

    def __init__(self, job: Job, peer: Peer, attend: Attention) -> None:
        self.attend = attend
        self.query, self.key, self.value = _inputs(job)
        self.rows, self.sample = _sampled_rows(job.shape.queries), None

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.attend(self.query, self.key, self.value)

    def small(self) -> Callable[[], object]:
        """The same work on the first few tokens."""
        small = copy.copy(self)
        small.query = _first(self.query, SMALL_QUERIES)
        small.key, small.value = (_first(tensor, SMALL_KEYS) for tensor in (self.key, self.value))
        return small

    def keep(self, result: Tensor) -> None:
        """Keep the rows of a result that `errors` needs: few enough to be lost in its peak memory."""
        self.sample = _chosen(result, self.rows)

    def errors(self) -> tuple[float, float | None]:
        expected = _reference(self.query, self.key, self.value, self.rows)
        return _largest_difference(self.sample, expected), None


class Training(Inference):
    """Attention and its gradients."""

    def __init__(self, job: Job, peer: Peer, attend: Attention) -> None:
        super().__init__(job, peer, attend)
        self.grad = torch.randn_like(self.query)

    def __call__(self) -> tuple[Tensor, ...]:
        inputs = [tensor.requires_grad_() for tensor in (self.query, self.key, self.value)]
        output = self.attend(*inputs)
        output.backward(self.grad)  # autograd.grad() is refused by kernels that use torch's older checkpointing
        gradients = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        return output.detach(), *gradients

    def small(self) -> Callable[[], object]:
        small = super().small()
        small.grad = _first(self.grad, SMALL_QUERIES)
        return small

    def keep(self, result: tuple[Tensor, ...]) -> None:
        super().keep(result[0])
        self.gradient_sample = _chosen(result[1], self.rows)

    def errors(self) -> tuple[float, float | None]:
        query, key, value = (tensor.detach() for tensor in (self.query, self.key, self.value))
        grad = _chosen(self.grad, self.rows)
        expected, gradient = _reference(query, key, value, self.rows, grad)
        return _largest_difference(self.sample, expected), _largest_difference(self.gradient_sample, gradient)


class Layer:
    """The whole forward of ldm's CrossAttention: this library's own, or with another attention written in."""

    def __init__(self, job: Job, peer: Peer, attend: Attention) -> None:
        shape, device, dtype = job.shape, torch.device(job.device), getattr(torch, job.dtype)
        channels, self.settings, self.attend = shape.heads * shape.width, peer.settings, attend
        context_width = channels if shape.keys == shape.queries else CONTEXT_WIDTH
        self.layer = _cross_attention_class()(channels, context_width, shape.heads, shape.width).eval()
        for projection in (self.layer.to_q, self.layer.to_k, self.layer.to_v):
            nn.init.normal_(projection.weight, 0, projection.in_features**-0.5)  # tokens ~ N(0, 1) stay so
        for projection in (self.layer.to_q, self.layer.to_k):
            projection.weight.data *= job.factor
        self.layer.to(device, dtype)
        self.x = torch.randn(shape.batch, shape.queries, channels).to(device, dtype)
        self.context = None
        if shape.keys != shape.queries:
            self.context = torch.randn(shape.batch, shape.keys, context_width).to(device, dtype)
        self.rows, self.sample = _sampled_rows(shape.queries), None

    def __call__(self) -> Tensor:
        with torch.no_grad():
            if self.settings is not None:
                return cross_attention(self.layer, self.x, self.context, settings=self.settings)
            return written_in(self.layer, self.x, self.context, self.attend)

    def small(self) -> Callable[[], object]:
        small = copy.copy(self)
        small.x = self.x[:, :SMALL_QUERIES].clone()
        return small

    def keep(self, result: Tensor) -> None:
        self.sample = result[:, self.rows].clone()

    def errors(self) -> tuple[float, float | None]:
        layer = copy.deepcopy(self.layer).to("cpu", torch.float64)
        x, context = _exact(self.x), None if self.context is None else _exact(self.context)
        with torch.no_grad():
            expected = written_in(layer, x[:, self.rows], x if context is None else context, _exact_attention)
        return _largest_difference(self.sample, expected), None


def written_in(layer: nn.Module, x: Tensor, context: Tensor | None, attend: Attention) -> Tensor:
    """The forward of ldm's CrossAttention with another attention written in."""
    context = x if context is None else context
    query, key, value = (
        projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for projected in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    return layer.to_out(attend(query, key, value).transpose(1, 2).flatten(2))


def _cross_attention_class() -> type[nn.Module]:
    try:
        from ldm.modules.attention import CrossAttention
    except ImportError as error:
        raise Unsupported(f"no ldm: pip install stable-diffusion-sdkit --no-deps, and einops ({error})") from error
    return CrossAttention


WORK = {"attention": Inference, "training": Training, "layer": Layer}


def _inputs(job: Job) -> list[Tensor]:
    shape, device, dtype = job.shape, torch.device(job.device), getattr(torch, job.dtype)
    if job.captured is None:
        sizes = [(shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys, shape.keys)]
        tensors = [torch.randn(size) for size in sizes]
    else:
        tensors = torch.load(job.captured, weights_only=True)
    for tensor in tensors[:2]:
        tensor *= job.factor
    return [tensor.to(device, dtype) for tensor in tensors]


def _first(tensor: Tensor, tokens: int) -> Tensor:
    return tensor.detach()[:, :, :tokens].contiguous()


# ---------------------------------------------------------------------------------------------------- against float64


def _sampled_rows(queries: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(queries, generator=generator)[:SAMPLE_ROWS].sort().values


def _chosen(tensor: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """These rows of a few heads [heads, rows, width] of [batch, heads, tokens, width], from all over the batch."""
    batch, heads = tensor.shape[:2]
    count = batch * heads
    chosen = sorted({number * count // SAMPLE_HEADS for number in range(SAMPLE_HEADS)})
    return torch.stack([tensor[number // heads, number % heads][rows] for number in chosen])


def _reference(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, grad: Tensor | None = None):
    """Exact results of the sampled rows; with a gradient of the output also that of the queries."""
    query = _exact(_chosen(query, rows))
    key, value = (_exact(_chosen(tensor)) for tensor in (key, value))
    if grad is None:
        return _exact_attention(query, key, value)
    query.requires_grad_()
    output = _exact_attention(query, key, value)
    return output.detach(), torch.autograd.grad(output, query, _exact(grad))[0]


def _exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").double()  # not every accelerator has float64


def _largest_difference(one: Tensor, other: Tensor) -> float:
    return (_exact(one) - other).abs().max().item()  # NaN stays NaN


# ------------------------------------------------------------------------------------------------- the machine's state


def processor_seconds() -> tuple[float, float, float] | None:
    """(all that there was, what programs took of it, what this one took) since the start, where the system tells."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
    except (OSError, ValueError, AttributeError):  # only Linux has the file, and Windows has no sysconf
        return None
    own = os.times()
    return sum(seconds), sum(seconds) - seconds[3] - seconds[4], own.user + own.system  # idle, and waiting for disks


def share_of_others(before: tuple | None, after: tuple | None) -> float | None:
    if before is None or after is None or after[0] == before[0]:
        return None
    everything, busy, own = (late - early for early, late in zip(before, after))
    return min(max(0.0, (busy - own) / everything), 1.0)


# ------------------------------------------------------------------------------------------------------------- memory


def _peak_call(work, device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes) of a first call at full size."""

    def call() -> object:
        result = work()
        work.keep(result)
        return result

    _give_back_freed_memory()
    seconds, peak = meter.measure(call, device)
    if peak is None and device.type == "cpu":
        peak = _sampled_peak(work)
    return seconds, peak


def _give_back_freed_memory() -> None:
    """glibc keeps what was freed, and what it keeps would pass for memory that the next call does not need."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _sampled_peak(call: Callable[[], object]) -> int | None:
    """The peak of resident memory, looked at a thousand times a second, where no high-water mark can be reset."""
    try:
        import psutil
    except ImportError:
        print("psutil is not installed: no peak memory on this system")
        return None
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    del result
    return peak - before


def _stay_within_memory(device: torch.device) -> None:
    """Make a peer that wants too much fail to allocate, rather than have the system end some process."""
    if device.type != "cpu" or sys.platform != "linux":  # accelerators' drivers map far more than they use
        return
    import resource

    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[5]) * resource.getpagesize()
        limit, hard = used + devices.free_bytes(device), resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    serve(_answer)
