"""Many short calls in one batch, as motion modules make them: an operator does the heads of many entries at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad import Settings, attention, memory, plan
from lib_subquad import device as devices
from lib_subquad.engines import portable
from lib_subquad.problem import Problem

PORTABLE = Settings(engine="portable")


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        return function(*args, **(kwargs or {}))


def as_layers_do(batch, heads, tokens, width, grad=False):
    return torch.randn(batch, tokens, heads, width).transpose(1, 2).requires_grad_(grad)


def masks(batch, heads, queries, keys):
    """Every kind of one, some with rows that may attend to nothing."""
    found = {"none": None}
    for sizes in ((1, 1, 1, keys), (batch, 1, 1, keys), (1, heads, queries, keys), (batch, heads, queries, keys)):
        numbers = torch.randn(sizes)
        found |= {f"bool {sizes}": numbers > 0, f"float {sizes}": numbers}
    found["bool with nothing"] = torch.rand(batch, 1, queries, keys) < 0.1
    return found


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("trusted", "threads")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 16, 40), (8, 24, 24, 80), (4, 16, 77, 64), (1, 9, 9, 8)], ids=str)
def test_operators_do_not_grow_with_the_batch(shape, masked, grad):
    """Of entries by the hundred, that is; of a few there are no more than heads."""
    heads, queries, keys, width = shape
    counts = []
    for batch in (32, 64, 128):
        given = [as_layers_do(batch, heads, tokens, width, grad) for tokens in (queries, keys, keys)]
        mask = torch.rand(batch, 1, 1, keys) < 0.9 if masked else None
        attention(*given, mask=mask, settings=PORTABLE)
        with Counted() as counted:
            output = attention(*given, mask=mask, settings=PORTABLE)
            if grad:
                torch.autograd.grad(output, given, torch.ones_like(output))
        counts.append(counted.operators)
    assert max(counts) <= min(counts) + 3 * heads, counts  # a view may be the tensor itself


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "three dimensions", "five dimensions"])
def test_it_is_exact(reference, dtype, layout, grad):
    batch, heads, queries, keys = 70, 3, 9, 12
    sizes = {"heads first": (batch, heads), "three dimensions": (batch * heads,), "five dimensions": (7, 10, heads)}
    for mask in masks(batch, heads, queries, keys).values() if layout == "tokens first" else (None,):
        if layout == "tokens first":
            given = [as_layers_do(batch, heads, tokens, 8) for tokens in (queries, keys, keys)]
        else:
            given = [torch.randn(*sizes[layout], tokens, 8) for tokens in (queries, keys, keys)]
        given = [it.to(dtype).requires_grad_(grad) for it in given]
        wants_mask = grad and mask is not None and mask.is_floating_point()
        mask = mask.requires_grad_() if wants_mask else mask
        output = attention(*given, mask=mask, settings=PORTABLE)
        exact = [it.detach().double().requires_grad_(grad) for it in given]
        exact_mask = mask.detach().clone().requires_grad_() if wants_mask else mask
        expected = reference(*exact, exact_mask)
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
        torch.testing.assert_close(output.detach().double(), expected.detach(), atol=tolerance, rtol=tolerance)
        if not grad:
            continue
        found = torch.autograd.grad(output, [*given, mask] if wants_mask else given, torch.ones_like(output))
        right = torch.autograd.grad(expected, [*exact, exact_mask] if wants_mask else exact, torch.ones_like(expected))
        for mine, its in zip(found, right):
            torch.testing.assert_close(mine.double(), its.double(), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("kind", ["cuda", "mps", "directml", "cpu"])
def test_as_many_entries_as_a_tile_has_room_for(monkeypatch, kind):
    monkeypatch.setattr(devices, "kind", lambda device: kind)
    sizes, batches = [], (4, 256, 4096, 1 << 20)
    for batch in batches:
        shape = (batch, 8, 16, 40)
        made = plan(shape, shape, shape, torch.float32, "cpu", PORTABLE, free_bytes=1 << 40)
        problem = Problem.from_shapes(shape, shape, shape, torch.float32, "cpu")
        assert made.head_chunk * 16 * 16 * 4 <= devices.tile_bytes(problem.device)
        sizes.append(made.head_chunk)
    assert sizes[0] <= 8 and sizes[1] == 256 and sizes == sorted(sizes) and sizes[-1] <= 65535


@pytest.mark.parametrize("shape", [(4096, 8, 16, 40), (256, 8, 24, 80)], ids=str)
def test_they_stay_inside_the_memory_limit(monkeypatch, peak_bytes, shape):
    given = [as_layers_do(*shape) for _ in range(3)]
    expected, sizes = attention(*given, settings=PORTABLE), []
    for free in (64 << 20, 4 << 20, 2 << 20):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        memory.forget()
        made = []
        settings = Settings(engine="portable", memory_limit=100)
        peak = peak_bytes(lambda: attention(*given, settings=settings, report=made.append))  # noqa: B023
        output_bytes = given[0].numel() * 4
        assert peak - output_bytes <= 1.25 * made[0].workspace_bytes + (1 << 17)
        assert made[0].workspace_bytes <= free
        sizes.append(made[0].head_chunk)
        assert torch.allclose(attention(*given, settings=settings), expected, atol=1e-6)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_fewer_entries_after_an_out_of_memory():
    given = [as_layers_do(512, 4, 16, 40) for _ in range(3)]
    expected = attention(*given, settings=PORTABLE)
    problem = Problem.of(*given, None)
    sizes, seen = portable.fitting(problem, Settings(), 1 << 30)[0], []
    while sizes is not None:
        seen.append(sizes)
        sizes = portable.smaller(problem, sizes)
    heads = [it.heads for it in seen]
    assert heads[0] == 512 and heads == sorted(heads, reverse=True) and 4 in heads and heads[-1] == 1
    assert all((it.queries, it.keys) == (16, 16) for it in seen if it.heads > 4)
    workspaces = [portable.workspace_bytes(problem, it) for it in seen]
    assert workspaces == sorted(workspaces, reverse=True)
    for it in seen:
        output, _ = portable.attend(problem, it, *given, None, 40**-0.5)
        assert torch.allclose(output, expected, atol=1e-6)
