"""attention() against its definition in float64, for every engine, shape, stride, mask and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lib_subquad import Plan, Settings
from lib_subquad.settings import OPTIONS
from tests import devices
from tests.devices import attention

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = (torch.float16, torch.bfloat16)
DTYPES = devices.dtypes((*HALF, torch.float32, torch.float64))
UPCAST = OPTIONS["upcast"].choices
PLANS = {
    "automatic": Settings(),
    "query chunks": Settings(query_chunk=5),
    "portable": Settings(engine="portable"),
    "portable chunks": Settings(engine="portable", query_chunk=5, kv_chunk=4),
}
LAYOUTS = {
    "plain": lambda tensor: tensor,
    "heads after tokens": lambda tensor: tensor.movedim(0, -2).contiguous().movedim(-2, 0),
    "width before tokens": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "a slice": lambda tensor: torch.cat((tensor, tensor, tensor), -2)[..., tensor.shape[-2] : 2 * tensor.shape[-2], :],
    "all tokens alike": lambda tensor: tensor[..., :1, :].expand_as(tensor),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def settings(request):
    return request.param


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check(output, wanted, query, key, value, scale=None):
    """Within a few roundings of the result, and what roundings of the scores make of it."""
    assert output.dtype == value.dtype and output.shape == wanted.shape
    if not wanted.numel():
        return
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    inner = abs(query.shape[-1] ** -0.5 if scale is None else scale) * query.shape[-1]
    largest = query.abs().max().double() * key.abs().max().double() * inner  # no score is larger
    rounding = 8 * torch.finfo(query.dtype if query.dtype in HALF else value.dtype).eps
    allowed = value.abs().max().double() * (rounding + 4 * torch.finfo(compute).eps * (1 + largest))
    assert (output.double() - wanted).abs().max() <= allowed


@st.composite
def calls(draw):
    """Arguments of attention()."""
    leading = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 2, 3)), max_size=3)))
    queries, keys = draw(st.integers(0, 20)), draw(st.integers(1, 20))
    width = draw(st.sampled_from((1, 3, 8, 16)))
    value_width = draw(st.sampled_from((width, width, 1, 5)))
    dtype = draw(st.sampled_from(DTYPES))
    value_dtype = draw(st.sampled_from((dtype, *HALF))) if dtype == torch.float32 else dtype
    seed, scale = draw(st.integers(0, 99)), draw(st.sampled_from((0.1, 1.0, 5.0)))
    query, key, value = (
        LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](normal(*leading, *shape, seed=seed + n, scale=scale, dtype=kind))
        for n, (shape, kind) in enumerate(
            (((queries, width), dtype), ((keys, width), dtype), ((keys, value_width), value_dtype))
        )
    )
    mask = None
    if draw(st.booleans()):
        full = (*leading, queries, keys)
        sizes = [draw(st.sampled_from((1, size))) for size in full][draw(st.integers(0, len(full))) :]
        allowed = normal(*sizes, seed=seed + 3) > draw(st.sampled_from((-9.0, 0.0, 0.8)))  # few to none masked, or most
        mask = allowed
        if draw(st.booleans()):
            added = normal(*sizes, seed=seed + 4, dtype=draw(st.sampled_from((dtype, torch.float16))))
            mask = added.masked_fill(~allowed, -torch.inf)
    settings = Settings(
        query_chunk=draw(st.integers(0, 21)),
        kv_chunk=draw(st.integers(0, 21)),
        engine=draw(st.sampled_from(OPTIONS["engine"].choices)),
        upcast=draw(st.sampled_from(UPCAST)),
    )
    return query, key, value, mask, draw(st.sampled_from((None, None, 0.3, 1, 0.0, -0.5))), settings


@given(calls())
@effort(max_examples=1000, deadline=None)
def test_any_call(reference, call):
    query, key, value, mask, scale, settings = call
    output = attention(query, key, value, mask=mask, scale=scale, settings=settings)
    check(output, reference(query, key, value, mask, scale), query, key, value, scale)


@pytest.mark.parametrize("queries, keys", [(1, 1), (9, 7), (17, 23)])
def test_every_chunk_size(reference, queries, keys):
    query, key, value = normal(3, queries, 8), normal(3, keys, 8, seed=1), normal(3, keys, 8, seed=2)
    wanted = reference(query, key, value)
    sizes = sorted({1, 2, 3, 5, 8, queries - 1, queries, queries + 1, keys - 1, keys, keys + 1} - {0})
    for engine, query_chunk, kv_chunk in itertools.product(("automatic", "portable"), sizes, sizes):
        chosen = Settings(engine=engine, query_chunk=query_chunk, kv_chunk=kv_chunk)
        check(attention(query, key, value, settings=chosen), wanted, query, key, value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "added"])
@pytest.mark.parametrize("batch, heads", [((2,), 2), ((3, 2), 2), ((), 3)], ids=["4-D", "5-D", "3-D"])
def test_every_way_a_mask_broadcasts(reference, settings, batch, heads, dtype):
    full = (*batch, heads, 6, 9)
    query, key, value = (normal(*batch, heads, n, 8, seed=n) for n in (6, 9, 9))
    for dimensions in range(len(full) + 1):
        for shape in itertools.product(*((1, size) for size in full[len(full) - dimensions :])):
            mask = normal(*shape, seed=5) > 0 if dtype == torch.bool else normal(*shape, seed=5)
            output = attention(query, key, value, mask=mask, settings=settings)
            check(output, reference(query, key, value, mask), query, key, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_may_attend_to_nothing_are_zero(reference, settings, dtype):
    query, key, value = (normal(2, 3, 11, 8, seed=n, dtype=dtype) for n in range(3))
    allowed = normal(2, 3, 11, 11, seed=3) > 0
    allowed[:, :, 2] = allowed[1, 1] = False
    allowed[0, 0, 5, :8] = False  # nothing in the first parts, something in a later one
    allowed[0, 0, 5, 8:] = True
    for mask in (allowed, torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf)):
        output = attention(query, key, value, mask=mask, settings=settings)
        assert not output[:, :, 2].any() and not output[1, 1].any() and output[0, 0, 5].any()
        check(output, reference(query, key, value, mask), query, key, value)


def test_masks_with_huge_numbers(reference, settings):
    query, key, value = (normal(1, 2, 9, 8, seed=n) for n in range(3))
    key[..., 4, :] *= 1e17  # whatever a masked key holds
    value[..., 4, :] *= 1e30
    mask = torch.zeros(9, 9)
    mask[:, 4] = -torch.inf
    for number in (-1e4, -1e30, torch.finfo(torch.float32).min):
        mask[1:4, 5:], mask[5:, :4] = number, number
        for given_mask in (mask, mask == 0):
            output = attention(query, key, value, mask=given_mask, settings=settings)
            seen = [tensor.index_fill(-2, torch.tensor([4]), 0.0) for tensor in (key, value)]
            check(output, reference(query, *seen, given_mask), query, *seen)
    mask[7] = torch.finfo(torch.float32).min  # lower than any score, but not minus infinity
    mask[7, 4] = -torch.inf
    output = attention(query, key, value, mask=mask, settings=settings)
    torch.testing.assert_close(output[..., 7, :], value[..., [0, 1, 2, 3, 5, 6, 7, 8], :].mean(-2))


STEPS = [0.1, 3.0, 40.0, 90.0, 5000.0]


@pytest.mark.parametrize("step", [*STEPS, *(-step for step in STEPS)])
def test_scores_that_grow_or_shrink_from_part_to_part(reference, step):
    """Each part's scores are `step` above those of the part before it: sums of a maximum assumed too low overflow."""
    query, key, value = normal(4, 30, 8, seed=1), normal(4, 64, 8, seed=2), normal(4, 64, 8, seed=3)
    query[..., 0] = 8**0.5
    key[..., 0] = torch.arange(64) // 8 * step
    for size in (8, 1, 5, 64):
        output = attention(query, key, value, settings=Settings(engine="portable", kv_chunk=size, query_chunk=16))
        check(output, reference(query, key, value), query, key, value)


