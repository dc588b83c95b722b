"""Images of tests of something else, which wait for no measurement: import the fixture into a folder's conftest."""

from __future__ import annotations

import pytest

from lib_subquad.lab.measured import rounds


@pytest.fixture(autouse=True)
def nothing_is_measured():
    """With a monkeypatch of its own: that of a test is to be undone before the host's classes get their own forwards
    back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "unknown", lambda problems, settings: [])
        yield
