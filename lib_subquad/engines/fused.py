"""PyTorch's own fused attention, the public `scaled_dot_product_attention`, on query chunks with all keys.

Keys are never split here: a fused kernel holds no scores, so that a split saves no memory, and putting together parts
that were rounded to half costs up to 19 times the error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from .. import memory
from ..problem import Problem, item_bytes
from ..settings import Settings
from ..tensors import as_small_as_it_is
from . import pytorch, whole
from .base import Sizes, call_bytes
from .masks import opened, rows_of_nothing, would_be_rounded
from .whole import kept_bytes as kept_bytes
from .whole import least_bytes as least_bytes
from .whole import rows_at_once as rows_at_once
from .whole import smaller as smaller
from .whole import taking_over as taking_over

NAME = "fused"
EXACT = True
SPLITS_KEYS = False
DIFFERENTIABLE = True
WHY = "PyTorch has a fused kernel for these sizes"

TOO_LARGE = "even the smallest chunks exceed the largest tensor this device can hold"

# torch.nn.attention.SDPBackend
MATH_KERNEL = 0  # keeps all scores in memory
CUDNN_KERNEL = 3
MASK_ALIGNMENT = 8  # PyTorch copies a mask into rows of a multiple of this: preprocess_mask() of its attention.cpp
# What PyTorch's CPU kernel allocates a thread: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
CPU_QUERY_SPLIT = 256
CPU_KEY_SPLIT = 512


def why_not(problem: Problem) -> list[str]:
    return why_no_kernel(problem) or _why_not_this_one(problem)


def why_no_kernel(problem: Problem) -> list[str]:
    """Every reason that holds for all fused kernels of PyTorch's, whichever of them it would take."""
    no_fused = _no_fused(problem.device)
    reasons = [*no_fused, *_never(problem.mask is not None)]
    if no_fused or not TAKES_SCALE:
        return reasons
    if problem.mask_grad:
        reasons.append("the mask needs a gradient, which no fused kernel gives")
    if not problem.batch * problem.heads:  # on torch 2.11 the CPU's kernel divides by their number: SIGFPE
        reasons.append("there are no heads")
    if would_be_rounded(problem.mask_dtype, problem.upcast_dtype):
        reasons.append(f"the mask's {str(problem.mask_dtype).removeprefix('torch.')} would be rounded for the kernel")
    if _too_large(problem, min(problem.queries, whole.SMALLEST_QUERY_CHUNK)):
        reasons.append(f"{TOO_LARGE} in the fused kernel")
    return reasons


def _why_not_this_one(problem: Problem) -> list[str]:
    if widths := devices.fused_widths(problem.device):
        return _by_rule(problem, widths)
    try:
        return list(_kernel_reasons(problem, devices.switches()))
    except Exception as error:  # a private operator: whatever it says, the portable engine can go on
        if devices.is_out_of_memory(error):
            memory.forget()  # so that it is asked again at the next call
        return [f"PyTorch does not say whether it has a fused kernel ({type(error).__name__})"]


def _by_rule(problem: Problem, widths: tuple[int, ...]) -> list[str]:
    fits = problem.width == problem.value_width and problem.width in widths
    reasons = [] if fits else [_no_kernel_for(problem)]
    if problem.grad and not devices.rules(problem.device).fused_gradients:
        reasons.append(f"PyTorch's fused kernel on {problem.device.type} gives no gradients")
    return reasons


def why_not_traced(device: torch.device, mask: Tensor | None) -> list[str]:
    no_fused = devices.rules(device).no_fused  # with widths that are not known here it may hold
    return [*([no_fused] if no_fused else []), *_never(mask is not None)]


def _no_fused(device: torch.device) -> list[str]:
    no_fused = devices.rules(device).no_fused
    return [no_fused] if no_fused and not devices.fused_widths(device) else []


def _never(masked: bool) -> list[str]:
    """Why this PyTorch does not do it, whatever the sizes."""
    reasons = []
    if not TAKES_SCALE:
        reasons.append(f"torch {torch.__version__}: scaled_dot_product_attention has no scale argument before 2.1")
    if masked and not MASKS_ARE_RIGHT:
        reasons.append(f"torch {torch.__version__}: rows that may attend to nothing would be NaN")
    return reasons


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    return whole.fitting(bounded(workspace_bytes, _too_large), problem, settings, limit)


