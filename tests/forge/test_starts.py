"""The web UI started in other ways: with its settings frozen, with broken ones saved, and behind a password."""

from __future__ import annotations

import json

import numpy as np

from tests.forge.models import CALLS
from tests.servers import status_of

PATHS = ("/subquad/v1/status", "/subquad/v1/plan")


def test_frozen_settings(forge):
    """What was saved holds, and nothing can be set."""
    saved = {"sd_model_checkpoint": forge.checkpoint, "subquad_use": "everything", "subquad_query_chunk": 96}
    with forge.running("--nowebui", "--freeze-settings", **saved) as server:  # newer ones end where none is saved
        image, infotext = server.generate()
        assert "Subquad use: everything" in infotext and "Subquad query chunk: 96" in infotext
        status = server.status()
        assert status["active"] and (status["query_chunk"], status["calls"]) == (96, CALLS + 1)
        assert np.ptp(image) > 50
        assert "lib_subquad" not in server.log  # as the lines of a traceback would have it


def test_saved_words_and_values_that_are_not_known_here(forge):
    """Told once, not used, and left as they were: another version may know them."""
    saved = {"subquad_use": "quantum", "subquad_engine": "hyperformers", "subquad_query_chunk": "a lot"}
    with forge.running("--nowebui", **saved) as server:
        for name, value in (("use", "quantum"), ("engine", "hyperformers"), ("query_chunk", "a lot")):
            assert server.log.count(f"[subquad] setting subquad_{name} is {value!r}") == 1
        _, infotext = server.generate()
        assert "Subquad" not in infotext and server.status()["calls"] == 0 and server.holders() == []
        server.options(samples_format="jpg")  # saves all
        kept = json.loads((forge.data / "config.json").read_text(encoding="utf-8"))
        assert (kept["subquad_use"], kept["subquad_engine"], kept["subquad_query_chunk"]) == (
            "quantum",
            "hyperformers",
            0,
        )
        server.use("everything")
        server.generate()
        assert server.status()["calls"] == CALLS + 1
    forge.check_log(server, "--nowebui")


def test_behind_the_same_password(forge):
    with forge.running("--nowebui", "--api-auth", "me:secret") as server:
        own = status_of(server, "/sdapi/v1/options")
        assert own == status_of(server, PATHS[0]) == status_of(server, PATHS[1]) == 401
        assert status_of(server, PATHS[0], "me:wrong") == 401
        for path in PATHS:
            assert status_of(server, path, "me:secret") == 200
