"""A real, installed web UI, with the extension installed from a git URL into a data folder of its own.

SD_WEBUI_DIR       its folder; without it these tests are skipped
SD_WEBUI_PYTHON    the Python that runs it (default: that of its own venv)
SD_WEBUI_CKPT_DIR  a folder with a small checkpoint of SD 1, of SDXL or of both (default: the tiny ones of
                   ../shared/checkpoints, and one of SD 3 that is made here); a test that needs another is skipped
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.servers import ROOT, Installation, Server, named_by, repository, restore, state
from tests.webui import sd3

SHARED = ROOT.parent / "shared" / "checkpoints"
TITLE = "subquad - fast attention within a memory limit"
SDP = "sdp - scaled dot product"
FLAGS = (
    "--skip-prepare-environment --skip-python-version-check --skip-torch-cuda-test --skip-version-check "
    "--use-cpu all --no-half --precision full --no-download-sd-model --do-not-download-clip --api"
).split()
KINDS = ("SD 1", "SDXL", "SD 3")
MARKS = {"SDXL": "conditioner.embedders.1.", "SD 3": "model.diffusion_model.joint_blocks."}
# The layers of a U-Net or transformer that attend, each by one of its tensors.
ATTENDS = re.compile(r"model\.diffusion_model\..+\.(to_q|x_block\.attn\.qkv)\.weight")


@dataclass(frozen=True)
class Model:
    """A checkpoint; `layers` is how many layers of its U-Net or transformer attend."""

    path: Path
    kind: str
    layers: int

    @classmethod
    def of(cls, path: Path) -> Model:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        kind = next((kind for kind, start in MARKS.items() if any(name.startswith(start) for name in names)), "SD 1")
        return cls(path, kind, sum(ATTENDS.fullmatch(name) is not None for name in names))

    def calls(self, steps: int = 3) -> int:
        """Of an image: each layer's once a step, and the VAE's when it decodes."""
        return self.layers * steps + 1


class WebUIServer(Server):
    def select(self, title: str) -> None:
        self.options(cross_attention_optimization=title)

    def load(self, model: Model) -> None:
        self.options(sd_model_checkpoint=model.path.name)

    def generate_with_sdp(self, path: str = "/sdapi/v1/txt2img", **request) -> np.ndarray:
        """The pixels that *sdp* leads to; ours is in force again afterwards."""
        self.select(SDP)
        image, _ = self.generate(path, **request)
        self.select(TITLE)
        return image


class WebUI(Installation):
    server = WebUIServer

    def __init__(self, folder: Path, python: Path, data: Path, checkpoints: Path):
        super().__init__(folder, python, data, *FLAGS, "--ckpt-dir", str(checkpoints))
        self.checkpoints = checkpoints

    def model(self, kind: str) -> Model:
        """The first checkpoint of this kind; a test that asks for one that is not there is skipped."""
        models = map(Model.of, sorted(self.checkpoints.glob("*.safetensors")))
        found = next((model for model in models if model.kind == kind), None)
        return found or pytest.skip(f"no checkpoint of {kind} in SD_WEBUI_CKPT_DIR or ../shared/checkpoints")


@pytest.fixture(scope="session")
def webui(tmp_path_factory):
    """The web UI with the extension installed; at the end it must be as it was."""
    folder, python = named_by("SD_WEBUI")
    before = state(folder)
    data = tmp_path_factory.mktemp("data")
    for name in ("extensions", "embeddings"):  # the web UI makes the one when it starts, and the other nowhere
        (data / name).mkdir()
    checkpoints = _checkpoints(tmp_path_factory.mktemp("checkpoints"), data / "extensions")
    installation = WebUI(folder, python, data, checkpoints)
    installation.said = installation.install(repository(tmp_path_factory.mktemp("git")))
    yield installation
    assert state(folder) == before


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
        yield from restore(request.getfixturevalue("server"))
    else:
        yield


def _checkpoints(folder: Path, extensions: Path) -> Path:
    given = os.environ.get("SD_WEBUI_CKPT_DIR")
    if given:
        return Path(given)
    if not SHARED.is_dir():
        pytest.skip("SD_WEBUI_CKPT_DIR names no folder of checkpoints, and ../shared/checkpoints is not there")
    shutil.copytree(SHARED / "tiny-sd1", folder, dirs_exist_ok=True)
    for config in folder.glob("*.yaml"):
        config.write_text(
            config.read_text(encoding="utf-8").replace("CLIP_DIR", str(folder / "clip")), encoding="utf-8"
        )
    subprocess.run([sys.executable, SHARED / "tiny-sdxl" / "make.py", folder], check=True)
    sd3.make_checkpoint(folder / "tiny-sd3.safetensors")
    sd3.install_guest(extensions, folder / "clip")
    return folder
