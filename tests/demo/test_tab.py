"""The tab "Attention" on the demo's page."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lib_subquad.webui import latents
from tests.accessibility import violations
from tests.attention_tab import (
    ANSWER,
    DETAILS,
    SENTENCE,
    AttentionTab,
    cut_off,
    from_answer_to_undo,
    set_number,
    wait_for,
)

SLOW = 120_000  # milliseconds; a test machine may be busy


def test_from_answer_to_undo(page):
    def set_query_chunk(value):
        open_generate(page)
        set_number(page, "setting_subquad_query_chunk", value)
        wait_for(page, "#demo_settings_result", f"Query chunk size: {value}")

    def generate():
        open_generate(page)
        page.click("#demo_generate")
        page.wait_for_function("() => document.querySelector('#demo_infotext textarea').value.includes('Steps: 2')")
        return 64  # the demo was started with images of 64 x 64 pixels, of which a token has 8 x 8

    from_answer_to_undo(page, set_query_chunk, generate)


def open_generate(page) -> None:
    page.locator("#tabs button").get_by_text("Generate", exact=True).first.click()
    page.wait_for_selector("#demo_generate")


def opened(browser, address, **how):
    page = browser.new_page(**how)
    page.set_default_timeout(SLOW)
    page.goto(address, wait_until="domcontentloaded")
    return page


def test_the_answer_is_there_and_follows_the_question(page):
    tab = AttentionTab(page)
    tab.open()
    page.wait_for_timeout(1000)  # at most: nobody presses anything
    assert " layers, at most " in tab.sentence and tab.sentence.startswith("A model like Stable Diffusion 1.x at")
    for side in (64, 192):
        set_number(page, "subquad_height", side)
        tab.wait_for(SENTENCE, f" × {side} on ")
    set_number(page, "subquad_batch", 3)
    tab.wait_for(SENTENCE, "at 3 images of")


def test_each_letter_of_a_number_is_answered_in_order(page):
    tab = AttentionTab(page).open(side=512)
    tab.wait_for(SENTENCE, "at 512 × 512 on")
    field = page.locator("#subquad_width input").first
    field.fill("")
    tab.wait_for(SENTENCE, "Width is empty or no number; it must be a whole number from 64 to 16384.")
    tab.wait_for_buttons()  # nothing can be pressed
    field.press("1")
    tab.wait_for(SENTENCE, "Width is 1; it must be")
    field.press("2")
    field.press("8")
    tab.wait_for(SENTENCE, "at 128 × 512 on")
    tab.wait_for_buttons("measure")


def test_one_bar_is_all_that_is_shown_of_progress(page):
    """Gradio would draw a line for each of the answers that are yet to come, over empty space."""
    tab = AttentionTab(page).open(side=1024)  # of which measuring takes long
    tab.click("measure")
    tab.wait_until_measuring()
    page.wait_for_timeout(500)
    shown = page.evaluate(
        """() => [...document.querySelectorAll("#subquad_page .generating, #subquad_page progress")]
            .filter(it => it.getClientRects().length).map(it => it.tagName)"""
    )
    assert shown == ["PROGRESS"]
    buttons, bar = (page.locator(it).first.bounding_box() for it in ("#subquad_cancel", f"{ANSWER} progress"))
    assert bar["y"] - (buttons["y"] + buttons["height"]) < 80
    tab.click("cancel")
    tab.wait_for(ANSWER, "Cancelled")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut_off_nor_scrolls_sideways(browser, address, width, theme):
    page = opened(browser, f"{address}/?__theme={theme}", viewport={"width": width, "height": 800})
    try:
        tab = AttentionTab(page).open(side=64)
        for fold in ("details_fold", "about"):
            tab.unfold(fold)
        tab.wait_for(DETAILS, "attention layers in the U-Net")
        tab.click("measure")
        tab.wait_for(f"{ANSWER} table", "recommended")
        page.wait_for_selector("#subquad_plot img, #subquad_plot svg")
        for zoom in (1, 2):  # as the browser does: half as many pixels, each twice as large
            page.set_viewport_size({"width": width // zoom, "height": 800})
            page.wait_for_timeout(300)
            assert cut_off(page) == [], f"at {width} pixels, {zoom * 100} %"
        page.set_viewport_size({"width": width, "height": 800})
        first = page.locator(f"{DETAILS} td").first.inner_text().split("\n")
        assert first[-1].startswith("U-Net, ") and first[:-1] == ([] if width == 1280 else ["Where"])
    finally:
        page.close()


def test_what_is_cut_off_is_found(page):
    AttentionTab(page).open()
    assert cut_off(page) == []
    page.evaluate("document.querySelector('#subquad_sentence p').style.width = '3000px'")
    assert cut_off(page)[0].startswith("DIV subquad_page")


def test_the_status_is_current_without_a_click(browser, address, page):
    """An image that another page makes is told here, and so is one that was made while another page was looked at."""
    tab = AttentionTab(page).open(side=64)
    before = tab.status
    other = opened(browser, address)
    try:
        other.wait_for_selector("#demo_generate")
        set_number(other, "demo_width", 128)
        other.click("#demo_generate")
        page.wait_for_function(
            "before => ![...document.querySelectorAll('#subquad_status')].some(it => it.innerText === before)",
            arg=before,
        )
        tab.wait_for("#subquad_status", "Last generation")
        assert tab.size == ("64", "64")  # what was typed stays while it is looked at
    finally:
        other.close()


def test_what_was_kept_is_decoded(page, data_folder):
    """The button is there as long as something waits, on a phone as well."""
    made = {"infotext": "a cat\nSteps: 2", "seed": 7, "prompt": "a cat"}
    path = latents.keep(torch.randn(1, 4, 8, 8), {}, [made], [data_folder / "images"], data_folder)
    page.set_viewport_size({"width": 390, "height": 800})
    tab = AttentionTab(page).open(side=64)
    tab.wait_for("#subquad_kept", path.name)
    assert cut_off(page) == violations(page) == []
    tab.click("decode")
    tab.wait_for("#subquad_kept", f"Decoded {path.name}: ")
    page.wait_for_selector("#subquad_decode", state="hidden")
    assert cut_off(page) == []
    (image,) = path.parent.glob("*.png")
    assert Image.open(image).info["parameters"] == made["infotext"]


def test_every_page_tells_what_became_of_it(browser, address, data_folder):
    path = latents.keep(torch.randn(1, 4, 8, 8), {}, [{"seed": 1}], [data_folder / "images"], data_folder)
    pages = [opened(browser, address) for _ in range(2)]
    try:
        one, other = (AttentionTab(page).open(side=64) for page in pages)
        one.click("decode")
        for tab in (one, other):
            tab.wait_for("#subquad_kept", f"Decoded {path.name}: ")
            tab.page.wait_for_selector("#subquad_decode", state="hidden")
        assert other.page.locator("#subquad_message").first.inner_text().strip() == ""
    finally:
        for page in pages:
            page.close()


def test_what_nobody_wants_is_dismissed(page, data_folder):
    path = latents.keep(torch.randn(1, 4, 8, 8), {}, [{"seed": 1}], [data_folder / "images"], data_folder)
    page.set_viewport_size({"width": 390, "height": 800})
    tab = AttentionTab(page).open(side=64)
    tab.wait_for("#subquad_kept", path.name)
    tab.click("dismiss")
    tab.wait_for("#subquad_message", f"Taken off the list: {path}")
    page.wait_for_selector("#subquad_dismiss", state="hidden")
    assert path.is_file() and not latents.waiting(data_folder)
    assert cut_off(page) == violations(page) == []


def test_what_was_dismissed_is_taken_in_again(page, data_folder):
    """Under *About*; what is no kept file is refused in words."""
    path = latents.keep(torch.randn(1, 4, 8, 8), {}, [{"seed": 1}], [data_folder / "images"], data_folder)
    latents.take_off(path, data_folder)
    page.set_viewport_size({"width": 390, "height": 800})
    tab = AttentionTab(page).open(side=64)
    tab.unfold("about")

    def take_in(file):
        with page.expect_file_chooser() as chooser:
            tab.click("take_in")
        chooser.value.set_files(str(file))

    other = data_folder / "other.safetensors"
    other.write_bytes(b"nothing")
    take_in(other)
    tab.wait_for("#subquad_taken", "It is not taken in: it is damaged")
    take_in(path)
    tab.wait_for("#subquad_taken", "Taken in: it waits to be decoded")
    page.wait_for_selector("#subquad_decode", state="visible")
    assert cut_off(page) == violations(page) == []
    (copy,) = latents.waiting(data_folder)
    assert latents.read(copy).images[0]["seed"] == 1
    latents.take_off(copy, data_folder)


def test_cancel_takes_a_waiting_measure_out_of_the_queue(browser, address):
    """While another visitor measures, who is not disturbed by it."""
    pages = [opened(browser, address) for _ in range(2)]
    one, other = (AttentionTab(page).open(side=1024) for page in pages)  # of which measuring takes long
    one.click("measure")
    one.wait_until_measuring()
    other.open(side=64)
    other.click("measure")
    other.wait_for("#subquad_message", "Others use this web UI now: another page measures or is about to.")
    other.wait_for("#subquad_measure", "Measure all the same")
    other.wait_for_buttons("measure")
    other.click("measure")
    other.wait_for(ANSWER, "as soon as it is its turn")
    other.wait_for_buttons("cancel")
    other.click("cancel")
    other.wait_for("#subquad_message", "Cancelled before its turn came")
    other.page.wait_for_function(
        "answer => ![...document.querySelectorAll(answer)].some(e => e.innerText.includes('queue'))", arg=ANSWER
    )
    other.wait_for_buttons("measure")
    other.click("measure")  # it can be asked for again
    other.wait_for("#subquad_measure", "Measure all the same")
    other.click("measure")
    other.wait_for(ANSWER, "as soon as it is its turn")
    assert one.page.locator(f"{ANSWER} progress").count() == 1
    one.click("cancel")
    one.wait_for(ANSWER, "Cancelled")
    other.wait_for(f"{ANSWER} table", "recommended")
    for page in pages:
        page.close()


@pytest.mark.parametrize(
    ("typed", "words"),
    [("100000", "Width is 100000"), ("512.5", "Width is 512.5"), ("", "Width is empty or no number")],
)
def test_a_size_that_cannot_be_is_said(page, typed, words):
    tab = AttentionTab(page).open(side=128)
    set_number(page, "subquad_width", typed)
    tab.wait_for(SENTENCE, f"{words}; it must be a whole number from 64 to 16384.")
