"""Programs that trace, export, compile or transform a call; and that nothing of it is remembered for real calls."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import Settings, attention, calls, plan
from lib_subquad.engines import order

ROOT = Path(__file__).parents[1]
NEW = hasattr(torch, "export") and hasattr(getattr(torch, "compiler", None), "is_compiling")
needs_new = pytest.mark.skipif(not NEW, reason="torch.export and torch.compiler.is_compiling are newer")
close = torch.testing.assert_close


def tensors(*leading, tokens=20, width=8):
    torch.manual_seed(0)
    return [torch.randn(*leading, tokens, width) for _ in range(3)]


def engine(*given, **more):
    plans = []
    attention(*given, report=plans.append, **more)
    return plans[0].engine


@contextlib.contextmanager
def fake():
    mode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode
    with mode():
        yield


# ------------------------------------------------------------------------------------------------ what is remembered


@pytest.mark.parametrize("masked", [False, True])
def test_what_fake_tensors_are_told_holds_for_them_only(masked):
    real = tensors(1, 2)
    with fake():
        given = tensors(1, 2)
        output = attention(*given, mask=torch.ones(20, 20, dtype=torch.bool) if masked else None)
        assert output.shape == (1, 2, 20, 8) and type(output).__name__ == "FakeTensor"
    mask = torch.ones(20, 20, dtype=torch.bool) if masked else None
    assert engine(*real, mask=mask) == engine(*tensors(1, 2, tokens=19), mask=None if mask is None else mask[:19, :19])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.usefixtures("fused_kernel")
def test_what_is_planned_beside_fake_tensors_holds_for_real_ones(grad):
    shape = (1, 2, 24, 8)
    with fake():
        made = plan(shape, shape, shape, torch.float32, "cpu", grad=grad)
    real = [it.requires_grad_(grad) for it in tensors(1, 2, tokens=24)]
    assert made.engine == engine(*real) == order.names()[0]


@needs_new
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_shows_pytorchs_operator_and_leaves_no_trace(strict):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value)

    given = tuple(tensors(1, 2, tokens=21))
    program = torch.export.export(Model(), given, strict=strict)
    shown = [str(node.target) for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(shown) == 1
    close(program.module()(*given), F.scaled_dot_product_attention(*given))
    assert engine(*given) == order.names()[0]


@needs_new
@pytest.mark.parametrize("more", [{}, {"scale": 0.3}, {"settings": Settings(upcast="always")}, {"mask": True}], ids=str)
@pytest.mark.parametrize("leading", [(1, 2), (6,)])
def test_compiled_without_a_break(leading, more):
    given = tensors(*leading)
    if "mask" in more:
        more = {"mask": torch.rand(20, 20) > 0.3}
    compiled = torch.compile(lambda *them: attention(*them, **more), fullgraph=True, backend="eager")
    close(compiled(*given), attention(*given, **more), atol=1e-6, rtol=1e-5)


@needs_new
def test_compiled_with_gradients():
    given = [it.requires_grad_() for it in tensors(1, 2)]
    torch.compile(attention, fullgraph=True, backend="aot_eager")(*given).square().sum().backward()
    compiled = [it.grad for it in given]
    again = [it.detach().clone().requires_grad_() for it in given]
    F.scaled_dot_product_attention(*again).square().sum().backward()
    for one, other in zip(compiled, again):
        close(one, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("settings", [Settings(), Settings(query_chunk=8, kv_chunk=8)], ids=["automatic", "chunks"])
def test_a_program_of_jit_trace_takes_other_sizes_than_it_saw(settings):
    """Chunks would be those of the sizes that it saw."""
    program = torch.jit.trace(
        lambda *them: attention(*them, settings=settings), tuple(tensors(1, 2)), check_trace=False
    )
    assert not calls._known  # whose keys would hold its tensors
    given = tensors(1, 2, tokens=31)
    close(program(*given), F.scaled_dot_product_attention(*given), atol=1e-6, rtol=1e-5)


WRONG = {
    "width": ([(1, 2, 9, 8), (1, 2, 9, 7), (1, 2, 9, 8)], {}),
    "heads": ([(1, 2, 9, 8), (1, 3, 9, 8), (1, 3, 9, 8)], {}),
    "keys": ([(1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 10, 8)], {}),
    "no keys": ([(1, 2, 9, 8), (1, 2, 0, 8), (1, 2, 0, 8)], {}),
    "no width": ([(1, 2, 9, 0)] * 3, {}),
    "dimensions": ([(8,), (9, 8), (9, 8)], {}),
    "mask": ([(1, 2, 9, 8)] * 3, {"mask": (3, 4)}),
    "mask's dtype": ([(1, 2, 9, 8)] * 3, {"mask": (9, 9), "mask_dtype": torch.int64}),
    "dtype": ([(1, 2, 9, 8)] * 3, {"dtype": torch.int64}),
    "key's dtype": ([(1, 2, 9, 8)] * 3, {"key_dtype": torch.float16}),
    "settings": ([(1, 2, 9, 8)] * 3, {"settings": {"query_chunk": 5}}),
    "no tensor": ([(1, 2, 9, 8), None, (1, 2, 9, 8)], {}),
}


def complaint(shapes, mask=None, mask_dtype=None, dtype=None, key_dtype=None, settings=Settings(), through=None):
    tensors = [None if shape is None else torch.ones(shape, dtype=dtype) for shape in shapes]
    if key_dtype is not None:
        tensors[1] = tensors[1].to(key_dtype)
    mask = None if mask is None else torch.ones(mask, dtype=mask_dtype)
    call = through or (lambda call, *given: call(*given))
    with pytest.raises(ValueError) as raised:
        call(lambda *given: attention(*given, mask=mask, settings=settings), *tensors)
    return str(raised.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_makes_no_attention_is_said_in_the_same_words(wrong):
    shapes, more = WRONG[wrong]
    expected = complaint(shapes, **more)
    with fake():
        assert complaint(shapes, **more) == expected
    if hasattr(torch, "func") and None not in shapes:
        many = [(4, *shape) for shape in shapes]
        assert complaint(many, **more, through=lambda call, *given: torch.func.vmap(call)(*given)) == expected


@pytest.mark.parametrize("settings", [Settings(), Settings(engine=order.names()[-1])], ids=["first", "last"])
@pytest.mark.parametrize("grad", [False, True])
def test_derivatives_in_forward_mode(settings, grad):
    query, key, value = tensors(1, 2)
    tangent = torch.randn_like(query)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query.requires_grad_(grad), tangent)
        found = torch.autograd.forward_ad.unpack_dual(attention(dual, key, value, settings=settings)).tangent
    _, expected = torch.autograd.functional.jvp(
        lambda it: (it @ key.mT * 8**-0.5).softmax(-1) @ value, query.detach(), tangent
    )
    close(found, expected, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("settings", [Settings(), Settings(engine=order.names()[-1])], ids=["first", "last"])
@pytest.mark.parametrize("name", ["vmap", "func.grad", "per-sample gradients", "grad of grad", "vmap of some"])
def test_transforms_work_as_with_pytorchs_own(name, settings):
    if not hasattr(torch, "func"):
        pytest.skip("torch.func is newer")
    from torch.func import grad, vmap

    if name == "grad of grad":
        settings = Settings(engine=order.names()[-1])  # PyTorch's own has no second derivative on this device

    def run(call):
        query, key, value = tensors(4, 2, 3)
        if name == "vmap":
            return vmap(call)(query, key, value)
        if name == "vmap of some":
            return vmap(call, in_dims=(0, None, None))(query, key[0], value[0])
        if name == "func.grad":
            return grad(lambda it: call(it, key[0], value[0]).sum())(query[0])
        if name == "grad of grad":
            inner = grad(lambda it: call(it, key[0], value[0]).square().sum())
            return grad(lambda it: inner(it).square().sum())(query[0])
        return vmap(grad(lambda *them: call(*them).square().sum()))(query, key, value)

    def plain(query, key, value):
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value

    close(run(lambda *them: attention(*them, settings=settings)), run(plain), atol=1e-4, rtol=1e-4)


def test_a_report_of_a_transformed_call():
    if not hasattr(torch, "func"):
        pytest.skip("torch.func is newer")
    plans = []
    torch.func.vmap(lambda *them: attention(*them, report=plans.append))(*tensors(4, 2, 3))
    assert plans[0].reasons == ("it is traced or transformed: PyTorch decides how it is computed",)


def test_a_mask_whose_rows_may_attend_to_nothing():
    if not hasattr(torch, "func"):
        pytest.skip("torch.func is newer")
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    found = torch.func.vmap(lambda *them: attention(*them, mask=mask))(*tensors(4, 2, 3))
    close(found, attention(*(it.flatten(0, 1) for it in tensors(4, 2, 3)), mask=mask).unflatten(0, (4, 2)))
    assert not found[..., 3, :].any()


# ------------------------------------------------------------------------------------------------ the default device


@pytest.mark.parametrize(
    "body", ["with torch.device('meta'): r = CALL", "torch.set_default_device('meta'); r = CALL"], ids=["with", "set"]
)
def test_nothing_is_asked_of_the_default_device(body):
    """In a process of its own, for some answers are asked for once."""
    code = "import torch; from lib_subquad import attention; x = torch.randn(1, 2, 8, 8)\n"
    code += "m = torch.ones(8, 8, dtype=torch.bool)\n" + body.replace("CALL", "attention(x, x, x, mask=m)")
    code += "\nassert r.device.type == 'cpu' and r.isfinite().all()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_it_loads_whatever_the_default_dtype_is(dtype):
    """torch 2.1.2 has no half-precision product on the CPU."""
    code = f"import torch; torch.set_default_dtype(torch.{dtype}); from lib_subquad import attention\n"
    code += "x = torch.ones(1, 2, 8, 8, dtype=torch.float32); assert torch.equal(attention(x, x, x), x)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
