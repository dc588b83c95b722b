"""Masks on their way into PyTorch's fused kernels: those of a GPU ask for more than the CPU's, which plays one here."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lib_subquad
from lib_subquad import Settings, attention
from lib_subquad import device as devices
from lib_subquad.engines import fused
from lib_subquad.problem import Problem

pytestmark = pytest.mark.skipif(
    not fused.MASKS_ARE_RIGHT or not hasattr(torch, "_fused_sdp_choice"), reason="no fused kernel takes masks here"
)

SHAPE = BATCH, HEADS, QUERIES, WIDTH = 2, 3, 64, 16
KEYS = 77
FLASH, EFFICIENT, CUDNN = 1, 2, 3  # torch.nn.attention.SDPBackend


class Gpu:
    """PyTorch's attention with the rules that a GPU's kernels have for masks; `masks` are those that it was given."""

    def __init__(self, kernel: int) -> None:
        self.kernel = kernel
        self.masks: list[torch.Tensor] = []
        self.steps = False  # whether it only makes the copies of the mask that PyTorch makes for the efficient kernel

    def choice(self, query, key, value, mask=None, *more, **named) -> int:
        if mask is not None and mask.stride(-1) != 1:  # check_last_dim_stride_equals_1_dense
            return fused.MATH_KERNEL
        if mask is not None and self.kernel == CUDNN:  # check_attn_mask_shape
            asked = (*query.shape[:-1], key.shape[-2])
            fits = mask.dim() in (2, 4) and all(one in (1, all_) for one, all_ in zip(mask.shape[::-1], asked[::-1]))
            return self.kernel if fits and not mask.requires_grad else EFFICIENT
        return self.kernel

    def attend(self, query, key, value, attn_mask=None, scale=None, **more):
        if not self.steps:
            self.masks.append(attn_mask)
        assert self.choice(query, key, value, attn_mask) != fused.MATH_KERNEL
        assert attn_mask.shape[-1] == key.shape[-2], "(*bias): last dimension must be contiguous"
        if self.kernel == CUDNN:
            return self._cudnn(query, key, value, attn_mask, scale)
        if self.steps:
            if attn_mask.dtype == torch.bool:
                closed = attn_mask.logical_not()
                attn_mask = torch.where(closed, -torch.inf, torch.zeros((), dtype=query.dtype))
                del closed
            keys = attn_mask.shape[-1]
            if keys % 8:
                attn_mask = F.pad(attn_mask, (0, -keys % 8))[..., :keys]
            return torch.zeros_like(query)
        return OWN(query, key, value, attn_mask=attn_mask, scale=scale)

    def _cudnn(self, query, key, value, mask, scale):
        """Rows of nothing attend to all keys alike, or are NaN: so are then all gradients."""
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -65504.0)
        return (query @ key.mT * scale + mask).softmax(-1) @ value


OWN = F.scaled_dot_product_attention


@pytest.fixture
def gpu(monkeypatch):
    """gpu(kernel): the CPU passes for a CUDA device on which PyTorch takes that kernel."""

    def become(kernel: int) -> Gpu:
        playing = Gpu(kernel)
        monkeypatch.setattr(devices, "kind", lambda device: "cuda")
        monkeypatch.setattr(torch, "_fused_sdp_choice", playing.choice)
        monkeypatch.setattr(F, "scaled_dot_product_attention", playing.attend)
        monkeypatch.setattr(fused.pytorch, "OWN", playing.attend)
        lib_subquad.forget()
        fused._kernel_reasons.cache_clear()
        return playing

    yield become
    fused._kernel_reasons.cache_clear()


def tensors(grad=False):
    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, HEADS, tokens, WIDTH) for tokens in (QUERIES, KEYS, KEYS))
    return [tensor.requires_grad_(grad) for tensor in (query, key, value)]


def random_mask(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.4


LAYOUTS = {
    "[1, 1, queries, keys]": random_mask(1, 1, QUERIES, KEYS),
    "[queries, keys]": random_mask(QUERIES, KEYS),
    "[batch, 1, 1, keys]": random_mask(BATCH, 1, 1, KEYS),
    "[batch, 1, 1, keys] expanded": random_mask(BATCH, 1, 1, KEYS).expand(BATCH, HEADS, QUERIES, KEYS),
    "[1, 1, queries, 1]": random_mask(1, 1, QUERIES, 1),
    "[1, 1, queries, 1] expanded": random_mask(1, 1, QUERIES, 1).expand(BATCH, 1, QUERIES, KEYS),
    "one for all": torch.ones((), dtype=torch.bool).expand(1, 1, QUERIES, KEYS),
    "transposed": random_mask(1, 1, KEYS, QUERIES).mT,
    "every other key": random_mask(1, HEADS, QUERIES, 2 * KEYS)[..., ::2],
    "all": random_mask(BATCH, HEADS, QUERIES, KEYS),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("query_chunk", [0, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [EFFICIENT, CUDNN])
def test_whatever_its_layout_the_kernel_takes_it(gpu, reference, kernel, layout, query_chunk, dtype):
    """And the plan, which does not know it, has asked for what is then passed."""
    mask = LAYOUTS[layout]
    if dtype != torch.bool:
        scores = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
        mask = scores.as_strided(mask.shape, mask.stride()) if 0 in mask.stride() else scores
    expected = reference(*tensors(), mask)
    playing, plans = gpu(kernel), []
    output = attention(*tensors(), mask=mask, settings=Settings(query_chunk=query_chunk), report=plans.append)
    assert plans[0].engine == "fused" and playing.masks
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [1, KEYS])
def test_a_mask_with_one_key_or_for_one_key(gpu, reference, keys):
    query, key, value = tensors()
    key, value = key[:, :, :keys], value[:, :, :keys]
    mask = random_mask(1, 1, 1, 1).expand(1, 1, QUERIES, 1)
    expected = reference(query, key, value, mask)
    gpu(EFFICIENT)
    plans = []
    output = attention(query, key, value, mask=mask, report=plans.append)
    assert plans[0].engine == "fused"
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.usefixtures("trusted")  # its calls are counted
def test_what_is_expanded_is_not_computed_with_in_full(gpu, monkeypatch, kind):
    """PyTorch makes scores of all of a bool mask: of this one 2 x 3 x 64 times what there is."""
    playing = gpu(EFFICIENT)
    monkeypatch.setattr(devices, "kind", lambda device: kind)
    attention(*tensors(), mask=random_mask(1, 1, 1, KEYS).expand(BATCH, HEADS, QUERIES, KEYS))
    assert [mask.shape for mask in playing.masks] == [(1, 1, 1, KEYS)]


@pytest.mark.usefixtures("trusted")  # its calls are counted
def test_a_mask_that_wants_a_gradient_where_none_is_recorded(monkeypatch):
    """PyTorch looks at the mask alone and takes the kernel that keeps all scores, on the CPU too."""
    taken = []
    own = F.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **more):
        taken.append(torch._fused_sdp_choice(query, key, value, attn_mask, 0.0, False, scale=1.0))
        return own(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with torch.no_grad():
        attention(*tensors(), mask=torch.zeros(1, 1, QUERIES, KEYS, requires_grad=True))
    assert taken == [FLASH]


# --------------------------------------------------------------------------------- rows that may attend to nothing


def closed(dtype):
    mask = random_mask(1, 1, QUERIES, KEYS)
    mask[..., 5:50, :] = False
    return mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("query_chunk", [0, 40])
@pytest.mark.parametrize("way", ["without gradients", "with them", "in a checkpoint", "twice over"])
def test_rows_of_nothing_are_zeros_with_cudnn(gpu, reference, way, query_chunk, dtype):
    """And their gradients, and no others."""
    mask = closed(dtype)
    expected = tensors(grad=True)
    (output := reference(*expected, mask)).square().sum().backward()
    gpu(CUDNN)
    plans = []

    def call(query, key, value):
        return attention(query, key, value, mask=mask, settings=Settings(query_chunk=query_chunk), report=plans.append)

    given = tensors(grad=True)
    with torch.no_grad() if way == "without gradients" else contextlib.nullcontext():
        found = checkpoint(call, *given, use_reentrant=False) if way == "in a checkpoint" else call(*given)
    torch.testing.assert_close(found, output.float(), atol=1e-5, rtol=0)
    assert found[:, :, 5:50].count_nonzero() == 0 and plans[0].engine == "fused"
    if way == "without gradients":
        return
    gradients = torch.autograd.grad(found.square().sum(), given, create_graph=way == "twice over")
    for one, other in zip(gradients, expected):
        torch.testing.assert_close(one, other.grad, atol=1e-4, rtol=1e-4)
    if way == "twice over":
        again = torch.autograd.grad(sum(one.square().sum() for one in gradients), given)
        assert all(one.isfinite().all() for one in again)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (KEYS,), (QUERIES, KEYS), (QUERIES, 1), (1, 1, QUERIES, KEYS)], ids=str)
def test_traced_too(gpu, reference, shape, dtype):
    mask = random_mask(*shape) if shape else torch.ones((), dtype=torch.bool)
    mask = mask if dtype == torch.bool else torch.zeros(shape).masked_fill(~mask, -torch.inf)
    expected = reference(*tensors(), mask)
    gpu(CUDNN)
    output = fused.attend_traced(*tensors(), mask, WIDTH**-0.5)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=0)


def test_a_torch_that_does_not_tell_which_kernel_it_takes(gpu, monkeypatch):
    gpu(CUDNN)
    mask = closed(torch.bool)
    attention(*tensors(), mask=mask)  # planned
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert attention(*tensors(), mask=mask)[:, :, 5:50].count_nonzero() == 0


# ----------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [1024, 1001])
@pytest.mark.parametrize("rows", ["all", 1])
@pytest.mark.parametrize("last", ["keys", 1])
@pytest.mark.parametrize("query_chunk", [0, 300])
@pytest.mark.usefixtures("trusted")  # zeros are no result
def test_the_copies_of_a_mask_are_within_the_plan(gpu, monkeypatch, peak_bytes, dtype, keys, rows, last, query_chunk):
    """Those that PyTorch makes for the kernel as well."""
    query, key, value = (torch.randn(2, 1, tokens, 16) for tokens in (1024, keys, keys))
    mask = random_mask(2, 1, 1024 if rows == "all" else 1, keys if last == "keys" else 1)
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype)
    playing, plans = gpu(EFFICIENT), []
    playing.steps = True
    monkeypatch.setattr(fused, "_cpu_kernel_bytes", lambda problem, queries: 0)
    peak = peak_bytes(
        lambda: attention(query, key, value, mask=mask, settings=Settings(query_chunk=query_chunk), report=plans.append)
    )
    assert plans[0].engine == "fused"
    measured = peak - Problem.of(query, key, value).output_bytes
    copy = mask.expand(*mask.shape[:-1], keys).numel() * (1 if dtype == torch.bool else 4)  # its layout may need one
    assert measured - 64 <= plans[0].workspace_bytes <= 1.5 * measured + copy + (1 << 16), (measured, plans[0])


@pytest.mark.parametrize("shape", [(1, 11), (11, 1), (3, 11), (11, 7)], ids=str)
@pytest.mark.parametrize("mask", [None, (1, 1), "all"], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_no_more_entries_or_heads_than_the_kernel_takes(monkeypatch, gpu, reference, shape, mask, grad):
    """Entries are counted in thousands by motion modules, each of a few tokens."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, tokens, WIDTH, requires_grad=grad) for tokens in (QUERIES, KEYS, KEYS)]
    if mask is not None:
        mask = random_mask(*(shape if mask == "all" else mask), QUERIES, KEYS)
    expected = reference(*inputs, mask)
    gpu(EFFICIENT)
    monkeypatch.setattr(fused.pytorch, "call", lambda *tensors, **more: at_most_4(*tensors, **more))
    monkeypatch.setitem(devices.RULES, "cuda", dataclasses.replace(devices.RULES["cuda"], most_entries=4))
    plans = []
    output = attention(*inputs, mask=mask, report=plans.append)
    assert plans[0].engine == "fused"
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=0)
    if grad:
        for one, other in zip(torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(one, other.float(), atol=1e-4, rtol=0)


def at_most_4(query, key, value, attn_mask, scale):
    assert max(query.shape[:2]) <= 4
    return OWN(query, key, value, attn_mask=attn_mask, scale=scale)


@pytest.mark.parametrize("engine", ["automatic", "portable"])
def test_the_plan_of_an_expanded_mask_is_that_of_what_it_holds(gpu, engine):
    gpu(EFFICIENT)
    plans = []
    for mask in (random_mask(BATCH, 1, 1, KEYS), random_mask(BATCH, 1, 1, KEYS).expand(BATCH, HEADS, QUERIES, KEYS)):
        attention(*tensors(), mask=mask, settings=Settings(engine=engine), report=plans.append)
    assert plans[0] == plans[1]