@pytest.mark.parametrize("outlier", [0, 20, 63])
@pytest.mark.parametrize("scale", [1e-4, 5.0, 300.0])
def test_peaky_scores(reference, settings, scale, outlier):
    query, key, value = (normal(2, 4, 64, 16, seed=n, scale=scale if n < 2 else 1.0) for n in range(3))
    key[:, :, outlier] *= 30.0  # above or below all others, as the query has it
    check(attention(query, key, value, settings=settings), reference(query, key, value), query, key, value)


def test_nan_stays_in_the_rows_it_touches(settings):
    """Through a key it touches every row of its head, through a value one column of them."""
    for position, touched in ((0, (0, 1, 7)), (1, (0, 1)), (2, (0, 1, slice(None), 3))):
        tensors = [normal(2, 3, 12, 8, seed=n) for n in range(3)]
        wanted = attention(*tensors, settings=settings)
        tensors[position][0, 1, 7, 3] = torch.nan
        output = attention(*tensors, settings=settings)
        if settings.engine == "portable":  # PyTorch's fused kernel on the CPU makes zeros of a query that is NaN
            assert output[touched].isnan().all()
        output[touched] = wanted[touched]
        torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize(
    "dtype, value_dtype",
    [*((dtype, dtype) for dtype in (torch.float32, *HALF)), *((torch.float32, half) for half in HALF)],
    ids=str,
)
def test_autocast_changes_nothing(reference, settings, dtype, value_dtype):
    query, key = normal(2, 3, 40, 8, dtype=dtype), normal(2, 3, 50, 8, seed=1, dtype=dtype)
    value = normal(2, 3, 50, 8, seed=2, dtype=value_dtype)
    for upcast in UPCAST:
        chosen = Settings(settings.query_chunk, settings.kv_chunk, engine=settings.engine, upcast=upcast)
        plain = attention(query, key, value, settings=chosen)
        check(plain, reference(query, key, value), query, key, value)
        with devices.autocast(torch.bfloat16):
            assert torch.equal(attention(query, key, value, settings=chosen), plain)