def bounded(
    workspace_bytes: Callable[[Problem, Sizes], int], too_large: Callable[[Problem, int], bool]
) -> Callable[[Problem, Sizes], float]:
    """The same workspace, but more than any limit where so many queries at a time make too large a tensor."""
    return lambda problem, sizes: math.inf if too_large(problem, sizes.queries) else workspace_bytes(problem, sizes)


def _too_large(problem: Problem, queries: int) -> bool:
    """Whether one of the tensors that a call makes is larger than the device can hold."""
    rules, heads = devices.rules(problem.device), problem.batch * problem.heads
    rows = [queries * problem.width, queries * problem.value_width]
    if rules.contiguous:
        rows += [problem.keys * problem.width, problem.keys * problem.value_width]
    sizes = [heads * numbers for numbers in rows]
    if problem.mask is not None:
        batch, mask_heads, mask_rows, keys = _mask_sizes(problem, problem.mask)
        sizes.append(batch * mask_heads * min(mask_rows, queries) * keys)
    return too_large(problem, max(sizes))


def too_large(problem: Problem, numbers: int) -> bool:
    """Whether a tensor of so many numbers is larger than the problem's device can hold."""
    rules = devices.rules(problem.device)
    most = min(rules.largest_elements or math.inf, (rules.largest_bytes or math.inf) / item_bytes(problem.upcast_dtype))
    return numbers > most


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    total = call_bytes(problem, sizes.queries, lambda queries: attend_bytes(problem, queries))
    return total + kept_for_gradients(problem)


def kept_for_gradients(problem: Problem) -> int:
    """In a block that is run twice two numbers a row are kept, and made of a third."""
    rows = problem.batch * problem.heads * problem.queries
    return 3 * rows * item_bytes(devices.compute_dtype(problem.dtype)) if problem.grad else 0


def attend_bytes(problem: Problem, queries: int, ours: tuple[bool, bool] = (False, False)) -> int:
    """What attending so many queries holds, its result included. `ours`: whether query and key, and whether value, are
    copies of ours, which lie as kernels want them."""
    item = item_bytes(problem.upcast_dtype)
    heads = problem.batch * problem.heads
    contiguous = devices.rules(problem.device).contiguous
    queries = max(queries, devices.rules(problem.device).fewest_queries)
    cast = 0
    if problem.dtype != problem.upcast_dtype or contiguous and not ours[0]:
        cast += heads * (queries + problem.keys) * problem.width * item
    if problem.value_dtype != problem.upcast_dtype or contiguous and not ours[1]:
        cast += heads * problem.keys * problem.value_width * item
    mask = _mask_bytes(problem, queries)
    kernel = heads * queries * max(item, 4)  # the logsumexp
    if problem.device.type == "cpu":
        kernel += _cpu_kernel_bytes(problem, queries)
    widest = devices.rules(problem.device).widest_in_registers
    if widest is not None and problem.value_width > widest and item == 2:
        kernel += heads * queries * problem.value_width * 4
    result = heads * queries * problem.value_width
    after = result * item_bytes(problem.value_dtype) if problem.value_dtype != problem.upcast_dtype else 0
    if _may_open(problem):
        after = max(after, result * item)  # without the rows of nothing
    if max(problem.batch, problem.heads) > (devices.rules(problem.device).most_entries or math.inf):
        after = max(after, result * item)  # put together from parts
    return cast + mask.ours + max(mask.making, result * item + max(mask.kernels + kernel, after))


class _MaskBytes(NamedTuple):
    """What a mask takes: copies that are held to the end; what PyTorch holds while it makes its own, and then."""

    ours: int = 0
    making: int = 0
    kernels: int = 0


def _mask_bytes(problem: Problem, queries: int) -> _MaskBytes:
    if problem.mask is None:
        return _MaskBytes()
    batch, heads, rows, keys = _mask_sizes(problem, problem.mask)
    rows = batch * heads * min(rows, queries)
    item, copy = item_bytes(problem.upcast_dtype), rows * keys * item_bytes(_mask_dtype(problem))
    in_rows, is_bool = devices.rules(problem.device).masks_in_rows, problem.mask_dtype == torch.bool
    scores = rows * keys * item if is_bool else 0  # PyTorch itself makes scores of it, and lets go of them at its end
    if not in_rows:
        return _MaskBytes(copy if _mask_dtype(problem) != problem.mask_dtype else 0, 0, scores)
    ours = copy * (2 if _may_open(problem) else 1)
    padded = rows * (keys + -keys % MASK_ALIGNMENT) * item if keys % MASK_ALIGNMENT else 0
    return _MaskBytes(ours, scores + max(padded, rows * keys if is_bool else 0), max(scores, padded))


