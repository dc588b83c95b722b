"""cuDNN's kernel first: the order is PyTorch's again afterwards, whatever happened, and no other call notices."""

from __future__ import annotations

import threading

import pytest
import torch

import lib_subquad
from lib_subquad import Settings, attention, plan
from lib_subquad import device as devices
from lib_subquad.engines import cudnn, fused, order, pytorch
from lib_subquad.problem import Problem

pytestmark = pytest.mark.usefixtures("fused_kernel")
needs_the_switch = pytest.mark.skipif(cudnn._order is None, reason="this torch puts no kernel first")
SHAPE = (2, 3, 64, 16)


@pytest.fixture
def card(monkeypatch):
    """card(can): the CPU passes for an NVIDIA card, for which PyTorch says that cuDNN can what `can(params)` says."""

    def become(can=lambda params: True):
        monkeypatch.setattr(devices, "kind", lambda device: "cuda")
        monkeypatch.setattr(cudnn, "installed", lambda: True)
        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can, raising=False)
        cudnn._kernel_reasons.cache_clear()
        lib_subquad.forget()

    yield become
    cudnn._kernel_reasons.cache_clear()


def state():
    return torch._C._get_sdp_priority_order(), [
        getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in ("cudnn", "flash", "mem_efficient", "math")
    ]


def tensors(grad=False):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, requires_grad=grad) for _ in range(3)]


@pytest.fixture
def seen(monkeypatch):
    """PyTorch's order and switches, as each call of its kernel finds them."""
    found, call = [], pytorch.call
    monkeypatch.setattr(pytorch, "call", lambda *given, **more: found.append(state()) or call(*given, **more))
    return found


@needs_the_switch
@pytest.mark.parametrize("grad", [False, True])
def test_it_comes_first_and_all_others_stay_on(card, seen, reference, grad):
    card()
    before, plans, given = state(), [], tensors(grad)
    output = attention(*given, settings=Settings(engine="cudnn"), report=plans.append)
    if grad:
        output.sum().backward()
    assert plans[0].engine == "cudnn" and state() == before
    assert seen and all(order_[0] == fused.CUDNN_KERNEL and switches == before[1] for order_, switches in seen)
    torch.testing.assert_close(output.double(), reference(*given), atol=1e-5, rtol=0)


def is_deterministic():
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@needs_the_switch
def test_where_only_deterministic_kernels_may_be_taken(card, seen):
    """PyTorch refuses cuDNN's then, for as long as that lasts, and does not where a warning is enough."""
    card(lambda params: not is_deterministic())
    plans, given = [], tensors()
    try:
        for mode in ("default", "error", "warn", "error", "default"):
            torch.set_deterministic_debug_mode(mode)
            attention(*given, settings=Settings(engine="cudnn"), report=plans.append)
    finally:
        torch.set_deterministic_debug_mode("default")
    assert [plan.engine == "cudnn" for plan in plans] == [True, False, True, False, True]


@needs_the_switch
def test_a_kernel_that_is_switched_off_stays_so(card, seen):
    card()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        before = state()
        attention(*tensors(), settings=Settings(engine="cudnn"))
        assert state() == before and all(switches == before[1] for _, switches in seen)
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


@needs_the_switch
@pytest.mark.usefixtures("trusted")
def test_the_order_is_as_it_was_after_an_error(card, monkeypatch):
    card()
    before = state()
    for error in (RuntimeError("no such kernel"), KeyboardInterrupt()):

        def fail(*given, error=error, **more):
            assert state()[0] != before[0]
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(pytorch, "call", fail)
            with pytest.raises(type(error)):
                cudnn.attend(Problem.of(*tensors()), None, *tensors(), None, 0.25)
        assert state() == before


