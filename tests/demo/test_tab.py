"""The tab "Attention" on the demo's page."""

from __future__ import annotations

import pytest

from tests.attention_tab import ANSWER, AttentionTab, from_explain_to_undo, hidden_columns, set_number, wait_for

SLOW = 120_000  # milliseconds; a test machine may be busy


def test_from_explain_to_undo(page):
    def set_query_chunk(value):
        open_generate(page)
        set_number(page, "setting_subquad_query_chunk", value)
        wait_for(page, "#demo_settings_result", f"Query chunk size: {value}")

    def generate():
        open_generate(page)
        page.click("#demo_generate")
        page.wait_for_function("() => document.querySelector('#demo_infotext textarea').value.includes('Steps: 2')")
        return 64  # the demo was started with images of 64 x 64 pixels, of which a token has 8 x 8

    from_explain_to_undo(page, set_query_chunk, generate)


def open_generate(page) -> None:
    page.locator("#tabs button").get_by_text("Generate", exact=True).first.click()
    page.wait_for_selector("#demo_generate")


def test_undo_and_apply_with_nothing_to_do_say_so(page):
    tab = AttentionTab(page).open()
    tab.click("undo")
    tab.wait_for("#subquad_message", "nothing to undo")


@pytest.mark.parametrize("width", [390, 820])
def test_it_reads_on_a_phone(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(SLOW)
    page.goto(address, wait_until="domcontentloaded")
    tab = AttentionTab(page).open()
    tab.click("explain")
    tab.wait_for(ANSWER, "attention layers in the U-Net")
    assert hidden_columns(page) == []
    assert page.locator(f"{ANSWER} td").first.inner_text().splitlines() == ["Where", "U-Net, self"]
    assert page.locator(f"{ANSWER} td abbr[title]").first.is_visible()
    tab.open(side=64)
    tab.click("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")
    assert hidden_columns(page) == []
    overflow = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    page.close()


def test_on_a_wide_page_a_table_is_a_table(page):
    tab = AttentionTab(page).open()
    tab.click("explain")
    tab.wait_for(ANSWER, "attention layers in the U-Net")
    assert page.locator(f"{ANSWER} td").first.inner_text() == "U-Net, self"
    assert hidden_columns(page) == []


def test_cancel_takes_a_waiting_measure_out_of_the_queue(browser, address):
    """While another visitor measures, who is not disturbed by it."""
    pages = [browser.new_page() for _ in range(2)]
    for page in pages:
        page.set_default_timeout(SLOW)
        page.goto(address, wait_until="domcontentloaded")
    one, other = (AttentionTab(page).open(side=1024) for page in pages)  # of which measuring takes long
    one.click("measure")
    one.wait_until_measuring()
    other.open(side=64)
    other.click("measure")
    other.wait_for(ANSWER, "as soon as it is its turn")
    other.click("cancel")
    other.wait_for("#subquad_message", "Cancelled before its turn came")
    other.page.wait_for_function(
        "answer => ![...document.querySelectorAll(answer)].some(e => e.innerText.includes('queue'))", arg=ANSWER
    )
    other.click("cancel")
    other.wait_for("#subquad_message", "Nothing is being measured on this page")
    other.click("measure")  # it can be asked for again
    other.wait_for(ANSWER, "as soon as it is its turn")
    assert one.page.locator(f"{ANSWER} progress").count() == 1
    one.click("cancel")
    one.wait_for(ANSWER, "Cancelled")
    other.wait_for(f"{ANSWER} table", "recommended")
    for page in pages:
        page.close()


@pytest.mark.parametrize(
    ("typed", "words"), [("100000", "Width is 100000"), ("512.5", "Width is 512.5"), ("", "Width is empty")]
)
def test_a_size_that_cannot_be_is_said(page, typed, words):
    tab = AttentionTab(page).open(side=128)
    set_number(page, "subquad_width", typed)
    tab.click("explain")
    tab.wait_for(ANSWER, f"{words}; it must be a whole number from 64 to 16384.")
