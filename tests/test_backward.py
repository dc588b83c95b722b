"""Gradients: against numerical ones, against SDPA's, in every setting that a trainer can be in."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lib_subquad
from lib_subquad import Settings, forget, recorded
from lib_subquad import device as devices
from lib_subquad.engines import fused, order
from lib_subquad.recompute import AttentionNode
from tests.devices import attention, autocast, cpu_only, is_cpu, is_stand_in, on_device
from tests.own_engines import OWN
from tests.personality import FailAt, alone

if is_stand_in():
    pytest.skip(
        "PyTorch ends the process where something fails in the backward pass of such a device", allow_module_level=True
    )

sdpa, pytorchs = on_device(lib_subquad.sdpa), on_device(F.scaled_dot_product_attention)

SHAPES = (2, 3, 7, 70)  # batch, heads, queries, keys
CHUNKED = {"engine": "portable", "query_chunk": 3, "kv_chunk": 64}
MASK_SIZES = [(7, 70), (1, 70), (7, 1), (1, 1), (3, 7, 70), (2, 1, 7, 70), (1, 3, 1, 70), (2, 3, 7, 70), (70,), ()]
WANTED = [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False, True, True)]


@pytest.fixture(autouse=True)
def by_itself():
    with alone():
        yield


def inputs(dtype=torch.float32, width=4, value_width=5, wanted=(True, True, True)):
    batch, heads, queries, keys = SHAPES
    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [torch.randn(batch, heads, *size).to(dtype).requires_grad_(needed) for size, needed in zip(sizes, wanted)]


def bool_mask() -> torch.Tensor:
    mask = torch.rand(SHAPES) > 0.4
    mask[:, :, 2] = False  # a row that may attend to nothing
    mask[0, :, 3:, :64] = False  # and a whole part
    return mask


def float_mask() -> torch.Tensor:
    return torch.randn(SHAPES).masked_fill(~bool_mask(), -torch.inf)


def exact(query, key, value, mask=None):
    """Plain attention in the inputs' dtype; rows that may attend to nothing are zeros."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ value


def gradients(output, tensors, grad_output):
    """Of the tensors that need one; by backward(), which alone torch's reentrant checkpoint takes."""
    output.backward(grad_output)
    found = [tensor.grad for tensor in tensors if tensor.requires_grad]
    for tensor in tensors:
        tensor.grad = None
    return found


def same_as_exact(tensors, mask=None, tolerance=1e-5, call=attention, **settings):
    """`call`'s result and gradients are those of plain attention in float64; returns the gradients."""
    settings = Settings(**{**CHUNKED, **settings})
    output = call(*tensors, mask=mask, settings=settings)
    grad_output = torch.randn(output.shape).to(output.dtype)
    found = gradients(output, tensors, grad_output)
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    double_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    wanted = gradients(exact(*doubles, double_mask), doubles, grad_output.double())
    for tensor, mine, right in zip((t for t in tensors if t.requires_grad), found, wanted):
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
        assert (mine.double() - right).abs().max() <= tolerance * max(1, right.abs().max())
    return found


@pytest.mark.parametrize("checkpointing", ["always", "never"])
@pytest.mark.parametrize("mask", [None, bool_mask, float_mask], ids=["none", "bool", "float"])
def test_numerical_gradients(mask, checkpointing):
    settings = Settings(**CHUNKED, checkpointing=checkpointing)
    bias = mask and (mask() if mask is bool_mask else mask().double())
    tensors = [tensor[:, :, :, :].detach().requires_grad_() for tensor in inputs(torch.float64, 2, 3)]
    assert torch.autograd.gradcheck(
        lambda *given: attention(*given, mask=bias, settings=settings), tensors, fast_mode=True
    )


@pytest.mark.parametrize("checkpointing", ["always", "never"])
@pytest.mark.parametrize("size", MASK_SIZES, ids=str)
def test_a_mask_that_needs_a_gradient(size, checkpointing):
    mask = torch.randn(size, dtype=torch.float64, requires_grad=True)
    tensors = inputs(torch.float64)
    for settings in (Settings(**CHUNKED, checkpointing=checkpointing), Settings(query_chunk=4)):
        assert torch.autograd.gradcheck(
            lambda *given, settings=settings: attention(*given[:3], mask=given[3], settings=settings),
            (*tensors, mask),
            fast_mode=True,
        )
    half = mask.detach().to(torch.bfloat16).requires_grad_()
    (alone,) = torch.autograd.grad(attention(*inputs(wanted=(False,) * 3), mask=half).sum(), half)
    assert alone.dtype == torch.bfloat16 and alone.shape == size and alone.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", ["automatic", "always", "never"])
