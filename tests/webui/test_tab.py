"""The tab "Attention" on the web UI's own page, and who waits for whom."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.accessibility import turned_around, violations
from tests.attention_tab import ANSWER, DETAILS, SENTENCE, AttentionTab, cut_off, from_answer_to_undo
from tests.pages import generate, open_page, set_number, set_query_chunk

TITLE = "subquad - fast attention within a memory limit"


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


def test_the_answer_is_right_and_comes_by_itself(page):
    server = page.server
    tab = AttentionTab(page).open(side=512)
    tab.wait_for(SENTENCE, "at 512 × 512 on")
    assert "PyTorch's fused kernel in all" in tab.sentence and tab.sentence.endswith("Nothing to gain.")
    server.options(subquad_engine="portable")
    tab.wait_for(SENTENCE, "no layer has a fused kernel, because the engine is set to portable.")
    assert tab.sentence.endswith("Measure tells which is faster.")
    server.options(subquad_engine="automatic", subquad_memory_limit=10)
    for name, value in (("width", 16384), ("height", 16384), ("batch", 64)):
        set_number(page, f"subquad_{name}", value)
    tab.wait_for(SENTENCE, "at 64 images of 16384 × 16384 on")
    assert "this does not fit. A call of attention takes" in tab.sentence
    tab.wait_for_buttons()  # nothing can be pressed
    server.select("sdp - scaled dot product")
    tab.wait_for(SENTENCE, "subquad is not active: the web UI uses sdp - scaled dot product. Select “subquad")
    server.select(TITLE)
    server.options(subquad_memory_limit=70)
    set_number(page, "subquad_batch", 1)


def test_without_a_checkpoint_it_says_where_one_belongs(webui, browser, tmp_path):
    with webui.running("--ckpt-dir", str(tmp_path), cross_attention_optimization=TITLE) as server:
        page = open_page(browser, server)
        tab = AttentionTab(page).open()
        tab.wait_for(SENTENCE, "No checkpoint is loaded yet. Put one into the web UI's folder of checkpoints.")
        tab.wait_for_buttons()
        page.close()


def test_the_status_is_current_without_a_click(webui, page):
    """An image that somebody else makes; what was typed stays."""
    tab = AttentionTab(page).open(side=64)
    steps = 5
    page.server.generate(width=128, height=128, steps=steps)
    tab.wait_for("#subquad_status", f"Last generation: {webui.model('SD 1').calls(steps)} calls")
    assert tab.size == ("64", "64")


@contextlib.contextmanager
def an_image_that_takes_long(server):
    """From its first step until it is interrupted, at the end."""
    making = threading.Thread(target=server.generate, kwargs={"width": 512, "height": 512, "steps": 150})
    making.start()
    while server.call("/sdapi/v1/progress?skip_current_image=true")["progress"] == 0:
        assert making.is_alive()
        time.sleep(0.2)
    try:
        yield
        assert making.is_alive()
    finally:
        server.ask("/sdapi/v1/interrupt", {})
        making.join()


def test_whoever_makes_others_wait_is_asked_first(page):
    """And waits until the image is made, or takes it back meanwhile."""
    with an_image_that_takes_long(page.server):
        tab = AttentionTab(page).open(side=64)
        for cancelled in (True, False):
            tab.click("measure")
            tab.wait_for("#subquad_message", "Others use this web UI now: an image is being made.")
            tab.wait_for("#subquad_measure", "Measure all the same")
            tab.wait_for_buttons("measure")
            tab.click("measure")
            tab.wait_for(ANSWER, "An image is being made: measuring begins when it is done.")
            tab.wait_for_buttons("cancel")
            if cancelled:
                tab.click("cancel")
                tab.wait_for("#subquad_message", "Cancelled before its turn came: nothing was measured.")
                tab.wait_for_buttons("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")


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
    opened = open_page(page.context.browser, page.server, f"/?__theme={theme}", viewport={"width": 1280, "height": 800})
    tab = AttentionTab(opened).open(side=64)
    for fold in ("details_fold", "about"):
        tab.unfold(fold)
    tab.wait_for(DETAILS, "attention layers in the U-Net")
    tab.click("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")
    opened.wait_for_selector("#subquad_plot svg[role=img]")
    for width in (1280, 768, 390):
        for zoom in (1, 2):  # as the browser does: half as many pixels, each twice as large
            opened.set_viewport_size({"width": width // zoom, "height": 800})
            opened.wait_for_timeout(300)
            assert cut_off(opened) == [], f"at {width} pixels, {zoom * 100} %"
            assert violations(opened) == []
    opened.evaluate("document.documentElement.dir = 'rtl'")
    assert turned_around(opened) == [] and cut_off(opened) == []
    opened.close()


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
