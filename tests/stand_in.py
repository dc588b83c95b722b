"""Devices that are none of the CPU's, in pure Python: what PyTorch knows of them is what it knows of any accelerator.

Tensors are on a device of their own and hold one of the CPU's, on which each operator that reaches the device is run:
all of them are seen. `privateuseone` is DirectML, which has no fused kernel and no float64. Under the name of `card` it
has a fused kernel, one of KERNELS: right, slow, or wrong in a way of its own.

A name, and what is registered for it, holds as long as the process: ask for a `device` only in one of its own, as
`pytest --device "wrong above 256 tokens"` does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

import lib_subquad

aten = torch.ops.aten
MATH_KERNEL, OWN_KERNEL = 0, 4  # torch.nn.attention.SDPBackend: MATH, OVERRIDEABLE
OUT_OF_MEMORY = "card: out of memory. Tried to allocate 1.50 GiB"
REFUSAL = "card error: invalid configuration argument"

_watching: list[list[str]] = []
_weighing: list[list[int]] = []


# --------------------------------------------------------------------------------------------------------- kernels


class Call(NamedTuple):
    """What a fused kernel is given, on the CPU: the mask is added to the scores, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    def scores(self) -> Tensor:
        scores = _wide(self.query) @ _wide(self.key).mT * self.scale
        return scores if self.mask is None else scores + self.mask


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def spoil(output: Tensor, call: Call) -> None:
    """Put what is wrong into `output`, and is far more than rounding of any dtype."""
    output += 0.25 * call.value.abs().amax()


class Right:
    """A kernel that is what it should be. Others are wrong in `attend`, which is given what is right."""

    def attend(self, call: Call, output: Tensor) -> None:
        pass


class Wrong(Right):
    def attend(self, call: Call, output: Tensor) -> None:
        spoil(output, call)


class WrongAbove256(Right):
    def attend(self, call: Call, output: Tensor) -> None:
        if max(call.query.shape[2], call.key.shape[2]) > 256:
            spoil(output, call)


class WrongForBatches(Right):
    """The first entry is right."""

    def attend(self, call: Call, output: Tensor) -> None:
        if len(output) > 1:
            spoil(output[1:], call)


class WrongForStrides(Right):
    """Where tokens lie before heads in memory, as a layer's projections leave them."""

    def attend(self, call: Call, output: Tensor) -> None:
        if any(it.shape[1] > 1 and it.shape[2] > 1 and it.stride(1) < it.stride(2) for it in call[:3]):
            spoil(output, call)


class WrongInTheLastTile(Right):
    """Rows beyond a multiple of 64."""

    def attend(self, call: Call, output: Tensor) -> None:
        whole = output.shape[2] // 64 * 64
        if whole < output.shape[2]:
            spoil(output[:, :, whole:], call)


class NotANumber(Right):
    def attend(self, call: Call, output: Tensor) -> None:
        output.fill_(torch.nan)


class Refuses(Right):
    def attend(self, call: Call, output: Tensor) -> None:
        raise RuntimeError(REFUSAL)


class RefusesEverySecond(Right):
    """In the middle of a call that takes several."""

    calls = 0

    def attend(self, call: Call, output: Tensor) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            raise RuntimeError(REFUSAL)


class Slow(Right):
    """Right in the end."""

    def attend(self, call: Call, output: Tensor) -> None:
        for _ in range(8):
            call.scores().softmax(-1) @ _wide(call.value)


class RunsOutOfMemoryOnce(Right):
    """For every size of keys; smaller chunks of queries then fit."""

    def __init__(self) -> None:
        self.known: set[torch.Size] = set()

    def attend(self, call: Call, output: Tensor) -> None:
        if call.key.shape not in self.known:
            self.known.add(call.key.shape)
            raise RuntimeError(OUT_OF_MEMORY)


KERNELS = {
    "right": Right,
    "slow": Slow,
    "wrong": Wrong,
    "wrong above 256 tokens": WrongAbove256,
    "wrong for batches above one": WrongForBatches,
    "wrong for tokens before heads": WrongForStrides,
    "wrong in the last tile": WrongInTheLastTile,
    "not a number": NotANumber,
    "refuses": Refuses,
    "refuses every second": RefusesEverySecond,
    "out of memory once": RunsOutOfMemoryOnce,
}
DIRECTML = "directml"
NAMES = (DIRECTML, *KERNELS)


# --------------------------------------------------------------------------------------------------------- devices


def why_not() -> str:
    """Why there are no such devices here, in words; empty where there are."""
    if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return ""
    return f"torch {torch.__version__}: a device in Python needs 2.13 or newer"


def device(name: str) -> torch.device:
    """The device of this name, of those in NAMES; nothing is known of it yet. A process has DirectML or the card,
    and the card the kernel that was asked for last.

    Raises:
        RuntimeError: the process has the other one.
    """
    global _card_kernel, _library
    kind = "privateuseone" if name == DIRECTML else "card"
    if not hasattr(torch, kind):
        # With a name, which may be its own: only then PyTorch computes gradients there.
        backend_registration._setup_privateuseone_for_python_backend(kind)
        _library = torch.library.Library("aten", "IMPL")  # what it registers goes with it
        for operator, function in PLAIN.items():
            _library.impl(operator, function, "PrivateUse1")
        _library.impl("scaled_dot_product_attention", _scaled_dot_product_attention, "AutogradPrivateUse1")
    _card_kernel = None if name == DIRECTML else KERNELS[name]()
    lib_subquad.forget()
    return torch.device(kind, 0)


