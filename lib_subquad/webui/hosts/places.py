"""Where a web UI holds attention as a function, found by what such places look like.

ComfyUI, Forge and their kin choose one of several functions when they start, and bind it to a second name in the module
that defines them (`attention_function = attention_pytorch`): that module is a *home*, and the function an *original*.
What others put there is none, whatever name a decorator gave it: no home holds it under its own name as well.
Modules that attend import it from there by whatever name they like; some classes of VAEs keep it in each instance. A
model that came with a function of its own, called `attention`, and asks no home (SD 3's), has an original as well, one
that nobody chose. No product's name is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType

import torch

# Parts of a module's name, where it holds an encoder of text, images or sound: what those compute is small, and none of
# ours. Names that models which make images share with an encoder (Qwen) are not among them.
ENCODERS = re.compile(
    r"(^|[._])(t5\w*|u?mt5\w*|clip\w*|\w*_?clip|bert\w*|llama\w*|llm|gemma\w*|mistral\w*|dino\w*|siglip\w*|"
    r"(text|image|vision|audio)_encoders?|text_processing)($|[._])"
)
LIBRARIES = tuple(
    os.path.join(os.path.normcase(sysconfig.get_path(name)), "")
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
OWN = "attention"  # what a model calls a function of its own
KEPT = "optimized_attention"  # what classes call the function that each instance of theirs keeps
QUERY_KEY_VALUE = (("q", "k", "v"), ("query", "key", "value"))


@dataclass(frozen=True)
class Original:
    """One of the web UI's own functions: with heads, or that of the VAE's single one; chosen, or a model's own."""

    function: FunctionType
    heads: bool
    chosen: bool = True

    def upcasts(self, precision: torch.dtype | None = None, dtype: torch.dtype | None = None) -> bool:
        """Whether its home's own rule asks for float32, for a call's `attn_precision` and queries of this dtype."""
        rule = getattr(sys.modules.get(self.function.__module__), "get_attn_precision", None)
        if callable(rule):
            precision = rule(*(precision, dtype)[: _parameters(rule)])
        return precision == torch.float32


@dataclass(frozen=True)
class Place:
    """A name under which `owner`, a module, holds attention."""

    owner: ModuleType
    name: str

    @property
    def held(self) -> object:
        """What is held there; None where it is gone."""
        return contents(self.owner).get(self.name)

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self.owner is other.owner and self.name == other.name


def kind_of(function: object) -> Original | None:
    """The function as an original, if its parameters are those of attention."""
    if type(function) is not FunctionType:
        return None
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    names = tuple(parameter.name for parameter in parameters[:3])
    if names not in QUERY_KEY_VALUE:
        return None
    if len(parameters) == 3:
        return Original(function, heads=False)
    return Original(function, heads=True) if parameters[3].name == "heads" else None


def originals(modules: Iterable[ModuleType], known: Iterable[Original] = ()) -> Iterator[Original]:
    """What homes hold under a name that is not the function's own, and models' own. A function may come more than once.

    A model's own is looked for in the packages of the homes, for elsewhere it is a guest's; `known` are the originals
    that were found before, in whose homes something else may stand by now.
    """
    modules = list(modules)
    packages = {_package(it.function.__module__) for it in known}
    for module in modules:
        for name, value in list(contents(module).items()):
            if type(value) is FunctionType and _is_chosen(module, name, value) and (found := kind_of(value)):
                packages.add(_package(value.__module__))
                yield found
    for module in modules:
        found = kind_of(contents(module).get(OWN))
        if found and found.heads and _package(contents(module)["__name__"]) in packages and not is_encoder(module):
            if found.function.__globals__ is contents(module):  # whatever name a guest's decorator gave it
                yield dataclasses.replace(found, chosen=False)


def _is_chosen(module: ModuleType, name: str, function: FunctionType) -> bool:
    held = contents(module)
    own = function.__module__ == held["__name__"] and held.get(function.__name__) is function
    return own and "attention" in name and name != function.__name__


def _package(name: str) -> str:
    return name.split(".")[0]


def is_encoder(module: ModuleType) -> bool:
    return _is_encoder(contents(module)["__name__"])


def classes_that_keep(module: ModuleType) -> Iterator[type]:
    """The classes of a module whose instances keep a function of attention."""
    for value in list(contents(module).values()):
        if issubclass(type(value), type) and value.__module__ == contents(module)["__name__"]:
            code = getattr(vars(value).get("__init__"), "__code__", None)
            if code is not None and KEPT in code.co_names and not hasattr(value, KEPT):  # a method may be called so
                yield value


def all_modules() -> list[ModuleType]:
    """Every module that is loaded, but those of Python and of installed packages: thousands, and none is a web UI's."""
    found = {}
    for module in list(sys.modules.values()):  # one may be there under two names
        if issubclass(type(module), ModuleType) and id(module) not in found:
            file, name = map(contents(module).get, ("__file__", "__name__"))
            if isinstance(name, str) and not (isinstance(file, str) and _is_installed(file)):
                found[id(module)] = module
    return list(found.values())


@functools.cache
def _is_installed(file: str) -> bool:
    return os.path.normcase(file).startswith(LIBRARIES)


@functools.cache
def _is_encoder(name: str) -> bool:
    return ENCODERS.search(name) is not None


def contents(module: ModuleType) -> dict[str, object]:
    """What a module holds. Neither a module nor a thing in it that is loaded when it is looked at is loaded by this, so
    ask `type()` of what is found: `isinstance` asks the thing itself."""
    return object.__getattribute__(module, "__dict__")


@functools.cache
def _parameters(function: Callable) -> int:
    return len(inspect.signature(function).parameters)
