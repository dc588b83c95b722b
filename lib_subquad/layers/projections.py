"""What the layers hand to attention(): the queries, keys and values that their projections made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import attention
from ..plan import Plan
from ..problem import HALF_DTYPES
from ..settings import Settings

Report = Callable[[Plan], None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    settings: Settings,
    report: Report | None,
) -> Tensor:
    """attention() for projections whose dtypes a patch (a LoRA in float32, say) has set apart."""
    dtype = query.dtype
    key = key.to(dtype)
    if value.dtype != dtype and not (dtype == torch.float32 and value.dtype in HALF_DTYPES):
        value = value.to(dtype)
    return attention(query, key, value, mask=mask, scale=scale, settings=settings, report=report)
