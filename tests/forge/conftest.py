"""A real, installed web UI of the Forge family, with the extension installed from a git URL into a folder of its own.

SD_FORGE_DIR       its folder; without it these tests are skipped
SD_FORGE_PYTHON    the Python that runs it (default: that of its own venv)
SD_FORGE_CKPT_DIR  a folder with one small checkpoint of SD 1 (default: one of random numbers, made here)

What one of them has and another lacks is asked of what it offers, never of its name.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forge import models
from tests.servers import Installation, Server, named_by, repository, restore, state

FLAGS = (
    "--always-cpu --api --skip-prepare-environment --skip-torch-cuda-test --skip-version-check "
    "--skip-python-version-check --no-hashing"
).split()
# Not known to all of them.
IF_KNOWN = ("--skip-google-blockly", "--do-not-download-clip", "--no-download-sd-model")
FLAGS_ARE_IN = ("modules/cmd_args.py", "backend/args.py", "ldm_patched/modules/args_parser.py")
FARTHEST = 1  # from the web UI's own image, of 255
USES = {"off": (), "everything": ("unet", "vae"), "U-Net or transformer only": ("unet",), "VAE only": ("vae",)}


@dataclass(frozen=True)
class Pair:
    """What the web UI makes of a request by itself: the first image, and how many calls of attention it took."""

    image: np.ndarray
    calls: int


def part_of(caller: str) -> str:
    """The part of the model that a caller of attention belongs to: the VAE's are forwards of its blocks."""
    return "vae" if any(part in caller for part in (".vae.", ".vae_wan.", ".diffusionmodules.model.")) else "unet"


class ForgeServer(Server):
    def generate_all(self, path: str = "/sdapi/v1/txt2img", model: dict | None = None, **request):
        """`model`: what the probe of models is to run within that generation."""
        if model:
            self.call("/probe/models", model)
        return super().generate_all(path, **{"width": 128, "height": 128, "steps": 1, "cfg_scale": 7, **request})

    def model_error(self, request: dict) -> str | None:
        """What the model of this request ended with, if it had one and that did not come to a result."""
        return self.call("/probe/models/error") if "model" in request else None

    def options(self, **changed) -> dict:
        if changed:
            self.call("/sdapi/v1/options", changed)
        return self.call("/probe/options")

    def use(self, what: str) -> None:
        self.options(subquad_use=what)

    def check_ours(self, path: str = "/sdapi/v1/txt2img", use: str = "everything", **request) -> Pair:
        """One request with the switch off and then on: the same images, and each call that is to be ours is."""
        self.use("off")
        own, _ = self.generate_all(path, **request)
        if (error := self.model_error(request)) and request["model"]["dtype"] != "float32":
            pytest.skip(f"without subquad this web UI cannot compute it either: {error}")
        assert error is None
        assert own[0].std() > 10  # a picture of something
        made = self.calls()
        assert not made["ours"] and sum(made["own"].values()) > 0
        self.use(use)
        ours, infotexts = self.generate_all(path, **request)
        assert self.model_error(request) is None
        served, status = self.calls(), self.status()
        wanted = {caller: count for caller, count in made["own"].items() if part_of(caller) in USES[use]}
        for caller in wanted:
            if part_of(caller) == "vae":  # which is ours to decode with, one image of a batch after the other
                wanted[caller] *= request.get("batch_size", 1)
        difference = max(np.abs(one - other).max() for one, other in zip(own, ours, strict=True))
        print(f"{use}: {status['calls']} of {sum(wanted.values())} calls, {difference}/255, {status['layers']} places")
        assert difference <= FARTHEST
        assert served["ours"] == wanted
        assert served["own"] == {caller: count for caller, count in made["own"].items() if caller not in wanted}
        assert status["active"] and status["calls"] == sum(wanted.values())
        assert status["passed_on"] == status["out_of_reach"] == {}
        assert all(f"Subquad use: {use}" in infotext for infotext in infotexts)
        return Pair(own[0], sum(made["own"].values()))

    def script(self, name: str, *arguments, **request) -> dict:
        """A request with arguments for the built-in whose name begins so; skipped where there is none."""
        known = self.call("/sdapi/v1/scripts")["txt2img"]
        found = next((it for it in known if it.startswith(name)), None) or pytest.skip(f"there is no {name} here")
        return {**request, "alwayson_scripts": {found: {"args": list(arguments)}}}

    def calls(self) -> dict:
        """Who called attention for the last image, text encoders aside: "own" and "ours", caller -> how often."""
        answer = self.call("/probe/calls")
        for who in ("own", "ours"):
            answer[who] = {caller: count for caller, count in answer[who].items() if "clip" not in caller}
        return answer

    def holders(self) -> list[str]:
        return self.call("/probe/holders")

    def reload(self) -> None:
        """As the button "Reload UI" does; only with a page."""
        starts = self.log.count("Startup time:")
        self.call("/probe/reload", {})
        self.wait_for("Startup time:", times=starts + 1)


