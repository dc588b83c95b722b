"""The pictures of the README, made anew: `python -m demo.pictures docs`.

Starts the demo and photographs its page in Chromium: the settings section, and the tab with its details and after
Measure. What the page says is noted beside the pictures, so that a test can tell when it says something else.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from lib_subquad.settings import OPTIONS

ROOT = Path(__file__).parents[1]
WORDS = ("words.py", "results.py")  # in lib_subquad/webui
NOTE = "pictures.json"
START_SECONDS = 60
MEASURE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser("demo.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: the one on PATH)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with tempfile.TemporaryDirectory() as data:  # the pictures show nothing that was measured before
        options = ["--port", str(port), "--data-dir", data, "--set", "subquad_query_chunk=128"]
        demo = subprocess.Popen(
            [sys.executable, "-m", "demo", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            _wait_for(url)
            photograph(url, arguments.folder, arguments.chromium)
        finally:
            demo.terminate()
            demo.wait()
    (arguments.folder / NOTE).write_text(json.dumps(said(), indent=1) + "\n", encoding="utf-8")
    return 0


def said() -> dict[str, str]:
    """A digest of the words on the tab and one of the settings, as they are now."""
    words = [text for name in WORDS for text in _texts(ROOT / "lib_subquad" / "webui" / name)]
    return {"words": _digest(words), "settings": _digest([f"{name}: {option}" for name, option in OPTIONS.items()])}


def _texts(path: Path) -> list[str]:
    """Every text in a file that is no comment, documents nothing, and is no style sheet, which has lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in texts if id(node) not in alone and "\n" not in node.value]


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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
        page.wait_for_selector("#subquad_sentence .subquad-sentence")
        page.locator("#subquad_details_fold .label-wrap").first.click()
        page.wait_for_selector("#subquad_details table")
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "explain.png", full_page=True)
        page.locator("#subquad_details_fold .label-wrap").first.click()
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
