"""Out-of-memory at every operator of a call: it ends in the right result, or in the device's own error."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad import Settings, attention, plan, retry
from lib_subquad import device as devices
from lib_subquad.engines import portable
from tests.personality import storage_of, tensors_in

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-10}
TEXT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1610612736 bytes"


class FailAt(TorchDispatchMode):
    """Runs out of memory at one operator: before it has run, or (`halfway`) once it has written its result."""

    def __init__(self, number: int | None, halfway: bool = False) -> None:
        super().__init__()
        self.number, self.halfway, self.seen, self.failed = number, halfway, 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mine = self.seen == self.number
        self.seen += 1
        if mine:
            self.failed = function.overloadpacket.__name__
        if mine and not self.halfway:
            raise RuntimeError(TEXT)
        result = function(*args, **(kwargs or {}))
        if mine:
            raise RuntimeError(TEXT)
        return result


class FailOver(TorchDispatchMode):
    """Runs out of memory whenever an operator makes a tensor of more than `limit` bytes."""

    def __init__(self, limit: int, error: Exception | None = None) -> None:
        super().__init__()
        self.limit, self.error, self.failures = limit, error or RuntimeError(TEXT), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {storage_of(tensor) for tensor in tensors_in(args, kwargs or {})}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if storage_of(tensor) not in before and tensor.untyped_storage().nbytes() > self.limit:
                self.failures += 1
                raise self.error
        return result


# They make a view of a tensor and no other: what stands before and after the loop.
VIEWS = {"view", "_unsafe_view", "alias", "detach", "transpose", "unsqueeze", "slice", "select", "expand", "permute"}


@pytest.fixture(autouse=True)
def alone():
    """Nothing remembered, and one thread: on a busy machine two wait for each other at every small operator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    retry.forget()
    yield
    retry.forget()
    torch.set_num_threads(threads)


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
    with FailAt(None) as watching:
        results = run(dtype, mask, grad, settings)
    check(results, dtype, mask, grad)
    errors = []
    for number in range(watching.seen):
        retry.forget()
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
    return watching.seen, errors


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
    assert faults > 4 * 30 and errors < faults / 2
    with capsys.disabled():
        print(f"\n{engine}, mask {mask}: {faults} faults, {faults - errors} right results, {errors} device's errors")


@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_no_tensor_may_be_large(checkpointing):
    """The workspace shrinks until it fits, forward and backward."""
    query, key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for tokens in (64, 256, 256))
    exact = torch.softmax(query @ key.transpose(-2, -1) * 8**-0.5, -1) @ value
    plans, settings = [], Settings(engine="portable", checkpointing=checkpointing)
    limit = 17000 if checkpointing == "always" else 70000  # the gradients of key and value alone have 16384 bytes
    with FailOver(limit) as device:
        output = attention(query, key, value, settings=settings, report=plans.append)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert device.failures >= 1 and plans[0].retries >= 1
    for result, right in zip((output, *gradients), (exact, *torch.autograd.grad(exact.sum(), (query, key, value)))):
        assert torch.allclose(result, right, atol=1e-5)


def test_what_is_written_stays(monkeypatch):
    query, key, value = (torch.randn(1, 2, tokens, 8) for tokens in (64, 256, 256))
    attend, rows = portable.attend, []

    def failing(problem, sizes, chunk, *rest):
        rows.append(chunk.shape[2])
        if len(rows) == 3:
            raise RuntimeError(TEXT)
        return attend(problem, sizes, chunk, *rest)

    monkeypatch.setattr(portable, "attend", failing)
    settings = Settings(engine="portable", query_chunk=16, kv_chunk=64)
    output = attention(query, key, value, settings=settings)
    assert rows[:3] == [16, 16, 16] and sum(rows) == 64 + 16  # one chunk came again, and nothing else
    assert torch.allclose(output, torch.softmax(query @ key.transpose(-2, -1) * 8**-0.5, -1) @ value, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is raised

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 18.00 GB)",
    "Invalid buffer size: 16.00 GB",
    "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
    "Allocation is out of device memory on current platform.",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Could not allocate tensor with 1610612736 bytes. There is not enough GPU video memory available!",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
]
ERRORS = [*(RuntimeError(text) for text in OUT_OF_MEMORY), torch.cuda.OutOfMemoryError("CUDA"), MemoryError()]
OTHERS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_every_form_of_out_of_memory(error):
    """Known for what it is; one that persists ends in the device's own error and a line that says what was tried."""
    assert devices.is_out_of_memory(error)
    text = str(error)
    query, key, value = (torch.randn(1, 2, tokens, 8) for tokens in (4, 128, 128))
    attention(query, key, value)
    with pytest.raises(type(error)) as raised, FailOver(0, error) as device:
        attention(query, key, value)
    assert type(raised.value) is type(error) and str(raised.value).startswith(text)
    line = str(raised.value).splitlines()[-1]
    assert "1 queries x 64 keys" in line and f"{device.failures - 1} times" in line


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_pass(error):
    assert not devices.is_out_of_memory(error)
    text = str(error)
    attention(*torch.randn(3, 1, 2, 64, 8))
    with pytest.raises(type(error)) as raised, FailOver(0, error) as device:
        attention(*torch.randn(3, 1, 2, 64, 8))
    assert str(raised.value) == text and device.failures == 1


