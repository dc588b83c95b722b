"""Taking over the `forward` of a class, so that it can be given back whatever others did to it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ForwardHook:
    """Puts `forward` in place of `owner.forward` while applied.

    Other extensions capture bound methods, wrap `forward` or replace it, and no undo reaches what they hold. So our
    forward, called while not applied, hands over to the one that the class has now; and where that one is a wrapper
    around ours, to what stood there before we first came. `before` is the forward that stood there when last applied.
    """

    def __init__(self, owner: type, forward: Callable) -> None:
        self.owner = owner
        self.applied = False
        self.before = self._pristine = None
        self._handing_over = threading.local()

        def hooked(layer, *args, **kwargs):
            if self.applied:
                return forward(layer, *args, **kwargs)
            return self._hand_over(layer, *args, **kwargs)

        self.forward = hooked

    def apply(self) -> None:
        if self.owner.forward is not self.forward:
            self.before = self.owner.forward
            self._pristine = self._pristine or self.before
            self.owner.forward = self.forward
        self.applied = True

    def undo(self) -> None:
        """Puts back what stood there, unless somebody else's forward stands there by now."""
        if self.owner.forward is self.forward:
            self.owner.forward = self.before
        self.applied = False

    def _hand_over(self, layer, *args, **kwargs):
        inside = self._handing_over.__dict__.setdefault("layers", set())
        if id(layer) in inside or self.owner.forward is self.forward:
            return self._pristine(layer, *args, **kwargs)
        inside.add(id(layer))
        try:
            return self.owner.forward(layer, *args, **kwargs)
        finally:
            inside.discard(id(layer))
