"""Trust before use: an engine whose results are wrong is found out before they reach anybody."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lib_subquad
from lib_subquad import Settings, attention, memory, plan, trust, truth
from lib_subquad.engines import fused, order
from lib_subquad.engines.base import ContractError
from lib_subquad.problem import Problem

pytestmark = pytest.mark.usefixtures("fused_kernel", "one_thread")
SHAPE = (2, 3, 96, 8)


def tensors(shape=SHAPE, dtype=torch.float32, grad=False):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(3)]


@pytest.fixture
def first(monkeypatch):
    """first(spoil): the first engine gives spoil(query, output); a list of the number of queries of each call."""
    engine, made = order.engines()[0], []
    attend = engine.attend

    def put_in(spoil):
        def attending(problem, sizes, query, *others):
            made.append(query.shape[2])
            output, statistics = attend(problem, sizes, query, *others)
            return spoil(query, output), statistics

        monkeypatch.setattr(engine, "attend", attending)
        return made

    return put_in


def right(query, output):
    return output


def computed(reference, given, mask=None, settings=Settings()):
    """The plan of a call, whose result is right whatever was in its way."""
    plans = []
    output = attention(*given, mask=mask, settings=settings, report=plans.append)
    torch.testing.assert_close(output.detach().double(), reference(*given, mask).detach(), atol=1e-5, rtol=0)
    return plans[0]


def raising(query, output):
    raise ValueError("head_dim must be 64")


WRONG = {
    "off by 0.01": lambda query, output: output + 0.01,
    "NaN": lambda query, output: output * torch.nan,
    "head_dim must be 64": raising,
    "off by": lambda query, output: output.flip(1),  # of another head
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_in_a_small_call_is_not_used(reference, first, caplog, words):
    made = first(WRONG[words])
    for _ in range(2):
        found = computed(reference, tensors())
        assert found.engine != order.names()[0] and words in found.reasons[0] and "a small call" in found.reasons[0]
    assert made == [trust.QUERIES] and len(caplog.records) == 1
    assert words in str(plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu"))  # and so in Explain
    computed(reference, tensors(dtype=torch.float64))
    assert made == [trust.QUERIES] * 2  # another dtype is another kernel


def last_rows(query, output):
    output = output.clone()
    output[:, :, 200:] += 0.01
    return output


@pytest.mark.parametrize(
    "spoil",
    [
        last_rows,
        lambda query, output: output + 0.01 * (query.shape[2] > 256),
        lambda query, output: output + 0.01 * (torch.arange(output.shape[0])[:, None, None, None] > 1),
        lambda query, output: output + 0.01 * (query.stride(1) > query.stride(2)),
        lambda query, output: output * (torch.nan if query.shape[2] > 256 else 1),
    ],
    ids=["later tokens", "many tokens", "later entries", "heads before tokens", "NaN"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_wrong_for_real_sizes_is_found_in_the_first_call(reference, first, spoil, grad):
    first(spoil)
    found = computed(reference, tensors((3, 2, 300, 8), grad=grad))
    assert found.engine != order.names()[0]
    assert found.reasons[-1].startswith(f"the {order.names()[0]} kernel gave wrong results for these sizes")


def test_what_is_wrong_for_some_sizes_is_used_for_others(reference, first):
    first(lambda query, output: output + 0.01 * (query.shape[2] > 256))
    assert computed(reference, tensors((1, 2, 300, 8))).engine != order.names()[0]
    assert computed(reference, tensors((1, 2, 200, 8))).engine == order.names()[0]


def test_each_way_of_lying_in_memory_is_looked_at(reference, first):
    first(lambda query, output: output + 0.01 * (query.stride(1) > query.stride(2)))
    tokens_first = [torch.randn(2, 96, 3, 8).transpose(1, 2) for _ in range(3)]
    assert computed(reference, tokens_first).engine == order.names()[0]
    assert computed(reference, tensors()).engine != order.names()[0]


def test_once_trusted_a_call_is_one_call(first, monkeypatch):
    made, looked = first(right), []
    attend = truth.attend
    monkeypatch.setattr(truth, "attend", lambda *them: looked.append(1) or attend(*them))
    given = tensors()
    attention(*given)
    assert made == [trust.QUERIES, SHAPE[2]] and looked
    made.clear(), looked.clear()
    for _ in range(3):
        attention(*given)
    assert made == [SHAPE[2]] * 3 and not looked
    attention(*given, settings=Settings(memory_limit=50))  # planned anew
    assert made == [SHAPE[2]] * 4 and not looked


def test_who_calls_while_the_first_call_is_looked_at_is_looked_at_too(reference, first, monkeypatch):
    first(lambda query, output: output + 0.01 * (query.shape[2] > 256))
    given, check, others = tensors((1, 2, 300, 8)), trust.check, []

    def looking(*call):
        if not others:
            others.append(threading.Thread(target=lambda: others.append(computed(reference, given))))
            others[0].start()
            others[0].join()
        check(*call)

    monkeypatch.setattr(trust, "check", looking)
    assert computed(reference, given).engine == others[1].engine != order.names()[0]


def test_gradients_are_part_of_it(reference, first):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    first(lambda query, output: Halved.apply(output))
    assert computed(reference, tensors()).engine == order.names()[0]
    given = tensors(grad=True)
    plans = []
    attention(*given, report=plans.append).sum().backward()
    assert plans[0].engine != order.names()[0]
    exact = [it.detach().double().requires_grad_() for it in given]
    reference(*exact).sum().backward()
    for mine, it in zip(given, exact):
        torch.testing.assert_close(mine.grad.double(), it.grad, atol=1e-5, rtol=0)


def test_who_asks_for_an_inexact_engine_gets_it(first, monkeypatch):
    first(lambda query, output: output + 0.01)
    engine, plans = order.engines()[0], []
    monkeypatch.setattr(engine, "EXACT", False)
    attention(*tensors(), settings=Settings(engine=engine.NAME), report=plans.append)
    attention(*tensors(), report=plans.append)
    assert plans[0].engine == engine.NAME != plans[1].engine


def test_running_out_of_memory_is_no_distrust(reference, monkeypatch):
    engine = order.engines()[0]
    attend, failures = engine.attend, [RuntimeError("CUDA out of memory")] * 2

    def attending(*call):
        if failures:
            raise failures.pop()
        return attend(*call)

    monkeypatch.setattr(engine, "attend", attending)
    given = tensors((1, 2, 600, 8))
    found = computed(reference, given)
    assert found.retries == 1 and found.engine == engine.NAME and found.query_chunk < 600
    lib_subquad.forget()
    assert computed(reference, given).engine == engine.NAME


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), NotImplementedError("no aten::index here")])
def test_a_look_that_fails_is_not_the_engines_fault(reference, first, monkeypatch, error):
    """Neither are chunks halved for it, nor does the engine refuse."""
    first(right)
    engine, given = order.engines()[0], tensors((1, 2, 600, 8))

    def failing(*given):
        raise error

    monkeypatch.setattr(truth, "attend", failing)
    for _ in range(2):
        found = computed(reference, given)
        assert (found.engine, found.query_chunk, found.retries) == (engine.NAME, 600, 0)
    assert found.reasons == (engine.WHY,)


def test_a_look_that_failed_is_made_up_for(reference, first, monkeypatch):
    first(lambda query, output: output + 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(truth, "attend", lambda *given: torch.empty(1 << 60))  # cannot allocate memory
        assert trust.why_not(order.engines()[0], Problem.of(*tensors())) == []
    assert computed(reference, tensors()).engine != order.names()[0]


def no_memory(*given):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("failing", ["the truth", "the tensors"])
def test_a_small_call_that_cannot_be_had_is_tried_ever_less_often(reference, first, monkeypatch, failing):
    """And never given up: when there is memory again, what is wrong is found."""
    made = first(lambda query, output: output + 0.01 * (query.shape[2] == trust.QUERIES))
    engine, problem, answers, tried = order.engines()[0], Problem.of(*tensors()), [], []
    with monkeypatch.context() as patch:
        where, name = (truth, "attend") if failing == "the truth" else (trust, "tensors")
        patch.setattr(where, name, lambda *given: tried.append(len(answers)) or no_memory())
        while len(answers) < 2 * trust.LONGEST_PAUSE:
            answers.append(trust.why_not(engine, problem))
    assert not any(answers)
    gaps = [later - earlier for earlier, later in zip(tried, tried[1:])]
    assert gaps == sorted(gaps) and gaps[:4] == [1, 2, 4, 8] and len(tried) <= 10
    made.clear()
    found = [bool(trust.why_not(engine, problem)) for _ in range(trust.LONGEST_PAUSE + 1)]
    assert found == sorted(found) and found[-1] and made == [trust.QUERIES]


def test_a_look_at_a_real_call_that_cannot_be_had_is_tried_ever_less_often(reference, first, monkeypatch):
    first(lambda query, output: output + 0.01 * (query.shape[2] > 256))
    given, taken, tried = tensors((1, 2, 300, 8)), [], []
    assert trust.why_not(order.engines()[0], Problem.of(*given)) == []
    with monkeypatch.context() as patch:
        patch.setattr(truth, "attend", lambda *them: tried.append(len(taken)) or no_memory())
        while len(taken) < 64:
            memory.forget()
            attention(*given, report=taken.append)
    assert tried[:5] == [0, 1, 3, 7, 15] and len(tried) <= 7
    while len(taken) < 128:
        memory.forget()
        attention(*given, report=taken.append)
    found = [it.engine != order.names()[0] for it in taken]
    assert found == sorted(found) and found[-1] and not any(found[:64])


def test_looks_that_cannot_be_had_are_not_counted_for_ever(first, monkeypatch):
    first(right)
    monkeypatch.setattr(trust, "MOST_GOOD", 3)
    monkeypatch.setattr(truth, "attend", no_memory)
    for queries in range(10, 20):
        attention(*tensors((1, 1, queries, 8)))
    assert 0 < len(trust._pauses._waiting) <= 3


def test_a_lost_device_is_told(first):
    def lost(query, output):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first(lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attention(*tensors())


def test_whoever_writes_an_engine_sees_what_is_wrong_with_it(first):
    first(lambda query, output: output[0])
    with pytest.raises(ContractError, match="as its result; expected"):
        attention(*tensors())


def test_nobody_sees_it(first, monkeypatch):
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operators = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operators.append(str(function))
            return function(*args, **(kwargs or {}))

    given, runs = tensors(), []
    for trusting in (False, True):
        lib_subquad.forget()
        with monkeypatch.context() as patch:
            if not trusting:
                patch.setattr(trust, "why_not", lambda engine, problem: [])
                patch.setattr(trust, "check", lambda *call: None)
            state = torch.get_rng_state()
            with Seen() as seen:
                attention(*given)
            assert torch.equal(state, torch.get_rng_state())
        runs.append(seen.operators)
    assert runs[0] == runs[1] != []


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_computed_twice_find_the_same(reference, reentrant):
    given = tensors(grad=True)
    checkpoint(lambda *them: attention(*them).square(), *given, use_reentrant=reentrant).sum().backward()
    exact = [it.detach().double().requires_grad_() for it in given]
    reference(*exact).square().sum().backward()
    for mine, it in zip(given, exact):
        torch.testing.assert_close(mine.grad.double(), it.grad, atol=1e-4, rtol=0)


def test_where_tensors_have_no_numbers_nothing_is_tried(first):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    made = first(right)
    with fake.FakeTensorMode():
        attention(*(torch.empty(SHAPE) for _ in range(3)))
    if hasattr(torch, "func"):
        torch.func.vmap(attention)(*tensors())
    assert made == []


def test_what_was_found_wrong_is_not_traced_either(reference, first):
    first(lambda query, output: output + 0.01)
    engine, given = order.engines()[0], tensors()
    attention(*given)
    assert trust.is_distrusted(engine, given[0].device)
    plans = []
    torch.func.vmap(lambda *them: attention(*them, report=plans.append))(*given)
    assert plans[0].engine != engine.NAME


def test_whoever_asks_while_another_thread_plans_gets_an_answer(first):
    first(lambda query, output: output + 0.01)
    attention(*tensors())

    class Planning:
        """A device that is compared while somebody else plans."""

        def __eq__(self, other):
            attention(*tensors(dtype=torch.float64))
            return False

    assert not trust.is_distrusted(order.engines()[0], Planning())


def test_whatever_defaults_a_program_has_engines_are_compared(reference, first):
    made = first(lambda query, output: output + 0.01)
    given = tensors()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            attention(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made == [trust.QUERIES]
    assert computed(reference, given).engine != order.names()[0]


def test_plans_of_training_that_are_asked_for_in_inference_mode(first):
    first(right)
    with torch.inference_mode():
        assert plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu", grad=True).engine == order.names()[0]


def test_where_no_hooks_are_allowed_engines_are_compared_all_the_same(reference, first):
    first(lambda query, output: output + 0.01)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        assert computed(reference, tensors()).engine != order.names()[0]


@pytest.mark.skipif(not fused.MASKS_ARE_RIGHT, reason="this torch's fused kernel is given no masks")
@pytest.mark.parametrize("mask", [-10_000.0, -1e9, torch.finfo(torch.float32).min])
def test_masks_so_large_that_digits_of_scores_are_lost_are_no_engines_fault(first, mask):
    """Such as -10,000 for all keys of an empty prompt."""
    first(right)
    for keys in (8, 77):
        query, key, value, plans = torch.randn(2, 8, 96, 40), *torch.randn(2, 2, 8, keys, 40), []
        attention(query, key, value, mask=torch.tensor([0.0, mask])[:, None, None, None], report=plans.append)
        assert plans[0].engine == order.names()[0], plans[0].reasons


def test_what_a_row_of_nothing_gives_is_looked_at():
    """However large the numbers of its mask are."""
    query, key, value = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    found = truth.attend(query, key, value, torch.full((4, 4), -torch.inf), 1.0)
    assert not found.rows.any() and found.allowed.max() < 1e-4
    assert found.wrong_by(found.rows.float() + 0.01)


def test_no_more_is_remembered_than_is_worth_it(first, monkeypatch):
    first(right)
    monkeypatch.setattr(trust, "MOST_GOOD", 3)
    for queries in range(10, 20):
        attention(*tensors((1, 1, queries, 8)))
    assert 0 < len(trust._good) <= 3


def test_scores_past_the_largest_half(first):
    """Without what SD 2.1 768 needs an engine is not trusted in half precision, whatever it gives of smaller scores."""

    def overflowing(query, output):
        return output * torch.nan if query.dtype == torch.float16 and query.abs().max() > 100 else output

    first(overflowing)
    for dtype, trusted in ((torch.float16, False), (torch.float32, True)):
        problem = Problem.of(*tensors(dtype=dtype))
        if not order.engines()[0].why_not(problem):
            assert (trust.why_not(order.engines()[0], problem) == []) == trusted


def test_rows_that_are_no_numbers_say_nothing(first):
    first(right)
    for broken in (torch.nan, torch.inf, 1e30):
        given, plans = tensors(), []
        given[0][:, :, ::3] = broken
        given[2][0, 0, 5] = broken
        attention(*given, report=plans.append)
        assert plans[0].engine == order.names()[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_is_right_is_trusted(dtype, masked, grad):
    """With every kind of mask that this PyTorch's kernel takes; where it is one that overflows, for that alone it is
    not."""
    overflows = dtype == torch.float16 and not fused.HALF_SCORES_ARE_RIGHT
    mask_dtype = {None: None, "bool": torch.bool, "same": dtype}[masked]
    for width in (8, 40, 64, 72, 160):
        for mask in ((1, 1, 1, 50), (2, 1, 90, 50), (1, 3, 90, 1)) if masked else (None,):
            query, keys = (2, 3, 90, width), (2, 3, 50, width)
            problem = Problem.from_shapes(
                query, keys, keys, dtype, "cpu", mask_shape=mask, mask_dtype=mask_dtype, grad=grad
            )
            for engine in order.engines()[:-1]:
                if not engine.why_not(problem):
                    reasons = trust.why_not(engine, problem)
                    assert not reasons or overflows and reasons[0].endswith("wrong results: NaN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_truth(reference, dtype):
    """Exact, in blocks; it allows rounding, and a few times that no more."""
    query, key, value = (torch.randn(300, 48).to(dtype) for _ in range(3))
    mask = torch.rand(300, 300) < 0.5
    mask[7] = False
    found = truth.attend(query, key, value, mask, 0.2)
    exact = reference(query, key, value, mask, 0.2)
    torch.testing.assert_close(found.rows, exact, atol=1e-12, rtol=0)
    assert found.wrong_by(exact.to(dtype)) == 0
    off = 100 * truth.UNITS[dtype]
    assert found.wrong_by((exact + off).to(dtype)) == pytest.approx(off, rel=0.5)
    assert torch.isnan(torch.tensor(found.wrong_by(torch.full_like(value, torch.nan))))
