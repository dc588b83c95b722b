"""Attention as a function of projections, against float64 and against what such functions compute elsewhere."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from lib_subquad import Settings
from lib_subquad.layers.heads import heads_attention, spatial_attention

PLANS = {
    "automatic": Settings(),
    "portable": Settings(engine="portable"),
    "chunked": Settings(engine="portable", query_chunk=3, kv_chunk=5),
}
BATCH, HEADS, TOKENS, KEYS, WIDTH = 2, 4, 7, 12, 8
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def settings(request):
    return request.param


def projections(batch=BATCH, heads=HEADS, tokens=TOKENS, keys=KEYS, width=WIDTH, value_width=None, **how):
    """Queries, keys and values [batch, tokens, heads * width]."""
    sizes = ((tokens, width), (keys, width), (keys, value_width or width))
    return tuple(torch.randn(batch, many, heads * wide, **how) for many, wide in sizes)


def apart(tensor, heads=HEADS):
    """[batch, tokens, heads * width] as [batch, heads, tokens, width]."""
    return tensor.unflatten(-1, (heads, -1)).movedim(2, 1)


def in_float64(query, key, value, heads, mask=None):
    """The definition, a head and an image at a time; `mask` is bool or added, [batch, heads, tokens, keys]."""
    output = torch.empty(*query.shape[:2], value.shape[2], dtype=torch.float64)
    for image in range(len(query)):
        for head, (q, k, v) in enumerate(zip(*(it[image].double().chunk(heads, -1) for it in (query, key, value)))):
            scores = q @ k.T / k.shape[1] ** 0.5
            if mask is not None:
                own = mask.expand(len(query), heads, *scores.shape)[image, head]
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own.double()
            output[image, :, head * v.shape[1] :][:, : v.shape[1]] = scores.softmax(-1) @ v
    return output


# ----------------------------------------------------------------------------- what such functions compute elsewhere


def by_sdpa(query, key, value, heads, mask=None, skip_reshape=False, skip_output_reshape=False):
    """A mask of two sizes is every image's and head's, one of three every head's."""
    if not skip_reshape:
        query, key, value = (apart(it, heads) for it in (query, key, value))
    while mask is not None and mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    if mask is not None and mask.shape[-1] == 1:  # torch 2.4 reads beyond the end of such a mask
        mask = mask.expand(*mask.shape[:-1], key.shape[-2]).contiguous()
    output = scaled_dot_product_attention(query, key, value, mask)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def by_scores(query, key, value, heads, mask=None):
    """Heads counted in the batch; a bool mask says for each image which keys there are, whatever its sizes."""
    query, key, value = (apart(it, heads).flatten(0, 1) for it in (query, key, value))
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask.flatten(1).repeat_interleave(heads, 0)[:, None], -torch.inf)
    elif mask is not None:
        images = mask.shape[0] if mask.dim() > 2 else 1
        each = mask.reshape(images, -1, *mask.shape[-2:]).expand(len(query) // heads, heads, -1, -1)
        scores = scores + each.flatten(0, 1)
    output = scores.softmax(-1) @ value
    return output.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def by_positions(query, key, value):
    """One head over the positions of a feature map."""
    shape = query.shape
    query, key, value = (it.flatten(2) for it in (query, key, value))
    weights = (query.transpose(1, 2) @ key * query.shape[1] ** -0.5).softmax(2)
    return (value @ weights.transpose(1, 2)).reshape(shape)


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("parts", ["v", "k", "kv"])
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_keys_and_values_whose_heads_are_apart_already(settings, parts, batches):
    """The blocks of SD 3 put heads of queries and keys side by side, and leave those of values as they were split."""
    query, key, value = projections(batch=4)
    key, value = (it[:batches] for it in (key, value))
    expected = heads_attention(query, key, value, HEADS, settings=settings)
    key, value = (it.unflatten(-1, (HEADS, -1)) if part in parts else it for part, it in (("k", key), ("v", value)))
    close(heads_attention(query, key, value, HEADS, settings=settings), expected)
    with pytest.raises(ValueError, match="do not have 3 dimensions"):
        heads_attention(query, key, value, HEADS // 2, settings=settings)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"heads": 1},
        {"batch": 1, "tokens": 1, "keys": 1},
        {"width": 1},
        {"keys": 77, "tokens": 40},
        {"value_width": 5},
        {"value_width": 16, "heads": 3},
    ],
    ids=str,
)
def test_without_a_mask(settings, sizes):
    query, key, value = projections(**sizes)
    heads = sizes.get("heads", HEADS)
    found = heads_attention(query, key, value, heads, settings=settings)
    close(found, in_float64(query, key, value, heads).float())
    if "value_width" not in sizes:
        close(found, by_sdpa(query, key, value, heads))
        close(found, by_scores(query, key, value, heads))


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_heads_apart(settings, skip_reshape, skip_output_reshape):
    query, key, value = projections()
    if skip_reshape:
        query, key, value = map(apart, (query, key, value))
    how = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    found = heads_attention(query, key, value, HEADS, settings=settings, **how)
    assert found.shape == ((BATCH, HEADS, TOKENS, WIDTH) if skip_output_reshape else (BATCH, TOKENS, HEADS * WIDTH))
    close(found, by_sdpa(query, key, value, HEADS, **how))


