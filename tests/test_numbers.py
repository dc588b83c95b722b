"""Errors against float64, beside those of PyTorch's own attention in the same dtype. `pytest -s` shows the figures."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import Settings
from lib_subquad.engines import fused
from tests import devices
from tests.devices import attention, on_device

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [  # batch, heads, queries, keys, width
    (1, 4, 64, 64, 40),
    (2, 2, 96, 77, 64),
    (1, 1, 50, 300, 128),
    (1, 2, 33, 1100, 16),
]
SCALES = (1e-4, 1e-2, 1.0, 5.0, 40.0, 300.0)
SEEDS = 10
ALLOWED = 1.3  # times the error of PyTorch's own
# Beside one product over all keys, which errs by 4.3 ulp where the 35 chunks of 1,100 keys err by 9.5 in float32: so it
# is without a fused kernel, as with torch 2.0 and on devices that have none. With torch 2.13 ours err by 9.8, that
# product by 4.3 and the CPU's fused kernel, which sums chunks too, by 14.5: only the yardstick is another.
ALLOWED_BESIDE_ONE_PRODUCT = 2.6
PLANS = {
    "automatic": Settings(),
    "query chunks": Settings(query_chunk=16),
    "portable": Settings(engine="portable"),
    "portable chunks": Settings(engine="portable", query_chunk=16, kv_chunk=32),
}
RATED = ("automatic", "portable", "portable chunks")  # with query chunks, fused is PyTorch's own on fewer rows
# In float32 the largest error is that of the one row whose two best keys are closest to a tie, and moves tenfold with
# the order in which products are summed. PyTorch's own error is then the largest of as many orders. Half precision
# rounds every result, and needs no such allowance.
ORDERS = {torch.float32: 4}
# With 2.1.2 the portable engine is up to 3.05 times as far off as PyTorch in the order given; from 2.13 on it holds.
BEFORE_2_13 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def inputs(shape, dtype, scale, seed):
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, heads, tokens, width, generator=generator) * scale).to(dtype)
        for tokens in (queries, keys, keys)
    ]


def pytorch_has(dtype) -> bool:
    """And can hold what it computes: torch 2.4 makes NaN of scores past the largest float16."""
    token = torch.full((1, 1, 1, 8), 256.0, dtype=dtype)
    try:
        return bool(F.scaled_dot_product_attention(token, token, token).isfinite().all())
    except RuntimeError:
        return False


def pytorchs(tensors, order):
    """PyTorch's attention in the dtype of the tensors, over channels and keys in the order of this number, 0 being as
    they are. Where PyTorch has none in this dtype, that in float32, rounded: no attention can do much better."""
    query, key, value = tensors
    if order:
        generator = torch.Generator().manual_seed(order)
        width, keys = (torch.randperm(size, generator=generator) for size in (query.shape[-1], key.shape[-2]))
        query, key, value = query[..., width], key[..., keys, :][..., width], value[..., keys, :]
    compute = query.dtype if pytorch_has(query.dtype) else torch.float32
    attend = on_device(F.scaled_dot_product_attention)
    return attend(*(tensor.to(compute) for tensor in (query, key, value))).to(query.dtype)


def allowed(name, dtype) -> float:
    one_product = not (fused.TAKES_SCALE and devices.is_cpu())
    chunks_beside_it = one_product and name == "portable chunks" and dtype == torch.float32
    return ALLOWED_BESIDE_ONE_PRODUCT if chunks_beside_it else ALLOWED


def ulp(magnitude: float, dtype) -> float:
    """The distance from one number of this magnitude to the next."""
    info = torch.finfo(dtype)
    return 2.0 ** math.floor(math.log2(max(magnitude, info.tiny))) * info.eps


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_beside_pytorchs_own(reference, dtype, scale):
    figures = []
    for shape in SHAPES:
        ours, theirs, as_they_are = {name: [] for name in RATED}, [], []
        for seed in range(SEEDS):
            tensors = inputs(shape, dtype, scale, seed)
            wanted = reference(*tensors)
            error = lambda output: (output.double() - wanted).abs().max().item()  # noqa: B023, E731
            floor = ulp(wanted.abs().max().item(), dtype)
            found = [error(pytorchs(tensors, order)) for order in range(ORDERS.get(dtype, 1))]
            theirs.append(max(*found, floor))
            as_they_are.append(max(found[0], floor))
            for name, settings in PLANS.items():
                output = attention(*tensors, settings=settings)
                assert wanted.isfinite().all() and output.isfinite().all(), (shape, name)
                if name in RATED:
                    ours[name].append(error(output))
        for name, errors in ours.items():
            ratio, strict = (statistics.median(errors) / statistics.median(peer) for peer in (theirs, as_they_are))
            figures.append((ratio, strict, name, shape))
    for name in RATED:
        ratio, strict = (max(found[n] for found in figures if found[2] == name) for n in (0, 1))
        print(f"\n{dtype}, N(0, {scale:g}²), {name}: {ratio:.2f} x PyTorch's error ({strict:.2f} in order)", end="")
        assert ratio <= allowed(name, dtype), (name, figures)
        is_portable = name != "automatic" or not fused.TAKES_SCALE
        assert strict <= ALLOWED or (is_portable and BEFORE_2_13), figures


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_numbers_of_a_dtype(reference, dtype, plan):
    """No NaN and no infinity where float64 has none, up to half of the largest number in q, k and v at once."""
    largest = min(torch.finfo(dtype).max / 2, 1e18)
    query, key, value = (
        tensor.clamp(-1, 1).mul(largest).to(dtype) for tensor in inputs((1, 2, 40, 70, 8), torch.float32, 1.0, 0)
    )
    assert attention(query, key, value, settings=PLANS[plan]).isfinite().all()
    query[..., 1:] = 0.0  # scores of one product each, so that float32 and float64 pick the same key
    output, wanted = attention(query, key, value, settings=PLANS[plan]), reference(query, key, value)
    assert (output.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_past_the_largest_half(dtype):
    """Dot products of 80,000, as SD 2.1's 768 model makes them, are past fp16's 65,504: black images elsewhere."""
    query, key, value = inputs((1, 2, 40, 70, 64), dtype, 1.0, 1)
    query[...], key[:, :, 11] = 35.0, 36.0
    for settings in PLANS.values():
        output = attention(query, key, value, settings=settings)
        torch.testing.assert_close(output, value[:, :, 11:12].expand_as(output))
    if pytorch_has(dtype):  # 2.1 has no half on the CPU, and ends the process where that is traced
        traced = torch.jit.trace(attention, (query, key, value), check_trace=False)  # PyTorch's operators, no plan
        torch.testing.assert_close(traced(query, key, value), output)
