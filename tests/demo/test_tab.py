"""The tab "Attention" on the demo's page."""

from __future__ import annotations

from tests.attention_tab import ANSWER, AttentionTab, from_explain_to_undo, set_number, wait_for


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


def test_it_reads_on_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(120_000)
    page.goto(address, wait_until="domcontentloaded")
    tab = AttentionTab(page).open()
    tab.click("explain")
    tab.wait_for(ANSWER, "attention layers in the U-Net")
    overflow = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    page.close()
