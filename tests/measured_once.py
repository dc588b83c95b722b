"""A real web UI measures a new size before its first image, and once."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np

from tests.servers import Installation, Server

SIZE = {"width": 192, "height": 448}
MEASURING = "[subquad] measuring which engine is fastest for 192 x 448: up to 5 seconds, once"


def measured_once(webui: Installation, server: Server) -> None:
    """With subquad in use, and the setting off as it is for all tests."""
    expected, _ = server.generate(**SIZE)
    assert MEASURING not in server.log
    told = []
    for _ in range(2):
        image, _ = server.generate(**SIZE, override_settings={"subquad_measure": True})
        assert np.abs(image - expected).max() <= 1
        told.append("Measured for 192 x 448: " in server.status()["summary"])
    assert told == [True, False]
    assert server.log.count(MEASURING) == server.log.count("[subquad] measured for 192 x 448: ") == 1
    assert "measuring failed" not in server.log

    path = webui.data / "subquad_measured.json"
    text = path.read_text(encoding="utf-8")
    (machine,) = json.loads(text)["machines"]
    for folder in (webui.data, webui.folder, Path.home()):
        assert str(folder) not in text
    assert len(server.call("/subquad/v1/measured")["measured"]) == len(machine["found"]) > 0

    forget = urllib.request.Request(f"{server.url}/subquad/v1/measured", method="DELETE")
    with urllib.request.urlopen(forget) as answer:
        assert json.load(answer) == {"forgotten": len(machine["found"])}
    assert not json.loads(path.read_text(encoding="utf-8"))["machines"]
    server.generate(**SIZE, override_settings={"subquad_measure": True})
    assert server.log.count(MEASURING) == 2