def test_upcast_always_is_as_exact_as_float32(reference, settings):
    query, key, value = (normal(2, 4, 64, 16, seed=n, dtype=torch.bfloat16, scale=3.0) for n in range(3))
    chosen = Settings(settings.query_chunk, settings.kv_chunk, engine=settings.engine, upcast="always")
    output = attention(query, key, value, settings=chosen)
    rounded = reference(query, key, value).to(torch.bfloat16)
    torch.testing.assert_close(output, rounded, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-4)


def test_report_gets_the_plan_that_was_carried_out(settings):
    plans = []
    attention(*(normal(2, 3, 11, 8, seed=n) for n in range(3)), settings=settings, report=plans.append)
    (made,) = plans
    assert isinstance(made, Plan) and made.retries == 0
    assert made.query_chunk == (settings.query_chunk or 11) and made.kv_chunk == (settings.kv_chunk or 11)
    assert settings.engine in ("automatic", made.engine)


def test_tokens_stay_before_heads_in_memory(settings):
    tensors = [normal(2, 11, 3, 8, seed=n).transpose(1, 2) for n in range(3)]
    output = attention(*tensors, settings=settings).transpose(1, 2)
    assert output.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "mask_dtype", "fill"),
    [
        (torch.float16, torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.bfloat16, torch.float16, None),
        (torch.float16, torch.float32, -1e5),
    ],
)
def test_a_mask_with_numbers_that_the_queries_dtype_has_not(reference, dtype, mask_dtype, fill):
    """It is not rounded to the queries' dtype on its way into a fused kernel."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 16).to(dtype) for _ in range(3))
    mask = (torch.randn(64, 64) * 8 if fill is None else torch.full((64, 64), fill)).to(mask_dtype)
    found = attention(query, key, value, mask=mask).double()
    assert (found - reference(query, key, value, mask)).abs().max() <= 0.02  # rounded: 0.06 and more