@needs_the_switch
def test_two_threads_leave_it_as_they_found_it(card, monkeypatch):
    """Each would else put back what the other had set: the second would take cuDNN's place first for the order that
    was."""
    card()
    before, inside, go_on = state(), threading.Event(), threading.Event()
    call, slow = pytorch.call, threading.local()

    def waiting(*given, **more):
        if getattr(slow, "here", False):
            inside.set()
            go_on.wait(5)
        return call(*given, **more)

    monkeypatch.setattr(pytorch, "call", waiting)
    problem = Problem.of(*tensors())

    def run(is_slow):
        slow.here = is_slow
        cudnn.attend(problem, None, *tensors(), None, 0.25)

    threads = [threading.Thread(target=run, args=(number == 0,)) for number in range(2)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    threads[1].join(0.2)  # it is at the switch by now, and waits there
    go_on.set()
    for thread in threads:
        thread.join()
    assert state() == before


@needs_the_switch
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_that_may_attend_to_nothing_are_zeros(card, monkeypatch, reference, dtype, grad):
    """Of cuDNN's kernel they are the mean of all values, or NaN."""

    def kernels(query, key, value, attn_mask=None, scale=None):
        mask = torch.where(attn_mask, 0.0, -65504.0) if attn_mask.dtype == torch.bool else attn_mask
        return (query @ key.mT * scale + mask).softmax(-1) @ value

    mask = torch.rand(1, 1, 64, 64) > 0.4
    mask[..., 5:9, :] = False
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    card()
    monkeypatch.setattr(pytorch, "call", kernels)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **more: state()[0][0])
    fused._kernel_reasons.cache_clear()
    plans, given = [], tensors(grad)
    output = attention(*given, mask=mask, settings=Settings(engine="cudnn"), report=plans.append)
    fused._kernel_reasons.cache_clear()
    assert plans[0].engine == "cudnn" and output[:, :, 5:9].count_nonzero() == 0
    torch.testing.assert_close(output.double(), reference(*given, mask), atol=1e-5, rtol=0)
    if grad:
        assert all(it.isfinite().all() for it in torch.autograd.grad(output.square().sum(), given))


@needs_the_switch
def test_what_pytorch_is_asked(card):
    """Sizes, dtype and mask of the call, of tensors that take no memory."""
    asked = []

    def can(params):
        asked.append(params)
        return params.query.shape[-1] % 8 == 0 and params.query.dtype == torch.float16

    card(can)
    shape, wide = (2, 8, 4096, 40), (2, 8, 4096, 41)
    more = {"mask_shape": (2, 1, 1, 4096), "mask_dtype": torch.bool}
    assert cudnn.why_not(Problem.from_shapes(shape, shape, shape, torch.float16, "cpu", **more)) == []
    assert asked[0].query.shape == shape and asked[0].attn_mask.shape == (2, 1, 1, 4096)
    assert asked[0].query.untyped_storage().nbytes() == 80 and asked[0].dropout == 0 and not asked[0].is_causal
    for shapes, dtype in ((wide, torch.float16), (shape, torch.float32)):
        assert "no attention kernel" in cudnn.why_not(Problem.from_shapes(shapes, shapes, shapes, dtype, "cpu"))[0]


@needs_the_switch
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda patch: patch.setattr(cudnn, "installed", lambda: False), "has no cuDNN"),
        (lambda patch: patch.setattr(devices, "kind", lambda device: "zluda"), "does not run on zluda"),
        (lambda patch: patch.setattr(cudnn, "_order", None), "cannot be put first before 2.6"),
        (lambda patch: patch.setattr(cudnn, "_can", lambda *given: {}["enable_gqa"]), "does not say"),
        (lambda patch: patch.setattr(cudnn, "_can", lambda *given: False), "no attention kernel for these sizes"),
    ],
)
def test_why_not_in_words(card, monkeypatch, change, words):
    card()
    for name in ("_order", "_set_order"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name) or list)
    change(monkeypatch)
    made = plan(SHAPE, SHAPE, SHAPE, torch.float16, "cpu", Settings(engine="cudnn"))
    assert made.engine != "cudnn" and words in made.reasons[1]


@pytest.mark.parametrize("hip, there, installed", [(None, True, True), ("6.4", True, False), (None, False, False)])
def test_only_nvidias_pytorch_has_it(monkeypatch, hip, there, installed):
    """What AMD's calls cuDNN is MIOpen."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: there)
    assert cudnn.installed() == installed == (cudnn in order.candidates("automatic"))


@needs_the_switch
def test_automatic_takes_it_after_fused_and_not_while_it_is_traced(card):
    card()
    assert plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu").engine == "fused"
    plans = []
    torch.func.vmap(lambda *them: attention(*them, settings=Settings(engine="cudnn"), report=plans.append))(*tensors())
    assert plans[0].engine == "fused"
