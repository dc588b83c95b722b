"""The VAE's decoder and encoder, at work in one way or another on a picture of a size: Stable Diffusion's, with random
weights, and with this library's attention in all ways, so that they differ in nothing else."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...console import UserError
from ...settings import Settings
from ...vae import BandPlan, in_bands
from ...vae.model import Decoder, Encoder, with_random_weights
from ..explain import sizes
from . import reference

USUAL, FORGES, BANDS, LOW_BANDS = "usual", "usual-forge", "bands", "low-bands"
WAYS = {
    USUAL: "all at once, as the web UI's own classes do it",
    FORGES: "all at once as in the Forge family, whose SiLU overwrites what it is given",
    BANDS: "in bands, with memory enough",
    LOW_BANDS: "in bands of as few rows as a plan takes before memory runs out",
}
HALVES: dict[str, type[Decoder] | type[Encoder]] = {"decoder": Decoder, "encoder": Encoder}
DEFAULT = ("decoder-512", "decoder-1024")
PICTURE_HELP = "the picture's size, 512 or 512x768, for the decoder, or HALF-SIZE, with a HALF of decoder, encoder"
FACTOR = 8  # pixels along one side of a picture for one of its latent
SMALL_SIDE = 64
CHECKED_SIDE = 128  # of the picture of which the error is told: in float64 a large one takes minutes
PLENTY = 1 << 50


@dataclass(frozen=True)
class Picture:
    """A half of the VAE, and the size in pixels of the picture that it makes or is given."""

    half: str
    width: int
    height: int

    @property
    def label(self) -> str:
        size = f"{self.width}²" if self.width == self.height else f"{self.width}×{self.height}"
        return f"{self.half} {size}"


def parse_picture(text: str) -> Picture:
    """The picture that `text` names.

    Raises:
        UserError: it names none; the message says what was expected.
    """
    found = re.fullmatch(r"(?:(\w+)-)?(\S+)", text.strip().lower())
    half = found[1] or "decoder" if found else ""
    if found is None or half not in HALVES:
        raise UserError(f"{text!r}; expected {PICTURE_HELP}")
    return Picture(half, *sizes.parse_size(found[2], sizes.STEP))


@dataclass(frozen=True)
class HalfJob:
    """What to measure: a way of `WAYS`."""

    way: str
    picture: Picture
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None

    @classmethod
    def of(cls, question: dict[str, Any]) -> HalfJob:
        """That of which this is `dataclasses.asdict`."""
        return cls(**{**question, "picture": Picture(**question["picture"])})

    def work(self) -> HalfWork:
        return HalfWork(self)


class HalfWork:
    """Called, it computes a picture or latents, and returns what came of it, for `keep`."""

    def __init__(self, job: HalfJob) -> None:
        self.job = job
        self.plans: list[BandPlan] = []
        self.half: Decoder | Encoder = with_random_weights(HALVES[job.picture.half](in_place=job.way == FORGES))
        self.half.to(torch.device(job.device), getattr(torch, job.dtype))
        self.x = self._given(job.picture.width, job.picture.height)
        self.result_bytes = 0

    def _given(self, width: int, height: int) -> Tensor:
        if self.job.picture.half == "decoder":
            width, height = width // FACTOR, height // FACTOR
        x = torch.randn(1, self.half.conv_in.in_channels, height, width)
        return x.to(torch.device(self.job.device), getattr(torch, self.job.dtype))

    def __call__(self) -> Tensor:
        with torch.no_grad():
            if self.job.way in (USUAL, FORGES):
                return self.half(self.x)
            free = PLENTY if self.job.way == BANDS else 0
            # Retrying would measure another plan than the one that is shown.
            settings = Settings(retry=False)
            return in_bands(self.half, self.x, settings=settings, free_bytes=free, report=self.plans.append)

    def small(self, side: int = SMALL_SIDE) -> HalfWork:
        """The same work on a picture of so many pixels a side, or fewer."""
        small = copy.copy(self)
        small.plans = []
        small.x = self._given(min(side, self.job.picture.width), min(side, self.job.picture.height))
        return small

    def keep(self, result: Tensor) -> None:
        self.result_bytes = result.numel() * result.element_size()

    @property
    def promise(self) -> tuple[str, int | None]:
        """(the plan in words, its bytes), where there was one."""
        return (str(self.plans[-1]), self.plans[-1].bytes) if self.plans else ("", None)

    def errors(self) -> tuple[float, float | None]:
        small = self.small(CHECKED_SIDE)
        found = small()
        with torch.no_grad():
            expected = copy.deepcopy(self.half).to("cpu", torch.float64)(reference.exact(small.x))
        return reference.largest_difference(found, expected), None
