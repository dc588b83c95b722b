"""The VAE's decoder and encoder in bands of rows: exact, and in less than half the memory."""

from .bands import BandPlan, lowest, plan_bands, usual_bytes
from .fallbacks import as_it_fits
from .halves import Interrupted, in_bands, why_not
from .parts import HOMES, steps_of

__all__ = [
    "HOMES",
    "BandPlan",
    "Interrupted",
    "as_it_fits",
    "in_bands",
    "lowest",
    "plan_bands",
    "steps_of",
    "usual_bytes",
    "why_not",
]
