"""Small halves of VAEs, of the classes that really run, with random weights."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad.vae.model import with_random_weights

with contextlib.redirect_stdout(io.StringIO()):  # ldm's layers announce themselves
    ldm = pytest.importorskip("ldm.modules.diffusionmodules.model", reason="stable-diffusion-sdkit is not installed")

TINY = {
    "ch": 32, "out_ch": 3, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
    "resolution": 64, "z_channels": 4, "double_z": True, "attn_type": "vanilla",
}  # fmt: skip
ROOMY, CRAMPED = 1 << 40, 0  # bytes that are free
OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 150994944 bytes"


def half(name: str, **config: object) -> nn.Module:
    """ "decoder" or "encoder", with norms and biases that matter."""
    cls = ldm.Decoder if name == "decoder" else ldm.Encoder
    with contextlib.redirect_stdout(io.StringIO()):
        return with_random_weights(cls(**(TINY | config)))


def given(name: str, height: int = 19, width: int = 7, batch: int = 1) -> Tensor:
    """Latents, or pictures of four times their size and a little more."""
    generator = torch.Generator().manual_seed(2)
    if name == "decoder":
        return torch.randn(batch, 4, height, width, generator=generator)
    return torch.randn(batch, 3, 4 * height + 1, 4 * width + 3, generator=generator)


def in_float64(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).double()(x.double())


def distance(found: Tensor, truth: Tensor) -> float:
    return torch.linalg.vector_norm(found.double() - truth).item()


def as_good(half_, x, found, bound=1.3):
    """Whether it is as near to float64 as the half's own forward."""
    truth = in_float64(half_, x)
    usual = half_(x)
    assert found.shape == usual.shape and found.dtype == usual.dtype
    assert distance(found, truth) <= bound * distance(usual, truth) + 1e-12


class Fails(TorchDispatchMode):
    """The operators of some numbers run out of memory: before they do anything, or when they have done it."""

    def __init__(self, numbers=(), after=False):
        super().__init__()
        self.count, self.numbers, self.after = 0, numbers, after
        self.writing = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        fails = self.count in self.numbers
        if function._schema.is_mutable:
            self.writing.append(self.count)
        if fails and not self.after:
            raise RuntimeError(OUT_OF_MEMORY)
        result = function(*args, **(kwargs or {}))
        if fails:
            raise RuntimeError(OUT_OF_MEMORY)
        return result