@pytest.mark.parametrize("which", [(2,), (1,), (1, 2)], ids=["value", "key", "both"])
def test_heads_apart_that_were_not_moved(settings, which):
    """[batch, tokens, heads, width], as SD 3's blocks leave the values of their one projection."""
    given = list(projections(keys=TOKENS))
    expected = by_sdpa(*given, HEADS)
    for number in which:
        together = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH)
        together[:, :, number] = given[number].unflatten(-1, (HEADS, -1))
        given[number] = together[:, :, number]
    close(heads_attention(*given, HEADS, settings=settings), expected)


# sizes of the mask -> what it is in four dimensions
FORMS = {
    (TOKENS, KEYS): (1, 1, TOKENS, KEYS),
    (1, KEYS): (1, 1, 1, KEYS),
    (TOKENS, 1): (1, 1, TOKENS, 1),
    (BATCH, KEYS): (BATCH, 1, 1, KEYS),
    (BATCH, TOKENS, KEYS): (BATCH, 1, TOKENS, KEYS),
    (BATCH, 1, KEYS): (BATCH, 1, 1, KEYS),
    (1, TOKENS, KEYS): (1, 1, TOKENS, KEYS),
    (HEADS, TOKENS, KEYS): (1, HEADS, TOKENS, KEYS),
    (HEADS, 1, KEYS): (1, HEADS, 1, KEYS),
    (BATCH * HEADS, TOKENS, KEYS): (BATCH, HEADS, TOKENS, KEYS),
    (BATCH * HEADS, 1, KEYS): (BATCH, HEADS, 1, KEYS),
    (BATCH, HEADS, TOKENS, KEYS): (BATCH, HEADS, TOKENS, KEYS),
    (BATCH, 1, TOKENS, KEYS): (BATCH, 1, TOKENS, KEYS),
    (1, HEADS, TOKENS, KEYS): (1, HEADS, TOKENS, KEYS),
    (BATCH, 1, 1, KEYS): (BATCH, 1, 1, KEYS),
    (1, 1, 1, 1): (1, 1, 1, 1),
}


def mask_of(shape, kind, dtype=torch.float32):
    mask = torch.randn(shape)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True  # a row that sees nothing is zeros here, and NaN or a mean elsewhere
        return mask
    return mask.to(dtype) if kind == "float" else (mask > -0.5).float().log().nan_to_num(neginf=-3e4).to(dtype)


@pytest.mark.parametrize("kind", ["float", "bool", "large"])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_every_form_of_a_mask(settings, shape, kind, skip_reshape):
    query, key, value = projections()
    mask = mask_of(shape, kind)
    if kind == "large":
        mask[..., 0] = 0.0
    expected = in_float64(query, key, value, HEADS, mask.reshape(FORMS[shape])).float()
    given = map(apart, (query, key, value)) if skip_reshape else (query, key, value)
    before = mask.clone()
    close(heads_attention(*given, HEADS, mask, skip_reshape=skip_reshape, settings=settings), expected)
    assert torch.equal(mask, before)


