"""The statistics of a group norm, from one band of rows after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import device as devices
from .parts import AnyModule


class Moments(NamedTuple):
    """How many numbers of each group were seen, their mean and the sum of their squared distances from it, [groups].

    Two of them merge without subtracting large sums (Chan, Golub & LeVeque 1979), however far from zero the mean is.
    """

    numbers: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor, groups: int) -> Moments:
        """Of a band [1, channels, rows, width]."""
        numbers = rows.numel() // groups
        dtype = devices.compute_dtype(rows.dtype)
        variance, mean = torch.var_mean(rows.unflatten(1, (groups, -1)).to(dtype), dim=(0, 2, 3, 4), correction=0)
        dtype = torch.float64 if devices.rules(rows.device).float64 else torch.float32
        return cls(numbers, mean.to(dtype), variance.to(dtype) * numbers)

    def merged(self, other: Moments) -> Moments:
        numbers = self.numbers + other.numbers
        away, share = other.mean - self.mean, other.numbers / numbers
        squares = self.squares + other.squares + away**2 * (self.numbers * share)
        return Moments(numbers, self.mean + away * share, squares)

    def affine(self, norm: AnyModule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What this norm multiplies each channel by, and then adds to it: [1, channels, 1, 1] each, to be computed in
        for numbers of `dtype`."""
        each = norm.num_channels // norm.num_groups
        scale = (self.squares / self.numbers + norm.eps).rsqrt().repeat_interleave(each)
        mean = self.mean.repeat_interleave(each)
        if norm.weight is not None:
            scale = scale * norm.weight.to(scale)
        shift = -mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias.to(shift)
        dtype = devices.compute_dtype(dtype)
        return scale.to(dtype).reshape(1, -1, 1, 1), shift.to(dtype).reshape(1, -1, 1, 1)
