"""A real, installed web UI, with the extension installed from a git URL into a data folder of its own.

SD_WEBUI_DIR       its folder; without it these tests are skipped
SD_WEBUI_PYTHON    the Python that runs it (default: that of its own venv)
SD_WEBUI_CKPT_DIR  a folder with a small checkpoint of SD 1, of SDXL or of both (default: the tiny ones of
                   ../shared/checkpoints); a test that needs another is skipped
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "checkpoints"
TITLE = "subquad - fast attention within a memory limit"
SDP = "sdp - scaled dot product"
FLAGS = (
    "--skip-prepare-environment --skip-python-version-check --skip-torch-cuda-test --skip-version-check "
    "--use-cpu all --no-half --precision full --no-download-sd-model --do-not-download-clip --api"
).split()
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
import sys
url, *sys.argv[1:] = sys.argv[1:]
from modules import initialize
initialize.imports()
from modules import ui_extensions
print(ui_extensions.install_extension_from_url(None, url)[1])
"""
WAIT = 300  # seconds
KINDS = ("SD 1", "SDXL")
# An SDXL model has no other preview at hand, and would ask for a download.
SETTINGS = {"show_progress_type": "Approx cheap"}


@dataclass(frozen=True)
class Model:
    """A checkpoint; `layers` is how many layers of its U-Net attend."""

    path: Path
    kind: str
    layers: int

    @classmethod
    def of(cls, path: Path) -> Model:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        kind = "SDXL" if any(name.startswith("conditioner.embedders.1.") for name in names) else "SD 1"
        layers = sum(name.startswith("model.diffusion_model.") and name.endswith(".to_q.weight") for name in names)
        return cls(path, kind, layers)

    def calls(self, steps: int = 3) -> int:
        """Of an image: each layer's once a step, and the VAE's when it decodes."""
        return self.layers * steps + 1