_card_kernel: Right | None = None
_library: torch.library.Library | None = None


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The names of all operators that run on such a device meanwhile."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


@contextlib.contextmanager
def weighed() -> Iterator[list[int]]:
    """How many bytes each tensor takes that is made on such a device meanwhile; also what does not lie together, when
    it is copied from there: PyTorch puts it together on the device first."""
    made: list[int] = []
    _weighing.append(made)
    try:
        yield made
    finally:
        _weighing.remove(made)


def _weigh(operator: str, given: list[OnDevice], made: Any, device: torch.device) -> None:
    known = {it.inside.untyped_storage().data_ptr() for it in given}
    for it in tree_flatten(made)[0] if device.type != "cpu" else ():
        if isinstance(it, Tensor) and it.untyped_storage().data_ptr() not in known:
            _made(it.numel() * it.element_size())
    if operator == "_to_copy" and device.type == "cpu" and not given[0].is_contiguous():
        _made(given[0].numel() * given[0].element_size())


def _made(size: int) -> None:
    for sizes in _weighing:
        sizes.append(size)


class OnDevice(Tensor):
    """A tensor of a device, whose numbers are in `inside`."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor, device: torch.device) -> OnDevice:
        if inside.dtype == torch.float64 and device.type == "privateuseone":
            raise RuntimeError("The GPU device does not support Double (Float64) operations!")
        made = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=device,
        )
        made.inside = inside
        return made

    def __repr__(self) -> str:
        return f"{self.inside!r} on {self.device}"

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    # As plain tensors have none. Tensors of devices are of no class of their own.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operator.overloadpacket.__name__, dict(kwargs or {})
        for seen in _watching:
            seen.append(name)
        if name == "scaled_dot_product_attention":  # in inference mode, which knows nothing of what leads to it else
            return _scaled_dot_product_attention(*args, **kwargs)
        given = [it for it in tree_flatten((args, kwargs))[0] if isinstance(it, OnDevice)]
        device = torch.device(kwargs.get("device") or given[0].device)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        for it in given:
            _check_one_device(name, it, given[0])
        run = functools.partial(OWN[name], _card_kernel) if name in OWN else operator
        made = run(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if _weighing:
            _weigh(name, given, made, device)
        known = {id(it.inside): it for it in given}  # what is written in place stays the tensor that it is
        return tree_map(lambda it: _outside(it, device, known), made)


def _check_one_device(name: str, one: OnDevice, other: OnDevice) -> None:
    if one.device != other.device and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name}: expected all tensors on one device, but found {one.device} and {other.device}")


def _inside(it: Any) -> Any:
    return it.inside if isinstance(it, OnDevice) else it


def _outside(it: Any, device: torch.device, known: dict[int, OnDevice]) -> Any:
    if not isinstance(it, Tensor) or device.type == "cpu":
        return it
    return known[id(it)] if id(it) in known else OnDevice(it, device)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype), device)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype), device)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _inside(target).copy_(_inside(source))
    return target


# What PyTorch asks a device for where no tensor of it is given, or where it looks past the class of tensors: an index
# that is a list, for one.
PLAIN = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from}


# ------------------------------------------------------------------- attention, as PyTorch takes it to an accelerator


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Tensor:
    """What PyTorch does for a device whose kernel comes from elsewhere: it has no such path for one in Python."""
    given = query, key, value, attn_mask, dropout_p, is_causal
    if torch._fused_sdp_choice(*given, scale=scale, **more) == MATH_KERNEL:
        return aten._scaled_dot_product_attention_math(*given, scale=scale, **more)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), -torch.inf)
    own = aten._scaled_dot_product_fused_attention_overrideable
    return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _choice(kernel, query, key, value, mask=None, dropout_p=0.0, is_causal=False, **_) -> int:
    fits = query.dim() == 4 and not dropout_p and not is_causal and (mask is None or mask.stride(-1) == 1)
    return OWN_KERNEL if kernel and fits else MATH_KERNEL


def _forward(kernel, query, key, value, mask=None, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
    call = Call(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)
    scores = call.scores()
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    # As PyTorch's kernels do, with dimensions in the query's order in memory: tokens before heads, if it is so there.
    output = torch.empty_like(query[..., :1].expand(*query.shape[:3], value.shape[3]))
    output.copy_(weights @ _wide(value))
    kernel.attend(call, output)
    logsumexp = scores.logsumexp(-1).masked_fill(nothing[..., 0], torch.inf)
    no, seed = torch.empty(0), torch.zeros((), dtype=torch.int64)
    return output, logsumexp, no, no, query.shape[2], key.shape[2], seed, seed.clone(), no


def _backward(kernel, grad_output, query, key, value, mask, wanted, output, logsumexp, *_, scale=None):
    call = Call(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)
    weights = (call.scores() - logsumexp[..., None]).exp()
    grad_output, output = _wide(grad_output), _wide(output)
    grad_value = weights.mT @ grad_output
    grad_scores = weights * (grad_output @ _wide(value).mT - (grad_output * output).sum(-1, keepdim=True))
    grad_query, grad_key = grad_scores @ _wide(key) * call.scale, grad_scores.mT @ _wide(query) * call.scale
    grad_mask = grad_scores.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and wanted[3] else None
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_mask


OWN = {
    "_fused_sdp_choice": _choice,
    "_scaled_dot_product_fused_attention_overrideable": _forward,
    "_scaled_dot_product_fused_attention_overrideable_backward": _backward,
}
