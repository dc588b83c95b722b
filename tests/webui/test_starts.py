"""The web UI started in other ways: with its settings frozen, by its flags, and with its page."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib_subquad.settings import OPTIONS
from tests.attention_tab import AttentionTab, wait_for
from tests.pages import apply_settings, open_page, open_section, set_query_chunk

TITLE = "subquad - fast attention within a memory limit"


def test_frozen_settings_and_the_hosts_own_flags(webui):
    """Automatic takes ours for the built-in's flag, with its chunk size for a default; nothing can be set."""
    flags = ["--nowebui", "--opt-sub-quad-attention", "--sub-quad-q-chunk-size", "96", "--freeze-settings"]
    with webui.running(*flags) as server:
        server.wait_for(
            "Applying attention optimization: sub-quadratic (subquad)... done."
        )  # the model loads meanwhile
        assert server.options()["subquad_query_chunk"] == 96
        image, infotext = server.generate()
        assert "Subquad query chunk: 96" in infotext
        assert server.status()["active"] and server.status()["query_chunk"] == 96
        assert np.ptp(image) > 50
        assert "lib_subquad" not in server.log  # as the lines of a traceback would have it
        with pytest.raises(AssertionError, match="changing settings is disabled"):
            server.generate(override_settings={"subquad_query_chunk": 64})
        assert "Subquad query chunk: 96" in server.generate()[1]


def test_automatic_without_flags_is_the_hosts_own_choice(webui):
    with webui.running("--nowebui") as server:
        assert not server.status()["active"]
        server.select("Automatic")
        assert not server.status()["active"]


def test_a_word_that_is_not_known_here_outlives_apply_settings(webui, browser):
    """As another version may have saved it: told, shown, not used, and left as it was until somebody changes it."""

    def saved():
        return json.loads((webui.data / "config.json").read_text(encoding="utf8"))

    with webui.running(subquad_engine="hyperformers", cross_attention_optimization=TITLE) as server:
        assert server.log.count("[subquad] setting subquad_engine is 'hyperformers'") == 1
        page = open_page(browser, server)
        AttentionTab(page).open().wait_for(
            "#subquad_status", "Engine is set to 'hyperformers', which is not known here"
        )
        set_query_chunk(page, 96)
        assert (saved()["subquad_query_chunk"], saved()["subquad_engine"]) == (96, "hyperformers")
        _, infotext = server.generate()
        assert "Subquad query chunk: 96" in infotext and "Subquad engine" not in infotext
        page.locator("#setting_subquad_engine label", has_text="portable").first.click()
        apply_settings(page)
        wait_for(page, "#settings_result", "subquad_engine")  # what the last one said is there already
        assert saved()["subquad_engine"] == "portable"
        assert "Subquad engine: portable" in server.generate()[1]
        page.close()
        assert "Traceback" not in server.log


def test_a_checkpoint_that_cannot_be_loaded(webui, models):
    """The web UI has taken every optimization off by then without telling any, and goes on without one."""
    first, second, *_ = models
    broken = webui.data / "models" / "Stable-diffusion" / "broken.safetensors"
    with webui.running("--nowebui") as server:
        server.select(TITLE)
        server.load(first)
        image, _ = server.generate()
        broken.write_bytes(b"nothing")
        server.call("/sdapi/v1/refresh-checkpoints", {})
        server.options(sd_model_checkpoint=broken.name)
        broken.unlink()
        assert "changing setting sd_model_checkpoint to broken.safetensors" in server.log
        assert not server.status()["active"]
        again, _ = server.generate()
        assert server.status()["calls"] == 0 and np.abs(again - image).max() <= 1
        for model in (second, first):
            server.load(model)
            assert server.status()["active"]
            server.generate()
            assert server.status()["calls"] == model.calls()
        assert "lib_subquad" not in server.log  # as the lines of a traceback would have it


@pytest.fixture(scope="module")
def page(webui, browser):
    with webui.running() as server:
        server.select(TITLE)  # before there is a page: what it shows is what it applies
        page = open_page(browser, server)
        yield page
        page.close()


def test_the_section_shows_every_setting_with_its_help(page):
    open_section(page, "Sub-quadratic attention")
    shown = page.locator("#settings_subquad")
    shown.get_by_text(OPTIONS["retry"].help).wait_for()  # help comes by JavaScript
    for name, option in OPTIONS.items():
        assert page.locator(f"#setting_subquad_{name}").first.is_visible()
        assert option.label in shown.inner_text() and option.help in shown.inner_text()


def test_apply_takes_effect_at_the_next_image(page):
    assert "subquad_query_chunk" in set_query_chunk(page, 192)
    _, infotext = page.server.generate()
    assert "Subquad query chunk: 192" in infotext and page.server.status()["query_chunk"] == 192


def test_reload_ui(page):
    """Our entry is in force as before, once, and its settings are drawn once."""
    server = page.server
    image, _ = server.generate()
    applied = server.log.count("(subquad)... done.")
    page.click("#settings_restart_gradio")
    server.wait_for("Startup time:", times=server.log.count("Startup time:") + 1)
    again, _ = server.generate()
    assert np.abs(again - image).max() == 0
    assert server.log.count("(subquad)... done.") == applied + 1
    assert server.status()["active"] and server.status()["calls"] > 0
    reloaded = open_page(page.context.browser, server)
    open_section(reloaded, "Sub-quadratic attention")
    assert reloaded.locator("#settings_subquad #setting_subquad_engine").count() == 1
    assert "lib_subquad" not in server.log  # as the lines of a traceback would have it
