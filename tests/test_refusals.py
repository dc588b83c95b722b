"""An engine whose kernel says no in the middle of a call: the next one goes on, and nothing is lost."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lib_subquad
from lib_subquad import Settings, attention, plan, refusals
from lib_subquad import device as devices
from lib_subquad.engines import order
from lib_subquad.problem import Problem
from tests.own_engines import able

pytestmark = pytest.mark.usefixtures("trusted")  # engines fail in the middle of a call

SHAPE = (1, 2, 96, 8)
NO = "CUDA error: invalid configuration argument\nCompile with TORCH_USE_CUDA_DSA"
CALLS = 5000  # in each of two threads


def exact(query, key, value):
    query, key, value = (it.detach().double() for it in (query, key, value))
    return ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value).float()


def tensors(shape=SHAPE, grad=False):
    return [torch.randn(shape, requires_grad=grad) for _ in range(3)]


def names(count=2):
    return able(Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, "cpu"))[:count]


@pytest.fixture
def first(monkeypatch):
    """refuse(error, at=0): the engine that comes first raises it at its `at`-th chunk, and again if `always`."""

    def refuse(error=NO, at=0, always=True):
        engine, made = order.engines()[0], []
        attend = engine.attend

        def attending(*arguments):
            made.append(1)
            if len(made) > at and (always or len(made) == at + 1):
                raise error if isinstance(error, Exception) else RuntimeError(error)
            return attend(*arguments)

        monkeypatch.setattr(engine, "attend", attending)
        return made

    return refuse


def computed(settings=Settings(), given=None, **more):
    plans, given = [], given or tensors(**more)
    output = attention(*given, settings=settings, report=plans.append)
    torch.testing.assert_close(output, exact(*given), atol=1e-5, rtol=0)
    return plans[0], output


# As torch 2.11 words every error of a CUDA device.
ADVICE = """
Search for `cudaErrorInvalidValue' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.mark.parametrize(
    "error",
    [
        NO,
        NotImplementedError("no kernel"),
        RuntimeError(""),
        "no kernel image is available",
        f"CUDA error: invalid argument{ADVICE}",
    ],
)
@pytest.mark.usefixtures("fused_kernel")
def test_the_next_engine_goes_on_and_says_why(first, error):
    first(error)
    made, _ = computed()
    text = str(error).splitlines()[0] if str(error) else "RuntimeError"
    assert made.engine == names()[1] and made.retries == 0
    assert made.reasons[-1] == f"the {names()[0]} kernel refused these sizes: {text}"


@pytest.mark.usefixtures("fused_kernel")
def test_what_is_written_stays(first):
    chunks = first(at=2)
    made, _ = computed(Settings(query_chunk=32))
    assert made.engine == names()[1] and len(chunks) == 3


@pytest.mark.usefixtures("fused_kernel")
def test_it_is_remembered_for_that_problem_until_told_to_forget(first, caplog):
    chunks = first(always=False)
    for _ in range(5):
        assert computed()[0].engine == names()[1]
    assert len(chunks) == 1 and len(caplog.records) == 1
    assert "refused these sizes" in str(plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu"))
    assert computed(Settings(memory_limit=50))[0].engine == names()[1]  # whatever is set
    assert computed(shape=(1, 2, 95, 8))[0].engine == names()[0]  # other sizes may do
    lib_subquad.forget()
    assert computed()[0].engine == names()[0]


@pytest.mark.usefixtures("fused_kernel")
def test_it_is_remembered_for_pytorchs_switches_as_they_were(first, monkeypatch):
    """With others PyTorch has another kernel."""
    state = ["flash"]
    monkeypatch.setattr(devices, "_SWITCHES", [lambda: state[0]])
    first(always=False)
    assert computed()[0].engine == names()[1]
    state[0] = "memory-efficient"
    assert computed()[0].engine == names()[0]
    state[0] = "flash"
    assert computed()[0].engine == names()[1]


@pytest.mark.usefixtures("fused_kernel")
def test_what_is_refused_for_want_of_determinism_is_done_without(monkeypatch):
    """As kernels do that have no deterministic implementation."""
    engine = order.engines()[0]
    attend = engine.attend

    def attending(problem, *others):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("attention does not have a deterministic implementation")
        return attend(problem, *others)

    monkeypatch.setattr(engine, "attend", attending)
    torch.use_deterministic_algorithms(True)
    try:
        assert computed()[0].engine == names()[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert computed()[0].engine == names()[0]


@pytest.mark.usefixtures("fused_kernel")
def test_it_is_remembered_after_an_out_of_memory_too(monkeypatch):
    """Whose plan was remembered before."""
    engine = order.engines()[0]
    says, attend = iter(["out of memory", NO, NO, NO]), engine.attend
    chunks = []

    def attending(*arguments):
        chunks.append(1)
        raise RuntimeError(next(says))

    monkeypatch.setattr(engine, "attend", attending)
    for _ in range(3):
        assert computed(shape=(1, 1, 1024, 8))[0].engine == names()[1]
    assert len(chunks) == 2
    lib_subquad.forget()
    monkeypatch.setattr(engine, "attend", attend)
    assert computed(shape=(1, 1, 1024, 8))[0].engine == names()[0]


def failing_hook(tensor):
    raise RuntimeError("a hook of the user's")


@pytest.mark.parametrize("who", ["a hook", "tensors made in inference mode"])
@pytest.mark.usefixtures("fused_kernel")
def test_what_no_engine_can_do_says_nothing_of_the_engines(who, caplog):
    query, key, value = tensors(grad=True)
    with pytest.raises(RuntimeError):
        if who == "a hook":
            with torch.autograd.graph.saved_tensors_hooks(failing_hook, lambda tensor: tensor):
                attention(query, key, value)
        else:
            with torch.inference_mode():
                made_there = torch.randn(SHAPE)
            attention(made_there, key, value)
    assert computed(given=(query, key, value))[0].engine == names()[0] and not caplog.records


@pytest.mark.usefixtures("fused_kernel")
def test_retry_off_is_about_memory(first):
    first()
    assert computed(Settings(retry=False))[0].engine == names()[1]


@pytest.mark.usefixtures("fused_kernel")
@pytest.mark.parametrize("checkpointing", ["automatic", "never"])
def test_with_gradients(first, checkpointing):
    first(at=1)
    given = tensors(grad=True)
    made, output = computed(Settings(query_chunk=32, checkpointing=checkpointing), given)
    output.sum().backward()
    wanted = [it.grad.clone() for it in given]
    for it in given:
        it.grad = None
    torch.nn.functional.scaled_dot_product_attention(*given).sum().backward()
    assert made.engine == names()[1]
    for one, it in zip(wanted, given):
        torch.testing.assert_close(one, it.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(first, reentrant):
    """The recomputation saves what the first run saved, for the refusal is remembered."""
    first(always=False)
    given = tensors(grad=True)
    output = checkpoint(lambda *them: attention(*them), *given, use_reentrant=reentrant)
    output.sum().backward()
    torch.testing.assert_close(output, exact(*given), atol=1e-5, rtol=0)
    assert all(it.grad is not None for it in given)


class Control(RuntimeError):
    """What a library raises through a kernel to get out of it."""


@pytest.mark.parametrize(
    "error",
    [Control("stop"), ValueError("no"), RuntimeError("CUDA error: an illegal memory access was encountered"),
     RuntimeError("CUDA error: device-side assert triggered"),
     RuntimeError(f"CUDA error: device-side assert triggered{ADVICE}"), KeyboardInterrupt()],
    ids=repr,
)  # fmt: skip
@pytest.mark.usefixtures("fused_kernel")
def test_what_is_no_refusal_passes(monkeypatch, error):
    engine, calls = order.engines()[0], []

    def attend(*arguments):
        calls.append(1)
        raise error

    monkeypatch.setattr(engine, "attend", attend)
    with pytest.raises(type(error)):
        attention(*tensors())
    assert len(calls) == 1 and not refusals.of(None, engine.NAME)


def test_when_all_refuse_the_last_ones_words_are_told(monkeypatch):
    for engine in order.engines():

        def attend(*arguments, name=engine.NAME):
            raise RuntimeError(f"{name} says no")

        monkeypatch.setattr(engine, "attend", attend)
    with pytest.raises(RuntimeError, match=f"^{order.names()[-1]} says no$"):
        attention(*tensors())


@pytest.mark.usefixtures("fused_kernel")
def test_random_calls_with_refusals_and_memory_that_runs_out(monkeypatch):
    """From two threads, with settings that change and are forgotten between and during the calls."""
    chance = random.Random(0)
    last = order.engines()[-1]
    told = {"refused": 0, "ran out": 0}

    def unreliable(engine, attend):
        def attending(problem, sizes, *rest):
            if chance.random() < 0.02 and engine is not last:
                told["refused"] += 1
                raise RuntimeError(NO)
            if chance.random() < 0.05 and sizes.queries > 1:
                told["ran out"] += 1
                raise RuntimeError("out of memory")
            return attend(problem, sizes, *rest)

        return attending

    for engine in order.engines():
        monkeypatch.setattr(engine, "attend", unreliable(engine, engine.attend))
    monkeypatch.setattr(devices, "free_bytes", lambda device: chance.choice([0, 1 << 20, 1 << 30]))
    shapes = [(1, 2, tokens, 8) for tokens in (7, 33, 64, 96)]
    inputs = [(given, exact(*given)) for given in map(tensors, shapes)]
    wrong, done = [], []

    def work(seed):
        own = random.Random(seed)
        for _ in range(CALLS):
            given, right = own.choice(inputs)
            settings = Settings(
                query_chunk=own.choice([0, 0, 16]), kv_chunk=own.choice([0, 0, 16]),
                memory_limit=own.choice([1, 70]), engine=own.choice(["automatic", *order.names()]),
            )  # fmt: skip
            output = attention(*given, settings=settings)
            if not torch.allclose(output, right, atol=1e-5):
                wrong.append(settings)
            done.append(1)
            if own.random() < 0.01:
                lib_subquad.forget()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        f"\n[{len(done)} calls: {told['refused']} refusals, {told['ran out']} times out of memory, {len(wrong)} wrong]"
    )
    assert not wrong and len(done) == 2 * CALLS and told["refused"] > 50 and told["ran out"] > 100
