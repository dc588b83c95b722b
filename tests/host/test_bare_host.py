"""A web UI that has callbacks, scripts and options, and nothing else that we know."""

from __future__ import annotations

import importlib
import re
import sys
from html import unescape
from types import ModuleType, SimpleNamespace

import gradio as gr
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_subquad.settings import OPTIONS
from tests.host import function_hosts
from tests.host.gradio_page import Page, sentences

INACTIVE = "subquad is not active here: this web UI keeps its attention where no extension can replace it."


@pytest.fixture
def bare(host, monkeypatch):
    """The demo's callbacks, scripts and options, in a `modules` that has no more than these."""
    callbacks, scripts, shared = (
        importlib.import_module(f"modules.{name}") for name in ("script_callbacks", "scripts", "shared")
    )
    callbacks.clear_callbacks()
    monkeypatch.delattr(callbacks, "on_list_optimizers")
    least = ModuleType("modules.shared")
    least.opts, least.OptionInfo, least.cmd_opts = shared.opts, shared.OptionInfo, shared.cmd_opts
    for name in [name for name in sys.modules if name.startswith("modules.")]:
        monkeypatch.delitem(sys.modules, name)
    package = ModuleType("modules")
    for name, module in (("script_callbacks", callbacks), ("scripts", scripts), ("shared", least)):
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    monkeypatch.setitem(sys.modules, "modules", package)
    return SimpleNamespace(callbacks=callbacks, scripts=scripts, opts=least.opts)


@pytest.fixture
def loaded(bare, capsys):
    function_hosts.load_extension()
    told = capsys.readouterr()
    assert "Traceback" not in told.err + told.out and "Error" not in told.err + told.out
    return bare