def test_retry_can_be_turned_off():
    attention(*torch.randn(3, 1, 2, 64, 8))
    with pytest.raises(RuntimeError) as raised, FailOver(0) as device:
        attention(*torch.randn(3, 1, 2, 64, 8), settings=Settings(retry=False))
    assert str(raised.value) == TEXT and device.failures == 1


# ------------------------------------------------------------------------------------------------ what is remembered


def test_the_smaller_size_is_remembered_until_memory_has_grown(monkeypatch, caplog):
    free = []
    monkeypatch.setattr(devices, "free_bytes", lambda device: free[-1])
    query, key, value = torch.randn(3, 1, 2, 256, 8)
    plans, failures = [], []
    for mebibytes in (1000, 1000, 500, 1200, 1200):
        free.append(mebibytes << 20)
        with FailOver(40000) as device:
            attention(query, key, value, settings=Settings(engine="portable"), report=plans.append)
        failures.append(device.failures)
    assert failures[0] > 0 and failures[1:3] == [0, 0] and failures[3] > 0 and failures[4] == 0
    assert [plan.retries > 0 for plan in plans] == [count > 0 for count in failures]
    assert plans[0].sizes == plans[1].sizes == plans[2].sizes
    other = attention(query[..., :200, :], key, value, settings=Settings(engine="portable"), report=plans.append)
    assert plans[-1].retries == 0 and other.shape[2] == 200  # another shape remembers for itself
    assert len(caplog.records) == 1


def test_a_failure_while_asking_for_a_kernel_is_no_answer():
    query, key, value = torch.randn(3, 1, 2, 33, 8)
    with FailAt(0) as device:
        attention(query, key, value)
    assert device.failed == "zeros"
    plans = []
    attention(query, key, value, report=plans.append)
    fresh = plan(query.shape, key.shape, value.shape, query.dtype, query.device)
    assert plans[0].reasons == fresh.reasons and "does not say" not in str(fresh)


def test_two_threads_that_both_run_out():
    right, wrong = inputs(torch.float32, "none", False)[1], []

    def work():
        for _ in range(30):
            with FailOver(3000):
                results = run(torch.float32, "none", False, Settings(engine="portable"))
            if (results[0].double() - right[0]).abs().max() > 1e-5:
                wrong.append(results)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and retry._remembered


# ------------------------------------------------------------------------------------------------- a real limit

LIMITED = """
import ctypes, json, resource, sys
import torch
from lib_subquad import Settings, attention, retry

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
        retry.forget()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + spare * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            output = attention(query, key, value, settings=Settings(engine=engine))
            error = ""
        except Exception as raised:
            output, error = None, f"{type(raised).__name__}: {raised}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        off = None if output is None else float((output[..., rows, :] - right).abs().max())
        print(json.dumps([engine, spare, off, error]), flush=True)
        del output
"""


def limited(heads: int, tokens: int, spares: list[int]) -> list:
    """[engine, spare MiB, largest error or None, what was raised] of calls under an address-space limit."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux limits the address space of a process")
    command = [sys.executable, "-c", LIMITED, json.dumps([heads, tokens, spares])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # a crash or an abort
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_address_space_from_nothing_to_256_mib():
    spares = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256]
    steps = limited(2, 2048, spares)
    assert len(steps) == 2 * len(spares)
    for engine, spare, off, error in steps:
        if off is None:
            assert "memory" in error and spare < 64, (engine, spare, error)
        else:
            assert off < 1e-5, (engine, spare)
    assert any(off is None for _, _, off, _ in steps)  # the limit bit


def test_256_mib_are_enough_for_a_1024_pixel_image():
    ((_, _, off, error),) = limited(16, 16384, [256])
    assert not error and off < 1e-5