@pytest.mark.parametrize("mask", [None, bool_mask, float_mask], ids=["none", "bool", "float"])
@pytest.mark.parametrize("engine", ["portable", "automatic"])
def test_like_exact_attention(engine, mask, checkpointing):
    found = same_as_exact(
        inputs(), mask and mask(), engine=engine, checkpointing=checkpointing, kv_chunk=64 * (engine == "portable")
    )
    if mask:
        assert not found[0][:, :, 2].any()  # the row that attended to nothing moves nothing


@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_a_mask_wider_than_the_queries(checkpointing):
    same_as_exact(inputs(), float_mask().double(), checkpointing=checkpointing)


@pytest.mark.parametrize("engine", ["automatic", "portable"])
@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_no_queries(checkpointing, engine):
    query, key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for tokens in (0, 5, 5))
    attention(query, key, value, settings=Settings(engine=engine, checkpointing=checkpointing)).sum().backward()
    assert query.grad.shape == query.shape and not key.grad.any() and not value.grad.any()


@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_a_row_masked_by_finite_numbers(checkpointing):
    """Beside a maximum of -3.4e38 the logarithm of any number of keys is lost, and with it the weights' sum."""
    mask = torch.zeros(SHAPES)
    mask[:, :, 2] = torch.finfo(torch.float32).min
    same_as_exact(inputs(), mask, checkpointing=checkpointing)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_only_some_inputs_need_a_gradient(wanted, checkpointing):
    for mask in (None, bool_mask()):
        same_as_exact(inputs(wanted=wanted), mask, checkpointing=checkpointing)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("checkpointing", ["always", "never"])
def test_half_precision(dtype, tolerance, checkpointing):
    for mask in (None, bool_mask()):
        same_as_exact(inputs(dtype), mask, tolerance, checkpointing=checkpointing)
    query, key, _ = inputs()
    *_, value = inputs(dtype)
    same_as_exact((query, key, value), None, tolerance, checkpointing=checkpointing)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_chunks_that_do_not_divide(size):
    same_as_exact(inputs(), query_chunk=size, kv_chunk=size * 13)
    same_as_exact(
        [tensor.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for tensor in inputs()]
    )


def test_like_sdpa():
    tensors = [torch.randn(1, 4, tokens, 40, requires_grad=True) for tokens in (300, 260, 260)]
    grad_output = torch.randn(1, 4, 300, 40)
    expected = gradients(F.scaled_dot_product_attention(*tensors), tensors, grad_output)
    for engine in ("fused", "portable"):
        output = attention(*tensors, settings=Settings(engine=engine, query_chunk=128))
        for mine, right in zip(gradients(output, tensors, grad_output), expected):
            assert (mine - right).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", ["both", "forward"])
def test_under_autocast(dtype, inside):
    tensors = inputs(dtype)
    plain = same_as_exact(tensors, None, 3e-2)
    torch.manual_seed(1)
    grad_output = torch.randn(2, 3, 7, 5).to(dtype)
    expected = gradients(attention(*tensors, settings=Settings(**CHUNKED)), tensors, grad_output)
    with autocast(torch.bfloat16):
        output = attention(*tensors, settings=Settings(**CHUNKED))
        if inside == "both":
            found = gradients(output, tensors, grad_output)
    if inside == "forward":
        found = gradients(output, tensors, grad_output)
    assert len(plain) == len(found) == 3
    assert output.dtype == dtype and all(torch.equal(mine, right) for mine, right in zip(found, expected))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("engine", ["portable", "automatic"])