SAME_ELSEWHERE = [shape for shape in FORMS if shape[0] not in (HEADS, BATCH * HEADS) and shape != (BATCH, KEYS)]


@pytest.mark.parametrize("shape", SAME_ELSEWHERE, ids=str)
@pytest.mark.parametrize("elsewhere", [by_sdpa, by_scores])
def test_masks_are_read_as_elsewhere(settings, shape, elsewhere):
    query, key, value = projections()
    mask = mask_of(shape, "float")
    close(heads_attention(query, key, value, HEADS, mask, settings=settings), elsewhere(query, key, value, HEADS, mask))


@pytest.mark.parametrize("shape", [(BATCH, KEYS), (BATCH, 1, KEYS), (BATCH, 1, 1, KEYS)], ids=str)
def test_a_bool_mask_that_says_which_keys_there_are(settings, shape):
    query, key, value = projections()
    mask = mask_of(shape, "bool")
    close(heads_attention(query, key, value, HEADS, mask, settings=settings), by_scores(query, key, value, HEADS, mask))


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "shape", "meant"),
    [
        (7, 4, 7, (7, KEYS), (1, 1, 7, KEYS)),  # as many images as tokens: tokens
        (4, 4, 7, (4, 7, KEYS), (4, 1, 7, KEYS)),  # as many images as heads: images
        (1, 4, 7, (4, 7, KEYS), (1, 4, 7, KEYS)),
        (4, 1, 7, (4, 7, KEYS), (4, 1, 7, KEYS)),
    ],
)
def test_where_sizes_leave_it_open(settings, batch, heads, tokens, shape, meant):
    query, key, value = projections(batch, heads, tokens)
    mask = mask_of(shape, "float")
    expected = in_float64(query, key, value, heads, mask.reshape(meant)).float()
    close(heads_attention(query, key, value, heads, mask, settings=settings), expected)


