"""Taking over a function of the host, so that it can be given back whatever others did to it meanwhile."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from types import FunctionType, MethodType

# The packages of the host, whose functions a guest may have found and put back. Its extensions have other names.
HOST_PACKAGES = ("modules", "ldm", "sgm")
SOMETHING_ELSE = "something else"


class Hook:
    """Puts `function` in place of `owner.name`, a method of a class or a function of a module, while applied.

    Other extensions capture bound methods, wrap what stands there or replace it, and no undo reaches what they hold. So
    our function, called while not in force, steps aside.
    """

    def __init__(self, owner: object, name: str, function: Callable) -> None:
        self.owner, self.name, self.function = owner, name, function
        self._applied = False
        self._before = self._first = self.standing

        def hooked(*args, **kwargs):
            return (function if self.in_force else self.step_aside)(*args, **kwargs)

        self.ours = hooked

    @property
    def standing(self) -> Callable:
        """What stands there now."""
        return getattr(self.owner, self.name)

    @property
    def beneath(self) -> Callable:
        """What stands there now, or would without us."""
        return self._before if self.standing is self.ours else self.standing

    @property
    def in_force(self) -> bool:
        """Whether it is applied, and the host has not put back its own without telling us, as it does for training."""
        standing = self.standing
        return self._applied and (standing is self.ours or not (standing is self._first or is_hosts(standing)))

    def apply(self) -> None:
        if self.standing is not self.ours:
            self._before = self.standing
            setattr(self.owner, self.name, self.ours)
        self._applied = True

    def undo(self) -> None:
        """Puts back what stood there, unless somebody else's function stands there by now."""
        if self.standing is self.ours:
            setattr(self.owner, self.name, self._before)
        self._applied = False

    def step_aside(self, *args, **kwargs):
        """What would be done without us: by what stands there now, or stood there when we were last applied, or at
        first; never by what wraps ours and so called us, for it would come back here and have its way twice.
        """
        others = (self.standing, self._before, self._first)
        function = next((it for it in others if it is not self.ours and not _is_running(it)), self._first)
        return function(*args, **kwargs)


def underlying(function: object) -> object:
    """The plain function behind bound methods and partial ones."""
    while isinstance(function, (MethodType, functools.partial)):
        function = function.__func__ if isinstance(function, MethodType) else function.func
    return function


def home(function: object) -> str:
    """The module whose code `function` is, whatever name a decorator gave it; empty where nothing tells."""
    function = underlying(function)
    return function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else ""


def owner(function: object) -> str:
    """The extension whose code `function` is, by the folder that it lies in."""
    plain = underlying(function)
    path = plain.__code__.co_filename if isinstance(plain, FunctionType) else ""
    folder = re.search(r"[\\/]extensions(?:-builtin)?[\\/]([^\\/]+)", path)
    return folder[1] if folder else home(plain) or SOMETHING_ELSE


def is_hosts(function: object) -> bool:
    return home(function).split(".")[0] in HOST_PACKAGES


def is_ours(function: object) -> bool:
    return home(function).split(".")[0] == __name__.split(".")[0]


def _is_running(function: Callable) -> bool:
    """Whether we are being called from inside `function`, or may be, where it has no code to be looked for."""
    code, frame = getattr(underlying(function), "__code__", None), sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return code is None or frame is not None
