"""The entry under Settings -> Optimizations -> Cross attention optimization."""

from __future__ import annotations

import importlib

from modules import sd_hijack, sd_hijack_optimizations, shared
from modules.hypernetworks import hypernetwork

from .. import layers
from . import options, status
from .hijack import ForwardHook


def cross_attention_forward(layer, x, context=None, mask=None, *args, **kwargs):
    def split_context(context):
        return hypernetwork.apply_hypernetworks(shared.loaded_hypernetworks, context, layer)

    return layers.cross_attention(
        layer,
        x,
        context,
        mask,
        *args,
        settings=options.current(),
        split_context=split_context if shared.loaded_hypernetworks else None,
        report=status.record,
        **kwargs,
    )


def attn_block_forward(layer, x, *args, **kwargs):
    settings = options.current()
    if settings.vae:
        return layers.attn_block(layer, x, settings=settings, report=status.record, **kwargs)
    return ENTRY.hook_of(type(layer)).step_aside(layer, x, *args, **kwargs)


HOOKED = (
    ("ldm.modules.attention", "CrossAttention", cross_attention_forward),
    ("sgm.modules.attention", "CrossAttention", cross_attention_forward),  # SDXL
    ("ldm.modules.diffusionmodules.model", "AttnBlock", attn_block_forward),
    ("sgm.modules.diffusionmodules.model", "AttnBlock", attn_block_forward),
)


class Subquad(sd_hijack_optimizations.SdOptimization):
    """What the web UI lists, applies and undoes."""

    # The title made of these is what the web UI saves: it never changes, or users silently get another optimization.
    name = "subquad"
    label = "fast attention within a memory limit"
    cmd_opt = "opt_sub_quad_attention"

    def __init__(self) -> None:
        self._hooks = {}
        for module, name, forward in HOOKED:
            try:
                owner = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):  # sgm came with SDXL; a host may do without
                continue
            self._hooks[owner] = ForwardHook(owner, forward)

    @property
    def priority(self) -> int:
        """Just above the built-in *sub-quadratic*, so that "Automatic" takes this wherever it would have taken that."""
        try:
            return sd_hijack_optimizations.SdOptimizationSubQuad().priority + 1
        except Exception:  # the web UI does not start if this raises; a host may have no such built-in
            return 11

    def is_available(self) -> bool:
        return True

    def apply(self) -> None:
        for hook in self._hooks.values():
            hook.apply()

    def undo(self) -> None:
        for hook in self._hooks.values():
            hook.undo()

    @property
    def active(self) -> bool:
        return any(hook.applied for hook in self._hooks.values())

    def hook_of(self, owner: type) -> ForwardHook:
        """The hook of `owner`, or of its ancestor."""
        return next(self._hooks[base] for base in owner.__mro__ if base in self._hooks)


ENTRY = Subquad()


def list_entry(optimizers: list) -> None:
    optimizers.append(ENTRY)


def unload() -> None:
    """Before scripts are loaded again: no class keeps a hook, and the web UI applies its setting anew."""
    ENTRY.undo()
    if sd_hijack.current_optimizer is ENTRY:
        sd_hijack.current_optimizer = None
