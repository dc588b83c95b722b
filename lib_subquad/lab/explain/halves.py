"""The VAE's halves as rows of the plan table: what their convolutions take, and whether they are computed in bands."""

from __future__ import annotations

from dataclasses import dataclass

from ...settings import Settings
from ...steps import CONVOLUTION, DOWN, LAST, RESIDUAL, UP
from ...vae import BandPlan
from ...vae.fallbacks import ALWAYS, NEVER
from .. import tables
from .rows import PART_NAMES, WHOLE

WHAT = "convolutions"
LOWER_BANDS, PROCESSOR = "in lower bands", "on the processor"
USUAL, BANDS = "as usual", "in bands"
COUNTS = {RESIDUAL: 2, CONVOLUTION: 1, UP: 1, DOWN: 1, LAST: 1}


@dataclass(frozen=True)
class Half:
    """A half of the VAE for an image of a size: how its convolutions are computed, and what they hold at their peak.

    `sides` are those of its image, in pixels; `lowest_bytes` is what it takes in the lowest bands, which it comes to
    when memory really runs out; `free_bytes` the device's free memory, of which the user's settings allow a share;
    `on_card`: the processor is another device, where it can be computed at last.
    """

    part: str
    layers: int
    sides: tuple[int, int]
    plan: BandPlan
    lowest_bytes: int
    free_bytes: int
    settings: Settings
    on_card: bool

    @property
    def usual_fits(self) -> bool:
        return self.plan.usual_bytes <= self._limit_bytes

    @property
    def in_bands(self) -> bool:
        when = self.settings.vae_bands
        return when == ALWAYS or (when != NEVER and not self.usual_fits)

    @property
    def bytes(self) -> int:
        """What it takes in the way that it is computed."""
        return self.plan.bytes if self.in_bands else self.plan.usual_bytes

    @property
    def fits(self) -> bool:
        return self.bytes <= self._limit_bytes

    @property
    def last_resort(self) -> str:
        """How it comes through although it does not fit, if it does: `LOWER_BANDS` or `PROCESSOR`."""
        if self.fits or not (self.in_bands and self.settings.retry):
            return ""
        if self.lowest_bytes <= self.free_bytes:
            return LOWER_BANDS
        return PROCESSOR if self.on_card else ""

    @property
    def _limit_bytes(self) -> int:
        return self.free_bytes * self.settings.memory_limit // 100

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why in this way, in words."""
        usual, bands = tables.memory(self.plan.usual_bytes), tables.memory(self.plan.bytes)
        if not self.in_bands:
            why = "as you have set it" if self.settings.vae_bands == NEVER else "which fits the memory limit"
            return (f"all at once, {why}; bands would take {bands}",)
        beyond = "" if self.usual_fits else ", more than the memory limit"
        told = f"all at once it takes {usual}{beyond}"
        return told, *self.plan.reasons

    def cells(self) -> dict[str, str]:
        """What the table of rows shows of it."""
        rows = f"{self.plan.rows} rows" if self.in_bands else tables.NOTHING
        return self._told({"Query chunk": rows, "KV chunk": tables.NOTHING, "Workspace": tables.memory(self.bytes)})

    def group_cells(self) -> dict[str, str]:
        """What the table of groups shows of it."""
        rows = f"{self.plan.rows} rows" if self.in_bands else WHOLE
        return self._told({"At a time": rows, "Memory": tables.memory(self.bytes)})

    def _told(self, sizes: dict[str, str]) -> dict[str, str]:
        width, height = self.sides
        return {
            "Where": f"{PART_NAMES[self.part]}, {WHAT}",
            "Layers": str(self.layers),
            "Tokens": f"{width} × {height} pixels",
            "Heads": tables.NOTHING,
            "Engine": BANDS if self.in_bands else USUAL,
            **sizes,
            "Why": "; ".join(self.reasons),
        }
