"""What the result should be: attention in float64, of a sample of rows, for all of them would take minutes."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE_ROWS, SAMPLE_HEADS = 32, 4


def sampled_rows(queries: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(queries, generator=generator)[:SAMPLE_ROWS].sort().values


def chosen_rows(tensor: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """These rows of a few heads [heads, rows, width] of [batch, heads, tokens, width], from all over the batch."""
    batch, heads = tensor.shape[:2]
    count = batch * heads
    chosen = sorted({number * count // SAMPLE_HEADS for number in range(SAMPLE_HEADS)})
    return torch.stack([tensor[number // heads, number % heads][rows] for number in chosen])


def expected(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """Exact results of the sampled rows."""
    return exact_attention(exact(chosen_rows(query, rows)), exact(chosen_rows(key)), exact(chosen_rows(value)))


def expected_with_gradient(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and the gradient of the queries where `grad` is that of the results."""
    query = exact(chosen_rows(query, rows)).requires_grad_()
    key, value = (exact(chosen_rows(tensor)) for tensor in (key, value))
    output = exact_attention(query, key, value)
    return output.detach(), torch.autograd.grad(output, query, exact(grad))[0]


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").double()  # not every accelerator has float64


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (exact(one) - other).abs().max().item()  # NaN stays NaN