@pytest.mark.parametrize("kind", ["float", "large"])
@pytest.mark.parametrize("mask_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_in_any_dtype(settings, dtype, mask_dtype, kind):
    query, key, value = projections(dtype=dtype)
    mask = mask_of((BATCH, 1, TOKENS, KEYS), kind, mask_dtype)
    mask[..., 0] = 0
    found = heads_attention(query, key, value, HEADS, mask, settings=settings)
    assert found.dtype == dtype
    close(found.double(), in_float64(query, key, value, HEADS, mask), atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_are_brought_together(settings, dtype, key_dtype, value_dtype):
    query, key, value = projections()
    query, key, value = query.to(dtype), key.to(key_dtype), value.to(value_dtype)
    found = heads_attention(query, key, value, HEADS, settings=settings)
    assert found.dtype == dtype
    worst = max(map(TOLERANCE.get, (dtype, key_dtype, value_dtype)))
    close(found.double(), in_float64(query, key, value, HEADS), atol=2 * worst, rtol=2 * worst)


def test_a_row_that_may_see_nothing_is_zeros(settings):
    query, key, value = projections()
    mask = torch.ones(TOKENS, KEYS, dtype=torch.bool)
    mask[2] = False
    found = heads_attention(query, key, value, HEADS, mask, settings=settings)
    assert not found[:, 2].any() and found[:, 3].all()


@pytest.mark.parametrize("upcast", ["always", "never"])
def test_upcast_is_in_the_plan_and_the_result_in_querys_dtype(settings, upcast):
    settings = Settings(**{**vars(settings), "upcast": upcast})
    query, key, value = (it.half() for it in projections())
    query = query * 2000  # whose scores are beyond what half precision can hold
    found = heads_attention(query, key * 100, value, HEADS, settings=settings)
    assert found.dtype == torch.float16 and found.isfinite().all()
    if upcast == "always":
        close(found.double(), in_float64(query, key * 100, value, HEADS), atol=1e-2, rtol=1e-2)


def test_the_plan_is_reported():
    plans = []
    heads_attention(*projections(), HEADS, settings=PLANS["chunked"], report=plans.append)
    spatial_attention(*torch.randn(3, 1, 8, 3, 4), settings=PLANS["chunked"], report=plans.append)
    assert [(plan.engine, plan.query_chunk, plan.kv_chunk) for plan in plans] == [("portable", 3, 5)] * 2


def test_any_strides(settings):
    query, key, value = projections()
    expected = by_sdpa(query, key, value, HEADS)
    strided = [torch.stack([it, it], -1)[..., 0] for it in (query, key, value)]
    close(heads_attention(*strided, HEADS, settings=settings), expected)
    one = torch.randn(BATCH, TOKENS, 3 * HEADS * WIDTH)  # of one projection for all three
    close(heads_attention(*one.chunk(3, -1), HEADS, settings=settings), by_sdpa(*one.chunk(3, -1), HEADS))
    tokens_first = [it.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for it in (query, key, value)]
    close(heads_attention(*tokens_first, HEADS, skip_reshape=True, settings=settings), expected)
    broadcast = query[:1].expand(3, -1, -1), key[:1].expand(3, -1, -1), value[:1].expand(3, -1, -1)
    mask = torch.randn(1, KEYS).expand(TOKENS, KEYS)
    close(heads_attention(*broadcast, HEADS, mask, settings=settings), by_sdpa(*broadcast, HEADS, mask))


@pytest.mark.parametrize("keys", [1, KEYS])
def test_the_result_is_the_callers_to_write_to(settings, keys):
    """Some models scale it in place."""
    query, key, value = projections(keys=keys)
    before = [it.clone() for it in (query, key, value)]
    heads_attention(query, key, value, HEADS, settings=settings).mul_(torch.rand(BATCH, TOKENS, HEADS * WIDTH))
    maps = torch.randn(3, 1, 8, 1, keys)
    maps_before = maps.clone()
    spatial_attention(*maps, settings=settings).mul_(torch.rand(1, 8, 1, keys))
    assert all(map(torch.equal, (query, key, value, maps), (*before, maps_before)))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_flow(settings, masked):
    given = [it.double().requires_grad_() for it in projections()]
    if masked:
        given.append(torch.randn(BATCH, TOKENS, KEYS, dtype=torch.float64, requires_grad=True))
    weights = torch.randn(BATCH, TOKENS, HEADS * WIDTH, dtype=torch.float64)

    def gradients(attend):
        return torch.autograd.grad((attend(*given[:3], HEADS, *given[3:]) * weights).sum(), given)

    for found, expected in zip(gradients(functools.partial(heads_attention, settings=settings)), gradients(by_sdpa)):
        close(found, expected)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"batch": 0, "tokens": 0}], ids=str)
def test_nothing_to_compute(settings, sizes, skip_reshape):
    given = projections(**sizes)
    found = heads_attention(*(map(apart, given) if skip_reshape else given), HEADS, skip_reshape=skip_reshape,
                            settings=settings)  # fmt: skip
    assert found.shape == (*given[0].shape[:2], HEADS * WIDTH)


