"""The tab's events over HTTP, as gradio's page and scripts send them: whatever is asked, the answer is a sentence."""

from __future__ import annotations

import contextlib
import json

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from tests.host.gradio_page import Page, sentences

BUTTONS = ("cancel", "apply", "undo", "forget", "decode", "dismiss")
LOADED = '"the loaded checkpoint"'
VISIT = "null"  # gradio's own
GOOD = [VISIT, LOADED, "64", "64", "1"]
# Anything that JSON, as Python reads it, can say.
ANYTHING = [
    *("null", "true", "false", "NaN", "Infinity", "1e400", "-1e400", "-5", "64.5", "1" + "0" * 400, "1" + "0" * 4000),
    *('""', '"x"', '"\\ud800"', '"512"', '"<b>"', '"' + "9" * 5000 + '"', '"the loaded checkpoint"'),
    *("[]", "[1]", '["the loaded checkpoint"]', "{}", '{"a": {}}', "[" * 200 + "]" * 200),
]


@pytest.fixture
def page(loaded):
    from demo.page import build

    page = Page(build("a prompt", 1, (64, 64), 1).queue())
    with page.client:
        yield page


def test_every_event_is_known_here(page):
    assert set(page.events) == {
        *((f"subquad_{name}", "change") for name in ("checkpoint", "width", "height", "batch")),
        ("subquad_ask", "click"),
        ("subquad_look", "click"),
        ("subquad_stop", "click"),
        ("subquad_stop", "then"),
        ("subquad_take_in", "upload"),
        ("subquad_take_in", "then"),
        *((f"subquad_{name}", "click") for name in ("measure", *BUTTONS)),
        *((f"subquad_{name}", "then") for name in ("go", "measure", *BUTTONS)),
        ("subquad_go", "change"),
        ("tab_subquad_tab", "select"),
        *([("subquad_gone", "change")] if gr.__version__.startswith("3.") else []),
    }


@pytest.mark.parametrize("event", [("subquad_width", "change"), ("subquad_go", "change")], ids=" ".join)
@pytest.mark.parametrize("slot", range(1, 5), ids=["checkpoint", "width", "height", "batch"])
def test_a_question_of_any_type_gets_a_sentence(page, event, slot, monkeypatch):
    from lib_subquad.lab.tune import exploration

    monkeypatch.setattr(exploration.Exploration, "run", lambda explored: iter(()))  # measures nothing: fast
    for value in ANYTHING:
        data = [*GOOD[:slot], value, *GOOD[slot + 1 :]]
        # what answers again and again needs a session in gradio 3
        for session in ("somebody", None) if event[0] == "subquad_width" else ("somebody",):
            said = sentences(page.send(*event, data, session))
            assert (
                "must be" in said or "There is no checkpoint" in said or "layers in" in said or "Nothing fits" in said
            )
            assert "That did not work" not in said


@pytest.mark.parametrize("value", ["null", "[]", '{"running": true}', '"\\ud800"', "1e400"])
@pytest.mark.parametrize(
    ("element", "said"),
    [
        ("subquad_cancel", "Nothing is being measured on this page."),
        ("subquad_apply", "Measure first"),
        ("subquad_undo", "There is nothing to undo."),
        ("subquad_forget", "Nothing has been measured on this device."),
        ("subquad_decode", "Nothing waits to be decoded."),
        ("subquad_dismiss", "Nothing waits to be decoded."),
        ("subquad_stop", "Nothing is being decoded."),
        ("subquad_measure", "Measuring begins as soon as it is its turn."),
        ("subquad_ask", "subquad is not active"),
        ("subquad_look", "subquad is not active"),
    ],
)
@pytest.mark.parametrize("session", ["somebody", None])
def test_buttons_that_take_no_question_ignore_what_is_sent(page, element, said, value, session):
    if element == "subquad_decode" and session is None:
        pytest.skip("what answers again and again needs a session in gradio 3")
    assert said in sentences(page.send(element, "click", [value], session))


def test_the_tab_asks_anew_when_it_is_shown(page, loaded):
    loaded.select("subquad")
    assert "subquad is active" in sentences(page.send("tab_subquad_tab", "select", [], "somebody"))
    loaded.select("sdp")
    assert "subquad is not active" in sentences(page.send("tab_subquad_tab", "select", [], "somebody"))


def test_the_size_that_was_used_last_is_asked_about(page, loaded):
    """That of the page's sliders, as long as there was no image; what was typed stays until another was used."""
    from lib_subquad.webui import status

    def told(sliders):
        sent = [*GOOD, json.dumps(sliders)]
        return sentences(page.send("tab_subquad_tab", "select", sent, "somebody"))

    loaded.select("subquad")
    for sliders in ("nonsense", "[1e999, 1, 1]", "[null, null, null]", "{}", "3"):
        assert "at <bdi>64 × 64</bdi> on" in told(sliders)
    assert "at <bdi>2</bdi> images of <bdi>192 × 256</bdi> on" in told("[192, 256, 2]")
    assert "at <bdi>64 × 64</bdi> on" in told("[192, 256, 2]")
    status.begin(status.Images(320, 128, 1))
    assert "at <bdi>320 × 128</bdi> on" in told("[192, 256, 2]")
    assert "at <bdi>64 × 64</bdi> on" in told("[512, 512, 2]")


