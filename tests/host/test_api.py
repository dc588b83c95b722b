"""The HTTP routes, on an app that has the web UI's own."""

from __future__ import annotations

import pytest
import torch
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient

from lib_subquad.checkpoint import from_shapes
from lib_subquad.engines import order
from lib_subquad.engines.table import Class, Found
from tests.checkpoint import public_models


def password(secret: str = ""):
    if secret != "secret":
        raise HTTPException(status_code=401)


@pytest.fixture
def app(loaded):
    from lib_subquad.webui import api

    def start(**own) -> TestClient:
        app = FastAPI()
        app.add_api_route("/sdapi/v1/options", lambda: {}, **own)
        app.openapi()  # remembered by then, as when somebody has looked at the page
        api.mount(None, app)
        return TestClient(app)

    return start


def test_no_routes_where_the_web_ui_has_none(subquad):
    from lib_subquad.webui import api

    app = FastAPI()
    api.mount(None, app)
    assert TestClient(app).get("/subquad/v1/status").status_code == 404


def test_behind_the_same_password(app):
    client = app(dependencies=[Depends(password)])
    for path in ("/subquad/v1/status", "/subquad/v1/plan", "/subquad/v1/measured"):
        assert client.get(path).status_code == 401
        assert client.get(f"{path}?secret=secret").status_code == 200
    assert client.delete("/subquad/v1/measured").status_code == 401
    assert client.delete("/subquad/v1/measured?secret=secret").status_code == 200


def test_status_before_and_after_an_image(app, loaded):
    client = app()
    loaded.select("subquad")
    loaded.status.begin()
    before = client.get("/subquad/v1/status").json()
    assert before["active"] and before["calls"] == 0 and before["engine"] is None
    from demo.generate import generate

    generate(prompt="a cat", seed=1, width=64, height=64, steps=1)
    after = client.get("/subquad/v1/status").json()
    assert after["calls"] > 0 and after["engine"] == "fused" and after["workspace_bytes"] > 0
    assert after["layers"] == 20 and after["out_of_reach"] == {} and "out of reach" not in after["summary"]
    loaded.select("sdp")
    assert not client.get("/subquad/v1/status").json()["active"]


def test_the_plan_has_a_row_for_every_shape(app, loaded):
    loaded.opts.data["subquad_query_chunk"] = 32
    answer = app().get("/subquad/v1/plan?width=64&height=128").json()
    assert {row["kind"] for row in answer["rows"]} == {"self", "cross"}
    assert max(row["query_chunk"] for row in answer["rows"]) == 32
    width, height = answer["largest_image"]
    assert abs(height - 2 * width) <= 64  # both are multiples of 64


def test_the_plan_tells_what_the_vae_takes(app, loaded, monkeypatch):
    from lib_subquad.webui import models

    assert all(half["usual_bytes"] > 0 for half in app().get("/subquad/v1/plan").json()["vae"])
    monkeypatch.setattr(models, "read", lambda title: from_shapes(public_models.tensors("sd15")))
    decoder, encoder = app().get("/subquad/v1/plan?width=512&height=1024").json()["vae"]
    assert (decoder["part"], encoder["part"]) == ("vae_decoder", "vae_encoder")
    assert 0 < decoder["bands_bytes"] < 0.41 * decoder["usual_bytes"] and decoder["band_rows"] > 0
    assert encoder["usual_bytes"] < decoder["usual_bytes"] and decoder["reasons"][0].startswith("all at once")


def test_what_was_measured_is_told_and_forgotten(app, loaded):
    client = app()
    here = order.machine(torch.device("cpu"))
    assert client.get("/subquad/v1/measured").json() == {
        "device": here.device,
        "torch": torch.__version__,
        "measured": [],
    }
    calls = Class("float32", "float32", 40, 40, "none", 4, 12, 6)
    other = here._replace(device="another card")
    table = order.table().with_found(here, {calls: Found("portable", 512, 0, 1.25)})
    order.go_by(table.with_found(other, {calls: Found("fused")}))
    (row,) = client.get("/subquad/v1/measured").json()["measured"]
    assert row == {
        "dtype": "float32", "value_dtype": "float32", "head_width": 40, "value_width": 40, "mask": "none",
        "heads": 16, "query_tokens": 4096, "key_tokens": 64,
        "engine": "portable", "query_chunk": 512, "kv_chunk": 0, "margin": 1.25, "disturbed": False,
    }  # fmt: skip
    assert client.delete("/subquad/v1/measured").json() == {"forgotten": 1}
    assert client.delete("/subquad/v1/measured").json() == {"forgotten": 0}
    assert list(order.table().machines) == [other]  # another device's are none of this one's


@pytest.mark.parametrize(
    "question", ["width=0", "height=16448", "batch=65", "width=wide", "checkpoint=/etc/passwd", "checkpoint=unknown"]
)
def test_what_cannot_be_answered(app, question):
    answer = app().get(f"/subquad/v1/plan?{question}")
    assert answer.status_code == 422 and answer.json()["detail"]


def test_its_openapi_page(app):
    paths = app().get("/openapi.json").json()["paths"]
    for path, how, schema in (
        ("plan", "get", "PlanResponse"),
        ("status", "get", "StatusResponse"),
        ("measured", "get", "MeasuredResponse"),
        ("measured", "delete", "ForgottenResponse"),
    ):
        answer = paths[f"/subquad/v1/{path}"][how]["responses"]["200"]["content"]["application/json"]
        assert answer["schema"]["$ref"].endswith(schema)