@trials(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_whatever_fits_is_computed(data):
    """Any sizes, any form of mask that goes with them, any dtypes, any chunks."""
    size = st.integers(1, 6)
    batch, heads, tokens, keys, width, value_width = (data.draw(size) for _ in range(6))
    query, key, value = projections(batch, heads, tokens, keys, width, value_width)
    full = (batch, heads, tokens, keys)
    mask = four = None
    form = data.draw(st.sampled_from(["none", "four", "images", "all", "each", "keys"]))
    if form != "none":
        four = tuple(data.draw(st.sampled_from([1, it])) for it in full)
        if form == "images":
            four = (batch, 1, *four[2:])
        elif form == "all":
            four = (1, 1, tokens, four[3])
        elif form == "each":
            four = (batch, heads, *four[2:])
        elif form == "keys":
            four = (batch, 1, 1, keys)
        kept = {"four": slice(None), "images": [0, 2, 3], "all": [2, 3], "keys": [0, 3]}.get(form)
        shape = (batch * heads, *four[2:]) if form == "each" else torch.tensor(four)[kept].tolist()
        mask = mask_of(shape, data.draw(st.sampled_from(["bool", "float"])))
        if form == "each" and batch * heads in (batch, heads) and four[:2] != (batch * heads, 1):
            four = (batch * heads, 1, *four[2:]) if heads == 1 else (1, batch * heads, *four[2:])
        if form == "keys" and batch in (1, tokens):
            four = (1, 1, batch, keys)
    settings = data.draw(st.builds(Settings, query_chunk=st.integers(0, 4), kv_chunk=st.integers(0, 4),
                                   engine=st.sampled_from(["automatic", "portable"])))  # fmt: skip
    how = {"skip_reshape": data.draw(st.booleans()), "skip_output_reshape": data.draw(st.booleans())}
    given = [apart(it, heads) for it in (query, key, value)] if how["skip_reshape"] else (query, key, value)
    found = heads_attention(*given, heads, mask, settings=settings, **how)
    expected = in_float64(query, key, value, heads, None if mask is None else mask.reshape(four)).float()
    close(found, apart(expected, heads) if how["skip_output_reshape"] else expected)


REFUSED = {
    "queries, keys or values that do not have 3 dimensions": [
        lambda q, k, v: (apart(q), apart(k), apart(v), HEADS),
        lambda q, k, v: (q[0], k[0], v[0], HEADS),
        lambda q, k, v: (q, None, v, HEADS),
        lambda q, k, v: (q.numpy(), k, v, HEADS),
    ],
    "a dtype that attention is not computed in": [
        lambda q, k, v: (q.int(), k, v, HEADS),
        lambda q, k, v: (q, k.to(torch.complex64), v, HEADS),
        lambda q, k, v: (q, k, v > 0, HEADS),
    ],
    "tensors on different devices": [
        lambda q, k, v: (q, k.to("meta"), v, HEADS),
        lambda q, k, v: (q, k, v.to("meta"), HEADS),
    ],
    "a number of heads that is no count": [
        lambda q, k, v, heads=heads: (q, k, v, heads) for heads in (0, -1, 4.0, True, None, "4")
    ],
    "channels that the heads cannot share evenly": [
        lambda q, k, v: (q, k, v, 5),
        lambda q, k, v: (q, k, v[..., :-1], HEADS),
        lambda q, k, v: (q[..., :0], k[..., :0], v, HEADS),
        lambda q, k, v: (q, k, v[..., :0], HEADS),
    ],
    "batches of different sizes": [
        lambda q, k, v: (q, k[:1, :-1], v[:1, :-1], HEADS),
        lambda q, k, v: (q, k, v[:1], HEADS),
        lambda q, k, v: (torch.cat([q, q[:1]]), k[:, :-1], v[:, :-1], HEADS),
        lambda q, k, v: (q[:0], k, v, HEADS),
    ],
    "queries, keys and values that do not fit together": [
        lambda q, k, v: (q, k, v[:, :-1], HEADS),
        lambda q, k, v: (q, k[..., : HEADS * 2], v, HEADS),
        lambda q, k, v: (q, k[:, :0], v[:, :0], HEADS),
    ],
    "a mask of a kind that is not known": [
        lambda q, k, v: (q, k, v, HEADS, torch.ones(TOKENS, KEYS, dtype=torch.long)),
        lambda q, k, v: (q, k, v, HEADS, torch.ones(TOKENS, KEYS, device="meta")),
        lambda q, k, v: (q, k, v, HEADS, "causal"),
        lambda q, k, v: (q, k, v, HEADS, [[True]]),
    ],
    "a mask whose sizes do not fit": [
        lambda q, k, v, shape=shape: (q, k, v, HEADS, torch.zeros(shape))
        for shape in [(), (KEYS,), (TOKENS, KEYS + 1), (KEYS, TOKENS), (3, TOKENS, KEYS), (BATCH, HEADS, KEYS, TOKENS),
                      (HEADS, BATCH, TOKENS, KEYS), (1, 1, 1, TOKENS, KEYS), (0, KEYS), (TOKENS, 0)]
    ],
}  # fmt: skip


@pytest.mark.parametrize(("words", "make"), [(words, make) for words, cases in REFUSED.items() for make in cases])
def test_what_is_not_computed_is_refused_in_words(words, make):
    with pytest.raises(ValueError) as refused:
        heads_attention(*make(*projections()))
    assert str(refused.value) == words


APART = {
    "queries, keys or values that do not have 4 dimensions": lambda q, k, v: (q[:, 0], k[:, 0], v[:, 0]),
    "heads that share keys and values": lambda q, k, v: (q, k[:, :2], v[:, :2]),
    "queries, keys and values that do not fit together": lambda q, k, v: (q[..., :0], k[..., :0], v),
    "batches of different sizes": lambda q, k, v: (q[:1], k, v),
}


@pytest.mark.parametrize("words", APART)
def test_and_where_heads_are_apart(words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        heads_attention(*APART[words](*map(apart, projections())), HEADS, skip_reshape=True)


def test_another_number_of_heads_than_there_are():
    with pytest.raises(ValueError, match="^heads that share keys and values$"):
        heads_attention(*map(apart, projections()), HEADS * 2, skip_reshape=True)


ANY_SIZE = st.lists(st.integers(0, 3), max_size=5)
ANY_DTYPE = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.bool, torch.int32])
ANY_TENSOR = st.one_of(st.none(), st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), ANY_SIZE, ANY_DTYPE))