class WebUI:
    """One installation, and at most one server of it at a time."""

    def __init__(self, folder: Path, python: Path, data: Path, checkpoints: Path):
        self.folder, self.python, self.data, self.checkpoints = folder, python, data, checkpoints
        self.flags = [*FLAGS, "--data-dir", str(data), "--ckpt-dir", str(checkpoints)]
        self.environment = {**os.environ, **ENVIRONMENT}

    def install(self, url: str) -> str:
        command = [self.python, "-c", INSTALL, url, *self.flags]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def model(self, kind: str) -> Model:
        """The first checkpoint of this kind; a test that asks for one that is not there is skipped."""
        models = map(Model.of, sorted(self.checkpoints.glob("*.safetensors")))
        found = next((model for model in models if model.kind == kind), None)
        return found or pytest.skip(f"no checkpoint of {kind} in SD_WEBUI_CKPT_DIR or ../shared/checkpoints")

    @contextlib.contextmanager
    def running(self, *flags: str, **saved):
        """A server that finds these settings saved; all others are at their defaults."""
        (self.data / "config.json").write_text(json.dumps({**SETTINGS, **saved}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.data / f"log-{port}.txt"
        with log.open("w") as output:
            command = [self.python, "launch.py", *self.flags, "--port", str(port), *flags]
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        server = Server(f"http://127.0.0.1:{port}", log)
        try:
            # a request that comes before this line can end a page's start
            server.wait_for("Startup time:", process)
            yield server
        finally:
            process.terminate()
            process.wait(60)


class Server:
    def __init__(self, url: str, log: Path):
        self.url, self._log = url, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, process: subprocess.Popen | None = None, times: int = 1) -> None:
        end = time.monotonic() + WAIT
        while self.log.count(text) < times:
            assert process is None or process.poll() is None, f"the web UI ended: {self.log[-3000:]}"
            assert time.monotonic() < end, f"no {text!r} in the log: {self.log[-3000:]}"
            time.sleep(0.2)

    def call(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        end = time.monotonic() + WAIT
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
            except urllib.error.URLError:  # its port opens a moment after the log says that it has started
                assert time.monotonic() < end
                time.sleep(0.2)

    def options(self, **changed) -> dict:
        if changed:
            self.call("/sdapi/v1/options", changed)
        return self.call("/sdapi/v1/options")

    def select(self, title: str) -> None:
        self.options(cross_attention_optimization=title)

    def load(self, model: Model) -> None:
        self.options(sd_model_checkpoint=model.path.name)

    def status(self) -> dict:
        return self.call("/subquad/v1/status")

    def generate(self, path: str = "/sdapi/v1/txt2img", **request) -> tuple[np.ndarray, str]:
        """An image's pixels and its infotext."""
        body = {"prompt": "a cat", "seed": 1, "width": 256, "height": 256, "steps": 3, "sampler_name": "Euler"}
        answer = self.call(path, {**body, **request})
        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        return np.asarray(image.convert("RGB"), dtype=int), json.loads(answer["info"])["infotexts"][0]

    def generate_with_sdp(self, path: str = "/sdapi/v1/txt2img", **request) -> np.ndarray:
        """The pixels that *sdp* leads to; ours is in force again afterwards."""
        self.select(SDP)
        image, _ = self.generate(path, **request)
        self.select(TITLE)
        return image


@pytest.fixture(scope="session")
def webui(tmp_path_factory):
    """The web UI with the extension installed; at the end it must be as it was."""
    folder = os.environ.get("SD_WEBUI_DIR")
    if not folder:
        pytest.skip("SD_WEBUI_DIR does not name an installed web UI")
    folder = Path(folder)
    python = os.environ.get("SD_WEBUI_PYTHON") or folder / "venv" / "bin" / "python"
    before = _state(folder)
    data = tmp_path_factory.mktemp("data")
    for name in ("extensions", "embeddings"):  # the web UI makes the one when it starts, and the other nowhere
        (data / name).mkdir()
    installation = WebUI(folder, python, data, _checkpoints(tmp_path_factory.mktemp("checkpoints")))
    installation.said = installation.install(_repository(tmp_path_factory.mktemp("git")))
    yield installation
    assert _state(folder) == before


@pytest.fixture(scope="module")
def server(webui):
    """Without a page, our entry selected and every setting at its default."""
    with webui.running("--nowebui") as running:
        running.select(TITLE)
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module", params=KINDS)
def model(request, webui, server) -> Model:
    """One checkpoint after the other, loaded."""
    model = webui.model(request.param)
    server.load(model)
    return model


@pytest.fixture(scope="module")
def models(webui) -> list[Model]:
    """All checkpoints, for tests that load one after the other."""
    return [webui.model(kind) for kind in KINDS]


@pytest.fixture(autouse=True)
def defaults(request):
    """What a test changes of the settings is as before for the next."""
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        before = server.options()
        yield
        changed = server.options()
        server.options(**{key: value for key, value in before.items() if changed[key] != value})
    else:
        yield


def _state(folder: Path) -> str:
    return subprocess.run(
        ["git", "status", "--porcelain", "--ignored"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def _repository(folder: Path) -> str:
    """A bare repository that holds this working tree."""
    address = folder / "subquad.git"
    git = ["git", f"--git-dir={address}", f"--work-tree={ROOT}", "-c", "user.name=test", "-c", "user.email=@"]
    subprocess.run(["git", "init", "--quiet", "--bare", address], check=True)
    subprocess.run([*git, "add", "--all"], check=True, cwd=ROOT)
    subprocess.run([*git, "commit", "--quiet", "--message=as it is"], check=True, cwd=ROOT)
    return f"file://{address}"


def _checkpoints(folder: Path) -> Path:
    given = os.environ.get("SD_WEBUI_CKPT_DIR")
    if given:
        return Path(given)
    if not SHARED.is_dir():
        pytest.skip("SD_WEBUI_CKPT_DIR names no folder of checkpoints, and ../shared/checkpoints is not there")
    shutil.copytree(SHARED / "tiny-sd1", folder, dirs_exist_ok=True)
    for config in folder.glob("*.yaml"):
        config.write_text(config.read_text().replace("CLIP_DIR", str(folder / "clip")))
    subprocess.run([sys.executable, SHARED / "tiny-sdxl" / "make.py", folder], check=True)
    return folder
