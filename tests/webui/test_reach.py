"""Every layer is ours: of one model after another, and after guests that put a forward of their own on layers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

TITLE = "subquad - fast attention within a memory limit"
SDP = "sdp - scaled dot product"
FARTHEST = 1
only_unets = pytest.mark.parametrize("model", ["SD 1", "SDXL"], indirect=True)
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
GUEST = '''
import functools

import gradio as gr
from modules import scripts, shared


class Guest(scripts.Script):
    """Does to the U-Net's layers what its only argument says."""

    def title(self):
        return "guest"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox()]

    @property
    def layers(self):
        return [module for module in shared.sd_model.model.modules() if type(module).__name__ == "CrossAttention"]

    def process(self, p, todo):
        if todo == "borrow":
            self.found = [(layer, layer.forward) for layer in self.layers]
            for layer, forward in self.found:
                layer.forward = functools.partial(forward)
        elif todo == "stay":
            for layer in self.layers[:3]:
                layer.forward = functools.partial(blind, layer)
        elif todo == "leave":
            for layer in self.layers[:3]:
                del layer.forward

    def postprocess(self, p, processed, todo):
        if todo == "borrow":
            for layer, forward in self.found:
                layer.forward = forward


def blind(layer, x, context=None, *args, **kwargs):
    return layer.to_out(layer.to_q(x))
'''


@pytest.fixture(scope="module", autouse=True)
def guest(webui):
    """An extension beside ours, for the servers of this file."""
    folder = webui.data / "extensions" / "a-guest"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "guest.py").write_text(GUEST, encoding="utf-8")
    yield
    shutil.rmtree(folder)


def let_guest(todo: str) -> dict:
    """What of a request makes the guest do something."""
    return {"alwayson_scripts": {"guest": {"args": [todo]}}}


def check_ours(server, calls: int, expected: np.ndarray, **request) -> None:
    """The next image is right, and every call ours."""
    image, _ = server.generate(**request)
    status = server.status()
    assert status["active"] and status["calls"] == calls
    assert "out of reach" not in status["summary"]
    assert np.abs(image - expected).max() <= FARTHEST


@pytest.fixture(scope="module")
def expected(server, models) -> dict:
    """Model -> the pixels with *sdp*."""
    images = {}
    for model in models:
        server.load(model)
        images[model] = server.generate_with_sdp()
    return images


# --------------------------------------------------------------------------------------------------- several models


@pytest.mark.parametrize("kept", [1, 2])
def test_from_one_model_to_another_and_back(server, expected, kept):
    """Loaded anew each time, and kept in memory."""
    server.options(sd_checkpoints_limit=kept)
    for model in (*expected, *expected, *expected):
        server.load(model)
        check_ours(server, model.calls(), expected[model])


def test_a_model_for_one_request(server, expected):
    first, *others = expected
    server.load(first)
    for other in others:
        check_ours(server, other.calls(), expected[other], override_settings={"sd_model_checkpoint": other.path.name})
        check_ours(server, first.calls(), expected[first])


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ({**HIRES, "steps": 2}, "hr_checkpoint_name"),
        ({"refiner_switch_at": 0.5, "steps": 4}, "refiner_checkpoint"),
    ],
    ids=["hires", "refiner"],
)
def test_two_models_for_one_image(server, models, request_, name):
    alike = [model for model in models if model.kind != "SD 3"]  # in their latents, which go from one to the other
    for model, other in (alike, reversed(alike)):
        server.load(model)
        request = {"width": 128, "height": 128, **request_, name: other.path.name}
        image = server.generate_with_sdp(**request)
        check_ours(server, model.calls(2) + 2 * other.layers, image, **request)


# ------------------------------------------------------------------------------------------------------------ guests


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("title", [SDP, TITLE])
def test_what_a_guest_pinned_meanwhile(server, expected, kept, title):
    """While this was in force; of two models where the web UI keeps both in memory."""
    server.options(sd_checkpoints_limit=kept)
    server.select(title)
    for model in expected:
        server.load(model)
        image, _ = server.generate(**let_guest("borrow"))
        assert np.abs(image - expected[model]).max() <= FARTHEST
    server.select(TITLE)
    for model in reversed(expected):
        server.load(model)
        check_ours(server, model.calls(), expected[model])


@only_unets
def test_a_guest_that_stays_is_named(server, model):
    expected = server.generate_with_sdp()
    server.generate(**let_guest("stay"))
    for _ in range(2):
        status = server.status()
        assert status["active"] and status["calls"] == model.calls() - 3 * 3
        assert f"3 of {model.layers} layers were out of reach: a-guest (3) computed them." in status["summary"]
        assert (status["layers"], status["out_of_reach"]) == (model.layers, {"a-guest": 3})
        server.generate()
    check_ours(server, model.calls(), expected, **let_guest("leave"))


@only_unets
def test_hypertile(server, model):
    """It comes with the web UI, and wraps layers for as long as the model is loaded."""
    request = {"width": 512, "height": 512, "steps": 1}
    server.select(SDP)
    server.options(hypertile_enable_unet=True)
    tiled, infotext = server.generate(**request)
    assert "Hypertile U-Net: True" in infotext
    server.options(hypertile_enable_unet=False)
    whole = server.generate_with_sdp(**request)
    for enabled, expected in ((False, whole), (True, tiled)):
        server.options(hypertile_enable_unet=enabled)
        check_ours(server, model.calls(1), expected, **request)
