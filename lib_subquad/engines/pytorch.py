"""PyTorch's own attention function: found at every call, for others may be put in its place, we among them."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Whatever stands in its place: private, and what the public name is bound to.
OWN = getattr(torch._C._nn, "scaled_dot_product_attention", F.scaled_dot_product_attention)

_running = threading.local()


def call(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    """What now has the public name; its own where that has led back to us."""
    if is_running():
        return OWN(query, key, value, **more)
    _running.here = True
    try:
        return F.scaled_dot_product_attention(query, key, value, **more)
    finally:
        _running.here = False


def is_running() -> bool:
    """Whether this thread is inside that function on our behalf."""
    return getattr(_running, "here", False)
