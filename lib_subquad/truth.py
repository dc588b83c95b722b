"""What attention should give, in float64 on the CPU, and how far from it an exact engine may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import device as devices

BLOCK = 1 << 13  # numbers in float64 at a time: the truth must not need more memory than the call that it judges
# Numbers that come from a device at a time: rows that do not lie together it copies there first, where memory is short.
COPIED = 1 << 16

# How much rounding moves a number, relative to it. A kernel may scale queries and round weights in the dtype of its
# inputs; float32 may go through TF32 or bfloat16 where that is allowed, and everywhere but on the CPU it may be.
UNITS = {torch.float64: 2**-45, torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}
UNIT_OF_TF32 = 2**-11
SLACK = 3
LARGEST = 1e30  # of a score so large that its rounding allows anything but NaN
GRADIENTS_SLACK = 32  # they are sums over many rows


class Truth(NamedTuple):
    """Exact rows [rows, value width] in float64, and by how much each number of a row may differ, [rows, 1]."""

    rows: Tensor
    allowed: Tensor

    def wrong_by(self, found: Tensor) -> float:
        """The largest difference of `found` [rows, value width] where it is more than allowed, NaN where it has numbers
        that are none; 0.0 where all is well. Rows whose truth is no number in `found`'s dtype say nothing."""
        said = torch.isfinite(self.rows.to(found.dtype)).all(-1)
        difference = (found.detach().to("cpu").double() - self.rows).abs()[said]
        beyond = difference[~(difference <= self.allowed[said])]  # NaN is not either
        return beyond.max().item() if beyond.numel() else 0.0


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Truth:
    """The truth about some rows of one head.

    Args:
        query: [rows, width], `key` [keys, width], `value` [keys, value width]; any device and floating-point dtypes.
        mask: [rows or 1, keys or 1], bool (True = may attend) or added to the scores; or None.
        scale: of the scores.

    Returns:
        softmax(scale * query . key^T + mask) . value, zeros where a row may attend to nothing. Allowed: rounding
        moves each product of a score by a unit, in either direction, and so the score by the root of the sum of their
        squares; a mask may make scores so large (-10,000 for all keys of an empty prompt) that their last digits are
        lost; softmax of scores that are moved by d differs by a factor of exp(2d) at the most.
    """
    units = unit(key), unit(value)
    query = _exact(query) * scale
    scores = query.new_empty(query.shape[0], key.shape[0])
    products = query.new_zeros(query.shape[0], 1)
    for some, keys in _in_blocks(key):
        scores[:, some] = query @ keys.T
        products = products.maximum((query.square() @ keys.square().T).amax(-1, keepdim=True).sqrt())
    if mask is not None:
        mask = mask.detach().to("cpu")
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    lost = scores.amax(-1, keepdim=True).abs() * torch.finfo(devices.compute_dtype(key.dtype)).eps
    rows = query.new_zeros(query.shape[0], value.shape[-1])
    largest = 0.0
    for some, values in _in_blocks(value):
        rows += weights[:, some] @ values
        largest = max(largest, values.abs().max().item())
    moved = SLACK * (units[0] * (products + 1) + lost)
    return Truth(rows, (torch.expm1(2 * moved).clamp(max=LARGEST) + SLACK * units[1]) * largest)


def gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Those of query, key and value, all [batch, heads, tokens, width], in float64."""
    with torch.enable_grad():
        query, key, value = (_exact(tensor).requires_grad_() for tensor in (query, key, value))
        scores = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            mask = mask.detach().to("cpu")
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        output = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0) @ value
        return torch.autograd.grad(output, (query, key, value), _exact(grad_output))


def wrong_gradient(found: Tensor, expected: Tensor, unit: float) -> float:
    """The largest difference, where it is more than rounding explains; NaN where there is any."""
    difference = (_exact(found) - expected).abs().max()
    allowed = GRADIENTS_SLACK * unit * expected.abs().max()
    return 0.0 if difference <= allowed else difference.item()


def unit(tensor: Tensor) -> float:
    """How much rounding may move one of the numbers that a kernel makes of it, relative to that number."""
    precise = tensor.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return UNITS[tensor.dtype] if precise or tensor.dtype != torch.float32 else UNIT_OF_TF32


def _in_blocks(tensor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a tensor [rows, width] in float64, few at a time, and which they are."""
    block, copied = (max(numbers // max(tensor.shape[-1], 1), 1) for numbers in (BLOCK, COPIED))
    for first in range(0, tensor.shape[0], copied):
        piece = tensor[first : first + copied].detach().to("cpu")
        for start in range(0, piece.shape[0], block):
            rows = _exact(piece[start : start + block])
            yield slice(first + start, first + start + rows.shape[0]), rows


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").double()  # not every accelerator has float64
