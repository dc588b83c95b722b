"""The VAE's decoder and encoder in bands of rows: exact, and in less than half the memory."""

from .bands import BandPlan, plan_bands, usual_bytes
from .halves import Interrupted, in_bands, why_not
from .parts import steps_of

__all__ = ["BandPlan", "Interrupted", "in_bands", "plan_bands", "steps_of", "usual_bytes", "why_not"]
