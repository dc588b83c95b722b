"""Which checkpoints a visitor may ask about, and for which sizes."""

from __future__ import annotations

import pytest

from lib_subquad.checkpoint import from_shapes
from lib_subquad.console import UserError
from tests.checkpoint import public_models

LOADED = "the loaded checkpoint"


@pytest.fixture
def models(loaded):
    from lib_subquad.webui import models

    return models


def ask(models, title=LOADED, width=64, height=64, batch=1):
    return models.question(title, width, height, batch)


@pytest.mark.parametrize("value", [512.5, 63, 16385, -64, 0, "many", "512.5", "", None, True, [512], {"a": 1}, 10**400,
                                   float("inf"), float("nan")])  # fmt: skip
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_side_that_cannot_be_is_said_and_not_changed(models, side, value):
    with pytest.raises(UserError, match=rf"^{side.title()} is .*; it must be a whole number from 64 to 16384\.$"):
        ask(models, **{side: value})


@pytest.mark.parametrize("value", [0, 65, 1.5, True, "1.5", None])
def test_a_batch_that_cannot_be_is_said(models, value):
    with pytest.raises(UserError, match="^Batch size is .*; it must be a whole number from 1 to 64"):
        ask(models, batch=value)


@pytest.mark.parametrize("value", [512, 512.0, "512"])
def test_whole_numbers_of_any_type_are_taken(models, value):
    rows = ask(models, width=value, height=value).rows()
    assert max(row.problem.queries for row in rows) == 64 * 64


@pytest.mark.parametrize("title", [["a"], {"a": 1}, 5, True, "nowhere.safetensors"])
def test_a_title_of_any_type_gets_a_sentence(models, title):
    with pytest.raises(UserError, match="^There is no checkpoint .* on the web UI's list"):
        ask(models, title)


def test_a_size_that_is_computed_smaller_is_told(models):
    told = "Sizes go in steps of 8 pixels: 500 x 519 is computed as 496 x 512."
    assert told in ask(models, width=500, height=519).notes
    assert not any("computed as" in note for note in ask(models, width=504, height=512).notes)


@pytest.mark.parametrize(
    ("name", "runs"),
    [("sd15", True), ("sdxl_base", True), ("sd3_medium", True), ("sd35_medium", False), ("flux_dev", False)],
)
def test_a_model_that_the_web_ui_does_not_run_is_told(models, monkeypatch, name, runs):
    monkeypatch.setattr(models, "read", lambda title: from_shapes(public_models.tensors(name)))
    asked = ask(models, width=1024, height=1024)
    assert (models.NOT_RUN not in asked.notes) == runs
    assert {row.problem.queries for row in asked.rows() if row.kind == "joint"} <= {4096 + 77 + 77, 4096 + 77}