def test_inside_torchs_checkpoint(engine, reentrant):
    def call(*tensors, mask, settings):
        return checkpoint(
            lambda *given: attention(*given, mask=mask, settings=settings), *tensors, use_reentrant=reentrant
        )

    same_as_exact(inputs(), None, call=call, engine=engine, kv_chunk=0)
    same_as_exact(inputs(), bool_mask(), call=call, engine=engine, kv_chunk=0)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = (project(x).unflatten(-1, (2, 4)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        return attention(*tensors, settings=Settings(**CHUNKED)).transpose(1, 2).flatten(2)


def test_a_module_in_eval_mode_trains_what_is_put_into_it():
    layer, x = Layer().eval().requires_grad_(False), torch.randn(2, 70, 8, requires_grad=True)
    output = layer(x)
    assert output.requires_grad
    (found,) = torch.autograd.grad(output.square().sum(), x)
    q, k, v = (project(x).unflatten(-1, (2, 4)).transpose(1, 2) for project in (layer.to_q, layer.to_k, layer.to_v))
    (right,) = torch.autograd.grad(exact(q, k, v).square().sum(), x)
    assert torch.allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_no_graph(mode, monkeypatch):
    monkeypatch.setattr(AttentionNode, "apply", lambda *args: pytest.fail("nobody asked for gradients"))
    tensors = inputs()
    for settings in (Settings(), Settings(**CHUNKED)):
        with mode():
            output = attention(*tensors, settings=settings)
        assert not output.requires_grad and output.grad_fn is None
    with torch.no_grad():
        assert torch.allclose(output, exact(*tensors), atol=1e-5)


@cpu_only
def test_a_retry_within_the_backward_pass():
    tensors = inputs()
    settings = Settings(**CHUNKED)
    output, grad_output = attention(*tensors, settings=settings), torch.randn(2, 3, 7, 5)
    expected = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    with FailAt(None) as device:
        torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    for name in ("zeros_like", "bmm", "exp2_", "sub_"):
        for number in (device.names.index(name), len(device.names) - 1 - device.names[::-1].index(name)):
            with FailAt(number, halfway=True) as failing:
                found = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
            assert len(failing.names) > len(device.names)  # it came again
            assert all(torch.allclose(mine, right, atol=1e-6) for mine, right in zip(found, expected))
    output = attention(*tensors, settings=Settings(**CHUNKED, retry=False))
    with pytest.raises(RuntimeError, match="allocate"), FailAt(device.names.index("bmm")):
        torch.autograd.grad(output, tensors, grad_output)


@pytest.mark.parametrize("checkpointing", ["automatic", "never"])
def test_gradients_of_gradients(checkpointing):
    tensors = inputs(torch.float64)
    for mask in (None, bool_mask(), float_mask().double()):
        call = partial(attention, mask=mask, settings=Settings(**CHUNKED, checkpointing=checkpointing))
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_gradients_of_gradients_that_are_made_of_the_same_tensors():
    """What the output's gradient is made of counts once."""
    found = []
    for call in (partial(attention, settings=Settings(**CHUNKED)), exact):
        query, key, value = inputs(torch.float64)
        torch.manual_seed(1)
        for it in (query, key, value):
            it.data.normal_()
        (first,) = torch.autograd.grad(call(query, key, value).pow(3).sum(), query, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (query, key, value), create_graph=True))
        found[-1] += torch.autograd.grad(found[-1][1].square().sum(), (query, value))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("query_chunk", [0, 3])
@pytest.mark.parametrize("engine", OWN)
def test_gradients_of_gradients_whatever_the_shape_and_engine(engine, query_chunk, mask, leading):
    """PyTorch's function has none for 4-D tensors, and for others only where it takes no fused kernel."""
    tensors = [torch.randn(*leading, tokens, 4, dtype=torch.float64, requires_grad=True) for tokens in (7, 9, 9)]
    if mask is not None:
        seen = torch.rand(7, 9) > 0.3
        seen[2] = False  # a row that may attend to nothing
        mask = seen if mask == "bool" else torch.randn(7, 9).double().masked_fill(~seen, -torch.inf)
    settings, plans = Settings(engine=engine, query_chunk=query_chunk), []
    for call in (partial(attention, mask=mask), partial(sdpa, attn_mask=mask)):
        call = partial(call, scale=0.3, settings=settings, report=plans.append)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
        assert not torch.autograd.grad(call(*tensors).sum(), tensors)[0].requires_grad
    if is_cpu():  # others have no fused kernel for float64
        able = fused.TAKES_SCALE and (mask is None or fused.MASKS_ARE_RIGHT)
        named = order.names()[0] if engine == "padded" else engine  # there is nothing to pad
        assert {plan.engine for plan in plans} == {named if able else order.names()[-1]}


@cpu_only
def test_gradients_of_gradients_of_heads_that_a_kernel_takes_a_few_at_a_time(monkeypatch):
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], most_entries=2))
    tensors = [torch.randn(3, 5, tokens, 4, dtype=torch.float64, requires_grad=True) for tokens in (7, 9, 9)]
    assert torch.autograd.gradgradcheck(attention, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_gradients_of_a_value_that_is_narrower(dtype):
    """What is cast or cut on its way to a kernel and back."""
    found = []
    query, key, value = inputs(value_width=4)
    value = value.detach().to(dtype).requires_grad_()
    for call in (attention, exact):
        output = call(query, key, value if call is attention else value.float()).pow(3).sum()
        first = torch.autograd.grad(output, (query, value), create_graph=True)
        found.append(torch.autograd.grad(sum(it.square().sum() for it in first), (query, key, value)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_gradients_of_gradients_where_pytorchs_kernels_are_switched_off():
    attention_of_torch = pytest.importorskip("torch.nn.attention")
    found = []
    for call in (pytorchs, attention, sdpa):
        torch.manual_seed(0)
        tensors = inputs()
        with attention_of_torch.sdpa_kernel(attention_of_torch.SDPBackend.MATH):
            (first,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[0], create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), tensors))
    for others in found[1:]:
        for one, other in zip(found[0], others):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


class WithoutGradient(torch.autograd.Function):
    """Says in its backward pass that there is none."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.sum()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("call", [pytorchs, attention, sdpa])
def test_a_result_that_gets_no_gradient(call, create_graph):
    tensors = inputs(value_width=4)
    sums = WithoutGradient.apply(call(*tensors)) + sum(tensor.sum() for tensor in tensors)
    found = torch.autograd.grad(sums, tensors, create_graph=create_graph)
    assert all(grad.equal(torch.ones_like(tensor)) for grad, tensor in zip(found, tensors, strict=True))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize("mask", [None, bool_mask], ids=["none", "bool"])
def test_many_gradients_at_a_time(engine, mask, watched, caplog):
    tensors, mask = inputs(value_width=4), mask and mask()
    with unchanged_hooks() if watched else contextlib.nullcontext():
        output = attention(*tensors, mask=mask, settings=Settings(engine=engine, query_chunk=3))
        many = torch.randn(4, *output.shape)
        found = torch.autograd.grad(output, tensors, many, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(output, tensors, one, retain_graph=True) for one in many]
    for mine, right in zip(found, map(torch.stack, zip(*each))):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    assert not caplog.records


# ----------------------------------------------------------------------- blocks that torch.utils.checkpoint runs twice


def unchanged_hooks():
    """Somebody looks at what is kept, and leaves it as it is."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def what_is_kept(call):
    """(shape, dtype) of all that PyTorch keeps of `call`."""
    kept = []

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("mask", [None, bool_mask, float_mask], ids=["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_is_kept_whatever_engine_and_sizes(dtype, mask):
    tensors, mask = inputs(dtype, value_width=4), mask and mask()
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    kept = [
        what_is_kept(lambda engine=engine, size=size: attention(*tensors, mask=mask, settings=Settings(
            engine=engine, query_chunk=size)))
        for engine in OWN for size in (0, 2, 3)
    ]  # fmt: skip
    assert all(other == kept[0] for other in kept) and len(kept[0]) == 5 + (mask is not None)


@pytest.mark.parametrize("mask", [None, float_mask], ids=["none", "float"])
@pytest.mark.parametrize("changes", ["query", "key", "value", "mask", "result", "nothing"])
def test_a_function_in_the_place_of_pytorchs_that_changes_what_it_is_given(changes, mask, monkeypatch):
    own = F.scaled_dot_product_attention

    def changing(query, key, value, attn_mask=None, **more):
        given = {"query": query, "key": key, "value": value, "mask": attn_mask}
        if given.get(changes) is not None:
            given[changes] = given[changes] * 2
        query, key, value, attn_mask = given.values()
        result = own(query, key, value, attn_mask=attn_mask, **more)
        return result * 2 if changes == "result" else result

    monkeypatch.setattr(F, "scaled_dot_product_attention", changing)
    tensors, mask = inputs(value_width=4), mask and mask()
    grad_output = torch.randn(2, 3, 7, 4)
    for settings in (Settings(), Settings(query_chunk=3)):
        found = []
        for hooks in (contextlib.nullcontext, unchanged_hooks):
            with hooks():
                found.append(gradients(attention(*tensors, mask=mask, settings=settings), tensors, grad_output))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)


@cpu_only
def test_nothing_is_held_of_what_somebody_else_keeps():
    """As `torch.utils.checkpoint` keeps nothing of a block's first run."""
    tensors = [torch.randn(1, 2, 2048, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            output = attention(*(it * 2 for it in tensors), settings=Settings(query_chunk=1024))
    held = sum(event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]")
    assert held < 1.25 * output.numel() * 4


@cpu_only
@pytest.mark.parametrize("queries, size", [(4096, 0), (4096, 512), (8192, 256)])
def test_what_such_a_call_takes_was_planned(queries, size, peak_bytes):
    tensors = [torch.randn(1, 16, tokens, 8, requires_grad=True) for tokens in (queries, 64, 64)]
    plans, settings = [], Settings(query_chunk=size)

    def call():
        with unchanged_hooks():
            return attention(*tensors, settings=settings, report=plans.append)

    call()
    assert peak_bytes(call) - tensors[0].numel() * 4 <= plans[0].workspace_bytes


def in_a_block(fails, reentrant, monkeypatch, error, layers=1, mask=None, settings=Settings()):
    """Tensors with gradients of a checkpointed block of equal layers whose chunks number `fails` fail, each once its
    kernel has run and PyTorch has kept what it wants of it."""
    module, calls = order.engines()[0], []
    if settings.engine != "automatic":
        module = order.named(settings.engine)
    attend = module.attend

    def failing(*arguments):
        calls.append(1)
        result = attend(*arguments)
        if len(calls) in fails:
            raise RuntimeError(error)
        return result

    def block(query, key, value):
        for _ in range(layers):
            query = attention(query, key, value, mask=mask, settings=settings).sin()
        return query

    monkeypatch.setattr(module, "attend", failing)
    tensors = [torch.randn(1, 2, 600, 8, requires_grad=True) for _ in range(3)]
    checkpoint(block, *tensors, use_reentrant=reentrant).sum().backward()
    monkeypatch.undo()
    query, key, value = again = [it.detach().clone().requires_grad_() for it in tensors]
    for _ in range(layers):
        query = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sin()
    query.sum().backward()
    for one, other in zip(tensors, again):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3)
    return calls


@pytest.mark.parametrize("error", ["out of memory", "invalid configuration argument"])
@pytest.mark.parametrize("fails", [(1,), (2,), (3,), (4,), (1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", OWN)
def test_a_block_that_is_run_twice(engine, reentrant, fails, error, monkeypatch, request):
    """In its first run or its second, in one layer or another that is like it."""
    if error != "out of memory":  # it goes on with the other engine
        request.getfixturevalue("fused_kernel")
    for layers in (1, 2):
        for size in (0, 200):
            forget()
            in_a_block(fails, reentrant, monkeypatch, error, layers, None, Settings(engine=engine, query_chunk=size))


def test_a_block_with_a_mask_that_is_run_twice(monkeypatch):
    for mask in (torch.rand(600, 600) > 0.3, torch.randn(2, 600, 600)):
        for fails in (1, 2, 3):
            forget()
            in_a_block([fails], False, monkeypatch, "out of memory", 2, mask)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="newer: that a block is computed again"
)
def test_scores_that_were_kept_the_first_time(monkeypatch):
    settings = Settings(engine=order.names()[-1], checkpointing="never")
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint computes this block again") as raised:
        in_a_block([2], False, monkeypatch, "out of memory", settings=settings)
    assert "Leave checkpointing to 'automatic'" in str(raised.value)


@pytest.mark.parametrize("error", ["out of memory", "no such kernel"])
@pytest.mark.usefixtures("fused_kernel")
def test_a_kernel_that_fails_in_the_backward_pass_of_a_block(error, monkeypatch):
    """Another engine goes on from the same numbers, at once the next time."""
    failed = []

    def failing(*arguments):
        failed.append(1)
        raise RuntimeError(error)

    monkeypatch.setattr(recorded.Record, "gradients", failing)
    tensors = inputs(value_width=4)
    for _ in range(2):
        same_as_exact(
            tensors, call=lambda *given, mask, settings: checkpoint(
                lambda *them: attention(*them, settings=settings), *given, use_reentrant=False
            ), engine="automatic", kv_chunk=0,
        )  # fmt: skip
    assert len(failed) == 1


@pytest.mark.parametrize("kept", ["products", "all"])
@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize("checkpointing", ["automatic", "never"])
def test_a_block_of_whose_operators_some_are_kept(engine, kept, checkpointing):
    """The results that our loops write over are none to be kept."""
    contexts = getattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts", None)
    if contexts is None:
        pytest.skip("selective checkpoints are newer")
    aten = torch.ops.aten
    policy = [aten.bmm.default, aten.bmm.out, aten.baddbmm.default, aten.baddbmm.out, aten.baddbmm_.default]
    if kept == "all":

        def policy(*arguments, **more):
            return torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE

    def call(*given, mask, settings):
        return checkpoint(
            lambda *them: attention(*them, mask=mask, settings=settings).clone(), *given,
            use_reentrant=False, context_fn=lambda: contexts(policy),
        )  # fmt: skip

    for mask in (None, bool_mask()):
        chunks = {"query_chunk": 3, "kv_chunk": 64 if engine == order.names()[-1] else 0}
        same_as_exact(inputs(value_width=4), mask, call=call, engine=engine, checkpointing=checkpointing, **chunks)
