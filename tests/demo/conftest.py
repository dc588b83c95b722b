"""An extension of one script, for the demo host to load."""

from __future__ import annotations

import pytest


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
