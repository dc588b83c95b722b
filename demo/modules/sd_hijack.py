"""Which attention entry is in force."""

from __future__ import annotations

import ldm.modules.attention
import ldm.modules.diffusionmodules.model
from modules import errors, script_callbacks, sd_hijack_optimizations, shared
from modules.hypernetworks import hypernetwork

from lib_subquad.console import say

# where xformers is installed ldm would build its own block, which no entry could replace
ldm.modules.attention.BasicTransformerBlock.ATTENTION_MODES["softmax-xformers"] = ldm.modules.attention.CrossAttention
ldm.modules.diffusionmodules.model.MemoryEfficientAttnBlock = ldm.modules.diffusionmodules.model.AttnBlock

optimizers: list[sd_hijack_optimizations.SdOptimization] = []
current_optimizer: sd_hijack_optimizations.SdOptimization | None = None


def list_optimizers() -> None:
    """Ask every script for its entries; the highest priority comes first."""
    available = [entry for entry in script_callbacks.list_optimizers_callback() if entry.is_available()]
    optimizers[:] = sorted(available, key=lambda entry: entry.priority, reverse=True)


def apply_optimizations(option: str | None = None) -> str:
    """Put the entry titled `option`, or the one the settings name, in force; returns its name."""
    global current_optimizer
    undo_optimizations()
    if not optimizers:
        current_optimizer = None
        return ""
    if current_optimizer is not None:
        current_optimizer.undo()
        current_optimizer = None
    chosen = _choose(option or shared.opts.cross_attention_optimization)
    if chosen is None:
        say("Disabling attention optimization")
        return ""
    say(f"Applying attention optimization: {chosen.name}... ", end="")
    chosen.apply()
    say("done.")
    current_optimizer = chosen
    return chosen.name


def _choose(selection: str):
    if selection == "None" or (selection == "Automatic" and shared.cmd_opts.disable_opt_split_attention):
        return None
    if selection == "Automatic":
        wanted = (entry for entry in optimizers if entry.cmd_opt and getattr(shared.cmd_opts, entry.cmd_opt, False))
    else:
        wanted = (entry for entry in optimizers if entry.title() == selection)
    # a title that no entry has any more falls back to the first, as in the web UI
    return next(wanted, optimizers[0])


def undo_optimizations() -> None:
    """Give ldm's classes their own forwards back. The entry in force is not told."""
    ldm.modules.attention.CrossAttention.forward = hypernetwork.attention_CrossAttention_forward
    ldm.modules.diffusionmodules.model.AttnBlock.forward = (
        sd_hijack_optimizations.diffusionmodules_model_AttnBlock_forward
    )


class StableDiffusionModelHijack:
    """What the web UI does to a model on loading, as far as attention goes."""

    optimization_method: str | None = None

    def apply_optimizations(self, option: str | None = None) -> None:
        try:
            self.optimization_method = apply_optimizations(option)
        except Exception as e:
            errors.display(e, "applying cross attention optimization")
            undo_optimizations()

    def redo_hijack(self, m) -> None:
        self.apply_optimizations()


model_hijack = StableDiffusionModelHijack()
