"""Going on after an out-of-memory: what is done again, what is raised, what is remembered and what is said."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lib_subquad import Settings, attention, memory, plan, refusals, retry
from lib_subquad import device as devices
from lib_subquad.engines import fused, order, portable
from lib_subquad.problem import Problem
from tests.own_engines import able
from tests.personality import TEXT, FailAt, FailOver, alone


@pytest.fixture(autouse=True)
def by_itself():
    with alone():
        yield


def exact(query, key, value):
    return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, -1) @ value


@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_no_tensor_may_be_large(checkpointing):
    """The workspace shrinks until it fits, forward and backward."""
    query, key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for tokens in (64, 256, 256))
    right = exact(query, key, value)
    plans, settings = [], Settings(engine="portable", checkpointing=checkpointing)
    limit = 17000 if checkpointing == "always" else 70000  # the gradients of key and value alone have 16384 bytes
    with FailOver(limit) as device:
        output = attention(query, key, value, settings=settings, report=plans.append)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert device.failures >= 1 and plans[0].retries >= 1
    for found, expected in zip((output, *gradients), (right, *torch.autograd.grad(right.sum(), (query, key, value)))):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.usefixtures("the_two", "fused_kernel")
def test_a_fused_kernel_given_up_while_training(monkeypatch, peak_bytes, reentrant):
    """From then on gradients are recomputed, as they will be in the calls that remember it: in a checkpointed block the
    second forward pass saves as many tensors as the first."""

    def failing(*_):
        raise RuntimeError(TEXT)

    monkeypatch.setattr(fused, "attend", failing)
    tensors = [torch.randn(1, 4, tokens, 40, requires_grad=True) for tokens in (512, 1024, 1024)]
    right = exact(*tensors)
    plans = []

    def step():
        call = lambda *given: attention(*given, report=plans.append)  # noqa: E731
        output = call(*tensors) if reentrant is None else checkpoint(call, *tensors, use_reentrant=reentrant)
        output.sum().backward()
        return output

    assert peak_bytes(step) < 4 * 512 * 1024 * 4  # no room for all scores
    assert plans[0].engine == "portable" and plans[0].retries and not plans[0].keeps_scores
    assert torch.allclose(attention(*tensors), right, atol=1e-5)
    for tensor, gradient in zip(tensors, torch.autograd.grad(right.sum(), tensors)):
        assert torch.allclose(tensor.grad, gradient, atol=1e-5)


def test_scores_that_cannot_be_kept_are_recomputed():
    tensors = [torch.randn(1, 4, 512, 40).half().float().requires_grad_() for _ in range(3)]
    plans, settings = [], Settings(engine="portable", checkpointing="never")
    with FailOver(4 * 512 * 512 * 4 - 1) as device:  # one byte short of a tensor of all scores
        output = attention(*tensors, settings=settings, report=plans.append)
        output.sum().backward()
    assert device.failures == 1 and plans[0].retries == 1 and not plans[0].keeps_scores
    assert torch.allclose(output, exact(*tensors), atol=1e-5)


@pytest.mark.usefixtures("fused_kernel")
def test_what_is_written_stays(monkeypatch):
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], threads_share=False))
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
    assert torch.allclose(output, exact(query, key, value), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is raised

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 3.94 GiB",
    "Allocation on device 0 would exceed allowed memory. (out of memory)",
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830',
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "HIP error: out of memory",
    "HIP error: hipErrorOutOfMemory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "rocBLAS error: rocblas_status_memory_error",
    "miopenStatusAllocFailed",
    "XPU out of memory. Tried to allocate 1.00 GiB",
    "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "Native API failed. Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)",
    "Native API failed. Native API returns: -4 (PI_ERROR_MEM_OBJECT_ALLOCATION_FAILURE)",
    "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "UR backend failed. UR backend returns:35 (UR_RESULT_ERROR_MEM_OBJECT_ALLOCATION_FAILURE)",
    "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "CL_MEM_OBJECT_ALLOCATION_FAILURE",
    "CL_OUT_OF_RESOURCES",
    "Allocation is out of device memory on current platform.",
    "Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 8.00 GB",
    "could not create a memory object",
    "MPS backend out of memory (MPS allocated: 5 GB, other allocations: 1 GB, max allowed: 6 GB)",
    "Invalid buffer size: 16.00 GB",
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "Could not allocate tensor with 1073741824 bytes. There is not enough GPU video memory available!",
    "Exception(1) tid(2d0c) 8007000E No hay suficientes recursos de memoria disponibles para completar esta operación.",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)",
    "Could not allocate memory for Tensor SizesAndStrides!",
    "std::bad_alloc",
    "bad allocation",
]

SOMETHING_ELSE = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: invalid argument",
    "CUDA error: invalid configuration argument",
    "CUDA error: too many resources requested for launch",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_MAPPING_ERROR",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "cuDNN error: CUDNN_STATUS_MAPPING_ERROR",
    "out of resource: shared memory, Required: 131072, Hardware limit: 101376.",
    "HIP error: hipErrorIllegalAddress",
    "HIP error: invalid device function",
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "Native API failed. Native API returns: 2147483646 (UR_RESULT_ERROR_UNKNOWN)",
    "could not create a primitive",
    "Placeholder storage has not been allocated on MPS device!",
    "MPSGraph does not support tensor dims larger than INT_MAX",
    "The GPU device instance has been suspended. Use GetDeviceRemovedReason to determine the reason. 887A0005",
    "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that it is out of shared memory.",
    "Storage size calculation overflowed with sizes=[4611686018427387904]",
    "Cannot allocate buffer larger than kint32max",
    "expected scalar type Float but found Half",
]

ERRORS = [
    *(RuntimeError(text) for text in OUT_OF_MEMORY),
    torch.cuda.OutOfMemoryError("Allocation on device "),
    MemoryError(),
]
OTHERS = [*(RuntimeError(text) for text in SOMETHING_ELSE), ValueError("out of memory"), KeyError("x")]


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
def test_other_errors_pass(error, request):
    """Tried once; or once with each engine, where it is a kernel that says no."""
    if refusals.is_refusal(error):
        request.getfixturevalue("fused_kernel")
    assert not devices.is_out_of_memory(error)
    text, tensors = str(error), torch.randn(3, 1, 2, 64, 8)
    attention(*tensors)
    with pytest.raises(type(error)) as raised, FailOver(0, error) as device:
        attention(*tensors)
    assert str(raised.value) == text
    assert device.failures == (len(able(Problem.of(*tensors))) if refusals.is_refusal(error) else 1)


def test_an_out_of_memory_that_is_reported_twice(monkeypatch):
    """As CUDA does where the error came asynchronously: the next operator tells it again."""
    attend, calls = portable.attend, []

    def failing(*arguments):
        calls.append(arguments[1])
        if len(calls) in (1, 2):
            raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the manual")
        return attend(*arguments)

    monkeypatch.setattr(portable, "attend", failing)
    query, key, value = torch.randn(3, 1, 2, 128, 8)
    plans = []
    output = attention(query, key, value, settings=Settings(engine="portable"), report=plans.append)
    assert torch.allclose(output, exact(query, key, value), atol=1e-5) and plans[0].retries == 2


def test_retry_can_be_turned_off():
    attention(*torch.randn(3, 1, 2, 64, 8))
    with pytest.raises(RuntimeError) as raised, FailOver(0) as device:
        attention(*torch.randn(3, 1, 2, 64, 8), settings=Settings(retry=False))
    assert str(raised.value) == TEXT and device.failures == 1


# ------------------------------------------------------------------------------------------------ what is remembered


def test_the_smaller_size_is_remembered_until_memory_has_grown(monkeypatch, caplog):
    monkeypatch.setattr(memory, "GREATEST_AGE", 0)
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


def failing_once(monkeypatch, engine):
    """Memory runs out at the engine's first chunk; returns the sizes of all."""
    attend, sizes = engine.attend, []

    def failing(*arguments):
        sizes.append(arguments[1])
        if len(sizes) == 1:
            raise RuntimeError("out of memory")
        return attend(*arguments)

    monkeypatch.setattr(engine, "attend", failing)
    return sizes


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_is_planned_while_another_finds_smaller_sizes(monkeypatch, grad):
    """Between what that one forgets and what it remembers."""
    query, key, value = torch.randn(3, 1, 2, 512, 8).requires_grad_(grad)
    call = partial(attention, query, key, value, settings=Settings(engine=order.names()[-1]))
    sizes = failing_once(monkeypatch, order.engines()[-1])

    def another(device):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    monkeypatch.setattr(devices, "release_cached", another)
    call()
    plans = []
    call(report=plans.append)
    assert plans[0].sizes == sizes[2] != sizes[0]


