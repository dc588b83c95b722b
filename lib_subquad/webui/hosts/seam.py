"""What of the web UI is there."""

from __future__ import annotations

import sys
from types import ModuleType


def module(name: str) -> ModuleType | None:
    """`modules.<name>` where the web UI has loaded it; never loads it itself, for that may start something."""
    return sys.modules.get(f"modules.{name}")
