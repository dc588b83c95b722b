"""What a mask says of its rows, for kernels that have no answer to a row which may attend to nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_nothing(mask: Tensor) -> Tensor:
    """Which rows may attend to nothing, [..., rows, 1]."""
    if mask.dtype == torch.bool:
        return mask.any(-1, keepdim=True).logical_not()
    return mask.amax(-1, keepdim=True) == -torch.inf


def opened(mask: Tensor, rows: Tensor) -> Tensor:
    """The mask with these rows free to attend to all."""
    return mask | rows if mask.dtype == torch.bool else mask.masked_fill(rows, 0.0)


def would_be_rounded(mask: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether a mask has numbers that `dtype` has not: a wider one, or the other half-precision dtype."""
    if mask is None or mask == torch.bool:
        return False
    return torch.finfo(mask).max > torch.finfo(dtype).max or torch.finfo(mask).eps < torch.finfo(dtype).eps