@pytest.mark.usefixtures("fused_kernel", "trusted")
def test_smaller_sizes_are_remembered_for_pytorchs_switches_as_they_were(monkeypatch):
    state = ["flash"]
    monkeypatch.setattr(devices, "_SWITCHES", [lambda: state[0]])
    failing_once(monkeypatch, order.engines()[0])
    plans = []
    for state[0] in ("flash", "flash", "memory-efficient", "flash"):
        attention(*torch.randn(3, 1, 2, 1024, 8), report=plans.append)
    assert [made.query_chunk < 1024 for made in plans] == [True, True, False, True]


def test_what_is_remembered_gives_way_to_a_limit_below_it(monkeypatch):
    monkeypatch.setattr(memory, "GREATEST_AGE", 0)
    free = [64 << 20]
    monkeypatch.setattr(devices, "free_bytes", lambda device: free[0])
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], least_tile_bytes=1 << 10))
    query, key, value = torch.randn(3, 1, 2, 256, 8)
    plans = []
    for free[0] in (64 << 20, 64 << 20, 32 << 10):
        with FailOver(40000):
            attention(query, key, value, settings=Settings(engine="portable"), report=plans.append)
    assert plans[0].sizes == plans[1].sizes
    assert plans[1].workspace_bytes > (32 << 10) * 70 // 100 >= plans[2].workspace_bytes


