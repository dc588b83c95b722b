"""A web UI's own page in headless Chromium: its tabs, its settings, its buttons."""

from __future__ import annotations

import re

from tests.attention_tab import set_number, wait_for

SLOW = 120_000  # milliseconds; a test machine may be busy


def open_page(browser, server, path: str = "", **options):
    """A page of this server, all drawn; the server is kept as `page.server`."""
    page = browser.new_page(**options)
    page.set_default_timeout(SLOW)
    page.server = server
    page.goto(server.url + path, wait_until="domcontentloaded")
    page.wait_for_selector("#txt2img_generate")
    return page


def open_tab(page, title: str) -> None:
    """Newer web UIs write their titles in other letters."""
    page.locator("#tabs button").get_by_text(re.compile(rf"^\s*{title}\s*$", re.IGNORECASE)).first.click()


def open_section(page, title: str) -> None:
    """A section of the settings."""
    open_tab(page, "Settings")
    page.locator("#settings button", has_text=title).first.click()


def apply_settings(page) -> str:
    """Press Apply, and read what it says."""
    page.click("#settings_submit")
    page.wait_for_function("document.querySelector('#settings_result').innerText.includes('changed')")
    return page.locator("#settings_result").last.inner_text()


def set_query_chunk(page, value: int) -> str:
    """With the slider of our section."""
    open_section(page, "Sub-quadratic attention")
    set_number(page, "setting_subquad_query_chunk", value)
    return apply_settings(page)


def generate(page, side: int = 128, steps: int = 2) -> int:
    """Make an image with the page's own button, larger where its sliders begin later; how many tokens of 8 x 8 pixels
    it has."""
    open_tab(page, "txt2img")
    side = max(side, int(page.locator("#txt2img_width input[type=range]").first.get_attribute("min")))
    for name, value in (("width", side), ("height", side), ("steps", steps)):
        set_number(page, f"txt2img_{name}", value)
    page.click("#txt2img_generate")
    wait_for(page, "#html_info_txt2img", f"Size: {side}x{side}")
    return (side // 8) ** 2
