"""The demo host, brought up for a test and cleared away after it."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

import pytest

# everything that keeps hold of the host's `modules`: another test may bring a `modules` of its own
BOUND = (
    "modules",
    "lib_subquad.webui",
    "demo.actions",
    "demo.comparison",
    "demo.generate",
    "demo.once",
    "demo.page",
    "demo.settings_panel",
)


@pytest.fixture
def host():
    """`demo.host` with a fresh `modules` package; ldm's classes get their own forwards back afterwards."""
    with contextlib.redirect_stdout(io.StringIO()):  # ldm's layers announce themselves
        attention = pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
        model = importlib.import_module("ldm.modules.diffusionmodules.model")
    from demo import host as demo_host

    hijacked = (attention.CrossAttention, model.AttnBlock)
    forwards = [cls.forward for cls in hijacked]
    stashed = _take_away()
    demo_host.install_modules()
    yield demo_host
    _take_away()
    sys.modules.update(stashed)
    for cls, forward in zip(hijacked, forwards, strict=True):
        cls.forward = forward


def _take_away() -> dict:
    taken = {}
    for name in [name for name in sys.modules if any(name == b or name.startswith(b + ".") for b in BOUND)]:
        taken[name] = sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # "from package import module" looks at the attribute first
            delattr(sys.modules.get(parent), child)
    return taken
