"""Layers that other extensions left with a forward of their own, out of reach of every attention optimization.

A guest that sets `layer.forward` and later puts back what it had found leaves the bound method of that moment as an
attribute of the layer: from then on the layer keeps the optimization that was in force at that moment. SAG, DAAM,
FABRIC, IP-Adapter and the built-in Hypertile do so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import MethodType

from modules import sd_models
from torch import nn

from .hooks import SOMETHING_ELSE, Hook, is_hosts, is_ours, owner

HYPERTILE = "__webui_hypertile_params"  # where Hypertile keeps a layer's forward, for as long as the model is loaded


def take_back(classes: tuple[type, ...]) -> None:
    """Delete forwards pinned to the host's own or to ours, so that the class decides again. Others' stay in force."""
    for layer in _layers(_loaded_models(), classes):
        if _is_pinned(vars(layer).get("forward"), layer):
            del vars(layer)["forward"]
        hypertile = getattr(layer, HYPERTILE, None)
        if _is_pinned(getattr(hypertile, "forward", None), layer):
            hypertile.forward = MethodType(_forward_of_class, layer)


def out_of_reach(hooks: dict[type, Hook], served: set[int]) -> tuple[int, dict[str, int]]:
    """How many layers of these classes the loaded model has, and whose are those that were not ours: owner -> layers.

    A class is given with the hook that makes its layers ours: of its forward, or of the function that it calls.
    `served`: the `id` of each layer that came to us, or of the hook where a function does not know for which.
    """
    owners, count = Counter(), 0
    for layer in _layers([sd_models.model_data.sd_model], tuple(hooks)):
        count += 1
        hook = next(hooks[base] for base in type(layer).__mro__ if base in hooks)
        if served.isdisjoint((id(layer), id(hook))):
            owners[_owner(layer, hook)] += 1
    return count, dict(owners.most_common())


def _loaded_models() -> list[nn.Module]:
    data = sd_models.model_data
    found = [data.sd_model, *getattr(data, "loaded_sd_models", ())]  # it may keep several in memory
    return list({id(model): model for model in found}.values())


def _layers(models: Iterable[object], classes: tuple[type, ...]) -> Iterator[nn.Module]:
    for model in models:
        if isinstance(model, nn.Module):
            yield from (layer for layer in model.modules() if isinstance(layer, classes))


def _is_pinned(forward: object, layer: nn.Module) -> bool:
    bound = isinstance(forward, MethodType) and forward.__self__ is layer and forward.__func__ is not _forward_of_class
    return bound and (is_hosts(forward) or is_ours(forward))


def _forward_of_class(layer: nn.Module, *args, **kwargs):
    return type(layer).forward(layer, *args, **kwargs)


def _owner(layer: nn.Module, hook: Hook) -> str:
    """The extension that has its own forward on a layer or on its class, or its own function in the hook's place."""
    found = (vars(layer).get("forward"), type(layer).forward, hook.standing)
    foreign = (it for it in found if it is not None and not is_hosts(it) and not is_ours(it))
    return next(map(owner, foreign), SOMETHING_ELSE)
