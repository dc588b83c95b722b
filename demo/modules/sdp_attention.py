"""Forwards of ldm's attention layers on PyTorch's `scaled_dot_product_attention`."""

from __future__ import annotations

from modules import shared
from modules.hypernetworks import hypernetwork
from torch.nn.functional import scaled_dot_product_attention


def cross_attention_forward(self, x, context=None, mask=None, **kwargs):
    """For `CrossAttention`: x [B, N, C], context [B, M, C'], mask [B, M] (True = may attend)."""
    context_k, context_v = hypernetwork.apply_hypernetworks(
        shared.loaded_hypernetworks, x if context is None else context
    )
    q, k, v = (
        projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
        for projected in (self.to_q(x), self.to_k(context_k), self.to_v(context_v))
    )
    if mask is not None:
        mask = mask.flatten(1)[:, None, None, :]
    out_dtype = v.dtype
    if shared.opts.upcast_attn:
        q, k, v = q.float(), k.float(), v.float()
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.to_out(out.transpose(1, 2).flatten(2).to(out_dtype))


def attn_block_forward(self, x):
    """For the VAE's `AttnBlock`: x [B, C, H, W], one head of width C."""
    normed = self.norm(x)
    q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
    out = scaled_dot_product_attention(q, k, v)
    return x + self.proj_out(out[:, 0].transpose(1, 2).reshape(x.shape))
