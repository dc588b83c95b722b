"""The tab for everyone: names, announcements, the keyboard alone, pages from right to left."""

from __future__ import annotations

import pytest

from tests.accessibility import tab_stops, turned_around, violations
from tests.attention_tab import ANSWER, DETAILS, SENTENCE, AttentionTab, set_number, wait_for

SLOW = 120_000  # milliseconds; a test machine may be busy


@pytest.fixture(scope="module", params=["light", "dark"])
def measured(request, browser, address):
    """The tab after Measure, everything unfolded, with something to apply."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SLOW)
    page.goto(f"{address}/?__theme={request.param}", wait_until="domcontentloaded")
    page.wait_for_selector("#demo_generate")
    set_number(page, "setting_subquad_query_chunk", 1)
    wait_for(page, "#demo_settings_result", "Query chunk size: 1")
    tab = AttentionTab(page).open(side=128)
    for fold in ("details_fold", "about"):
        tab.unfold(fold)
    tab.click("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")
    tab.wait_for_buttons("measure", "apply")
    yield tab
    page.locator("#tabs button").get_by_text("Generate", exact=True).first.click()
    set_number(page, "setting_subquad_query_chunk", 0)
    wait_for(page, "#demo_settings_result", "Query chunk size: 0")
    page.close()


def test_axe_finds_nothing_serious(measured):
    assert violations(measured.page) == []


def test_axe_would_find_it(page):
    AttentionTab(page).open()
    page.evaluate("document.querySelector('#subquad_page').insertAdjacentHTML('beforeend', '<button></button>')")
    assert any("button-name" in it for it in violations(page))


def test_a_look_dims_nothing_while_it_is_on_its_way(page):
    tab = AttentionTab(page).open(side=64)
    tab.wait_for(SENTENCE, "at 64 × 64 on")
    held = []
    page.route("**/run/predict*", lambda route: held.append(route))
    page.evaluate("document.querySelector('#subquad_look').click()")
    page.wait_for_selector("#subquad_page .pending", state="attached")
    page.wait_for_timeout(300)
    waiting = "[...document.querySelectorAll('#subquad_page .pending')].map(it => getComputedStyle(it).opacity)"
    assert set(page.evaluate(waiting)) == {"1"}
    assert held


def test_what_changes_is_announced(measured):
    for name in ("sentence", "message"):
        assert measured.page.locator(f"#subquad_{name}").first.get_attribute("aria-live") == "polite"


def test_sizes_are_not_turned_around_from_right_to_left(measured):
    page = measured.page
    page.evaluate("document.documentElement.dir = 'rtl'")
    try:
        assert "×" in page.locator(SENTENCE).last.inner_text() and "×" in page.locator(DETAILS).last.inner_text()
        assert turned_around(page) == []
        page.evaluate(
            "document.querySelector('#subquad_message').innerHTML = '<p dir=rtl>16 × 8</p><p dir=rtl>3 MiB</p>'"
        )
        assert turned_around(page) == ["16 × 8", "3 MiB"]  # it would be found
    finally:
        page.evaluate("document.querySelector('#subquad_message').innerHTML = ''")
        page.evaluate("document.documentElement.dir = ''")


def test_the_keyboard_is_enough(page):
    tab = AttentionTab(page).open(side=64)
    tab.wait_for_buttons("measure")
    stops = tab_stops(page, "#subquad_width input", "#subquad_about .label-wrap")
    wanted = ["height", "batch", "measure", "details_fold", "about"]
    assert [it for it in stops if it.startswith("subquad_")] == [f"subquad_{name}" for name in wanted]
    for key in ("Enter", " "):  # folds open and close
        inside = page.locator("#subquad_about .label-wrap + div").first
        before = inside.is_visible()
        page.keyboard.press(key)
        inside.wait_for(state="hidden" if before else "visible")
    page.locator("#subquad_measure").first.focus()
    page.keyboard.press("Enter")
    tab.wait_for(f"{ANSWER} table", "recommended")
    page.wait_for_timeout(500)
    assert page.evaluate("document.activeElement.closest('[id^=subquad_]') !== null")  # it is not lost with a button
