"""The fused kernel for heads of other widths: zeros change nothing, are counted, and are not spoken of where there is
nothing to say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lib_subquad
from lib_subquad import Settings, attention, plan
from lib_subquad import device as devices
from lib_subquad.engines import fused, order, padded, pytorch
from lib_subquad.engines.table import Found, Table, class_of
from lib_subquad.problem import Problem
from tests.threads import torch_threads

pytestmark = pytest.mark.usefixtures("fused_kernel")
WIDTHS = [(64, 40), (40, 64), (8, 12), (33, 7)]
CPU = torch.device("cpu")


@pytest.fixture
def pads(monkeypatch):
    """The CPU is a device on which zeros cost less than going without the fused kernel."""
    monkeypatch.setitem(devices.RULES, "cpu", dataclasses.replace(devices.RULES["cpu"], pads=True))
    lib_subquad.forget()


def tensors(widths=(40, 64), dtype=torch.float32, grad=False, tokens=(90, 70)):
    torch.manual_seed(0)
    (width, value_width), (queries, keys) = widths, tokens
    sizes = ((queries, width), (keys, width), (keys, value_width))
    made = [torch.randn(2, rows, 3, its).to(dtype).transpose(1, 2) for rows, its in sizes]
    return [tensor.requires_grad_(grad) for tensor in made]


def masks(dtype):
    seen = torch.rand(1, 3, 90, 70) > 0.4
    seen[..., 5, :] = False
    numbers = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    return {"none": None, "bool": seen, "added": numbers, "of keys": seen[:, :1, :1]}


ATOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("upcast", ["web UI", "always"])
@pytest.mark.parametrize("query_chunk", [0, 40])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.usefixtures("pads")
def test_like_float64(reference, dtype, widths, query_chunk, upcast):
    for name, mask in masks(dtype).items():
        if mask is not None and not fused.MASKS_ARE_RIGHT:
            continue
        plans, given = [], tensors(widths, dtype)
        if padded.why_not(Problem.of(*given, mask, upcast=upcast == "always")):
            pytest.skip("this torch has no fused kernel for such a dtype")
        settings = Settings(query_chunk=query_chunk, upcast=upcast)
        output = attention(*given, mask=mask, settings=settings, report=plans.append)
        assert plans[0].engine == "padded" and plans[0].query_chunk == (query_chunk or 90), name
        assert output.shape[-1] == widths[1] and output.dtype == dtype
        torch.testing.assert_close(output.double(), reference(*given, mask), atol=ATOL[dtype], rtol=0)


@pytest.mark.usefixtures("pads")
def test_the_scale_is_that_of_the_true_width(monkeypatch):
    scales, call = [], pytorch.call
    monkeypatch.setattr(pytorch, "call", lambda *given, **more: scales.append(more["scale"]) or call(*given, **more))
    attention(*tensors((40, 64)))
    assert set(scales) == {40**-0.5}


@pytest.mark.parametrize("query_chunk", [0, 40])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.usefixtures("pads")
def test_gradients_and_gradients_of_gradients(reference, widths, query_chunk):
    mask = masks(torch.float32)["bool"] if fused.MASKS_ARE_RIGHT else None
    plans, given = [], tensors(widths, grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found = attention(*given, mask=mask, settings=Settings(query_chunk=query_chunk), report=plans.append)
    assert plans[0].engine == "padded"
    pairs = []
    for output, inputs in ((found, given), (reference(*exact, mask), exact)):
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        pairs.append((*first, *second))
    for mine, its in zip(*pairs):
        torch.testing.assert_close(mine.double(), its, atol=1e-4 * its.abs().max().item(), rtol=0)


@pytest.mark.parametrize("query_chunk", [0, 300])
@pytest.mark.parametrize("widths", [(64, 40), (256, 512), (160, 32)], ids=str)
@pytest.mark.parametrize(
    "dtype, upcast", [(torch.float32, "web UI"), (torch.bfloat16, "web UI"), (torch.bfloat16, "always")]
)
@pytest.mark.usefixtures("pads")
def test_its_copies_are_within_the_plan(peak_bytes, dtype, upcast, widths, query_chunk):
    given, plans = tensors(widths, dtype, tokens=(1024, 700)), []
    settings = Settings(query_chunk=query_chunk, upcast=upcast)
    with torch_threads(2):
        attention(*given, settings=settings)  # compared, which takes memory of its own
        peak = peak_bytes(lambda: attention(*given, settings=settings, report=plans.append))
    measured = peak - Problem.of(*given).output_bytes
    assert plans[0].engine == "padded"
    assert measured - 1024 <= plans[0].workspace_bytes <= 1.25 * measured + (1 << 17), (measured, plans[0])


@pytest.mark.usefixtures("pads")
def test_chunks_shrink_to_the_limit():
    shapes = (1, 8, 4096, 40), (1, 8, 1024, 40), (1, 8, 1024, 64)
    free = 8 << 20
    made = plan(*shapes, torch.float32, "cpu", Settings(memory_limit=100), free_bytes=free)
    assert made.engine == "padded" and 256 <= made.query_chunk < 4096 and made.workspace_bytes <= free


def test_it_says_nothing_of_its_own_where_zeros_do_not_help():
    shapes = (1, 8, 64, 64), (1, 8, 64, 64), (1, 8, 64, 40)
    more = {"mask_shape": (64, 64), "mask_dtype": torch.float32, "grad": True, "mask_grad": True}
    for settings in (Settings(), Settings(engine="padded")):
        made = plan(*shapes, torch.float32, "cpu", settings, **more)
        assert (
            made.engine == "portable"
            and made.reasons.count("the mask needs a gradient, which no fused kernel gives") == 1
        )
        assert "zero" not in str(made) and "padded" not in str(made).replace("set to padded", "")
    made = plan((1, 8, 64, 64), (1, 8, 64, 64), (1, 8, 64, 64), torch.float32, "cpu", Settings(engine="padded"))
    assert made.engine == "fused" and "the fused kernel takes these widths as they are" in made.reasons


def test_on_a_cpu_only_whoever_names_it_takes_it():
    """Or a measurement: with few keys it is faster."""
    shapes = (1, 8, 64, 64), (1, 8, 64, 64), (1, 8, 64, 40)
    made = plan(*shapes, torch.float32, "cpu")
    assert made.engine == "portable" and len(made.reasons) == 1
    assert plan(*shapes, torch.float32, "cpu", Settings(engine="padded")).engine == "padded"
    calls, before = class_of(Problem.from_shapes(*shapes, torch.float32, "cpu")), order.table()
    order.go_by(Table({order.machine(CPU): {calls: Found("padded", margin=2.0)}}))
    try:
        assert plan(*shapes, torch.float32, "cpu").engine == "padded"
    finally:
        order.go_by(before)


@pytest.mark.usefixtures("pads", "trusted")
def test_it_gives_way_where_its_kernel_refuses(monkeypatch, reference):
    def refuse(*given, **more):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(pytorch, "call", refuse)
    plans, given = [], tensors()
    output = attention(*given, report=plans.append)
    assert plans[0].engine == "portable" and "the padded kernel refused these sizes: no such kernel" in plans[0].reasons
    torch.testing.assert_close(output.double(), reference(*given), atol=1e-5, rtol=0)


def test_which_width_is_asked_for(monkeypatch):
    """The narrowest that PyTorch says yes to, of one kind of kernel that takes multiples of 32."""
    asked = []

    def choice(query, key, value, *more, **named):
        asked.append(query.shape[-1])
        return int(query.shape[-1] % 32 == 0 and query.shape[-1] == value.shape[-1])

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    fused._kernel_reasons.cache_clear(), padded._widened.cache_clear()
    try:
        problem = Problem.from_shapes(*[(1, 2, 16, 40)] * 3, torch.float16, "cpu")
        assert padded.why_not(problem) == [] and padded._wide(problem).width == 64
        assert asked == [40, 48, 64]
    finally:
        fused._kernel_reasons.cache_clear(), padded._widened.cache_clear()
