"""The tab "Attention" through headless Chromium: explain, measure, cancel, measure, apply, generate, undo."""

import pytest

ANSWER = "#subquad_answer"


@pytest.fixture
def tab(page):
    page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
    page.wait_for_selector("#subquad_explain")
    set_number(page, "subquad_width", 256)
    set_number(page, "subquad_height", 256)
    return page


def set_number(page, elem_id, value):
    number = page.locator(f"#{elem_id} input[type=number]").first
    number.fill(str(value))
    number.press("Tab")


def shown(page, elem_id):
    return page.locator(f"#{elem_id}").last.inner_text()


def wait_for(page, selector, part):
    page.wait_for_function(
        "([selector, part]) => [...document.querySelectorAll(selector)].some(e => e.innerText.includes(part))",
        arg=[selector, part],
    )


def slider(page, field):
    return page.locator(f'[id="setting_subquad_{field}"] input').first.input_value()


def engine(page):
    return page.locator('[id="setting_subquad_engine"] input:checked').input_value()


def test_from_explain_to_undo(tab):
    tab.click("#subquad_explain")
    wait_for(tab, ANSWER, "attention layers in the U-Net")
    assert tab.locator(f"{ANSWER} abbr[title]").count() >= 9
    rows = tab.locator(f"{ANSWER} tbody tr")
    assert "1024" in rows.first.inner_text()

    tab.click("#subquad_measure")
    tab.wait_for_selector(f"{ANSWER} progress")
    tab.click("#subquad_cancel")
    wait_for(tab, ANSWER, "Cancelled")

    # A setting that Automatic beats by far, so that there is something to apply.
    set_slow_setting(tab)
    tab.click("#subquad_measure")
    tab.wait_for_selector(f"{ANSWER} progress")
    wait_for(tab, f"{ANSWER} table", "recommended")
    tab.wait_for_selector("#subquad_plot img")

    tab.click("#subquad_apply")
    wait_for(tab, "#subquad_message", "→")
    tab.wait_for_function("() => document.querySelector('[id=\"setting_subquad_query_chunk\"] input').value !== '1'")
    applied = slider(tab, "query_chunk"), slider(tab, "kv_chunk"), engine(tab)
    assert applied != ("1", "0", "automatic")

    open_generate(tab)
    tab.click("#demo_generate")
    tab.wait_for_function("() => document.querySelector('#demo_infotext textarea').value.includes('Steps: 2')")
    tab.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
    tab.click("#subquad_refresh")
    wait_for(tab, "#subquad_status", "Last generation")
    status = shown(tab, "subquad_status")
    assert "subquad is active" in status
    assert ", 1 x " not in status  # no longer one query at a time

    tab.click("#subquad_undo")
    tab.wait_for_function("() => document.querySelector('[id=\"setting_subquad_query_chunk\"] input').value === '1'")
    assert (slider(tab, "kv_chunk"), engine(tab)) == ("0", "automatic")


def set_slow_setting(page):
    open_generate(page)
    set_number(page, "setting_subquad_query_chunk", 1)
    wait_for(page, "#demo_settings_result", "Query chunk size: 1")
    page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()


def open_generate(page):
    page.locator("#tabs button").get_by_text("Generate", exact=True).first.click()
    page.wait_for_selector("#demo_generate")


def test_undo_and_apply_with_nothing_to_do_say_so(page):
    page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
    page.click("#subquad_undo")
    wait_for(page, "#subquad_message", "nothing to undo")


def test_it_reads_on_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(120_000)
    page.goto(address, wait_until="domcontentloaded")
    page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
    page.click("#subquad_explain")
    wait_for(page, ANSWER, "attention layers in the U-Net")
    overflow = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    page.close()