class Forge(Installation):
    server = ForgeServer

    def __init__(self, folder: Path, python: Path, data: Path, checkpoints: Path, control: Path):
        self._known = "".join(
            (folder / it).read_text(encoding="utf-8") for it in FLAGS_ARE_IN if (folder / it).is_file()
        )
        optional = [flag for flag in IF_KNOWN if self.knows(flag)]
        folders = {
            "--ckpt-dir": checkpoints,
            "--controlnet-dir": control / "ControlNet",
            "--controlnet-preprocessor-models-dir": control / "ControlNetPreprocessor",
            "--gradio-allowed-path": folder,  # it is not the current folder here
        }
        super().__init__(folder, python, data, *FLAGS, *optional, *(str(it) for pair in folders.items() for it in pair))
        self.cwd = data
        self.checkpoint = next(checkpoints.glob("*.safetensors")).name
        self.environment = {
            **self.environment,
            "DIFFUSERS_OFFLINE": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "HF_HOME": str(data / "huggingface"),
            "MPLCONFIGDIR": str(data / "matplotlib"),
            "GRADIO_TEMP_DIR": str(data / "gradio"),
            "PYTHONPYCACHEPREFIX": str(data / "bytecode"),
        }
        del self.environment["PYTHONDONTWRITEBYTECODE"]  # the second start need not compile all anew

    def check_log(self, server: Server, *flags: str) -> None:
        """No traceback of a server that has ended, but those that the same flags and one image bring without us too."""
        if found := tracebacks(server.log):
            with self.running(*flags, disabled_extensions=["subquad"]) as alone:
                alone.generate()
            assert found - tracebacks(alone.log) == set()

    def knows(self, flag: str) -> bool:
        """Whether it has this flag of the command line."""
        return f'"{flag}"' in self._known


def tracebacks(log: str) -> set[str]:
    """What went wrong: the last line of each traceback, whatever it is indented by."""
    found = re.findall(r"^( *).*Traceback .*\n(?:\1 +.*\n)*(.*)$", log, re.MULTILINE)
    return {last.strip() for _, last in found}


def as_png(image: np.ndarray) -> str:
    """As requests carry it."""
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    """The web UI with the extension installed; at the end it must be as it was."""
    folder, python = named_by("SD_FORGE")
    pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
    before = state(folder)
    data = tmp_path_factory.mktemp("data")
    for name in ("extensions", "embeddings"):
        (data / name).mkdir()
    installation = Forge(folder, python, data, _checkpoints(tmp_path_factory), _control(tmp_path_factory))
    installation.said = installation.install(repository(tmp_path_factory.mktemp("git")))
    # after ours in the alphabet, so that it sees what ours has done
    shutil.copytree(Path(__file__).parent / "probe", data / "extensions" / "z-probe")
    yield installation
    assert state(folder) == before


@pytest.fixture(scope="module")
def server(forge):
    """Without a page, every setting at its default: the switch is off."""
    with forge.running("--nowebui") as running:
        yield running
    forge.check_log(running, "--nowebui")


@pytest.fixture(autouse=True)
def defaults(request):
    """What a test changes of the settings is as before for the next."""
    if "server" in request.fixturenames:
        yield from restore(request.getfixturevalue("server"))
    else:
        yield


def _checkpoints(tmp_path_factory) -> Path:
    if given := os.environ.get("SD_FORGE_CKPT_DIR"):
        return Path(given)
    folder = tmp_path_factory.mktemp("checkpoints")
    models.make_checkpoint(folder / "tiny.safetensors")
    return folder


def _control(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    for name in ("ControlNet", "ControlNetPreprocessor"):
        (folder / name).mkdir()
    models.make_controlnet(folder / "ControlNet" / "tiny-controlnet.safetensors")
    models.make_ip_adapter(folder / "ControlNet" / "tiny-ip-adapter.safetensors")
    models.make_image_encoder(folder / "ControlNetPreprocessor" / "CLIP-ViT-H-14.safetensors")
    return folder