@trials(max_examples=400, deadline=None, database=None)
@given(ANY_TENSOR, ANY_TENSOR, ANY_TENSOR, st.integers(-1, 3), ANY_TENSOR, st.booleans(), st.booleans())
def test_whatever_is_given_is_computed_or_refused(query, key, value, heads, mask, skip_reshape, skip_output_reshape):
    """In words of a few: never an error of another kind, which the original's turn would not follow."""
    try:
        heads_attention(query, key, value, heads, mask, skip_reshape=skip_reshape,
                        skip_output_reshape=skip_output_reshape)  # fmt: skip
    except ValueError as refused:
        assert len(str(refused)) < 60 and "[" not in str(refused)
    try:
        spatial_attention(query, key, value)
    except ValueError as refused:
        assert len(str(refused)) < 60 and "[" not in str(refused)


# ----------------------------------------------------------------------------------------------------------- spatial


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 16, 6, 6), (2, 8, 15), (2, 8, 2, 3, 5), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_of_a_feature_map(settings, shape, dtype):
    query, key, value = torch.randn(3, *shape).to(dtype)
    found = spatial_attention(query, key, value, settings=settings)
    assert found.dtype == dtype and found.shape == shape and found.is_contiguous()
    expected = by_positions(query.double(), key.double(), value.double())
    close(found.double(), expected, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_of_any_strides(settings, memory_format):
    whole = torch.randn(2, 24, 4, 6).contiguous(memory_format=memory_format)
    query, key, value = (it[..., ::2] for it in whole.chunk(3, 1))
    close(spatial_attention(query, key, value, settings=settings), by_positions(query, key, value))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float64),
    ],
)
def test_maps_of_mixed_dtypes(settings, dtypes):
    query, key, value = (it.to(dtype) for it, dtype in zip(torch.randn(3, 1, 8, 3, 4), dtypes))
    found = spatial_attention(query, key, value, settings=settings)
    assert found.dtype == dtypes[0]
    close(found.double(), by_positions(query.double(), key.double(), value.double()), atol=6e-2, rtol=6e-2)


def test_maps_have_gradients(settings):
    given = [it.requires_grad_() for it in torch.randn(3, 1, 8, 3, 4, dtype=torch.float64)]
    found, expected = (
        torch.autograd.grad(attend(*given).square().sum(), given)
        for attend in (functools.partial(spatial_attention, settings=settings), by_positions)
    )
    for one, other in zip(found, expected):
        close(one, other)


