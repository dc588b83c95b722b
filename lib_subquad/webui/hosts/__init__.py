"""The web UIs that the extension runs in: what it asks of one is `Host`, and each kind has a file of its own."""

from __future__ import annotations

import importlib

from .base import Host

# A file each, with `find()`: the first that finds what it builds on is taken.
KINDS = ("a1111", "functions", "pipelines")

_host: Host | None = None


def host() -> Host:
    """The web UI that we run in."""
    global _host
    if _host is None:
        _host = next(filter(None, map(_find, KINDS)), None) or Host()
    return _host


def _find(kind: str) -> Host | None:
    try:
        return importlib.import_module(f".{kind}", __name__).find()
    except ImportError as error:  # a name that this web UI lacks
        if (error.name or "").startswith(__name__.split(".")[0]):
            raise
        return None