def test_an_infotext_of_any_request_leaves_a_size_or_none(loaded):
    from types import SimpleNamespace

    from lib_subquad.webui import status

    for given, images in (
        ({"width": 64, "height": 128, "batch_size": 2}, (64, 128, 2)),
        ({"width": None, "height": "x", "batch_size": 2}, None),
        ({}, None),
    ):
        before = status.generation().number
        loaded.infotext.begin(SimpleNamespace(extra_generation_params={}, **given))
        assert (status.generation().images, status.generation().number) == (images, before + 1)


def test_what_nobody_foresaw_gets_a_sentence_too(loaded, monkeypatch, capsys):
    """In the words of the error, whatever they are made of; the console has where it came from."""
    from demo.page import build
    from lib_subquad.webui import models
    from lib_subquad.webui.laboratory import LABORATORY

    def broken(*_):
        raise RuntimeError("half a character \ud800 <b>")

    tried = ("apply", "undo", "forget", "cancel", "decode", "dismiss", "take_in", "stop_decoding", "request", "look")
    for name in tried:
        monkeypatch.setattr(LABORATORY, name, broken)
    page = Page(build("a prompt", 1, (64, 64), 1).queue())
    for name in ("question", "titles"):
        monkeypatch.setattr(models, name, broken)
    events = [event for event in page.events if event != ("subquad_gone", "change")]
    with page.client:
        for event in events:
            sent = [] if event[0] == "subquad_take_in" else GOOD  # gradio refuses what is no file
            said = sentences(page.send(*event, sent, "somebody"))
            assert "That did not work: RuntimeError: half a character \\ud800 &lt;b&gt;" in said
    assert capsys.readouterr().out.count("Traceback") == len(events)


def test_cancel_takes_a_waiting_measure_out_of_the_queue(page, monkeypatch):
    from lib_subquad.webui.laboratory import LABORATORY

    measured = []
    monkeypatch.setattr(LABORATORY, "_measure", lambda *question: iter([measured.append(question) or "measured"]))
    page.send("subquad_measure", "click", [], "one")
    assert "Cancelled before its turn came" in sentences(page.send("subquad_cancel", "click", [], "one"))
    page.send("subquad_go", "change", GOOD, "one")
    assert not measured
    page.send("subquad_measure", "click", [], "one")
    assert "Nothing is being measured" in sentences(page.send("subquad_cancel", "click", [], "other"))
    assert "measured" in sentences(page.send("subquad_go", "change", GOOD, "one")) and len(measured) == 1


@pytest.mark.skipif(gr.__version__.startswith("3."), reason="gradio 3 takes what is cancelled out of its queue")
def test_what_gradio_would_answer_all_the_same_is_not_cancelled(page):
    """Gradio 4 ends a page's stream with a KeyError at the answer of an event that the page has cancelled."""
    events = page.client.get("/config").json()["dependencies"]
    assert events and not [event for event in events if event["cancels"]]


def test_without_gradios_queue_it_measures_all_the_same(loaded, monkeypatch):
    """A web UI that was started so does not start at all if an event could be cancelled."""
    from modules import shared

    from demo.page import build

    monkeypatch.setattr(shared.cmd_opts, "no_gradio_queue", True, raising=False)
    blocks = build("a prompt", 1, (64, 64), 1)
    blocks.progress_tracking = False  # of the demo's own buttons
    if gr.__version__.startswith("3."):
        blocks.validate_queue_settings()
    page = Page(blocks)
    with page.client:
        page.send("subquad_measure", "click", [], "one")
        [answer] = page.send("subquad_go", "change", GOOD, "one")
    assert "recommended" in answer[0]


def test_notes_that_json_cannot_carry(loaded, monkeypatch):
    from lib_subquad.checkpoint import CheckpointError
    from lib_subquad.webui import api, models

    app = api.FastAPI()
    app.add_api_route("/sdapi/v1/options", lambda: {})
    api.mount(None, app)
    client = TestClient(app)
    from dataclasses import replace

    found = replace(models.read(None), notes=("a tensor called \ud800",))
    loaded.select("subquad")
    with monkeypatch.context() as patch:
        patch.setattr(models, "read", lambda title: found)
        assert client.get("/subquad/v1/plan?width=64&height=64").json()["notes"] == ["a tensor called \\ud800"]

    def unreadable(*_):
        raise CheckpointError("there is no file \udcff")

    monkeypatch.setattr(models, "from_shapes", unreadable)
    response = client.get("/subquad/v1/plan")
    assert response.status_code == 422 and response.json()["detail"] == "there is no file \\udcff"


@pytest.mark.parametrize("value", ["null", "[1]", "{}", "NaN", "1e400", "true", "64.5", "", "9" * 4000, "9" * 5000])
@pytest.mark.parametrize("name", ["width", "height", "batch", "checkpoint"])
def test_a_plan_asked_for_over_http(loaded, name, value):
    from lib_subquad.webui import api

    app = api.FastAPI()
    app.add_api_route("/sdapi/v1/options", lambda: {})
    api.mount(None, app)
    response = TestClient(app).get("/subquad/v1/plan", params={"width": 64, "height": 64, name: value})
    assert response.status_code == (200 if (name, value) == ("checkpoint", "") else 422)
    with contextlib.suppress(KeyError):
        assert response.json()["detail"]
