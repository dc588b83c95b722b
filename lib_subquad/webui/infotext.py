"""A generation from beginning to end: which layers it has, and what an image's infotext says of us."""

from __future__ import annotations

from modules import shared

from . import options, status
from .optimizer import ENTRY

RETRIES = "Subquad retries"


def begin(p) -> None:
    """At `process`, when this request's overrides are in force."""
    status.begin()
    if ENTRY.active:
        p.extra_generation_params.update(options.changed_from_default())


def begin_batch(p) -> None:
    """At `before_process`, so that guests find no pinned layer, and at `process_batch`, after guests' own turn."""
    if ENTRY.active:
        ENTRY.take_back_pins()


def finish_batch(p) -> None:
    """At `postprocess_batch`, before infotexts are made: smaller chunks change an image's last bits."""
    seen = status.generation()
    if ENTRY.active and not (shared.state.interrupted or shared.state.skipped):
        seen.layers, seen.out_of_reach = ENTRY.out_of_reach(seen.served)
    if seen.retries or seen.remembered:
        p.extra_generation_params[RETRIES] = seen.retries or "remembered"
