"""What is measured before the first image of a size."""

from __future__ import annotations

from tests.measured_once import measured_once


def test_a_new_size_is_measured_once(webui, server):
    server.load(webui.model("SD 1"))
    measured_once(webui, server)
