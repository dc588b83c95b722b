"""A chunk that PyTorch can differentiate, without anything that PyTorch would keep for it.

Of each chunk PyTorch keeps the queries, keys, values, result and logsumexp, as they were when it ran; and where
`torch.utils.checkpoint` runs a block twice, it expects to keep the same again, whatever memory has done in between. So
the chunk's own node is made to look for these among what a call keeps, which is the same for every engine and all
sizes: query, key, value, mask, output and each row's statistics.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._python_dispatch
from torch import Tensor

from . import device as devices
from .engines.base import Engine, Kept, Sizes, attended
from .problem import Problem
from .tensors import rows_of

# What nodes of PyTorch's attention call the tensors that they keep. Beside them they keep the state of their dropout.
QUERY, KEY, VALUE, MASK, OUTPUT, STATISTICS = range(6)
PLACES = {
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
    "attn_mask": MASK,
    "attn_bias": MASK,
    "output": OUTPUT,
    "ouput": OUTPUT,  # torch 2.1
    "logsumexp": STATISTICS,
    "log_sumexp": STATISTICS,
}
NEEDED = {QUERY, KEY, VALUE, OUTPUT, STATISTICS}
Form = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype
SMALL = 64  # elements: the state of dropout has fewer


class Record(NamedTuple):
    """The graph of one chunk, whose queries are `rows` of the call's, from `exit` to `door`, which are single numbers:
    what it needs it takes from `stands`."""

    rows: slice
    door: Tensor
    exit: Tensor
    stands: _Stands

    def gradients(self, kept: Kept, grad_output: Tensor) -> tuple[Tensor, ...]:
        """Of the chunk's queries, and its part of those of all keys and values."""
        query, key, value, mask, output, statistics = kept
        mask = None if mask is None else rows_of(mask, self.rows)
        rows = (slice(None), slice(None), self.rows)
        self.stands.kept = Kept(query[rows], key, value, mask, output[rows], statistics[rows])
        self.stands.grad_output = grad_output[rows]
        try:
            torch.autograd.grad(self.exit, self.door, retain_graph=True, allow_unused=True)
            return tuple(self.stands.gradients[place] for place in (QUERY, KEY, VALUE))
        finally:
            self.stands.let_go()


def attend(
    engine: Engine,
    rows: slice,
    problem: Problem,
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None, Record | None]:
    """`engine.attend` of the queries in `rows` with its node: (chunk, statistics, record).

    The last two are None where PyTorch has put together the result from more than one operator of its own, or keeps
    what cannot be made of a call's tensors.
    """
    stands = _Stands()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(stands.stand_for, stands.tensor):
        door = torch.zeros((), device=query.device, requires_grad=True)
        query, key, value = (_Door.apply(door, it, stands, n) for n, it in enumerate((query, key, value)))
        chunk, _ = attended(engine, problem, sizes, query, key, value, mask, scale)
        with unseen_by_policies():
            logsumexp = stands.named(chunk.grad_fn, (query, key, value, mask, chunk, None))
        if logsumexp is None:
            return chunk.detach(), None, None
        exit = _Exit.apply(chunk, stands)
    chunk.detach_()
    with unseen_by_policies():
        statistics = _statistics(logsumexp, query.shape[2], mask is not None)
    return chunk, statistics, Record(rows, door, exit, stands)


class _Door(torch.autograd.Function):
    """The tensor itself, with a gradient wanted, and nothing behind it that keeps hold of it."""

    @staticmethod
    def forward(ctx: Any, door: Tensor, tensor: Tensor, stands: _Stands, place: int) -> Tensor:
        ctx.stands, ctx.place = stands, place
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None, None]:
        ctx.stands.gradients[ctx.place] = grad_output
        return None, None, None, None


class _Exit(torch.autograd.Function):
    """A number that stands for a chunk: the gradient of the chunk comes in here, whatever that of the number is."""

    @staticmethod
    def forward(ctx: Any, chunk: Tensor, stands: _Stands) -> Tensor:
        ctx.stands = stands
        return chunk.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.stands.grad_output, None


