"""Hypernetworks: small networks between the context and its keys and values."""

from __future__ import annotations

import ldm.modules.attention

# captured on import, before any optimizer has replaced it
attention_CrossAttention_forward = ldm.modules.attention.CrossAttention.forward


def apply_hypernetworks(hypernetworks, context, layer=None):
    """The context for the keys and the one for the values, after every hypernetwork that fits its width."""
    context_k = context_v = context
    for hypernetwork in hypernetworks:
        layers = hypernetwork.layers.get(context_k.shape[2])
        if layers is None:
            continue
        if layer is not None:
            layer.hyper_k, layer.hyper_v = layers
        context_k, context_v = layers[0](context_k), layers[1](context_v)
    return context_k, context_v
