"""Our functions in the place of those that the web UI, ComfyUI, Forge and PyTorch itself ship."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lib_subquad import (
    Settings,
    attention,
    dropin,
    efficient_dot_product_attention,
    efficient_dot_product_attention_of_transposed_keys,
    sdpa,
)
from lib_subquad.engines import fused
from lib_subquad.lab.bench.peers import Unsupported, without_its_package

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:None of the inputs"),  # of the peers
]
SEED = Path(__file__).parents[2] / "shared" / "seed" / "sub_quadratic_attention.md"
close = {"atol": 2e-6, "rtol": 0.0}


@pytest.fixture(scope="module")
def seed():
    """The kernel that the web UI ships, from its listing."""
    if not SEED.exists():
        pytest.skip("the web UI's kernel is not in ../shared/seed")
    if not beta_of_zero_is_right():
        pytest.skip("it begins with torch.baddbmm(…, beta=0), which in this PyTorch keeps NaN of memory that it reuses")
    code = SEED.read_text(encoding="utf8").split("```")[1]
    code = code.replace("    use_checkpoint=True,\n", "    use_checkpoint=True,\n):\n", 1)  # which the listing lost
    names = {}
    exec(compile(code, SEED.name, "exec"), names)
    return names["efficient_dot_product_attention"]


def beta_of_zero_is_right() -> bool:
    one, nothing = torch.ones(1, 1, 1), torch.full((1, 1, 1), torch.nan)
    return not torch.baddbmm(one, one, one, beta=0, out=nothing).isnan().any()


@pytest.fixture(scope="module")
def package():
    """The torch function of the package memory-efficient-attention, whose own __init__ imports JAX."""
    try:
        module = without_its_package("memory_efficient_attention", "attention_torch")
    except Unsupported as reason:
        pytest.skip(str(reason))
    return module.efficient_dot_product_attention


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensors(heads, queries, keys, width, value_width=None, seed=0):
    sizes = ((queries, width), (keys, width), (keys, value_width or width))
    return [normal(heads, *size, seed=seed + n) for n, size in enumerate(sizes)]


def test_same_signature(seed):
    ours, theirs = (inspect.signature(function).parameters for function in (efficient_dot_product_attention, seed))
    assert list(ours)[: len(theirs)] == list(theirs)  # and then what Forge's has beside it
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())


@given(st.data())
@effort(max_examples=300, deadline=None)
def test_like_the_seed_over_its_parameters(seed, data):
    heads, queries, keys = (data.draw(st.integers(1, most)) for most in (4, 60, 60))
    width = data.draw(st.sampled_from((1, 8, 40, 64)))
    size = st.integers(1, 70)
    chunks = {
        "query_chunk_size": data.draw(size),
        "kv_chunk_size": data.draw(st.none() | size | st.just(0)),
        "kv_chunk_size_min": data.draw(st.none() | size | st.just(0)),
        "use_checkpoint": data.draw(st.booleans()),
    }
    call = tensors(heads, queries, keys, width, seed=data.draw(st.integers(0, 99)))
    wanted = seed(*call, **chunks)
    torch.testing.assert_close(efficient_dot_product_attention(*call, **chunks), wanted, **close)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_like_the_seed_over_a_grid_of_chunks(seed, checkpointed):
    call = tensors(2, 50, 37, 40)
    parts = (None, 0, 1, 8, 36, 37, 38, 20000)
    for query_chunk, kv_chunk, least in itertools.product((1, 16, 49, 50, 51, 20000), parts, parts):
        if query_chunk == 1 and kv_chunk == 1:
            continue  # thousands of steps
        chunks = (query_chunk, kv_chunk, least, checkpointed)
        torch.testing.assert_close(efficient_dot_product_attention(*call, *chunks), seed(*call, *chunks), **close)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_gradients_like_the_seeds(seed, checkpointed):
    gradients = []
    for function in (efficient_dot_product_attention, seed):
        call = [tensor.requires_grad_() for tensor in tensors(2, 50, 40, 16)]
        output = function(*call, 16, 8, None, checkpointed)
        (output * normal(2, 50, 16, seed=9)).sum().backward()
        gradients.append([tensor.grad for tensor in call])
    torch.testing.assert_close(*gradients, atol=5e-6, rtol=0.0)


@pytest.mark.parametrize("queries, keys, query_chunk, kv_chunk", [(64, 60, 64, 60), (64, 60, 16, 12), (40, 77, 8, 11)])
def test_like_the_package(package, queries, keys, query_chunk, kv_chunk):
    """Chunks of equal size: the package reads beyond a last one that is smaller."""
    for value_width in (16, 24):
        call = tensors(3, queries, keys, 16, value_width)
        heads_last = [tensor.transpose(0, 1) for tensor in call]
        wanted = package(*heads_last, query_chunk_size=query_chunk, key_chunk_size=kv_chunk).transpose(0, 1)
        output = efficient_dot_product_attention(*call, query_chunk, kv_chunk)
        torch.testing.assert_close(output, wanted, **close)


@pytest.mark.parametrize("value_width", [1, 15, 41])
def test_what_the_seed_rejects(reference, value_width):
    call = tensors(2, 50, 45, 16, value_width)
    for query_chunk, kv_chunk in itertools.product((1, 7, 50, 64), (None, 1, 7, 45)):
        output = efficient_dot_product_attention(*call, query_chunk, kv_chunk)
        torch.testing.assert_close(output.double(), reference(*call), **close)


def test_the_web_uis_call(reference):
    """As modules/sd_hijack_optimizations.py calls it."""
    call = tensors(4, 256, 77, 40)
    output = efficient_dot_product_attention(
        *call, query_chunk_size=64, kv_chunk_size=None, kv_chunk_size_min=None, use_checkpoint=False
    )
    torch.testing.assert_close(output.double(), reference(*call), **close)


@pytest.mark.parametrize("size", [16384, 16385, 10**9, 2**70])
def test_chunks_beyond_every_slider(reference, size):
    call = tensors(1, 16500, 3, 4)
    torch.testing.assert_close(efficient_dot_product_attention(*call, size), attention(*call), **close)
    query, key, value = tensors(1, 3, 16500, 4)
    for chunks in ((size, size), (size, 64, size)):
        output = efficient_dot_product_attention(query, key, value, *chunks)
        torch.testing.assert_close(output.double(), reference(query, key, value), **close)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0,), "query_chunk_size is 0; expected at least 1"),
        ((-1,), "query_chunk_size is -1; expected at least 1"),
        ((8, -4), "kv_chunk_size is -4; expected at least 1"),
    ],
)
def test_chunks_of_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        efficient_dot_product_attention(*tensors(1, 9, 9, 8), *arguments)


def test_a_least_size_rescues_a_size_of_nothing(reference):
    call = tensors(1, 9, 9, 8)
    for least in (4, 100):
        output = efficient_dot_product_attention(*call, 8, -4, least)
        torch.testing.assert_close(output.double(), reference(*call), **close)


def test_only_three_dimensions_and_some_keys():
    four = [tensor[None] for tensor in tensors(1, 9, 9, 8)]
    with pytest.raises(ValueError, match=r"query has shape \[1, 1, 9, 8\]; expected \[batch \* heads, tokens, width\]"):
        efficient_dot_product_attention(*four)
    query, key, value = tensors(1, 9, 9, 8)
    with pytest.raises(ValueError, match=r"key has shape \[1, 0, 8\]; expected at least one key"):
        efficient_dot_product_attention(query, key[:, :0], value[:, :0])
    assert efficient_dot_product_attention(query[:, :0], key, value).shape == (1, 0, 8)


# --------------------------------------------------------------------------------------------- keys that are transposed


@pytest.mark.parametrize("keys", [77, 16])  # 16: the width, where nothing tells one form from the other
@pytest.mark.parametrize("more", [{}, {"upcast_attention": True}, {"mask": True}, {"use_checkpoint": False}], ids=str)
def test_as_comfyui_and_forge_call_it(keys, more):
    query, key, value = torch.randn(4, 20, 16), torch.randn(4, keys, 16), torch.randn(4, keys, 16)
    if "mask" in more:
        more = {"mask": torch.randn(4, 20, keys)}
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=more.get("mask"))
    more = {"query_chunk_size": 8, "kv_chunk_size": None, "kv_chunk_size_min": None, **more}
    found = efficient_dot_product_attention_of_transposed_keys(query, key.movedim(1, 2), value, **more)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(efficient_dot_product_attention(query, key, value, **more), found)


def test_half_precision_upcast():
    query, key, value = torch.randn(3, 2, 20, 16).half() * 200
    found = efficient_dot_product_attention(query, key, value, upcast_attention=True)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert found.dtype == torch.float16 and (found.double() - exact).abs().max() < 0.5


@pytest.mark.parametrize("key", [torch.randn(4, 16), None, "key"])
def test_transposed_keys_that_are_none(key):
    with pytest.raises(ValueError, match=r"^key has shape .*; expected \[batch \* heads, width, tokens\]$"):
        efficient_dot_product_attention_of_transposed_keys(torch.randn(4, 20, 16), key, torch.randn(4, 7, 16))


# ----------------------------------------------------------------------------------- in the place of PyTorch's function

SDPA_CALLS = {
    "as it is": {},
    "bool mask": {"attn_mask": torch.rand(20, 30) > 0.3},
    "float mask": {"attn_mask": torch.randn(2, 1, 20, 30)},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "no batch": {"leading": (3,)},
    "more batches": {"leading": (2, 2, 3)},
    "broadcast": {"leading": (2, 3), "others": (1, 3)},
}


@pytest.mark.parametrize("name", SDPA_CALLS)
def test_sdpa_is_pytorchs(name):
    more = dict(SDPA_CALLS[name])
    leading = more.pop("leading", (2, 3))
    others = more.pop("others", leading)
    query, key, value = torch.randn(*leading, 20, 8), torch.randn(*others, 30, 8), torch.randn(*others, 30, 8)
    if "scale" in more and not fused.TAKES_SCALE:
        pytest.skip("this PyTorch takes no scale")
    found, mask = sdpa(query, key, value, **more), more.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        more["attn_mask"] = mask.double()
    exact = F.scaled_dot_product_attention(*(it.double() for it in (query, key, value)), **more)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-4)


def test_sdpa_with_heads_that_share_keys():
    query, key, value = torch.randn(2, 6, 20, 8), torch.randn(2, 3, 30, 8), torch.randn(2, 3, 30, 8)
    repeated = (it.repeat_interleave(2, dim=1) for it in (key, value))
    torch.testing.assert_close(
        sdpa(query, key, value, enable_gqa=True), F.scaled_dot_product_attention(query, *repeated), atol=1e-5, rtol=1e-4
    )


def test_sdpa_by_the_users_settings_is_reported():
    query, plans = torch.randn(1, 2, 20, 8), []
    settings = Settings(engine="portable", query_chunk=7)
    found = sdpa(query, query, query, settings=settings, report=plans.append)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, query, query), atol=1e-5, rtol=1e-4)
    assert [(plan.engine, plan.query_chunk) for plan in plans] == [("portable", 7)]
    sdpa(query, query, query, is_causal=True, settings=settings, report=plans.append)
    assert len(plans) == 1  # PyTorch's to compute


def test_dropout_is_pytorchs(monkeypatch):
    query = torch.randn(1, 2, 20, 8)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(sdpa(query, query, query, dropout_p=0.5), expected)


def test_what_is_wrong_gets_pytorchs_words():
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        sdpa(*torch.ones(3, 1, 2, 4, 8, dtype=torch.int64))
    with pytest.raises((RuntimeError, ValueError)):
        sdpa(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 7), torch.randn(1, 2, 4, 8))


WRONG = [
    ({}, [(2, 3, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)], r"key has shape \[2, 2, 4, 8\]; expected leading .* \[2, 3\]"),
    ({}, [(2, 3, 4, 8), (1, 3, 4, 8), (5, 3, 4, 8)], r"value has shape \[5, 3, 4, 8\]; expected leading .* \[2, 3\]"),
    ({}, [(2, 3, 4, 8), (2, 3, 4, 7), (2, 3, 4, 8)], r"key has shape \[2, 3, 4, 7\]; expected width 8, that of query"),
    ({"attn_mask": torch.ones(5, 4)}, [(2, 3, 4, 8)] * 3, r"mask has shape \[5, 4\]; expected one that broadcasts to"),
    ({"scale": "large"}, [(2, 3, 4, 8)] * 3, "scale is 'large'; expected a finite number"),
]


@pytest.mark.parametrize("more, shapes, words", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_wrong_is_pytorchs_error_and_our_sentence(more, shapes, words):
    given = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(*given, **more)
    with pytest.raises(type(theirs.value), match=f"\n{words}") as ours:
        sdpa(*given, **more)
    assert str(ours.value).startswith(str(theirs.value).splitlines()[0])


@pytest.mark.parametrize("more", [{"dropout_p": None}, {"is_causal": None}, {"is_causal": ""}, {"enable_gqa": None}])
def test_what_pytorchs_function_does_not_take_is_not_taken(more):
    with pytest.raises(TypeError):
        sdpa(*torch.randn(3, 1, 2, 4, 8), **more)


def test_settings_that_are_none_and_reports_that_fail_are_not_passed_over():
    given = torch.randn(3, 1, 2, 4, 8)

    def failing(plan):
        raise ValueError("a report of the user's")

    with pytest.raises(ValueError, match="^settings is .*; expected a Settings"):
        sdpa(*given, settings={"query_chunk": 64})
    with pytest.raises(ValueError, match="^a report of the user's$"):
        sdpa(*given, report=failing)


@pytest.mark.parametrize(
    "mask", [torch.tensor(-1.0), torch.randn(30), torch.randn(20, 30).double()], ids=["0", "1", "64"]
)
def test_masks_that_pytorchs_function_takes_for_some_shapes_only(mask):
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 30, 8)
    exact = F.scaled_dot_product_attention(
        *(it.double() for it in (query, key, key)), attn_mask=mask.double().expand(20, 30)
    )
    torch.testing.assert_close(sdpa(query, key, key, attn_mask=mask).double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("who", ["sdpa", "attention", "a wrapper of it"])
def test_in_its_place_nobody_goes_in_circles(monkeypatch, who):
    """Whoever calls PyTorch's public name comes to us, and we find PyTorch's own behind it."""
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    expected = F.scaled_dot_product_attention(query, key, value)
    calls = []

    def counted(*tensors, attn_mask=None, **more):
        calls.append(1)
        return {"sdpa": sdpa, "attention": attention, "a wrapper of it": sdpa}[who](*tensors, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa if who == "sdpa" else counted)
    for _ in range(3):
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(attention(query, key, value), expected, atol=1e-5, rtol=1e-4)
    assert len(calls) < 20


@pytest.mark.usefixtures("fused_kernel", "trusted")
def test_others_in_its_place_are_asked(monkeypatch):
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    own, asked = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *them, **more: asked.append(1) or own(*them, **more))
    attention(query, key, value)
    assert asked == [1]


def test_the_function_that_is_replaced_is_traced_as_its_own(monkeypatch):
    if not hasattr(torch, "func"):
        pytest.skip("torch.func is newer")
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    query, key, value = torch.randn(3, 4, 2, 20, 8)
    found = torch.func.vmap(F.scaled_dot_product_attention)(query, key, value)
    torch.testing.assert_close(found, attention(query, key, value), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_where_autocast_is_on(dtype, masked):
    """Results in the dtype that the layers after it were given before."""
    query, key, value = torch.randn(3, 1, 2, 20, 8, dtype=dtype)
    mask = torch.randn(20, 20, dtype=dtype) if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        plain = F.scaled_dot_product_attention(query, key, value)
        found = sdpa(query, key, value, attn_mask=mask)
    if plain.dtype == expected.dtype:  # before torch 2.2 autocast is about parts of it, as they happen to be used
        assert found.dtype == expected.dtype
    torch.testing.assert_close(found.double(), expected.double(), atol=0.03, rtol=0.03)


def test_sdpa_where_autocast_is_on_in_a_program_that_is_transformed_or_recorded():
    if not hasattr(torch, "func"):
        pytest.skip("torch.func is newer")
    given = torch.randn(3, 4, 2, 20, 8).unbind()
    dropin._is_cast.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.func.vmap(sdpa)(*given)  # is asked first, and its answer is not remembered
        expected = F.scaled_dot_product_attention(*given).dtype
        assert sdpa(*given).dtype == torch.jit.trace(sdpa, given, check_trace=False)(*given).dtype == expected


@pytest.mark.parametrize("in_its_place", [False, True])
def test_a_mask_that_is_a_class_of_its_own(monkeypatch, in_its_place):
    """Its numbers are nowhere."""
    biases = pytest.importorskip("torch.nn.attention.bias")
    query, (key, value) = torch.randn(1, 2, 10, 8), torch.randn(2, 1, 2, 13, 8)
    for bias in (biases.causal_upper_left(10, 13), biases.causal_lower_right(10, 13)):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        with monkeypatch.context() as patch:
            if in_its_place:
                patch.setattr(F, "scaled_dot_product_attention", sdpa)
            found = sdpa(query, key, value, attn_mask=bias)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_such_a_mask_is_none_for_attention():
    """Whether a plain one of its sizes came before or not."""
    biases = pytest.importorskip("torch.nn.attention.bias")
    query, (key, value) = torch.randn(1, 2, 10, 8), torch.randn(2, 1, 2, 13, 8)
    for bias in (biases.causal_upper_left(10, 13), biases.causal_lower_right(10, 13)):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"mask is a CausalBias; expected a plain tensor .*sdpa\(\)"):
                attention(query, key, value, mask=bias)
            attention(query, key, value, mask=torch.zeros(10, 13))


class Named(torch.Tensor):
    """A tensor with its numbers."""


@pytest.mark.parametrize("make", [Named, torch.nn.Parameter])
def test_a_mask_of_a_class_that_has_its_numbers(make):
    query, (key, value) = torch.randn(1, 2, 10, 8), torch.randn(2, 1, 2, 13, 8)
    mask = torch.randn(10, 13)
    with torch.no_grad():
        found = attention(query, key, value, mask=make(mask))
    torch.testing.assert_close(torch.Tensor(found), attention(query, key, value, mask=mask), atol=1e-5, rtol=1e-4)


class Model(torch.nn.Module):
    def forward(self, query, key, value, mask: Optional[torch.Tensor] = None):  # noqa: UP045, UP007 - torch 2.1 reads no |
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_program_of_torch_jit_has_pytorchs_operator(monkeypatch, tmp_path, how):
    given, mask = torch.randn(3, 1, 2, 20, 8).unbind(), torch.randn(20, 20)
    expected = Model()(*given), Model()(*given, mask)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", sdpa)
        if how == "script":
            program = torch.jit.script(Model())
        else:
            program = torch.jit.trace(Model(), (*given, mask))
        torch.jit.save(program, tmp_path / "program.pt")
    program = torch.jit.load(tmp_path / "program.pt")
    assert "aten::scaled_dot_product_attention" in str(program.inlined_graph)
    torch.testing.assert_close(program(*given, mask), expected[1])
    if how == "script":
        torch.testing.assert_close(program(*given), expected[0])


@pytest.mark.parametrize("layout", ["strided", "jagged"])
def test_nested_tensors_are_pytorchs(layout):
    if not hasattr(torch, layout):
        pytest.skip("this layout is newer")
    sequences = [torch.randn(5, 2, 8), torch.randn(7, 2, 8)]
    if layout == "strided":
        given = torch.nested.nested_tensor([it.transpose(0, 1).contiguous() for it in sequences])
    else:
        given = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    for found, expected in zip(
        sdpa(given, given, given).unbind(), F.scaled_dot_product_attention(given, given, given).unbind()
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [(1, 3), (4, 3)])
def test_heads_that_cannot_share_keys(heads):
    query, key = (torch.randn(1, number, 4, 8) for number in heads)
    with pytest.raises((RuntimeError, TypeError)):
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    with pytest.raises((RuntimeError, TypeError)):
        sdpa(query, key, key, enable_gqa=True)


def test_sdpa_of_what_has_no_numbers():
    mode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode
    with mode():
        query = torch.randn(1, 2, 20, 8)
        assert sdpa(query, query, query).shape == query.shape
