"""Out-of-memory at every operator of a call: it ends in the right result, or in the device's own error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lib_subquad import Settings, attention, calls
from tests.personality import TEXT, FailAt, alone

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-10}


# They allocate nothing: what stands before and after the loop.
VIEWS = {
    "is_same_size",
    "view",
    "_unsafe_view",
    "alias",
    "detach",
    "transpose",
    "unsqueeze",
    "slice",
    "select",
    "expand",
    "permute",
}


@pytest.fixture(autouse=True)
def by_itself():
    with alone():
        yield


@cache
def inputs(dtype: torch.dtype, mask: str, grad: bool):
    """Query, key, value, mask, the gradient of the output, and the right answers in float64."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 8).to(dtype).requires_grad_(grad) for tokens in (10, 70, 70))
    bias = {"none": None, "bool": torch.rand(10, 70) > 0.3, "float": torch.randn(1, 1, 10, 70).to(dtype)}[mask]
    grad_output = torch.randn(1, 2, 10, 8).to(dtype)
    exact = [tensor.detach().double().requires_grad_(grad) for tensor in (query, key, value)]
    scores = exact[0] @ exact[1].transpose(-2, -1) * 8**-0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if mask == "bool" else scores + bias
    output = scores.softmax(-1) @ exact[2]
    answers = [output, *(torch.autograd.grad(output, exact, grad_output.double()) if grad else ())]
    return (query, key, value, bias, grad_output), [answer.detach() for answer in answers]


def run(dtype: torch.dtype, mask: str, grad: bool, settings: Settings):
    (query, key, value, bias, grad_output), _ = inputs(dtype, mask, grad)
    output = attention(query, key, value, mask=bias, settings=settings)
    return [output, *(torch.autograd.grad(output, (query, key, value), grad_output) if grad else ())]


def check(results, dtype: torch.dtype, mask: str, grad: bool) -> None:
    for result, answer in zip(results, inputs(dtype, mask, grad)[1]):
        assert result.dtype == dtype
        assert (result.double() - answer).abs().max() <= TOLERANCE[dtype] * max(1, answer.abs().max())


def inject(dtype, mask, grad, settings, halfway) -> tuple[int, list[str]]:
    """Fail once at each operator in turn: how often, and the operators that ended in the device's own error."""
    run(dtype, mask, grad, settings)  # asks PyTorch once which kernel it has
    calls.forget()
    with FailAt(None) as watching:
        results = run(dtype, mask, grad, settings)
    check(results, dtype, mask, grad)
    errors = []
    for number in range(len(watching.names)):
        calls.forget()
        failing = FailAt(number, halfway)
        try:
            with failing:
                results = run(dtype, mask, grad, settings)
        except RuntimeError as error:
            assert TEXT in str(error)
            errors.append(failing.failed)
        else:
            check(results, dtype, mask, grad)
        assert failing.failed
    return len(watching.names), errors


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("engine", ["fused", "portable", "automatic"])
def test_a_failure_at_any_operator(engine, mask, capsys):
    faults = errors = 0
    for dtype in DTYPES:
        for grad in (False, True):
            chunks = {"query_chunk": 10 if grad else 6, "kv_chunk": 64 if engine == "portable" else 0}
            settings = Settings(engine=engine, **chunks)
            for halfway in (False, True) if dtype == torch.float32 else (False,):
                seen, own = inject(dtype, mask, grad, settings, halfway)
                faults, errors = faults + seen, errors + len(own)
                if engine == "portable" or not grad:  # a fused backward is PyTorch's, and outside the loop
                    assert set(own) <= VIEWS
    assert faults > 60 and errors < faults / 2
    with capsys.disabled():
        print(f"\n{engine}, mask {mask}: {faults} faults, {faults - errors} right results, {errors} device's errors")


# ------------------------------------------------------------------------------------------------- a real limit

LIMITED = """
import ctypes, json, resource, sys
import torch
from lib_subquad import Settings, attention, calls

heads, tokens, spares = json.loads(sys.argv[1])
torch.manual_seed(0)
query, key, value = torch.randn(3, 1, heads, tokens, 40)
rows = slice(tokens // 2, tokens // 2 + 8)
scores = query[..., rows, :].double() @ key.double().transpose(-2, -1) * 40**-0.5
right = scores.softmax(-1) @ value.double()
engines = ("fused", "portable") if len(spares) > 1 else ("automatic",)
for engine in engines:  # threads and their stacks
    attention(query[..., :256, :], key[..., :256, :], value[..., :256, :], settings=Settings(engine=engine))
del scores
for engine in engines:
    for spare in spares:
        plans = []
        calls.forget()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + spare * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            output = attention(query, key, value, settings=Settings(engine=engine), report=plans.append)
            error = ""
        except Exception as raised:
            output, error = None, f"{type(raised).__name__}: {raised}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        off = None if output is None else float((output[..., rows, :] - right).abs().max())
        print(json.dumps([engine, spare, off, error, plans[0].retries if plans else 0]), flush=True)
        del output
"""


def limited(heads: int, tokens: int, spares: list[int]) -> list:
    """[engine, spare MiB, largest error or None, what was raised, retries] of calls under an address-space limit."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux limits the address space of a process")
    command = [sys.executable, "-c", LIMITED, json.dumps([heads, tokens, spares])]
    # Every tensor a mapping of its own: what earlier calls have freed must not serve later ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr  # a crash or an abort
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_address_space_from_nothing_to_256_mib():
    spares = [0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256]
    steps = limited(2, 2048, spares)
    assert len(steps) == 2 * len(spares)
    print(*steps, sep="\n")
    for engine, spare, off, error, _ in steps:
        if off is None:
            assert "memory" in error and spare < 64, (engine, spare, error)
        else:
            assert off < 1e-5, (engine, spare)
    assert any(error for _, _, _, error, _ in steps)  # the limit bit
    assert any(retries and not error for _, _, _, error, retries in steps)


def test_256_mib_are_enough_for_a_1024_pixel_image():
    ((_, _, off, error, _),) = limited(16, 16384, [256])
    assert not error and off < 1e-5
