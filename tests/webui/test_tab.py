"""The tab "Attention" on the web UI's own page, and who waits for whom."""

from __future__ import annotations

import threading

import pytest

from tests.attention_tab import ANSWER, DETAILS, SENTENCE, AttentionTab, from_answer_to_undo
from tests.pages import generate, open_page, set_number, set_query_chunk
from tests.real_tab import (
    it_reads_at_every_width_and_for_everyone,
    the_answer_comes_by_itself,
    the_status_is_current,
    whoever_makes_others_wait_is_asked_first,
)
from tests.webui.conftest import SDP, TITLE


@pytest.fixture(scope="module")
def page(webui, browser):
    with webui.running() as server:
        server.select(TITLE)
        yield open_page(browser, server)
        assert "Traceback" not in server.log


def test_from_answer_to_undo(page):
    from_answer_to_undo(page, lambda value: set_query_chunk(page, value), lambda: generate(page))
    assert page.server.options()["subquad_query_chunk"] == 1
    set_query_chunk(page, 0)


def test_the_checkpoints_are_those_of_the_web_ui(page):
    tab = AttentionTab(page).open(side=512)
    page.click("#subquad_checkpoint input")
    options = page.locator("#subquad_checkpoint ul li")
    options.nth(1).wait_for()
    assert "tiny-sd1.safetensors" in options.nth(1).inner_text()
    options.nth(1).click()
    tab.wait_for(SENTENCE, "at 512 × 512 on")
    tab.unfold()
    tab.wait_for(DETAILS, "attention layers in the U-Net")
    assert "64²" in page.locator(f"{DETAILS} tbody tr").first.inner_text()


def test_the_sliders_of_the_page_are_asked_about_before_the_first_image(webui, browser):
    """And whoever opens the tab without subquad, or without a model, is told what to do."""
    with webui.running() as server:
        page = open_page(browser, server)
        set_number(page, "txt2img_width", 192)
        tab = AttentionTab(page).open()
        tab.wait_for(SENTENCE, "subquad is not active: the web UI uses")
        assert "Select" in tab.sentence and tab.size == ("192", "512")
        server.select(TITLE)
        tab.wait_for(SENTENCE, "at 192 × 512 on")  # without a click
        page.close()


def test_the_answer_comes_by_itself(page):
    the_answer_comes_by_itself(page, lambda ours: page.server.select(TITLE if ours else SDP))


def test_without_a_checkpoint_it_says_where_one_belongs(webui, browser, tmp_path):
    with webui.running("--ckpt-dir", str(tmp_path), cross_attention_optimization=TITLE) as server:
        page = open_page(browser, server)
        tab = AttentionTab(page).open()
        tab.wait_for(SENTENCE, "No checkpoint is loaded yet. Put one into the web UI's folder of checkpoints.")
        tab.wait_for_buttons()
        page.close()


def test_the_status_is_current(webui, page):
    the_status_is_current(page, webui.model("SD 1").calls(5), width=128, height=128, steps=5)


def test_whoever_makes_others_wait_is_asked_first(page):
    whoever_makes_others_wait_is_asked_first(page)


def test_another_page_is_told_who_is_busy(page):
    tab = AttentionTab(page).open(side=1024)
    tab.click("measure")
    tab.wait_until_measuring()
    other = open_page(page.context.browser, page.server)
    others = AttentionTab(other).open(side=64)
    others.click("measure")
    others.wait_for("#subquad_message", "Others use this web UI now: another page measures or is about to.")
    others.wait_for_buttons("measure")
    other.close()
    assert page.locator(f"{ANSWER} progress").count()
    tab.click("cancel")
    tab.wait_for(ANSWER, "Cancelled")


def test_an_image_waits_while_measuring(page):
    """And has the device to itself afterwards, when measuring was cancelled."""
    tab = AttentionTab(page).open(side=1024)  # for which one call takes longer than the image does
    tab.click("measure")
    tab.wait_until_measuring()
    images = []
    making = threading.Thread(target=lambda: images.append(page.server.generate(width=64, height=64, steps=1)))
    making.start()
    page.wait_for_timeout(1500)  # many times what the image takes by itself
    assert making.is_alive() and page.locator(f"{ANSWER} progress").count()
    tab.click("cancel")
    tab.wait_for(ANSWER, "Cancelled")
    making.join(60)
    assert len(images) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_reads_at_every_width_and_for_everyone(page, theme):
    it_reads_at_every_width_and_for_everyone(page, theme)


def test_without_gradios_queue(webui, browser):
    """The web UI starts, and Measure gives its answer when it is done."""
    with webui.running("--no-gradio-queue") as server:
        page = open_page(browser, server)
        tab = AttentionTab(page).open(side=64)
        tab.click("measure")
        tab.wait_for(f"{ANSWER} table", "recommended")
        page.close()
        assert "Traceback" not in server.log


def test_frozen_settings_get_a_message(webui, browser):
    flags = ["--opt-sub-quad-attention", "--sub-quad-q-chunk-size", "1", "--freeze-settings"]
    with webui.running(*flags) as server:
        page = open_page(browser, server)
        tab = AttentionTab(page).open(side=256)
        tab.click("measure")
        tab.wait_for(f"{ANSWER} table", "recommended")
        tab.click("apply")
        tab.wait_for("#subquad_message", "disabled")
        assert server.options()["subquad_query_chunk"] == 1
        page.close()
        assert "Traceback" not in server.log
