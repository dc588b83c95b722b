"""Gradients that are recomputed chunk by chunk in the backward pass, by engines that PyTorch cannot differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import device as devices
from .engines import order
from .forward import attend_chunks
from .retry import Attempts, Chunks


class RecomputedAttention(torch.autograd.Function):
    """attention() with gradients in query, key, value and a floating-point mask."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        chunks: Chunks,
    ) -> Tensor:
        """The loop, without gradients; what it keeps for the backward pass is two numbers a row."""
        output, statistics = attend_chunks(query, key, value, mask, scale, chunks)
        ctx.save_for_backward(query, key, value, mask, output, statistics)
        ctx.scale = scale
        ctx.call = chunks.problem, chunks.plan, chunks.settings
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if torch.is_grad_enabled():  # once_differentiable would let them pass as constants where grad_output is one
            raise RuntimeError(
                "recomputed gradients cannot be differentiated again (create_graph=True); set checkpointing to 'never' "
                "and the memory limit so high that scores are kept"
            )
        attempts = Attempts(*ctx.call, backward=True)
        with devices.without_autocast(grad_output.device):
            while attempts.pending:
                with attempts.attempt():  # from the start: a chunk that failed may have added to grad_key already
                    gradients = order.named(attempts.plan.engine).gradients(
                        *ctx.saved_tensors, grad_output, ctx.scale, attempts.plan.sizes, ctx.needs_input_grad
                    )
        attempts.remember_refusals()
        return (*gradients, None, None)
