"""What attention() promises for any strides and any shape, in every engine, held against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lib_subquad import Settings
from tests.devices import attention
from tests.own_engines import OWN

CHUNKED = {"query_chunk": 3, "kv_chunk": 5}


def exact(query, key, value):
    query, key, value = (it.detach().double() for it in (query, key, value))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


@st.composite
def tensor(draw, leading: tuple[int, ...], tokens: int, width: int):
    """A tensor of these sizes whose strides are anything: permuted, cut out, expanded, overlapping."""
    sizes = (*leading, tokens, width)
    kind = draw(st.sampled_from(["plain", "permuted", "cut", "expanded", "overlapping", "offset"]))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "permuted":
        order_of = draw(st.permutations(range(len(sizes))))
        back = [order_of.index(place) for place in range(len(sizes))]
        return torch.randn([sizes[place] for place in order_of], generator=made).permute(back)
    if kind == "cut":
        larger = torch.randn([2 * size + 1 for size in sizes], generator=made)
        return larger[tuple(slice(1, 1 + 2 * size, 2) for size in sizes)]
    if kind == "expanded":
        fixed = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
        return torch.randn([1 if it else size for it, size in zip(fixed, sizes)], generator=made).expand(sizes)
    if kind == "overlapping":
        strides = [draw(st.integers(0, 3)) for _ in sizes]
        need = sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1
        return torch.randn(max(need, 1), generator=made).as_strided(sizes, strides)
    if kind == "offset":
        return torch.randn(7 + torch.Size(sizes).numel(), generator=made)[7:].view(sizes)
    return torch.randn(sizes, generator=made)


@st.composite
def call(draw):
    leading = draw(st.sampled_from([(), (3,), (2, 3), (1, 1), (2, 1, 2)]))
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    width, value_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return (
        draw(tensor(leading, queries, width)),
        draw(tensor(leading, keys, width)),
        draw(tensor(leading, keys, value_width)),
    )


@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize("strides", [(0, 1, 2, 1), (1, 0, 0, 1), (2, 1, 3, 1), (1, 1, 0, 1), (1, 2, 1, 1)])
def test_queries_whose_heads_or_tokens_lie_one_number_apart(engine, strides):
    """PyTorch's kernel orders its output as the query is ordered, and then wrote where there was none."""
    query = torch.arange(16.0).sin().as_strided((2, 2, 2, 3), strides)
    key, value = torch.randn(2, 2, 2, 5, 3)
    found = attention(query, key, value, settings=Settings(engine=engine))
    torch.testing.assert_close(found.double(), exact(query, key, value), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("engine", OWN)
@given(call())
@effort(max_examples=150, deadline=None)
def test_any_strides_and_any_shape(engine, more, tensors):
    found = attention(*tensors, settings=Settings(engine=engine, **more))
    torch.testing.assert_close(found.double(), exact(*tensors), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("engine", OWN)
@given(call())
@effort(max_examples=60, deadline=None)
def test_gradients_of_any_strides(engine, tensors):
    given_, again = ([it.detach().requires_grad_() for it in tensors] for _ in range(2))
    attention(*given_, settings=Settings(engine=engine)).square().sum().backward()
    exact_ = [it.double() for it in again]
    scores = exact_[0] @ exact_[1].transpose(-2, -1) * exact_[0].shape[-1] ** -0.5
    (scores.softmax(-1) @ exact_[2]).square().sum().backward()
    for one, other in zip(given_, again):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize(
    "shape", [(1, 65536, 2, 4), (65536, 1, 2, 4), (65536, 2, 4), (1, 1, 3, 1), (2, 70000, 1, 1)], ids=str
)
def test_many_heads_and_narrow_ones(engine, shape):
    tensors = torch.randn(3, *shape)
    torch.testing.assert_close(
        attention(*tensors, settings=Settings(engine=engine)).double(), exact(*tensors), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("more", [{}, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("engine", OWN)
def test_the_largest_values_beside_weights_that_are_nothing(engine, more, dtype):
    """A value as large as the dtype has, at a key that nobody attends to, is no part of the result."""
    largest = torch.finfo(dtype).max
    query = torch.ones(1, 1, 8, 4, dtype=dtype)
    key = torch.ones(1, 1, 12, 4, dtype=dtype)
    key[..., 5, :] = -200
    value = torch.ones(1, 1, 12, 4, dtype=dtype)
    value[..., 5, :] = largest
    found = attention(query, key, value, settings=Settings(engine=engine, **more))
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("engine", OWN)
def test_what_is_global_stays_as_it_was(engine):
    """Determinism is asked of PyTorch, not taken from it; nor is a random number."""
    tensors = torch.randn(3, 1, 2, 300, 8)
    torch.use_deterministic_algorithms(True)
    try:
        before = torch.get_rng_state()
        first = attention(*tensors, settings=Settings(engine=engine))
        assert torch.are_deterministic_algorithms_enabled() and torch.equal(before, torch.get_rng_state())
        assert torch.equal(first, attention(*tensors, settings=Settings(engine=engine)))
    finally:
        torch.use_deterministic_algorithms(False)