def test_only_a_real_out_of_memory_goes_below_what_is_efficient(monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    query, key, value = torch.randn(3, 1, 2, 512, 8)
    plans, settings = [], Settings(engine="portable")
    attention(query, key, value, settings=settings, report=plans.append)
    for _ in range(2):
        with FailOver(40000) as device:
            output = attention(query, key, value, settings=settings, report=plans.append)
        assert torch.allclose(output, exact(query, key, value), atol=1e-5)
    efficient, found, remembered = (plan.query_chunk * plan.kv_chunk * plan.head_chunk * 4 for plan in plans)
    assert plans[0].retries == 0 and efficient >= 1 << 18 and plans[1].retries > 0 and found <= 40000
    assert not device.failures and remembered == found  # although nothing seems free


@pytest.mark.usefixtures("fused_kernel")
def test_a_failure_while_asking_for_a_kernel_is_no_answer():
    query, key, value = torch.randn(3, 1, 2, 33, 8)
    fused._kernel_reasons.cache_clear()
    with FailAt(0) as device:
        attention(query, key, value)
    assert device.failed == "zeros"
    plans = []
    attention(query, key, value, report=plans.append)
    fresh = plan(query.shape, key.shape, value.shape, query.dtype, query.device)
    assert plans[0].reasons == fresh.reasons and "does not say" not in str(fresh)


def test_two_threads_that_both_run_out():
    query, key, value = (torch.randn(1, 2, tokens, 8) for tokens in (10, 70, 70))
    right, wrong = exact(query, key, value), []

    def work():
        for _ in range(30):
            with FailOver(3000):
                output = attention(query, key, value, settings=Settings(engine="portable"))
            if not torch.allclose(output, right, atol=1e-5):
                wrong.append(output)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and retry._remembered
