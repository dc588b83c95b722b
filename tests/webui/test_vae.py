"""The VAE of the real web UI in bands, and what was sampled kept: the images of *sdp*, with little memory."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from lib_subquad.device import MIB
from tests.webui.conftest import TITLE
from tests.webui.test_generation import FARTHEST, apart

LARGE = {"width": 768, "height": 768, "steps": 2}
linux = pytest.mark.skipif(sys.platform != "linux", reason="another process's memory can be limited on Linux only")


@contextlib.contextmanager
def spare(server, mib: int):
    """The process may take so much more address space than it has."""
    server.limit(mib * MIB)
    try:
        yield
    finally:
        server.limit(None)


def encoded(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


HIRES = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6, "width": 128, "height": 128, "steps": 2}


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ({}, "txt2img"),
        ({"width": 320, "height": 192, "batch_size": 2, "steps": 2}, "txt2img"),
        ({"tiling": True, "steps": 2}, "txt2img"),
        ({**HIRES, "hr_upscaler": "Latent"}, "txt2img"),
        ({"denoising_strength": 0.6, "steps": 2}, "img2img"),
        ({"denoising_strength": 0.6, "steps": 2, "mask": True}, "img2img"),
    ],
    ids=["plain", "batch", "tiling", "hires", "img2img", "inpainting"],
)
def test_in_bands_always(server, model, request_, path):
    path = f"/sdapi/v1/{path}"
    if path.endswith("img2img"):
        first, _ = server.generate(steps=1)
        request_ = {**request_, "init_images": [encoded(first)]}
        if request_.pop("mask", None):
            mask = np.zeros_like(first)
            mask[:, 128:] = 255
            request_["mask"] = encoded(mask)
    expected = server.generate_with_sdp(path, **request_)
    server.options(subquad_vae_bands="always")
    images, told = server.generate_all(path, **request_)
    assert apart(images[0], expected) <= FARTHEST
    assert all("Subquad VAE bands: always" in it and "Subquad VAE computed: in bands" in it for it in told)
    assert "The VAE: bands of" in server.status()["summary"]
    server.options(subquad_vae_bands="never")
    image, told = server.generate(path, **request_)
    assert apart(image, expected) <= FARTHEST and "Subquad VAE bands: never" in told and "computed: in" not in told


def test_previews_in_full_come_meanwhile(server, webui):
    """On a thread of their own, which decodes as well."""
    server.load(webui.model("SD 1"))
    size = {"width": 320, "height": 192, "steps": 12}
    expected = server.generate_with_sdp(**size)
    server.options(subquad_vae_bands="always", show_progress_type="Full", show_progress_every_n_steps=1)
    previews = set()
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(server.generate, **size)
        while not making.done():
            previews.add(server.call("/sdapi/v1/progress")["current_image"])
        image, told = making.result()
    assert len(previews - {None}) > 1
    assert apart(image, expected) <= FARTHEST and "Subquad VAE computed: in bands" in told


def test_a_refiner_decodes_what_it_refined(server, models):
    """With a VAE of its own, which was loaded while the image was sampled."""
    server.load(models[0])
    refined = {"refiner_checkpoint": models[1].path.name, "refiner_switch_at": 0.5, "steps": 4}
    expected = server.generate_with_sdp(**refined)
    server.options(subquad_vae_bands="always")
    image, told = server.generate(**refined)
    assert apart(image, expected) <= FARTHEST
    assert "Refiner: " in told and "Subquad VAE computed: in bands" in told


@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_a_vae_that_is_moved_about(webui, flag):
    model = webui.model("SD 1")
    with webui.running("--nowebui", flag, sd_model_checkpoint=model.path.name) as server:
        server.select(TITLE)
        expected = server.generate_with_sdp()
        server.options(subquad_vae_bands="always")
        first, told = server.generate()
        assert apart(first, expected) <= FARTHEST and "Subquad VAE computed: in bands" in told
        request = {"init_images": [encoded(first)], "denoising_strength": 0.6}
        expected = server.generate_with_sdp("/sdapi/v1/img2img", **request)
        image, _ = server.generate("/sdapi/v1/img2img", **request)
        assert apart(image, expected) <= FARTHEST
        assert "Traceback" not in server.log


@contextlib.contextmanager
def alone(webui):
    """A server of its own, whose log has tracebacks of images that are lost; (server, what *sdp* makes of LARGE)."""
    model = webui.model("SD 1")
    with webui.running("--nowebui", sd_model_checkpoint=model.path.name) as server:
        server.select(TITLE)
        yield server, server.generate_with_sdp(**LARGE)


@pytest.fixture(scope="module")
def cramped(webui):
    with alone(webui) as found:
        yield found


@pytest.fixture
def new(webui):
    """What a process has freed it may use again: one that has made more images has more to spare than it is left."""
    with alone(webui) as found:
        yield found


def asked(server, **request) -> tuple[int, str]:
    body = {"prompt": "a cat", "seed": 1, "sampler_name": "Euler", "save_images": True, **LARGE, **request}
    code, answer = server.ask("/sdapi/v1/txt2img", body)
    return code, answer.decode()


@linux
@pytest.mark.parametrize("mib", [400, 250])
def test_with_little_memory_the_image_is_made_that_others_lose(new, mib):
    """In bands or in lower ones: from one process to the next it differs how much of that is left for them."""
    server, expected = new
    with spare(server, mib):
        image, told = server.generate(**LARGE)
    assert apart(image, expected) <= FARTHEST
    assert re.search("Subquad VAE computed: in (lower )?bands", told)
    for other in ("sdp - scaled dot product", "sub-quadratic", "Doggettx", "None"):
        server.select(other)
        with spare(server, mib):
            assert asked(server)[0] == 500


@linux
def test_what_cannot_be_decoded_is_kept_and_decoded_later(new, webui):
    """The limit is lowered when all is sampled."""
    server, expected = new
    with server.shrinking(48 * MIB):
        code, answer = asked(server)
    assert code == 500 and "What was sampled is kept in" in answer and "the tab Attention decodes it" in answer
    (path,) = webui.data.rglob("subquad-latent-*.safetensors")
    assert path.parent.parent.name == "txt2img-images"  # in the day's folder, where the image would be
    assert server.call("/subquad/v1/kept") == {"waiting": [path.name]}
    with spare(server, 48):
        told = server.call("/subquad/v1/kept", {})
    assert told["images"] == [] and "still too little memory" in told["told"][0]
    (name,) = server.call("/subquad/v1/kept", {})["images"]
    image = Image.open(path.parent / name)
    assert apart(np.asarray(image.convert("RGB"), dtype=int), expected) <= FARTHEST
    assert "a cat" in image.info["parameters"] and "Seed: 1" in image.info["parameters"]
    assert server.call("/subquad/v1/kept") == {"waiting": []}


@linux
def test_what_was_decoded_when_the_web_ui_was_ended_waits_when_it_is_started_again(webui):
    with alone(webui) as (server, expected), ThreadPoolExecutor(1) as thread:
        before = set(webui.data.rglob("subquad-latent-*.safetensors"))
        with spare(server, 250):
            lost = thread.submit(asked, server)
            while not (kept := set(webui.data.rglob("subquad-latent-*.safetensors")) - before):
                assert not lost.done()
                time.sleep(0.01)
            server.kill()
        with pytest.raises((AssertionError, OSError)):
            lost.result()
    with webui.running("--nowebui", sd_model_checkpoint=webui.model("SD 1").path.name) as server:
        server.select(TITLE)
        (path,) = kept
        assert "What was sampled and not decoded waits in 1 file: the tab Attention" in server.log
        assert server.call("/subquad/v1/kept") == {"waiting": [path.name]}
        (name,) = server.call("/subquad/v1/kept", {})["images"]
        assert apart(np.asarray(Image.open(path.parent / name).convert("RGB"), dtype=int), expected) <= FARTHEST


@linux
def test_files_are_named_as_those_of_new_images(new, webui):
    """As the request has it, of which nothing is there any more; of several none takes another's place."""
    server, _ = new
    before = set(webui.data.rglob("*.png"))
    server.options(samples_filename_pattern="[sampler]-[seed]-[batch_number]", save_images_add_number=False)
    server.options(subquad_vae_bands="never")
    try:
        with server.shrinking(100 * MIB):
            code, _ = asked(server, batch_size=2)
        assert code == 500
        made = server.call("/subquad/v1/kept", {})["images"]
    finally:
        server.options(samples_filename_pattern="", save_images_add_number=True, subquad_vae_bands="when needed")
    assert made == ["Euler-1-1.png", "Euler-2-2.png"]
    assert {path.name for path in set(webui.data.rglob("*.png")) - before} == set(made)
