"""An extension of one script for the demo host to load, and the demo's page in headless Chromium."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.unmeasured import nothing_is_measured as nothing_is_measured

ROOT = Path(__file__).parents[2]
SLOW = 120_000  # milliseconds; a test machine may be busy


@pytest.fixture
def extension(host, tmp_path, monkeypatch):
    """Writes the text it is called with as the only script of an extension that the host then loads."""
    from modules import scripts

    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(scripts, "extension_path", str(tmp_path))

    def write(text: str) -> str:
        path = tmp_path / "scripts" / "door.py"
        path.write_text(text, encoding="utf8")
        return str(path)

    return write


@pytest.fixture(scope="package")
def data_folder(tmp_path_factory):
    """Of the demo that runs."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="package")
def address(data_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--size", "64", "--steps", "2", "--optimizer", "subquad"]
    options += ["--data-dir", str(data_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    server = subprocess.Popen([sys.executable, "-m", "demo", *options], cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, "the demo ended before its page was there"
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.set_default_timeout(SLOW)
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_selector("#demo_generate")
    yield page
    page.close()
