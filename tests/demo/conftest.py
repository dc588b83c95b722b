"""The demo host, brought up for a test and cleared away after it."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest

ldm_attention = pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
ldm_model = importlib.import_module("ldm.modules.diffusionmodules.model")

# everything that keeps hold of the host's `modules`: another test may bring a `modules` of its own
BOUND = ("modules", "lib_subquad.webui", "demo.actions", "demo.comparison", "demo.generate", "demo.once", "demo.page",
         "demo.settings_panel")


@pytest.fixture
def host():
    """`demo.host` with a fresh `modules` package; ldm's classes get their own forwards back afterwards."""
    from demo import host as demo_host

    hijacked = (ldm_attention.CrossAttention, ldm_model.AttnBlock)
    forwards = [cls.forward for cls in hijacked]
    stashed = _take_away()
    demo_host.install_modules()
    yield demo_host
    _take_away()
    sys.modules.update(stashed)
    for cls, forward in zip(hijacked, forwards, strict=True):
        cls.forward = forward


@pytest.fixture
def extension(host, tmp_path, monkeypatch):
    """Writes the text it is called with as the only script of an extension that the host then loads."""
    from modules import scripts

    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(scripts, "extension_path", str(tmp_path))

    def write(text: str) -> str:
        path = tmp_path / "scripts" / "door.py"
        path.write_text(text, encoding="utf8")
        return str(path)

    return write


def _take_away() -> dict:
    taken = {}
    for name in [name for name in sys.modules if any(name == b or name.startswith(b + ".") for b in BOUND)]:
        taken[name] = sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # "from package import module" looks at the attribute first
            delattr(sys.modules.get(parent), child)
    return taken
