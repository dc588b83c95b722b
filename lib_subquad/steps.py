"""The halves of a VAE as steps, whoever tells of them: a file's header, or the layers themselves."""

from __future__ import annotations

from dataclasses import dataclass

# How a step is computed: a 3 x 3 convolution; a residual block; twice or half the resolution, then a convolution; norm
# and convolution at the end; anything else, which is called whole.
CONVOLUTION, RESIDUAL, UP, DOWN, LAST, WHOLE = "convolution", "residual", "up", "down", "last", "whole"


@dataclass(frozen=True)
class VaeStep:
    """A layer of a half, from a feature map of `into` channels to one of `out`.

    Attributes:
        kind: how it is computed, one of the words above.
        resizes: UP where its result has twice the sides, DOWN where it has half of them.
        in_place: whether its SiLU overwrites what it is given, instead of making two maps more.
    """

    kind: str
    into: int
    out: int
    resizes: str = ""
    in_place: bool = False
