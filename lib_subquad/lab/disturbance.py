"""What other programs did to a measurement, and how much that matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Less than this is nothing to speak of: of the processors, and beyond what repeated calls take at best.
SHARE, LONGER = 0.1, 1.1
MANY = 10  # times as long


@dataclass(frozen=True)
class Disturbance:
    """`share` of the processors that others took, None where the system does not tell; how many times as long as at
    their best `longer` repeated calls took; the least `difference` between two settings' times that can be told, as a
    ratio, None before they were compared."""

    share: float | None = None
    longer: float = 1.0
    difference: float | None = None

    @property
    def felt(self) -> bool:
        """Whether that is anything to speak of."""
        return self.longer >= LONGER or (self.share or 0.0) >= SHARE

    def hides_something(self, device: torch.device) -> bool:
        """Whether something that is faster on this device may look as if it were not. An accelerator computes by
        itself, whatever the processors do meanwhile."""
        return self.felt if device.type == "cpu" else self.longer >= LONGER

    def _how_many(self) -> str:
        """What one short call lost to another program is no measure of the others."""
        return f"about {self.longer:.1f}" if self.longer < MANY else "many"

    def sentence(self, past: bool) -> str:
        """In words; empty where nothing disturbed it."""
        if not self.felt:
            return ""
        who = "Something else" if self.share is None or self.share < SHARE else "Other programs"
        busy = "" if self.share is None or self.share < SHARE else f" {self.share * 100:.0f} % of the processor"
        verb = ("took" if past else "take") if busy else ("slowed it" if past else "slows it")
        were = "were" if past else "are"
        so = (
            f"times {were} {self._how_many()} times as long" if self.longer >= LONGER else f"times {were} hardly longer"
        )
        if self.difference is None:
            return f"{who} {verb}{busy}: {so}."
        least = f"{max(1, round((self.difference - 1) * 100))} %"
        return f"{who} {verb}{busy}: {so}, and what differs by less than {least} cannot be told apart."
