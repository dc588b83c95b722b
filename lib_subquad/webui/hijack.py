"""Taking over the `forward` of a class, so that it can be given back whatever others did to it meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable


class ForwardHook:
    """Puts `forward` in place of `owner.forward` while applied.

    Other extensions capture bound methods, wrap `forward` or replace it, and no undo reaches what they hold. So our
    forward, called while not applied, steps aside.
    """

    def __init__(self, owner: type, forward: Callable) -> None:
        self.owner = owner
        self.applied = False
        self._before = self._first = owner.forward

        def hooked(layer, *args, **kwargs):
            return (forward if self.applied else self.step_aside)(layer, *args, **kwargs)

        self.forward = hooked

    def apply(self) -> None:
        if self.owner.forward is not self.forward:
            self._before = self.owner.forward
            self.owner.forward = self.forward
        self.applied = True

    def undo(self) -> None:
        """Puts back what stood there, unless somebody else's forward stands there by now."""
        if self.owner.forward is self.forward:
            self.owner.forward = self._before
        self.applied = False

    def step_aside(self, layer, *args, **kwargs):
        """What the layer would do without us: the forward that the class has now, or had when we were last applied, or
        had at first; never one that wraps ours and so called us, for it would come back here and have its way twice.
        """
        others = (self.owner.forward, self._before, self._first)
        forward = next((it for it in others if it is not self.forward and not _is_running(it)), self._first)
        return forward(layer, *args, **kwargs)


def _is_running(function: Callable) -> bool:
    """Whether we are being called from inside `function`."""
    code, frame = getattr(function, "__code__", None), sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
