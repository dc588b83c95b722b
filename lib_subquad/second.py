"""Second derivatives, from all scores: PyTorch's fused kernels have none, and recomputed gradients no graph.

Nothing is made for them before somebody differentiates a gradient (create_graph=True).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import device as devices
from . import recorded
from .engines import order

# Private: the node whose hooks run. Where it is missing, second derivatives are PyTorch's, which are none.
_running_node = getattr(torch._C, "_current_autograd_node", lambda: None)
KERNEL = "ScaledDotProduct"  # what the names of their nodes begin with
PUT_TOGETHER = "Cat"  # likewise where a kernel was called for some heads at a time
NEAR = 6  # nodes from a result, which may have been cut or cast, to the kernel's


class Gradients(torch.autograd.Function):
    """`first(grad_output)`, the gradients of query, key, value and mask, as a node of their own, where they may be
    differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        grad_output: Tensor,
        scale: float,
        first: Callable[[Tensor], list[Tensor | None]],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(query, key, value, mask, grad_output)
        ctx.scale = scale
        return tuple(first(grad_output))

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """From all scores, which are made and kept here: there is no other way."""
        needed = ctx.needs_input_grad[:5]
        again = torch.is_grad_enabled()
        with torch.enable_grad(), devices.without_autocast(ctx.saved_tensors[-1].device):
            # Views, so that the gradients of these stay apart from those of whatever grad_output was made of.
            given: list[Any] = [None if it is None else it.view_as(it) for it in ctx.saved_tensors]
            inputs = [it for it, wanted in zip(given, needed) if wanted]
            pairs = [(it, grad) for it, grad in zip(given, grad_gradients) if grad is not None]
            query, key, value, mask, grad_output = given
            output = order.engines()[-1].attend_traced(query, key, value, mask, ctx.scale)
            first = torch.autograd.grad(output, [it for it, _ in pairs], grad_output, create_graph=True)
            second = torch.autograd.grad(
                first, inputs, [grad for _, grad in pairs], create_graph=again, allow_unused=True
            )
        found = iter(second)
        return (*(next(found) if wanted else None for wanted in needed), None, None)


def enable(chunk: Tensor) -> None:
    """Give the kernel of PyTorch's that `chunk` comes from, or those of its parts, a second derivative."""
    nodes = [chunk.grad_fn]
    for _ in range(NEAR):
        before = []
        for node in nodes:
            if node is None:
                continue
            if node.name().startswith(KERNEL):
                node.register_hook(_differentiable)
            else:
                several = node.name().startswith(PUT_TOGETHER)
                before += [it for it, _ in node.next_functions[: None if several else 1]]
        nodes = before


def _differentiable(
    grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """A kernel's gradients with a graph behind them, where one is wanted; else, and where it does more than attend,
    they stay as they are. Takes all from the node: what a hook holds would be held for as long as the node."""
    node = _running_node() if torch.is_grad_enabled() else None
    grad_output = grad_outputs[0]  # None where what came after it has no gradient
    if node is None or grad_output is None or _does_more(node) or recorded.batch_level(grad_output):
        return None
    masks = (getattr(node, f"_saved_{name}", None) for name in ("attn_mask", "attn_bias"))
    mask = next((it for it in masks if it is not None), None)
    query, scale = node._saved_query, node._saved_scale
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = [None if it is None else it.detach() for it in grad_inputs[:3]]
    given = query, node._saved_key, node._saved_value, mask, grad_output
    gradients = Gradients.apply(*given, scale, lambda _: [*found, None])
    return (*gradients[:3], *grad_inputs[3:])


def _does_more(node: Any) -> bool:
    """Than attend with these tensors and this scale; or does not tell."""
    told = all(hasattr(node, f"_saved_{name}") for name in ("query", "key", "value", "scale"))
    return not told or bool(getattr(node, "_saved_dropout_p", 0) or getattr(node, "_saved_is_causal", False))
