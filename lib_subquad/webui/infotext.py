"""A generation from beginning to end: which layers it has, and what an image's infotext says of us."""

from __future__ import annotations

from .. import memory
from . import options, status
from .hosts import host

RETRIES = "Subquad retries"
RERUNS = "Subquad exact reruns"  # calls of which an inexact engine's result was of no use


def begin(p) -> None:
    """At `process`, when this request's overrides are in force; and before, where the web UI tells of all requests."""
    status.begin()
    memory.forget()  # the model may have been moved since
    host().prepare()
    if host().active:
        p.extra_generation_params.update(options.changed_from_default())


def begin_batch(p) -> None:
    """At `before_process`, so that guests find no pinned layer; at `process_batch`, after guests' own turn; and before
    every sampling, for which another model may have been loaded."""
    host().prepare()


def finish_batch(p) -> None:
    """At `postprocess_batch`, before infotexts are made: smaller chunks change an image's last bits."""
    seen = status.generation()
    if host().active and not host().interrupted():
        seen.reach = host().reach(seen.served)
    if seen.retries or seen.remembered:
        p.extra_generation_params[RETRIES] = seen.retries or "remembered"
    if seen.reruns:
        p.extra_generation_params[RERUNS] = seen.reruns


def end(p) -> None:
    """After the generation, whatever became of it, where the web UI tells of all requests."""
    finish_batch(p)  # some are made without the script that would have been asked
    host().release()
