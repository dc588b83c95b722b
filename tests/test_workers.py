"""Threads that share a call on the CPU: what they compute, and that nobody else notices them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad import Settings, attention
from lib_subquad.engines.base import Sizes
from lib_subquad.engines.portable import workers
from lib_subquad.engines.portable.sizes import shares
from tests.threads import torch_threads

ROOT = Path(__file__).parents[1]
PORTABLE = Settings(engine="portable")
kernel = sys.modules["lib_subquad.engines.portable.attend"]  # the module; the package calls a function so

SHAPES = {
    "two heads": (1, 2, 700, 600, 40),
    "one head": (1, 1, 900, 700, 64),
    "five heads": (1, 5, 300, 400, 64),
    "batches": (3, 2, 400, 300, 64),
}

needs_threads = pytest.mark.skipif(not workers._EACH_ITS_OWN, reason="this PyTorch has no threads to set one by one")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """They share what takes long: here, everything."""
    monkeypatch.setattr(workers, "LEAST", 0)
    with torch_threads(3):
        yield


@pytest.fixture
def shared(monkeypatch):
    """The number of workers of every call that was shared."""
    seen, share = [], workers.share

    def watched(pieces, compute, count):
        if count > 1:
            seen.append(count)
        return share(pieces, compute, count)

    monkeypatch.setattr(workers, "share", watched)
    return seen


def make(name, grad=False):
    batch, heads, queries, keys, width = SHAPES[name]
    return tuple(torch.randn(batch, heads, tokens, width, requires_grad=grad) for tokens in (queries, keys, keys))


# ------------------------------------------------------------------------------------------------ what they compute


@needs_threads
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("chunks", [{}, {"query_chunk": 130, "kv_chunk": 170}], ids=["automatic", "chunks"])
@pytest.mark.parametrize("name", SHAPES)
def test_results_and_gradients(reference, shared, name, chunks, mask):
    tensors = make(name, grad=True)
    mask = torch.rand(tensors[0].shape[2], tensors[1].shape[2]) > 0.3 if mask else None
    settings = Settings(engine="portable", **chunks)
    output = attention(*tensors, mask=mask, settings=settings)
    expected = reference(*tensors, mask)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert shared
    shared.clear()
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, grad)
    for gradient, right in zip(found, torch.autograd.grad(expected, tensors, grad.double())):
        torch.testing.assert_close(gradient, right, atol=1e-4, rtol=1e-4)
    assert shared


@needs_threads
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_every_time(name):
    """Whichever thread takes a piece."""
    tensors = make(name, grad=True)
    outputs = [attention(*tensors, settings=PORTABLE) for _ in range(4)]
    gradients = [torch.autograd.grad(output.sum(), tensors) for output in outputs]
    for output, found in zip(outputs, gradients):
        assert torch.equal(output, outputs[0])
        assert all(map(torch.equal, found, gradients[0]))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16, 64])
@pytest.mark.parametrize("sizes", [Sizes(1024, 512, 2), Sizes(1, 64, 1), Sizes(2048, 512, 1), Sizes(300, 77, 20)])
def test_together_they_score_no_more_than_planned(sizes, threads):
    for batch, heads, queries in ((1, 1, 9216), (2, 8, 4096), (1, 5, 64), (1, 20, 1), (2, 3, 1000)):
        here = Sizes(min(sizes.queries, queries), sizes.keys, min(sizes.heads, heads))
        count, each = shares(batch, heads, queries, here, threads)
        assert 1 <= count <= threads and each.keys == here.keys and each.heads >= 1 and each.queries >= 1
        assert count * each.heads * each.queries <= here.heads * here.queries + count * each.heads


def test_a_mask_with_a_gradient_is_added_to_by_one_thread(shared, reference):
    query, key, value = make("five heads")
    mask = torch.randn(300, 400, requires_grad=True)
    (found,) = torch.autograd.grad(attention(query, key, value, mask=mask, settings=PORTABLE).sum(), mask)
    (right,) = torch.autograd.grad(reference(query, key, value, mask).sum(), mask)
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- what nobody else notices


def in_a_new_thread(function, *args):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


@needs_threads
def test_thread_counts_are_left_as_they_were(shared):
    torch.set_num_threads(2)  # also what threads that are made from now on begin with
    workers._forget()  # so that they are made anew
    seen = []
    alone = threading.Thread(
        target=lambda: seen.extend([torch.get_num_threads(), ready.wait(), torch.get_num_threads()])
    )
    ready = threading.Event()
    alone.start()
    attention(*make("two heads"), settings=PORTABLE)
    ready.set()
    alone.join()
    assert shared == [2]
    assert torch.get_num_threads() == 2 and seen[0] == seen[2] == 2
    assert in_a_new_thread(torch.get_num_threads) == 2
    mine = [future.result() for future in [workers._threads.submit(torch.get_num_threads) for _ in range(8)]]
    assert set(mine) == {1}


@needs_threads
def test_more_threads_after_fewer_and_fewer_after_more(shared, reference):
    tensors = make("two heads")
    for count in (2, 4, 2, 3):
        torch.set_num_threads(count)
        output = attention(*tensors, settings=PORTABLE)
        torch.testing.assert_close(output.double(), reference(*tensors), atol=1e-5, rtol=1e-5)
        assert torch.get_num_threads() == count
    assert shared == [2, 4, 2, 3]


@needs_threads
def test_modes_of_the_caller(shared):
    query, key, value = make("two heads")
    with torch.inference_mode():
        output = attention(query, key, value, settings=PORTABLE)
        assert output.is_inference() and torch.is_inference_mode_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        again = attention(query, key, value, settings=PORTABLE)
    assert torch.equal(output, again) and again.dtype == torch.float32 and not again.is_inference()
    assert len(shared) == 2 and torch.is_grad_enabled()


@pytest.mark.parametrize("how", ["mode", "profiler", "small"])
def test_whoever_watches_the_calling_thread_sees_everything(monkeypatch, shared, how):
    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    query, key, value = make("two heads")
    if how == "small":  # and what is done before other threads have begun is not worth it
        monkeypatch.setattr(workers, "LEAST", 1 << 31)
        attention(query, key, value, settings=PORTABLE)
    elif how == "mode":
        with Watch() as watch:
            attention(query, key, value, settings=PORTABLE)
        assert any("bmm" in name for name in watch.seen)
    else:
        with torch.autograd.profiler.profile() as profile:
            attention(query, key, value, settings=PORTABLE)
        assert any("bmm" in event.name for event in profile.function_events)
    assert not shared


@needs_threads
def test_two_callers_at_a_time(reference):
    """As the live preview decodes on a thread of its own while the next step runs."""
    calls = [make(name) for name in ("two heads", "one head")]
    right, wrong = [reference(*tensors) for tensors in calls], []

    def work(tensors, expected):
        for _ in range(12):
            if not torch.allclose(attention(*tensors, settings=PORTABLE).double(), expected, atol=1e-5):
                wrong.append(tensors)

    threads = [threading.Thread(target=work, args=call) for call in zip(calls, right) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------------------------ what goes wrong


@needs_threads
def test_memory_that_runs_out_in_one_of_them(monkeypatch, shared, reference):
    """It is tried again in smaller chunks, by all of them, and nothing of the first attempt is held."""
    divide, failures = kernel.divide, []

    def failing(*args):
        if not failures:
            failures.append(threading.current_thread().name)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes.")
        return divide(*args)

    monkeypatch.setattr(kernel, "divide", failing)
    tensors, plans = make("five heads"), []
    output = attention(*tensors, settings=PORTABLE, report=plans.append)
    torch.testing.assert_close(output.double(), reference(*tensors), atol=1e-5, rtol=1e-5)
    assert plans[0].retries == 1 and failures[0].startswith("subquad") and len(shared) == 2


@needs_threads
def test_an_error_is_raised_once_all_have_stopped_and_holds_no_tensor():
    class Mine(Exception):
        pass

    tensor, busy = torch.randn(3), []

    def compute(pieces):
        held = torch.randn(5)
        for piece in pieces:
            busy.append(piece)
            time.sleep(0.01)
            busy.remove(piece)
            if piece == 4:
                raise Mine(held.shape)

    with pytest.raises(Mine):
        workers.share(range(1000), compute, 3)
    assert not busy and tensor is not None
    found = []
    workers.share(range(20), lambda pieces: found.extend(pieces), 3)  # and they go on
    assert sorted(found) == list(range(20))


@needs_threads
def test_no_room_for_a_thread(monkeypatch, reference):
    def no_room(size):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "_pool", no_room)
    tensors = make("two heads")
    torch.testing.assert_close(
        attention(*tensors, settings=PORTABLE).double(), reference(*tensors), atol=1e-5, rtol=1e-5
    )


def run(program: str) -> dict:
    """What a program prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PROGRAM = """
import json, os, signal, threading, time
import torch
from lib_subquad import Settings, attention
from lib_subquad.engines.portable import workers
workers.LEAST = 0
torch.set_num_threads(2)
query, key, value = torch.randn(3, 1, 2, 600, 40)
settings = Settings(engine="portable")
right = attention(query, key, value, settings=settings)
"""