def _may_open(problem: Problem) -> bool:
    """Whether rows of nothing are opened for the kernel, so that its gradients are numbers."""
    return problem.mask is not None and problem.grad and devices.rules(problem.device).cudnn


def _mask_sizes(problem: Problem, mask: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Those in which a kernel gets it."""
    return (*mask[:3], problem.keys) if devices.rules(problem.device).masks_in_rows else mask


def _mask_dtype(problem: Problem) -> torch.dtype:
    return torch.bool if problem.mask_dtype == torch.bool else problem.upcast_dtype


def _cpu_kernel_bytes(problem: Problem, queries: int) -> int:
    split = CPU_QUERY_SPLIT if queries >= 768 else 64 if queries >= 192 else 32
    keys = min(CPU_KEY_SPLIT, problem.keys)
    item = item_bytes(problem.upcast_dtype)
    thread = split * (keys + problem.value_width + 2) * max(item, 4)
    if item == 2:
        thread += split * keys * 2  # weights rounded to half
    return torch.get_num_threads() * thread


def attend(
    problem: Problem, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    rules, rows = devices.rules(problem.device), query.shape[2]
    query, key, value = [
        _as_kernels_want(tensor, problem.upcast_dtype, rules.contiguous) for tensor in (query, key, value)
    ]
    if 1 in query.stride()[:-1]:
        # The output's dimensions are ordered as the query's strides are, and the CPU's kernel of torch 2.13 writes
        # in the wrong places where heads or tokens are as close together as channels: overlapping tensors.
        query = query.contiguous()
    nothing = None
    if mask is not None:
        mask = _mask_as_kernels_want(problem, mask)
        if rules.cudnn and _takes_cudnn(query, key, value, mask):
            nothing = rows_of_nothing(mask)
            mask = opened(mask, nothing) if problem.grad else mask
    if few := rows < rules.fewest_queries:
        more = (0, 0, 0, rules.fewest_queries - rows)
        query, mask = F.pad(query, more), F.pad(mask, more) if mask is not None and mask.shape[2] > 1 else mask
    output = _in_parts(query, key, value, mask, scale, rules.most_entries)
    output = output[:, :, :rows] if few else output
    if nothing is not None:
        output = output.masked_fill(nothing, 0.0) if problem.grad else output.masked_fill_(nothing, 0.0)
    return output.to(problem.value_dtype), None


def _in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, most: int | None) -> Tensor:
    """The kernel's result, in calls of no more batch entries and heads than it takes."""
    if most is None or max(query.shape[:2]) <= most:
        return pytorch.call(query, key, value, attn_mask=mask, scale=scale)
    dim, parts = 0 if query.shape[0] > most else 1, []
    for start in range(0, query.shape[dim], most):
        length = min(most, query.shape[dim] - start)
        some, keys, values = (tensor.narrow(dim, start, length) for tensor in (query, key, value))
        its_mask = mask.narrow(dim, start, length) if mask is not None and mask.shape[dim] > 1 else mask
        parts.append(_in_parts(some, keys, values, its_mask, scale, most))
    return torch.cat(parts, dim)


def attend_traced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    rules = devices.rules(query.device)
    if _makes_nan(query.dtype, query.device):
        query, key, value = query.float(), key.float(), value.float()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    if mask is not None and rules.masks_in_rows:
        mask = mask[None] if mask.dim() == 1 else mask  # the question about cuDNN's kernel fails of one dimension
        if mask.dim() == 0 or mask.shape[-1] != key.shape[-2]:
            mask = mask.expand(*(mask.shape[:-1] or (1,)), key.shape[-2]).contiguous()
    if mask is None or not rules.cudnn:
        return pytorch.OWN(query, key, value, attn_mask=mask, scale=scale)
    nothing = rows_of_nothing(mask)
    output = pytorch.OWN(query, key, value, attn_mask=opened(mask, nothing), scale=scale)
    return output.masked_fill(nothing, 0.0)


def _makes_nan(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.float16 and device.type == "cpu" and not HALF_SCORES_ARE_RIGHT


def _as_kernels_want(tensor: Tensor, dtype: torch.dtype, contiguous: bool) -> Tensor:
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 and not contiguous else tensor.contiguous()


def _mask_as_kernels_want(problem: Problem, mask: Tensor) -> Tensor:
    """The mask as the kernel was asked for: one that wants a gradient, even where none is recorded, has none, nor has
    one whose keys are not side by side. What is expanded is made small again: PyTorch computes with all of it."""
    mask = as_small_as_it_is(mask.detach())
    dtype = _mask_dtype(problem)
    if not devices.rules(problem.device).masks_in_rows:
        return mask.to(dtype)
    if mask.stride(-1) == 1 and mask.shape[-1] == problem.keys and mask.dtype == dtype:
        return mask
    return mask.new_empty((*mask.shape[:-1], problem.keys), dtype=dtype).copy_(mask)


def _takes_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    try:
        return choice(query, key, value, mask) == CUDNN_KERNEL
    except Exception:  # private: where it does not say, what is right for that kernel is right for all
        return True


def _takes_scale() -> bool:
    token = torch.zeros(1, 1, 1, 8, dtype=torch.float32, device="cpu")  # the defaults may have no numbers, no kernel
    try:
        F.scaled_dot_product_attention(token, token, token, scale=1.0)
    except (AttributeError, TypeError):
        return False
    return True


def _masks_are_right() -> bool:
    """Whether a row that may attend to nothing comes out as zeros: NaN on torch 2.1.2, zeros on 2.13."""
    token = torch.zeros(1, 1, 1, 8, dtype=torch.float32, device="cpu")
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="cpu")
    return not F.scaled_dot_product_attention(token, token, token, attn_mask=nothing).isnan().any()


@lru_cache(maxsize=1024)
def _kernel_reasons(problem: Problem, switches: tuple[bool, ...]) -> tuple[str, ...]:
    """Ask PyTorch which kernel it would run for tensors of these sizes; *math* means that none is fused.

    An exception, such as an out-of-memory, is no answer to remember.
    """
    return () if asked(problem, choice) != MATH_KERNEL else (_no_kernel_for(problem),)


def choice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> int:
    return torch._fused_sdp_choice(query, key, value, mask, 0.0, False, scale=1.0)


def _no_kernel_for(problem: Problem) -> str:
    sizes = f"{str(problem.upcast_dtype).removeprefix('torch.')}, heads {problem.width} wide"
    if problem.width != problem.value_width:
        sizes += f" with values {problem.value_width} wide"
    return f"PyTorch has no fused kernel on {problem.device.type} for {sizes}{_conditions(problem)}"


Answer = TypeVar("Answer")


def asked(problem: Problem, question: Callable[[Tensor, Tensor, Tensor, Tensor | None], Answer]) -> Answer:
    """What PyTorch answers to a question about query, key, value and mask of these sizes, and of next to no memory.

    Asked of tensors with numbers: of those which PyTorch makes while a mode of its own is on, no answer holds later.
    (On torch 2.0 one that is asked for under a trace does.)
    """
    made_here = torch.zeros(0, device="cpu")
    with contextlib.nullcontext() if type(made_here) is Tensor else devices.without_modes():
        query, key = (_probe(problem, tokens, problem.width) for tokens in (problem.queries, problem.keys))
        value = _probe(problem, problem.keys, problem.value_width)
        mask = None
        if problem.mask is not None:
            sizes = _mask_sizes(problem, problem.mask)
            row = torch.zeros(sizes[-1], dtype=_mask_dtype(problem), device=problem.device)
            mask = row.as_strided(sizes, (0, 0, 0, 1))
        return question(query, key, value, mask)


def _conditions(problem: Problem) -> str:
    words = ""
    if problem.mask is not None:
        words += ", with a mask"
    if problem.grad:
        words += ", with gradients"
    if problem.device.type == "cuda" and devices.are_fused_kernels_off():
        words += " (its fused kernels are switched off)"
    return words


def _probe(problem: Problem, tokens: int, width: int) -> Tensor:
    """A tensor of the problem's sizes and unit last stride, on storage for one token."""
    token = torch.zeros(width, dtype=problem.upcast_dtype, device=problem.device)
    sizes = (problem.batch, problem.heads, tokens, width)
    return token.as_strided(sizes, (0, 0, 0, 1)).requires_grad_(problem.grad)


# Asked when this is loaded: later it may be asked under a trace, whose tensors have no numbers.
TAKES_SCALE = _takes_scale()
MASKS_ARE_RIGHT = TAKES_SCALE and _masks_are_right()
# Scores past the largest float16 are NaN on the CPU of torch 2.4.1, right on 2.13. Whoever plans compares a small call
# (`trust`); a trace can not, and asking here would start PyTorch's threads in a process that may fork.
HALF_SCORES_ARE_RIGHT = devices.is_as_new(str(torch.__version__), "2.13")
