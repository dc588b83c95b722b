"""The work that is measured: attention, its gradients, or a whole layer, on tensors of a shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...layers.ldm import CrossAttentionParts, cross_attention
from ...plan import plan_problem
from ...problem import Problem
from . import reference
from .peers import Attention, Peer, Unsupported, find
from .shapes import Shape

PEAKY = 5  # what queries and keys are multiplied by: most weights of the softmax then underflow
CONTEXT_WIDTH = 768  # of a prompt's tokens, in SD 1
SMALL_QUERIES, SMALL_KEYS = 512, 1024


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

    @classmethod
    def of(cls, question: dict[str, Any]) -> Job:
        """That of which this is `dataclasses.asdict`."""
        return cls(**{**question, "shape": Shape(**question["shape"])})

    def work(self) -> Work:
        """The work, with what its plan promised.

        Raises:
            Unsupported: the peer cannot do it.
        """
        problem, peer = self.problem(), find(self.peer)
        work = WORK[self.mode](self, peer, peer.make(problem))
        work.result_bytes = problem.output_bytes
        if peer.settings is not None:
            plan = plan_problem(problem, peer.settings)
            work.promise = str(plan), plan.workspace_bytes
        return work

    def problem(self) -> Problem:
        shape = self.shape
        query, key = ((shape.batch, shape.heads, tokens, shape.width) for tokens in (shape.queries, shape.keys))
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        return Problem.from_shapes(query, key, key, dtype, device, grad=self.mode == "training")

    @property
    def factor(self) -> int:
        return PEAKY if self.scores == "peaky" else 1


Self = TypeVar("Self", bound="Inference")


class Inference:
    """Attention of three tensors. Called, it does the work and returns what came of it, for `keep`.

    `promise` is the plan in words and the workspace that it promised, where there is one.
    """

    sample: Tensor
    result_bytes: int
    promise: tuple[str, int | None] = ("", None)

    def __init__(self, job: Job, peer: Peer, attend: Attention) -> None:
        self.attend = attend
        self.query, self.key, self.value = _inputs(job)
        self.rows = reference.sampled_rows(job.shape.queries)

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.attend(self.query, self.key, self.value)

    def small(self: Self) -> Self:
        """The same work on the first few tokens."""
        small = copy.copy(self)
        small.query = _first(self.query, SMALL_QUERIES)
        small.key, small.value = (_first(tensor, SMALL_KEYS) for tensor in (self.key, self.value))
        return small

    def keep(self, result: Any) -> None:
        """Keep the rows of a result that `errors` needs: few enough to be lost in its peak memory."""
        self.sample = reference.chosen_rows(result, self.rows)

    def errors(self) -> tuple[float, float | None]:
        expected = reference.expected(self.query, self.key, self.value, self.rows)
        return reference.largest_difference(self.sample, expected), None


class Training(Inference):
    """Attention and its gradients."""

    gradient_sample: Tensor

    def __init__(self, job: Job, peer: Peer, attend: Attention) -> None:
        super().__init__(job, peer, attend)
        self.grad = torch.randn_like(self.query)

    def __call__(self) -> tuple[Tensor | None, ...]:
        inputs = [tensor.requires_grad_() for tensor in (self.query, self.key, self.value)]
        output = self.attend(*inputs)
        output.backward(self.grad)  # autograd.grad() is refused by kernels that use torch's older checkpointing
        gradients = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        return output.detach(), *gradients

    def small(self) -> Training:
        small = super().small()
        small.grad = _first(self.grad, SMALL_QUERIES)
        return small

    def keep(self, result: Any) -> None:
        super().keep(result[0])
        self.gradient_sample = reference.chosen_rows(result[1], self.rows)

    def errors(self) -> tuple[float, float | None]:
        query, key, value = (tensor.detach() for tensor in (self.query, self.key, self.value))
        grad = reference.chosen_rows(self.grad, self.rows)
        expected, gradient = reference.expected_with_gradient(query, key, value, self.rows, grad)
        return reference.largest_difference(self.sample, expected), reference.largest_difference(
            self.gradient_sample, gradient
        )


class Layer:
    """The whole forward of ldm's CrossAttention: this library's own, or with another attention written in."""

    sample: Tensor
    result_bytes: int
    promise: tuple[str, int | None] = ("", None)

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
        self.rows = reference.sampled_rows(shape.queries)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            if self.settings is not None:
                return cross_attention(self.layer, self.x, self.context, settings=self.settings)
            return written_in(self.layer, self.x, self.context, self.attend)

    def small(self) -> Layer:
        small = copy.copy(self)
        small.x = self.x[:, :SMALL_QUERIES].clone()
        return small

    def keep(self, result: Tensor) -> None:
        self.sample = result[:, self.rows].clone()

    def errors(self) -> tuple[float, float | None]:
        layer = copy.deepcopy(self.layer).to("cpu", torch.float64)
        x, context = reference.exact(self.x), None if self.context is None else reference.exact(self.context)
        with torch.no_grad():
            expected = written_in(layer, x[:, self.rows], x if context is None else context, reference.exact_attention)
        return reference.largest_difference(self.sample, expected), None


def written_in(layer: CrossAttentionParts, x: Tensor, context: Tensor | None, attend: Attention) -> Tensor:
    """The forward of ldm's CrossAttention with another attention written in."""
    context = x if context is None else context
    query, key, value = (
        projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for projected in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    return layer.to_out(attend(query, key, value).transpose(1, 2).flatten(2))


def _cross_attention_class() -> type[Any]:
    try:
        from ldm.modules.attention import CrossAttention
    except ImportError as error:
        raise Unsupported(f"no ldm: pip install stable-diffusion-sdkit --no-deps, and einops ({error})") from error
    return CrossAttention


Work = Inference | Layer
WORK: dict[str, type[Work]] = {"attention": Inference, "training": Training, "layer": Layer}


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
