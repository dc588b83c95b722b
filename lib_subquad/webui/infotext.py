"""What an image's infotext says of us: settings that are not the default, and whether memory ran out."""

from __future__ import annotations

from . import options, status
from .optimizer import ENTRY

RETRIES = "Subquad retries"


def begin(p) -> None:
    """At `process`, when this request's overrides are in force."""
    status.begin()
    if ENTRY.active:
        p.extra_generation_params.update(options.changed_from_default())


def finish_batch(p) -> None:
    """At `postprocess_batch`, before infotexts are made: smaller chunks change an image's last bits."""
    seen = status.generation()
    if seen.retries or seen.remembered:
        p.extra_generation_params[RETRIES] = seen.retries or "remembered"