def text(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", "", html, flags=re.S))).strip()


def test_the_door_opens_and_the_settings_are_there(loaded):
    assert {name for name in sys.modules if name.startswith("modules.")} == {
        "modules.script_callbacks",
        "modules.scripts",
        "modules.shared",
    }
    assert [data.script_class.__name__ for data in loaded.scripts.scripts_data] == ["Subquad"]
    assert {name for name in loaded.opts.data_labels if name.startswith("subquad_")} == {
        f"subquad_{name}" for name in OPTIONS
    }
    assert loaded.opts.set("subquad_query_chunk", 512)


def test_reload_and_images_go_on(loaded, capsys):
    p = SimpleNamespace(extra_generation_params={}, override_settings={})
    for _ in range(2):
        function_hosts.reload_extension()
        script = loaded.scripts.scripts_txt2img.alwayson_scripts[0]
        for stage in ("before_process", "process", "process_batch", "process_before_every_sampling"):
            getattr(script, stage)(p)
        script.postprocess_batch(p)
    assert p.extra_generation_params == {}
    assert "Error" not in capsys.readouterr().err


def test_a_web_ui_that_does_not_show_its_model_measures_nothing(loaded, monkeypatch, capsys):
    from lib_subquad.webui import measuring
    from lib_subquad.webui.hosts import host

    monkeypatch.setattr(type(host()), "active", True)
    for _ in range(2):
        measuring.before(SimpleNamespace(width=512, height=512, batch_size=1))
    assert capsys.readouterr().out.splitlines() == [
        "[subquad] nothing is measured before an image, and rules decide: "
        "This web UI does not show the loaded checkpoint"
    ]


def test_it_says_that_it_is_not_active_and_why(loaded):
    from lib_subquad.webui.laboratory import LABORATORY

    line = text(LABORATORY.status())
    assert line.startswith(INACTIVE) and "No image has been made with subquad yet." in line
    assert "a list of optimizations or attention as a function" in line


def test_the_api_answers(loaded):
    app = FastAPI()
    app.add_api_route("/sdapi/v1/options", lambda: {})
    loaded.callbacks.app_started_callback(None, app)
    client = TestClient(app)
    state = client.get("/subquad/v1/status").json()
    assert not state["active"] and state["standing"].startswith(INACTIVE) and state["calls"] == state["layers"] == 0
    refused = client.get("/subquad/v1/plan")
    assert refused.status_code == 422
    assert refused.json()["detail"] == ("This web UI does not show the loaded checkpoint. Choose one from the list.")


@pytest.fixture
def page(loaded):
    with gr.Blocks(analytics_enabled=False) as blocks, gr.Tabs():
        for tab, title, element in loaded.callbacks.ui_tabs_callback():
            with gr.TabItem(title, id=element, elem_id=f"tab_{element}"):
                tab.render()
    page = Page(blocks.queue())
    with page.client:
        yield page


@pytest.mark.parametrize(
    ("element", "how", "said"),
    [
        ("tab_subquad_tab", "select", "subquad is not active here"),
        ("subquad_checkpoint", "change", "does not show the loaded checkpoint"),
        ("subquad_width", "change", "does not show the loaded checkpoint"),
        ("subquad_height", "change", "does not show the loaded checkpoint"),
        ("subquad_batch", "change", "does not show the loaded checkpoint"),
        ("subquad_ask", "click", "does not show the loaded checkpoint"),
        ("subquad_look", "click", "does not show the loaded checkpoint"),
        ("subquad_measure", "click", "Measuring begins as soon as it is its turn."),
        ("subquad_go", "change", "does not show the loaded checkpoint"),
        ("subquad_cancel", "click", "Nothing is being measured on this page."),
        ("subquad_apply", "click", "Measure first: there is nothing to apply yet."),
        ("subquad_undo", "click", "There is nothing to undo."),
        ("subquad_forget", "click", "Nothing has been measured on this device."),
        ("subquad_decode", "click", "Nothing waits to be decoded."),
        ("subquad_dismiss", "click", "Nothing waits to be decoded."),
        ("subquad_take_in", "upload", "This web UI shows no way to decode it."),
        ("subquad_stop", "click", "Nothing is being decoded."),
    ],
)
def test_every_button_answers_with_a_sentence(page, element, how, said):
    asks = how in ("then", "change", "select") or element in ("subquad_ask", "subquad_look")
    question = ["null", '"the loaded checkpoint"', "64", "64", "1"] if asks else ["null"]
    answer = sentences(page.send(element, how, question, "somebody"))
    assert said in answer and "That did not work" not in answer


def test_all_buttons_were_tried(page):
    tried = {element for element, *_ in test_every_button_answers_with_a_sentence.pytestmark[0].args[1]}
    assert {element for element, _ in page.events} - {"subquad_gone"} == tried


def test_what_is_asked_of_a_host_has_an_answer(loaded):
    from lib_subquad.webui.hosts import host

    found = host()
    assert type(found).__name__ == "Host" and not found.active and not found.has_switch
    assert found.callbacks() == {} and found.checkpoints() == {}
    assert (found.device(), found.dtype()) == (torch.device("cpu"), torch.float32)
    assert found.settings().upcast == "never" and not found.interrupted() and found.reach(set()).owners == {}
    assert found.lock().acquire(blocking=False)
    found.lock().release()
    assert found.set("subquad_query_chunk", 256) and found.save() is None
    found.prepare()
    found.undo()


def test_a_list_of_checkpoints_is_all_that_explain_needs(loaded, monkeypatch, tmp_path):
    """Where the web UI has one, whatever else it has."""
    safetensors = pytest.importorskip("safetensors.torch")
    from demo.model import random_model

    file = tmp_path / "tiny.safetensors"
    safetensors.save_file({name: it.half().clone() for name, it in random_model().state_dict().items()}, str(file))
    models = ModuleType("modules.sd_models")
    models.checkpoints_list = {"tiny": SimpleNamespace(filename=str(file))}
    monkeypatch.setitem(sys.modules, "modules.sd_models", models)
    from lib_subquad.webui.laboratory import LABORATORY

    assert "attention layers in the U-Net" in text(LABORATORY.look("tiny", 64, 64, 1)[1])