def test_a_batch_of_no_maps(settings):
    given = torch.randn(3, 0, 8, 3, 4)
    assert spatial_attention(*given, settings=settings).shape == (0, 8, 3, 4)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("no feature maps", lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0])),
        ("no feature maps", lambda q, k, v: (None, k, v)),
        ("queries, keys or values that do not have 4 dimensions", lambda q, k, v: (q, k[0], v)),
        ("a dtype that attention is not computed in", lambda q, k, v: (q.int(), k, v)),
        ("tensors on different devices", lambda q, k, v: (q, k.to("meta"), v)),
        ("feature maps of different sizes", lambda q, k, v: (q, k[:, :4], v[:, :4])),
        ("feature maps of different sizes", lambda q, k, v: (q, k, v[:1])),
        ("feature maps without channels or positions", lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0])),
        ("feature maps without channels or positions", lambda q, k, v: (q[:0, :, :0], k[:0, :, :0], v[:0, :, :0])),
    ],
)
def test_what_are_no_maps_is_refused_in_words(words, make):
    with pytest.raises(ValueError, match=f"^{words}$"):
        spatial_attention(*make(*torch.randn(3, 2, 8, 3, 4)))


@pytest.mark.parametrize(("tiles", "tokens"), [(1, 64), (4, 16), (16, 4)])
def test_keys_whose_batch_hypertile_leaves_whole(tiles, tokens):
    """It cuts queries into tiles and no keys; the web UIs' own functions view keys by the number of the tiles then."""
    query = torch.randn(2 * tiles, tokens, HEADS * WIDTH)
    key, value = torch.randn(2, 2, 64, HEADS * WIDTH)
    shared = (it.view(2 * tiles, -1, HEADS * WIDTH) for it in (key, value))
    torch.testing.assert_close(heads_attention(query, key, value, HEADS), heads_attention(query, *shared, HEADS))
    viewed = (it.reshape(2 * tiles, -1, HEADS * WIDTH) for it in (query, key, value))
    expected = scaled_dot_product_attention(*map(apart, viewed))
    torch.testing.assert_close(
        heads_attention(query, key, value, HEADS), expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_keys_of_several_images_for_each_query(settings, images, together):
    """As IP-Adapter gives them: batch entries of one query follow each other; without a guidance there is one query."""
    query, _, _ = projections(batch=1 + together)
    key, value = torch.randn(2, len(query), images, 4, HEADS * WIDTH)
    found = heads_attention(query, key.flatten(0, 1), value.flatten(0, 1), HEADS, settings=settings)
    close(found, in_float64(query, key.flatten(1, 2), value.flatten(1, 2), HEADS).float())
    assert images == 1 or not torch.allclose(found, by_sdpa(query, key[:, 0], value[:, 0], HEADS), atol=1e-2)


def test_masks_beside_keys_of_several_images(settings):
    query, key, value = projections()
    mask = mask_of((BATCH, TOKENS, KEYS), "bool")
    images = (it.reshape(2 * BATCH, KEYS // 2, -1) for it in (key, value))
    expected = in_float64(query, key, value, HEADS, mask[:, None]).float()
    close(heads_attention(query, *images, HEADS, mask, settings=settings), expected)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
@trials(max_examples=60, deadline=None, database=None)
def test_any_numbers_of_batch_entries(queries, batch, tokens):
    """Computed wherever a view by query's number of them has a meaning, with what that view computes."""
    query, key, value = torch.randn(queries, 3, 8), *torch.randn(2, batch, tokens, 8)
    if batch * tokens % queries:
        with pytest.raises(ValueError, match="^batches of different sizes$"):
            heads_attention(query, key, value, 2)
        return
    viewed = (it.view(queries, -1, 8) for it in (key, value))
    close(heads_attention(query, key, value, 2), by_sdpa(query, *viewed, 2))
