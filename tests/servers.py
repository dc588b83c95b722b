"""Real, installed web UIs as tests drive them: installed into, started, and asked over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "SD_WEBUI_RESTARTING": "1",  # opens no browser
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "COMMANDLINE_ARGS": "",
}
# What the button "Install from URL" calls, in the host's own Python.
INSTALL = """
import contextlib, sys
folder, url, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
with contextlib.suppress(ImportError):
    from modules_forge.initialization import initialize_forge
    initialize_forge()
from modules import initialize
initialize.imports()
from modules import ui_extensions
print(ui_extensions.install_extension_from_url(None, url)[1])
"""
WAIT = 300  # seconds


class Server:
    """A web UI that runs."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen):
        self.url, self._log, self._process = url, log, process

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + WAIT
        while self.log.count(text) < times:
            self._check_that_it_runs()
            assert time.monotonic() < end, f"no {text!r} in the log: {self.log[-3000:]}"
            time.sleep(0.2)

    def call(self, path: str, body: dict | None = None):
        code, answer = self.ask(path, body)
        assert code == 200, f"{path}: {code} {answer.decode()}"
        return json.loads(answer)

    def ask(self, path: str, body: dict | None = None, **headers: str) -> tuple[int, bytes]:
        """The HTTP status and the body of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        end = time.monotonic() + WAIT
        while True:
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
            except (urllib.error.URLError, ConnectionError):
                self._check_that_it_runs()  # its port opens a moment after the log says that it has started
                assert time.monotonic() < end
                time.sleep(0.2)

    def limit(self, spare_bytes: int | None) -> None:
        """Its process may take so much more address space than it has; as much as it likes where None is given."""
        limit = resource.RLIM_INFINITY
        if spare_bytes is not None:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="utf-8").split()[0])
            limit = pages * resource.getpagesize() + spare_bytes
        hard = resource.prlimit(self._process.pid, resource.RLIMIT_AS)[1]
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, (limit, hard))

    @contextlib.contextmanager
    def shrinking(self, spare_bytes: int):
        """As soon as its next image is all but sampled, it has no more to spare than this."""
        done = threading.Event()

        def watch():
            while not done.is_set():
                state = self.call("/sdapi/v1/progress?skip_current_image=true")["state"]
                if state["sampling_steps"] and state["sampling_step"] >= state["sampling_steps"] - 1:
                    return self.limit(spare_bytes)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.limit(None)

    def kill(self) -> None:
        """End it as a system without memory does."""
        self._process.kill()

    def options(self, **changed) -> dict:
        if changed:
            self.call("/sdapi/v1/options", changed)
        return self.call("/sdapi/v1/options")

    def status(self) -> dict:
        return self.call("/subquad/v1/status")

    def generate(self, path: str = "/sdapi/v1/txt2img", **request) -> tuple[np.ndarray, str]:
        """An image's pixels and its infotext."""
        images, infotexts = self.generate_all(path, **request)
        return images[0], infotexts[0]

    def generate_all(self, path: str = "/sdapi/v1/txt2img", **request) -> tuple[list[np.ndarray], list[str]]:
        """The pixels and the infotext of each image of a request."""
        body = {"prompt": "a cat", "seed": 1, "width": 256, "height": 256, "steps": 3, "sampler_name": "Euler"}
        answer = self.call(path, {**body, **request})
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
        return [np.asarray(image.convert("RGB"), dtype=int) for image in images], infotexts(answer)

    def _check_that_it_runs(self) -> None:
        code = self._process.poll()
        assert code is None, f"the web UI ended with {code}: {self.log[-3000:]}"


class Installation:
    """A web UI's folder, and at most one server of it at a time."""

    server = Server
    settings: dict[str, object] = {
        "show_progress_type": "Approx cheap",  # other previews may ask for a download
        "subquad_measure": False,  # no image waits, and engines are those of the rules
    }

    def __init__(self, folder: Path, python: Path, data: Path, *flags: str):
        self.folder, self.python, self.data = folder, python, data
        self.flags = [*flags, "--data-dir", str(data)]
        self.cwd = folder
        self.environment = {**os.environ, **ENVIRONMENT}

    def install(self, url: str) -> str:
        command = [self.python, "-c", INSTALL, self.folder, url, *self.flags]
        done = subprocess.run(
            command, cwd=self.cwd, env=self.environment, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def running(self, *flags: str, **saved):
        """A server that finds these settings saved; all others are at their defaults."""
        (self.data / "config.json").write_text(json.dumps({**self.settings, **saved}), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.data / f"log-{port}.txt"
        with log.open("w") as output:
            command = [self.python, self.folder / "launch.py", *self.flags, "--port", str(port), *flags]
            process = subprocess.Popen(
                command, cwd=self.cwd, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        server = self.server(f"http://127.0.0.1:{port}", log, process)
        try:
            server.wait_for("Startup time:")  # a request that comes before this line can end a page's start
            yield server
        finally:
            process.terminate()
            process.wait(60)


def infotexts(answer: dict) -> list[str]:
    """Of the images of an answer, without the one setting that `Installation` changes for all of them."""
    return [text.replace(", Subquad measure: False", "") for text in json.loads(answer["info"])["infotexts"]]


def status_of(server: Server, path: str, user: str | None = None) -> int:
    """The HTTP status that it answers a user of this "name:password" with."""
    headers = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
    return server.ask(path, **headers)[0]


def restore(server: Server):
    """A generator for a fixture: what a test changes of the settings is as before for the next."""
    before = server.options()
    yield
    changed = server.options()
    server.options(**{key: value for key, value in before.items() if changed[key] != value})


def named_by(variable: str) -> tuple[Path, Path]:
    """The folder of the web UI that this variable names, and the Python that runs it; or the test is skipped."""
    folder = os.environ.get(f"{variable}_DIR")
    if not folder:
        pytest.skip(f"{variable}_DIR does not name an installed web UI")
    python = os.environ.get(f"{variable}_PYTHON") or Path(folder) / "venv" / "bin" / "python"
    return Path(folder), Path(python)


def state(folder: Path) -> str:
    """What tells whether a web UI's folder is as it was."""
    return subprocess.run(
        ["git", "status", "--porcelain", "--ignored"],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    ).stdout


def repository(folder: Path) -> str:
    """The URL of a bare repository that holds this working tree."""
    address = folder / "subquad.git"
    git = ["git", f"--git-dir={address}", f"--work-tree={ROOT}", "-c", "user.name=test", "-c", "user.email=@"]
    subprocess.run(["git", "init", "--quiet", "--bare", address], check=True)
    subprocess.run([*git, "add", "--all"], check=True, cwd=ROOT)
    subprocess.run([*git, "commit", "--quiet", "--message=as it is"], check=True, cwd=ROOT)
    return f"file://{address}"
