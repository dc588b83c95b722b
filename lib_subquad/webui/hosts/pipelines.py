"""Web UIs whose models are pipelines of diffusers, which call PyTorch's own function.

They hold no attention of their own: from the beginning of a generation to its end ours stands in the place of PyTorch's
function, before whatever the web UI has put there. Whether subquad is used is a setting of ours.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from modules import script_callbacks
from torch import Tensor

from ...dropin import sdpa
from ...engines import pytorch
from .. import status
from ..status import Reach
from .base import UNET, VAE, Switched, in_words
from .hooks import Hook, owner, underlying

FUNCTION = "scaled_dot_product_attention"


class Pipelines(Switched):
    """A web UI that tells when a generation begins and ends."""

    def __init__(self) -> None:
        self._hook = Hook(F, FUNCTION, self._attend)

    def prepare(self) -> None:
        if self.active:
            self._hook.apply()
        else:
            self._hook.undo()

    def release(self) -> None:
        self._hook.undo()

    def undo(self) -> None:
        self._hook.undo()

    def own_in_words(self, part: str) -> str:
        code = getattr(underlying(self._hook.beneath), "__code__", None)  # decorators give it PyTorch's name
        return in_words(code.co_name if code else "pytorch")

    def reach(self, served: set[int]) -> Reach:
        standing = self._hook.standing
        whose = "PyTorch" if standing is pytorch.OWN else owner(standing)
        return Reach(1, "places that call attention", {} if standing is self._hook.ours else {whose: 1})

    def _attend(self, *args, **kwargs) -> Tensor:
        query = args[0] if args else kwargs.get("query")
        ours = pytorch.is_running()  # and of whatever shape: engines are tried on small calls of their own
        if not ours and _part(query) not in self.parts_in_use():
            return self._hook.step_aside(*args, **kwargs)
        return sdpa(*args, **kwargs, settings=self.settings(), report=status.record)


def _part(query: Tensor) -> str:
    """Whose call it is: a single head of all channels is the VAE's."""
    return VAE if query.dim() > 2 and query.shape[-3] == 1 else UNET


def find() -> Pipelines | None:
    tells = all(hasattr(script_callbacks, name) for name in ("on_before_process", "on_after_process"))
    return Pipelines() if tells and "diffusers" in sys.modules else None
