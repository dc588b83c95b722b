"""Web UIs whose models call attention as a function, chosen once when they start: Forge, reForge and their kin.

They have no list of optimizations, so whether subquad is used is a setting of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import FunctionType, ModuleType

import torch
from torch import nn

from ...settings import Settings
from .. import options
from ..status import Reach
from . import places
from .base import UNET, VAE, Loaded, Switched, in_words, readable
from .hooks import home, owner
from .places import KEPT, Original, Place
from .seam import module
from .vae import Vae
from .wrapper import Wrapper

CHECKPOINT_PREFIXES = {"unet": "model.", "vae": "first_stage_model."}


class InstancesOwn:
    """Stands in a class for the function that each of its instances keeps; the instances keep what they had."""

    def __init__(self, host: Functions, keeper: type) -> None:
        self._host, self._keeper = host, keeper
        self._wrappers: dict[FunctionType, Wrapper] = {}

    def __get__(self, instance: object, owner: type | None = None):
        if instance is None:
            return self
        try:
            kept = unwrapped(vars(instance)[KEPT])  # it may have been made before this came into its class
        except KeyError:
            raise AttributeError(KEPT) from None  # nn.Module then looks among its parts
        if type(kept) is not FunctionType or not self._host.is_own(kept, self._keeper):
            return kept
        if kept not in self._wrappers and (original := places.kind_of(kept)):
            self._wrappers[kept] = self._host.wrap(original)
        return self._wrappers.get(kept, kept)

    def __set__(self, instance: object, value: object) -> None:
        vars(instance)[KEPT] = unwrapped(value)

    def __delete__(self, instance: object) -> None:
        try:
            del vars(instance)[KEPT]
        except KeyError:
            raise AttributeError(KEPT) from None


class Functions(Switched):
    """A web UI that binds attention to names in its modules."""

    def __init__(self) -> None:
        self._originals: dict[FunctionType, Original] = {}
        self._wrappers: dict[Place, Wrapper] = {}
        self._classes: set[type] = set()
        self._kept: list[FunctionType] = []  # by instances of classes: known when they are first called
        self._in_place = False
        self.vae = Vae(self, lambda: self._serves(VAE))

    def prepare(self) -> None:
        """Put a wrapper wherever an original is held: of what was loaded since, or is new, too."""
        if not self.active:
            if self._in_place:
                self.undo()
            return
        first, self._in_place = not self._in_place, True
        self.vae.apply() if first else self.vae.catch_up()
        modules = places.all_modules()
        self.look(modules)
        for held_in in modules:
            if places.is_encoder(held_in):
                _give_back(held_in)  # a late import may have taken ours along
                continue
            for name, value in list(places.contents(held_in).items()):
                if type(value) in (FunctionType, Wrapper):
                    self._take(Place(held_in, name), value)
            for keeper in places.classes_that_keep(held_in):
                setattr(keeper, KEPT, InstancesOwn(self, keeper))
                self._classes.add(keeper)

    def undo(self) -> None:
        """Every name is bound to the web UI's own again, also where a late import took ours along."""
        self._in_place = False
        self.vae.undo()
        for held_in in places.all_modules():
            _give_back(held_in)
        for keeper in self._classes:
            delattr(keeper, KEPT)
        self._classes.clear()

    def look(self, modules: Iterable[ModuleType]) -> bool:
        """Whether one of these holds attention as a function; what they hold is known from then on."""
        known = list(self._originals.values())
        self._originals.update((found.function, found) for found in places.originals(modules, known))
        return bool(self._originals)

    def wrap(self, original: Original) -> Wrapper:
        if original.function not in self._originals and original.function not in self._kept:
            self._kept.append(original.function)
        return Wrapper(original, self._serves)

    def is_own(self, function: FunctionType, keeper: type) -> bool:
        """Whether an instance of this class keeps the web UI's function, and not one that a guest gave it."""
        return function in self._originals or home(function).split(".")[0] == keeper.__module__.split(".")[0]

    def settings(self) -> Settings:
        return options.current(any(it.upcasts() for it in self._originals.values() if it.heads))

    def parts_in_use(self) -> tuple[str, ...]:
        return super().parts_in_use() if self._originals else ()

    def reach(self, served: set[int]) -> Reach:
        foreign = {place: place.held for place in self._foreign() if id(self._wrappers.get(place)) not in served}
        return Reach(
            len({*self._wrappers, *foreign}) + len(self._classes),
            "places that call attention",
            dict(Counter(map(owner, foreign.values())).most_common()),
        )

    def loaded(self) -> Loaded:
        data = getattr(module("sd_models"), "model_data", None)
        model = getattr(data, "sd_model", None)
        filename = readable(getattr(getattr(model, "sd_checkpoint_info", None), "filename", ""))
        if getattr(model, "forge_objects", None) is not None and (filename or _parts_of(model)):
            return Loaded(filename, lambda: _shapes(model))
        chosen = self._chosen_file()
        if not readable(chosen):
            raise self.nothing_loaded()
        return Loaded(chosen, note="It is not loaded yet: the web UI loads it for the next image.")

    def model(self) -> object:
        reload = getattr(module("sd_models"), "forge_model_reload", None)
        if callable(reload):  # it loads a model when an image needs it
            reload()
        return super().model()

    def dtype(self) -> torch.dtype:
        unet = _parts_of(getattr(getattr(module("sd_models"), "model_data", None), "sd_model", None)).get("unet")
        named = (getattr(unet, name, None) for name in ("computation_dtype", "manual_cast_dtype", "dtype"))
        return next((it for it in named if isinstance(it, torch.dtype) and it.is_floating_point), super().dtype())

    def _take(self, place: Place, value: object) -> None:
        """Put a wrapper there if it is an original that is held; each place has one of its own."""
        original = self._originals.get(unwrapped(value))
        if original is None or original.chosen and place.name == original.function.__name__:
            return  # by its own name one of several is asked for itself
        wrapper = self._wrappers.get(place)
        if wrapper is None or wrapper.original != original:
            wrapper = self._wrappers[place] = self.wrap(original)
        if value is not wrapper:
            setattr(place.owner, place.name, wrapper)

    def _foreign(self) -> set[Place]:
        """Where a function of somebody else stands under a name by which modules hold the web UI's."""
        names = {place.name for place, wrapper in self._wrappers.items() if wrapper.original.chosen}
        homes = {function.__module__ for function in self._originals}
        held = (Place(it, name) for it in places.all_modules() for name in names if not places.is_encoder(it))
        return {it for it in held if places.kind_of(it.held) and home(it.held) not in homes}

    def _serves(self, part: str) -> bool:
        return self._in_place and part in options.use()

    def own_in_words(self, part: str) -> str:
        known = [it.function for it in self._originals.values() if it.chosen and it.heads is (part == UNET)]
        known += self._kept if part == VAE else []
        return " or ".join(dict.fromkeys(in_words(it.__name__) for it in known)) or "attention of its own"

    def _chosen_file(self) -> str:
        """The checkpoint that the user has chosen, or else the first on the list, as the web UI does."""
        models, options_now = module("sd_models"), getattr(module("shared"), "opts", None)
        known = getattr(models, "checkpoint_aliases", {})
        chosen = known.get(getattr(options_now, "sd_model_checkpoint", None))
        return str(getattr(chosen, "filename", "")) or next(iter(self.checkpoints().values()), "")


def _give_back(held_in: ModuleType) -> None:
    for name, value in list(places.contents(held_in).items()):
        if type(value) is Wrapper:
            setattr(held_in, name, unwrapped(value))


def unwrapped(value: object) -> object:
    return value.original.function if type(value) is Wrapper else value


def find() -> Functions | None:
    host = Functions()
    return host if host.look(places.all_modules()) else None


def _parts_of(model: object) -> dict[str, nn.Module]:
    """Part of a checkpoint -> what holds its tensors, of a loaded model."""
    objects = getattr(model, "forge_objects", None)
    found = {
        "unet": getattr(getattr(objects, "unet", None), "model", None),
        "vae": getattr(getattr(objects, "vae", None), "first_stage_model", None),
    }
    return {part: it for part, it in found.items() if isinstance(it, nn.Module)}


def _shapes(model: object) -> dict[str, tuple[int, ...]]:
    """Tensor name, as checkpoints have it -> shape."""
    return {
        CHECKPOINT_PREFIXES[part] + name: tuple(tensor.shape)
        for part, holder in _parts_of(model).items()
        for name, tensor in holder.state_dict().items()
    }
