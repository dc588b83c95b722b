"""The pictures of the README, made anew: `python -m demo.pictures docs`.

Starts the demo and photographs its page in Chromium: the settings section, and the tab after Explain and after Measure.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

START_SECONDS = 60
MEASURE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser("demo.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: the one on PATH)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    demo = subprocess.Popen(
        [sys.executable, "-m", "demo", "--port", str(port), "--set", "subquad_query_chunk=128"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        _wait_for(url)
        photograph(url, arguments.folder, arguments.chromium)
    finally:
        demo.terminate()
        demo.wait()
    return 0


def photograph(url: str, folder: Path, chromium: str | None) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(url)
        page.wait_for_selector("#setting_subquad_query_chunk")
        page.wait_for_timeout(1000)
        page.locator("#settings_subquad").screenshot(path=folder / "settings.png")
        page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
        page.click("#subquad_explain")
        page.wait_for_selector("#subquad_answer table")
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "explain.png", full_page=True)
        page.click("#subquad_measure")
        page.wait_for_selector("#subquad_answer progress")
        page.wait_for_selector("#subquad_answer table", timeout=MEASURE_SECONDS * 1000)
        page.wait_for_selector("#subquad_plot svg[role=img]")
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "measure.png", full_page=True)
        browser.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
