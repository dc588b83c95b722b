"""Attention shapes to measure: those of real models by name, or any by its numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ...console import UserError
from ..explain import sizes

GUIDANCE = 2  # classifier-free guidance: with and without the prompt at once


@dataclass(frozen=True)
class Shape:
    """queries [batch, heads, queries, width] against keys and values [batch, heads, keys, width]."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int

    @property
    def sizes(self) -> str:
        """Such as 16×4096×40: batch·heads, tokens, width; with 77 keys 16×4096×77×40."""
        keys = () if self.keys == self.queries else (self.keys,)
        return "×".join(str(size) for size in (self.batch * self.heads, self.queries, *keys, self.width))

    @property
    def label(self) -> str:
        return f"{self.name} {self.sizes}".strip()

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


class Model(NamedTuple):
    """The attention layer that costs a model the most: its heads, and the pixels along the side of one token."""

    title: str
    batch: int
    heads: int
    width: int
    downsampling: int


MODELS = {
    "sd15": Model("SD 1.5", GUIDANCE, 8, 40, 8),
    "sd21": Model("SD 2.1", GUIDANCE, 5, 64, 8),
    # SDXL has no attention at 8 pixels a token.
    "sdxl": Model("SDXL", GUIDANCE, 10, 64, 16),
    "vae": Model("VAE", 1, 1, 512, 8),
}
DEFAULT = ("sd15-512", "sdxl-1024", "vae-1024", "sd15-1024", "sd15-512-cross77")
SHAPE_HELP = (
    "MODEL-SIDE or MODEL-SIDE-crossTOKENS, with a MODEL of "
    + ", ".join(MODELS)
    + " and an image's side in pixels (sd15-512, vae-2048, sdxl-1024-cross231); or BATCH,HEADS,QUERIES,KEYS,WIDTH"
)


def parse_shape(text: str) -> Shape:
    """The shape that `text` names.

    Raises:
        UserError: it names none; the message says what was expected.
    """
    if "," in text:
        return _from_numbers(text)
    found = re.fullmatch(r"([a-z0-9]+)-(\d+)(?:-cross(\d+))?", text.strip().lower())
    if found is None or found[1] not in MODELS:
        raise UserError(f"shape {text!r}; expected {SHAPE_HELP}")
    model, side = MODELS[found[1]], sizes.side(f"shape {text!r}: the side", int(found[2]), sizes.STEP)
    tokens = (side // model.downsampling) ** 2
    name = f"{model.title} {side}²"
    if found[3] is None:
        return Shape(name, model.batch, model.heads, tokens, tokens, model.width)
    if found[1] == "vae" or int(found[3]) < 1:
        raise UserError(f"shape {text!r}; expected a model that looks at a prompt, and at least one token of it")
    return Shape(f"{name} cross", model.batch, model.heads, tokens, int(found[3]), model.width)


def _from_numbers(text: str) -> Shape:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or min(numbers) < 1:
        raise UserError(f"shape {text!r}; expected five whole numbers BATCH,HEADS,QUERIES,KEYS,WIDTH of at least 1")
    return Shape("", *numbers)
