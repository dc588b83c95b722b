"""Images through the real web UI's HTTP API: with our entry they are those of *None*, whatever the settings."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

TITLE = "subquad - fast attention within a memory limit"
FARTHEST = 2


@pytest.fixture(scope="module")
def plain(server):
    return server.generate_plain()


def apart(image: np.ndarray, other: np.ndarray) -> int:
    return np.abs(image - other).max()


def vector(webui) -> torch.Tensor:
    """The embedding "it", as the web UI keeps it."""
    embedding = torch.load(webui.data / "embeddings" / "it.pt", weights_only=True)
    return embedding["string_to_param"]["*"].detach()


def test_it_was_installed_from_its_url(webui, server):
    assert "Installed into" in webui.said
    assert (webui.data / "extensions" / "subquad" / "scripts" / "subquad.py").is_file()
    assert [extension["name"] for extension in server.call("/sdapi/v1/extensions")].count("subquad") == 1
    assert "Applying attention optimization: sub-quadratic... by subquad, done." in server.log


def test_the_image_is_that_of_none(server, plain):
    image, infotext = server.generate()
    assert apart(image, plain) <= FARTHEST
    assert "Subquad" not in infotext
    assert plain.std() > 10  # a picture of something
    status = server.status()
    assert status["active"] and status["calls"] > 3 and status["retries"] == 0


def test_chunk_sizes_change_from_one_request_to_the_next(server, plain):
    for query_chunk, kv_chunk in ((96, 32), (48, 0), (0, 0)):
        server.options(subquad_query_chunk=query_chunk, subquad_kv_chunk=kv_chunk)
        image, infotext = server.generate()
        assert apart(image, plain) <= FARTHEST
        assert (f"Subquad query chunk: {query_chunk}" in infotext) == (query_chunk > 0)
        assert (f"Subquad KV chunk: {kv_chunk}" in infotext) == (kv_chunk > 0)
        status = server.status()
        assert (status["query_chunk"] == query_chunk) == (query_chunk > 0)
        assert (status["kv_chunk"] == kv_chunk) == (kv_chunk > 0)
        assert (status["engine"] == "portable") == (kv_chunk > 0)


def test_override_settings_hold_for_one_request(server, plain):
    override = {"subquad_query_chunk": 80, "subquad_engine": "portable", "subquad_vae": False}
    image, infotext = server.generate(override_settings=override)
    assert apart(image, plain) <= FARTHEST
    for part in ("Subquad query chunk: 80", "Subquad engine: portable", "Subquad VAE: False"):
        assert part in infotext
    assert (server.status()["engine"], server.status()["query_chunk"]) == ("portable", 80)
    assert "Subquad" not in server.generate()[1]
    assert server.options()["subquad_query_chunk"] == 0


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("query_chunk", "a lot", 0),
        ("query_chunk", -64, 0),
        ("kv_chunk", 10**9, 16384),
        ("memory_limit", 0, 1),
        ("memory_limit", [1, 2], 70),
        ("memory_limit", float("nan"), 70),
        ("engine", 5, "automatic"),
        ("vae", "off", False),
        ("upcast", {"a": 1}, "web UI"),
    ],
)
def test_broken_values_are_brought_into_range(server, plain, name, value, used):
    assert server.options(**{f"subquad_{name}": value})[f"subquad_{name}"] == used
    assert f"[subquad] setting subquad_{name} is " in server.log
    assert apart(server.generate()[0], plain) <= FARTHEST


@pytest.mark.parametrize("value", ["a lot", -64, 10**9, None, [1]])
def test_broken_overrides_fail_nothing(server, plain, value):
    """The web UI sets them without a word to us."""
    assert apart(server.generate(override_settings={"subquad_query_chunk": value})[0], plain) <= FARTHEST
    assert server.options()["subquad_query_chunk"] == 0


def test_switching_away_and_back(server, plain):
    for title in ("sub-quadratic", TITLE, "sdp - scaled dot product", "None", TITLE):
        server.select(title)
        assert server.status()["active"] == (title == TITLE)
        assert apart(server.generate()[0], plain) <= FARTHEST
        assert (server.status()["calls"] > 0) == (title == TITLE)


def test_the_vae_with_and_without_us(server, plain):
    calls = {}
    for vae in (True, False):
        server.options(subquad_vae=vae)
        assert apart(server.generate()[0], plain) <= FARTHEST
        calls[vae] = server.status()["calls"]
    assert calls[True] == calls[False] + 1


@pytest.mark.parametrize("size", [(64, 64), (320, 192), (384, 384)])
def test_other_sizes_and_batches(server, size):
    request = {"width": size[0], "height": size[1], "batch_size": 2, "steps": 2}
    plain = server.generate_plain(**request)
    assert apart(server.generate(**request)[0], plain) <= FARTHEST


def test_hires(server):
    request = {
        "width": 128,
        "height": 128,
        "steps": 2,
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.6,
    }
    plain = server.generate_plain(**request)
    image, _ = server.generate(**request)
    assert image.shape == (256, 256, 3)
    assert apart(image, plain) <= FARTHEST


def test_img2img(server, plain):
    data = io.BytesIO()
    Image.fromarray(plain.astype(np.uint8)).save(data, "PNG")
    request = {"init_images": [base64.b64encode(data.getvalue()).decode()], "denoising_strength": 0.6}
    expected = server.generate_plain("/sdapi/v1/img2img", **request)
    image, _ = server.generate("/sdapi/v1/img2img", **request)
    assert apart(image, expected) <= FARTHEST
    assert server.status()["calls"] > 0


def test_the_checkpoint_is_unloaded_and_loaded_again(server, plain):
    for _ in range(2):
        server.call("/sdapi/v1/unload-checkpoint", {})
        server.call("/sdapi/v1/reload-checkpoint", {})
        image, _ = server.generate()
        assert apart(image, plain) <= FARTHEST
        assert server.status()["active"] and server.status()["calls"] > 0


def test_settings_are_saved(webui, server):
    server.options(subquad_query_chunk=128)
    assert json.loads((webui.data / "config.json").read_text())["subquad_query_chunk"] == 128


def test_textual_inversion_trains_through_it(webui, server):
    """Two steps: U-Net forward and, the web UI's checkpoint of every block around it, once more for backward."""
    pictures = webui.data / "pictures"
    pictures.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(pictures / "one.png")
    server.call("/sdapi/v1/create/embedding", {"name": "it", "num_vectors_per_token": 1, "overwrite_old": True})
    untrained = vector(webui)
    server.options(training_xattention_optimizations=True, training_write_csv_every=1)
    server.generate(steps=1)
    before = server.status()["calls"]  # each layer of the U-Net once, and the VAE's
    job = {
        "id_task": "train", "embedding_name": "it", "learn_rate": "0.05", "batch_size": 1, "gradient_step": 1,
        "data_root": str(pictures), "log_directory": str(webui.data / "training"), "training_width": 64,
        "training_height": 64, "varsize": False, "steps": 2, "clip_grad_mode": "disabled", "clip_grad_value": "0.1",
        "shuffle_tags": False, "tag_drop_out": 0, "latent_sampling_method": "once", "use_weight": False,
        "create_image_every": 0, "save_embedding_every": 1, "template_filename": "style.txt",
        "save_image_with_stored_embedding": False, "preview_from_txt2img": False, "preview_prompt": "",
        "preview_negative_prompt": "", "preview_steps": 1, "preview_sampler_name": "Euler", "preview_cfg_scale": 7,
        "preview_seed": 1, "preview_width": 64, "preview_height": 64,
    }  # fmt: skip
    answer = server.call("/sdapi/v1/train/embedding", job)
    assert "error: None" in answer["info"]
    assert server.status()["calls"] - before == 2 * 2 * (before - 1) + 1  # the picture was encoded
    (losses,) = (webui.data / "training").glob("*/it/textual_inversion_loss.csv")
    rows = losses.read_text().splitlines()
    assert len(rows) == 3 and all(float(row.split(",")[3]) > 0 for row in rows[1:])
    assert (vector(webui) - untrained).abs().min() > 0.01  # each number has had a gradient
