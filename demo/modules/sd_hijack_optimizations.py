"""The entries of *Cross attention optimization*: what one is, and the built-in ones."""

from __future__ import annotations

import ldm.modules.attention
import ldm.modules.diffusionmodules.model
import torch
from modules import sdp_attention
from modules.hypernetworks import hypernetwork

diffusionmodules_model_AttnBlock_forward = ldm.modules.diffusionmodules.model.AttnBlock.forward


class SdOptimization:
    """One way to compute attention. `title()` is what the settings keep, so it must never change."""

    name: str | None = None
    label: str | None = None
    cmd_opt: str | None = None
    priority: int = 0

    def title(self):
        return self.name if self.label is None else f"{self.name} - {self.label}"

    def is_available(self):
        return True

    def apply(self):
        pass

    def undo(self):
        ldm.modules.attention.CrossAttention.forward = hypernetwork.attention_CrossAttention_forward
        ldm.modules.diffusionmodules.model.AttnBlock.forward = diffusionmodules_model_AttnBlock_forward


class SdOptimizationSdp(SdOptimization):
    """PyTorch's fused attention: the yardstick."""

    name = "sdp"
    label = "scaled dot product"
    cmd_opt = "opt_sdp_attention"
    priority = 70

    def is_available(self):
        return hasattr(torch.nn.functional, "scaled_dot_product_attention")

    def apply(self):
        ldm.modules.attention.CrossAttention.forward = sdp_attention.cross_attention_forward
        ldm.modules.diffusionmodules.model.AttnBlock.forward = sdp_attention.attn_block_forward


def list_optimizers(res):
    """Append the built-in entries."""
    res.append(SdOptimizationSdp())
