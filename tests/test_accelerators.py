"""What this machine has beside the CPU computes what float64 does; skipped where it has nothing. With `--device` it is
that device, whichever it is."""

from __future__ import annotations

import pytest
import torch

from lib_subquad import Settings, attention
from tests import devices

SHAPES = [  # batch, heads, queries, keys, width
    (2, 8, 256, 256, 40),
    (2, 8, 200, 77, 64),
    (1, 1, 576, 576, 512),
]
PLANS = {
    "automatic": Settings(),
    "query chunks": Settings(query_chunk=64),
    "portable": Settings(engine="portable"),
    "portable chunks": Settings(engine="portable", query_chunk=64, kv_chunk=32),
}
MODULES = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": getattr(torch, "xpu", None)}
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
HERE = [name for name, module in MODULES.items() if module is not None and module.is_available()]


@pytest.fixture(params=HERE or [None] if devices.is_cpu() else [devices.device()], ids=str)
def device(request):
    if request.param is None:
        pytest.skip("there is only the CPU")
    try:
        torch.ones(8, device=request.param).sum().item()
    except RuntimeError as error:  # as on a virtual machine that shows a device and lends it no memory
        pytest.skip(f"{request.param} cannot be used: {str(error).splitlines()[0]}")
    return torch.device(request.param)


def inputs(shape, dtype):
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, width, generator=generator).to(dtype) for n in (queries, keys, keys)]


def masks(shape):
    _, _, queries, keys, _ = shape
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(queries, keys, generator=generator) < 0.7
    allowed[3] = False  # a row that attends to nothing
    return {"none": None, "bool": allowed, "added": torch.randn(queries, keys, generator=generator)}


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_like_float64(device, shape, plan, dtype, reference):
    tensors = inputs(shape, dtype)
    for name, mask in masks(shape).items():
        mask = mask.to(dtype) if name == "added" else mask
        there = None if mask is None else mask.to(device)
        output = attention(*(tensor.to(device) for tensor in tensors), mask=there, settings=PLANS[plan])
        assert output.device.type == device.type and output.dtype == dtype
        error = (output.cpu().double() - reference(*tensors, mask)).abs().max().item()
        assert error <= ALLOWED[dtype], name


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_like_float64(device, plan, reference):
    tensors = inputs((1, 4, 200, 77, 40), torch.float32)
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    ours = [tensor.to(device).requires_grad_() for tensor in tensors]
    reference(*exact).square().sum().backward()
    attention(*ours, settings=PLANS[plan]).square().sum().backward()
    for name, there, wanted in zip(("query", "key", "value"), ours, exact):
        assert (there.grad.cpu().double() - wanted.grad).abs().max() <= 1e-4 * wanted.grad.abs().max(), name