@needs_threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's own libraries do not outlive a fork")
def test_a_process_that_forks():
    found = run(
        PROGRAM
        + """
read, write = os.pipe()
if os.fork() == 0:
    signal.alarm(60)
    same = torch.equal(attention(query, key, value, settings=settings), right)
    os.write(write, b"right" if same else b"wrong")
    os._exit(0)
os.close(write)
child = os.read(read, 9).decode()
print(json.dumps({"child": child, "parent": torch.equal(attention(query, key, value, settings=settings), right)}))
"""
    )
    assert found == {"child": "right", "parent": True}


@needs_threads
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")
def test_ctrl_c():
    """It is heard in the middle of a call, the workers stop at the end of their pieces, and the next call works."""
    found = run(
        PROGRAM
        + f"""
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background, the tests' too, ignores it
large = torch.randn(1, 8, 8192, 40)
threading.Timer(0.3, lambda: os.kill(os.getpid(), {int(signal.SIGINT)})).start()
try:
    while True:
        attention(large, large, large, settings=settings)
except KeyboardInterrupt:
    heard = time.perf_counter()
idle = [workers._threads.submit(time.perf_counter) for _ in range(2)]
print(json.dumps({{"next": torch.equal(attention(query, key, value, settings=settings), right),
                  "stopped": all(future.result(10) for future in idle)}}))
"""
    )
    assert found == {"next": True, "stopped": True}


@needs_threads
def test_a_program_that_ends_in_the_middle():
    """Interpreter shutdown waits for no piece that nobody needs, and raises nothing."""
    found = run(
        PROGRAM
        + "threading.Thread(target=lambda: attention(query, key, value, settings=settings)).start()\nprint('{}')"
    )
    assert found == {}