class _StandIn:
    """Stands for a tensor that a node wanted to keep: which one of a call's it is made of, and how it was laid out."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.place = -1
        self.form: Form = tensor.shape, tensor.stride(), tensor.dtype


class _Stands:
    """What a node wanted to keep; and while gradients are computed, what goes in and comes out.

    Knows nothing of the node itself, which nobody could ever free otherwise.
    """

    def __init__(self) -> None:
        self.all: list[_StandIn] = []
        self.asked_for: _StandIn | None = None
        self.let_go()

    def let_go(self) -> None:
        self.kept: Kept | None = None
        self.grad_output: Tensor | None = None
        self.gradients: dict[int, Tensor] = {}

    def stand_for(self, tensor: Tensor) -> _StandIn:
        self.all.append(_StandIn(tensor))
        return self.all[-1]

    def tensor(self, stands: _StandIn) -> Tensor:
        self.asked_for = stands
        if stands.tensor is not None:
            return stands.tensor
        source = None if self.kept is None else self.kept[stands.place]
        if source is None:
            raise LookupError("what is kept of a call is there only while its gradients are computed")
        return _laid_out(source, stands.place, stands.form)

    def named(self, node: torch.autograd.graph.Node | None, given: tuple[Tensor | None, ...]) -> Tensor | None:
        """The logsumexp, once it is known of every tensor what to make it of, and none is held any more; or None."""
        logsumexp: Tensor | None = None
        found: set[int] = set()
        if node is None:
            return None
        for name, place in PLACES.items():
            self.asked_for = None
            tensor = getattr(node, f"_saved_{name}", None)
            if self.asked_for is None or not isinstance(tensor, Tensor):
                continue
            if not _can_be_made(tensor, place, given, self.asked_for.form):
                return None
            self.asked_for.place = place
            found.add(place)
            logsumexp = tensor if place == STATISTICS else logsumexp
        known = [stands for stands in self.all if stands.place >= 0]
        others = [stands.tensor for stands in self.all if stands.place < 0 and stands.tensor is not None]
        if not found >= NEEDED or sum(tensor.numel() for tensor in others) > SMALL:
            return None
        for stands in known:
            stands.tensor = None
        return logsumexp


def _can_be_made(tensor: Tensor, place: int, given: tuple[Tensor | None, ...], form: Form) -> bool:
    """Whether this one, which a node keeps, comes of that one of the call's chunk.

    An engine, or what is in the place of PyTorch's function, may have changed it.
    """
    source = given[QUERY if place == STATISTICS else place]
    if source is None:
        return False
    if place == STATISTICS:
        batch, heads, queries, _ = source.shape
        return tensor.shape[:2] == (batch, heads) and tensor.dim() > 2 and queries <= tensor.shape[2:].numel()
    if (source.data_ptr(), source.shape, source.stride(), source.dtype) == (tensor.data_ptr(), *form):
        return True
    expands = place == MASK and tensor.dim() == 4 and all(mine in (1, its) for mine, its in zip(source.shape, form[0]))
    return (expands or tensor.shape == source.shape) and torch.equal(_laid_out(source, place, form), tensor)


def _laid_out(source: Tensor, place: int, form: Form) -> Tensor:
    """A tensor of a call's in the shape, strides and dtype that a kernel had it in."""
    shape, stride, dtype = form
    if place == STATISTICS:
        maximum, total = source.unbind(-1)
        source = maximum + total.log()
        rest = shape[2:].numel() - source.shape[2]  # rows that a kernel adds have no weights
        source = torch.nn.functional.pad(source, (0, rest), value=torch.inf).reshape(shape)
    elif place == MASK and source.dtype == torch.bool:
        source = torch.zeros_like(source, dtype=dtype).masked_fill_(source.logical_not(), -torch.inf)
    if source.shape == shape and source.stride() == stride and source.dtype == dtype:
        return source
    sizes = [1 if step == 0 else size for size, step in zip(shape, stride)]  # expanded, as a mask is
    made = torch.empty_strided(sizes, stride, dtype=dtype, device=source.device)
    for dim, size in enumerate(sizes):
        source = source.narrow(dim, 0, 1) if size == 1 else source
    return made.copy_(source).expand(shape)


def _statistics(logsumexp: Tensor, queries: int, masked: bool) -> Tensor:
    """Each row's "largest score" and sum of weights beside it: the logsumexp and one, or nothing."""
    logsumexp = logsumexp.flatten(2)[..., :queries]
    if not masked:
        return torch.stack((logsumexp, torch.ones_like(logsumexp)), dim=-1)
    some = logsumexp.isfinite()  # a row that may attend to nothing has a sum of zero
    return torch.stack((logsumexp.masked_fill(~some, 0.0), some.to(logsumexp.dtype)), dim=-1)


def is_watched() -> bool:
    """Whether somebody looks at what PyTorch keeps for a backward pass, as `torch.utils.checkpoint` does; where PyTorch
    does not tell, yes."""
    return hooks is None or hooks() is not None


def _hooks_of_pytorch() -> Callable[[], tuple[Any, Any] | None] | None:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private, and newer than torch 2.1
    return top and partial(top, True)


# The pair of functions that now has all that PyTorch keeps, or None; where it does not tell there is no function.
hooks = _hooks_of_pytorch()


def batch_level(tensor: Tensor) -> int | None:
    """At which level it stands for many, as gradients do in `torch.autograd.grad(..., is_grads_batched=True)`; None
    where it is one. Asks the tensor, for the thread of a backward pass does not know."""
    if _is_batched(tensor):
        return next(
            (level for level in range(1, 9) if not _is_batched(torch._remove_batch_dim(tensor, level, 1, 0))), None
        )
    return None


def _is_batched(tensor: Tensor) -> bool:
    return re.search(r"\bBatched\b", repr(torch._C._dispatch_keys(tensor))) is not None


def unseen_by_policies() -> contextlib.AbstractContextManager[object]:
    """Hides operators from what chooses which of them `torch.utils.checkpoint` keeps the results of, if it is at work:
    ours are written over."""
    if any(type(mode).__name__ in POLICIES for mode in _modes()):
        return devices.without_modes()
    return contextlib.nullcontext()


POLICIES = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
_modes = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", list)
