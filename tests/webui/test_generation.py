"""Images through the real web UI's HTTP API: with our entry they are those of *sdp*, whatever the settings."""

from __future__ import annotations

import base64
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

TITLE = "subquad - fast attention within a memory limit"
FARTHEST = 1
only_sd1 = pytest.mark.parametrize("model", ["SD 1"], indirect=True)
only_unets = pytest.mark.parametrize("model", ["SD 1", "SDXL"], indirect=True)
# A block in the middle of a U-Net or transformer, and what kohya's trainer calls it.
MIDDLE_BLOCK = {
    "SD 1": ("middle_block.1", "lora_unet_mid_block_attentions_0"),
    "SDXL": ("middle_block.1", "lora_unet_middle_block_1"),
    "SD 3": ("joint_blocks.1", "lora_unet_joint_blocks_1"),
}
PROJECTIONS = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".qkv.weight")


@pytest.fixture(scope="module")
def expected(server, model):
    return server.generate_with_sdp()


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
    assert "Applying attention optimization: sub-quadratic (subquad)... done." in server.log


def test_the_image_is_that_of_sdp(server, model, expected):
    image, infotext = server.generate()
    assert apart(image, expected) <= FARTHEST
    assert "Subquad" not in infotext
    assert expected.std() > 10  # a picture of something
    status = server.status()
    assert status["active"] and status["calls"] == model.calls() and status["retries"] == 0
    assert "out of reach" not in status["summary"]


def test_chunk_sizes_change_from_one_request_to_the_next(server, expected):
    for query_chunk, kv_chunk in ((96, 32), (48, 0), (0, 0)):
        server.options(subquad_query_chunk=query_chunk, subquad_kv_chunk=kv_chunk)
        image, infotext = server.generate()
        assert apart(image, expected) <= FARTHEST
        assert (f"Subquad query chunk: {query_chunk}" in infotext) == (query_chunk > 0)
        assert (f"Subquad KV chunk: {kv_chunk}" in infotext) == (kv_chunk > 0)
        status = server.status()
        assert (status["query_chunk"] == query_chunk) == (query_chunk > 0)
        assert (status["kv_chunk"] == kv_chunk) == (kv_chunk > 0)
        assert (status["engine"] == "portable") == (kv_chunk > 0)


def test_override_settings_hold_for_one_request(server, model, expected):
    override = {"subquad_query_chunk": 80, "subquad_engine": "portable", "subquad_vae": False}
    image, infotext = server.generate(override_settings=override)
    assert apart(image, expected) <= FARTHEST
    for part in ("Subquad query chunk: 80", "Subquad engine: portable", "Subquad VAE: False"):
        assert part in infotext
    status = server.status()
    assert (status["engine"], status["query_chunk"], status["calls"]) == ("portable", 80, model.calls() - 1)
    assert "Subquad" not in server.generate()[1]
    assert server.options()["subquad_query_chunk"] == 0


@only_sd1
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
def test_broken_values_are_brought_into_range(server, expected, name, value, used):
    assert server.options(**{f"subquad_{name}": value})[f"subquad_{name}"] == used
    assert f"[subquad] setting subquad_{name} is " in server.log
    assert apart(server.generate()[0], expected) <= FARTHEST


@only_sd1
@pytest.mark.parametrize("value", ["a lot", -64, 10**9, None, [1]])
def test_broken_overrides_fail_nothing(server, expected, value):
    """The web UI sets them without a word to us."""
    assert apart(server.generate(override_settings={"subquad_query_chunk": value})[0], expected) <= FARTHEST
    assert server.options()["subquad_query_chunk"] == 0


def test_switching_away_and_back(server, model, expected):
    for title in ("sub-quadratic", TITLE, "sdp - scaled dot product", "None", TITLE):
        server.select(title)
        assert server.status()["active"] == (title == TITLE)
        assert apart(server.generate()[0], expected) <= FARTHEST
        assert server.status()["calls"] == (model.calls() if title == TITLE else 0)


def test_the_vae_with_and_without_us(server, model, expected):
    for vae in (True, False):
        server.options(subquad_vae=vae)
        assert apart(server.generate()[0], expected) <= FARTHEST
        assert server.status()["calls"] == model.calls() - (not vae)


@pytest.mark.parametrize("size", [(64, 64), (320, 192), (384, 384)])
def test_other_sizes_and_batches(server, model, size):
    request = {"width": size[0], "height": size[1], "batch_size": 2, "steps": 2}
    expected = server.generate_with_sdp(**request)
    assert apart(server.generate(**request)[0], expected) <= FARTHEST
    assert server.status()["calls"] == model.calls(2) + 1  # the VAE decodes one image at a time


def test_hires(server, model):
    request = {
        "width": 128,
        "height": 128,
        "steps": 2,
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.6,
    }
    expected = server.generate_with_sdp(**request)
    image, _ = server.generate(**request)
    assert image.shape == (256, 256, 3)
    assert apart(image, expected) <= FARTHEST
    assert server.status()["calls"] == model.calls(2 + 2)


def test_img2img(server, model, expected):
    data = io.BytesIO()
    Image.fromarray(expected.astype(np.uint8)).save(data, "PNG")
    request = {"init_images": [base64.b64encode(data.getvalue()).decode()], "denoising_strength": 0.6, "steps": 2}
    expected = server.generate_with_sdp("/sdapi/v1/img2img", **request)
    image, _ = server.generate("/sdapi/v1/img2img", **request)
    assert apart(image, expected) <= FARTHEST
    assert server.status()["calls"] == model.calls(2) + 1  # the VAE encodes as well


def test_a_lora(webui, server, model, expected):
    """Through the extension that comes with the web UI."""
    save_lora(webui.data / "models" / "Lora" / f"{model.path.stem}-lora.safetensors", model)
    request = {"prompt": f"a cat <lora:{model.path.stem}-lora:1>"}
    changed = server.generate_with_sdp(**request)
    assert apart(changed, expected) > 20
    assert apart(server.generate(**request)[0], changed) <= FARTHEST
    assert server.status()["calls"] == model.calls()
    assert apart(server.generate()[0], expected) <= FARTHEST


def save_lora(path, model) -> None:
    """Random weights for the projections of the block in the middle."""
    middle, lora = MIDDLE_BLOCK[model.kind]
    middle, random = f"model.diffusion_model.{middle}", torch.Generator().manual_seed(0)
    tensors = {}
    with safe_open(model.path, "pt") as file:
        for name in file.keys():
            if name.startswith(middle) and name.endswith(PROJECTIONS):
                rows, columns = file.get_slice(name).get_shape()
                module = name.removeprefix(middle).removesuffix(".weight").replace(".", "_")
                tensors[f"{lora}{module}.lora_down.weight"] = torch.randn(4, columns, generator=random) / columns**0.5
                tensors[f"{lora}{module}.lora_up.weight"] = torch.randn(rows, 4, generator=random)
    save_file(tensors, path)


@only_unets  # for which alone the web UI has them
def test_a_hypernetwork(server, model, expected):
    made = {"name": model.path.stem, "enable_sizes": widths(model), "overwrite_old": True}
    server.call("/sdapi/v1/create/hypernetwork", {**made, "layer_structure": [1, 2, 1], "weight_init": "XavierNormal"})
    request = {"prompt": f"a cat <hypernet:{model.path.stem}:1>"}
    changed = server.generate_with_sdp(**request)
    assert apart(changed, expected) > 20
    assert apart(server.generate(**request)[0], changed) <= FARTHEST
    assert server.status()["calls"] == model.calls()
    assert apart(server.generate()[0], expected) <= FARTHEST


def widths(model) -> list[int]:
    """Of what keys and values are made from."""
    with safe_open(model.path, "pt") as file:
        return sorted({file.get_slice(name).get_shape()[1] for name in file.keys() if name.endswith(".to_k.weight")})


def test_the_checkpoint_is_unloaded_and_loaded_again(server, model, expected):
    """The web UI keeps it in memory meanwhile, and its layers serve what they served."""
    for _ in range(2):
        server.call("/sdapi/v1/unload-checkpoint", {})
        assert server.status()["active"]
        server.call("/sdapi/v1/reload-checkpoint", {})
        assert server.status()["active"]
        image, _ = server.generate()
        assert apart(image, expected) <= FARTHEST
        assert server.status()["calls"] == model.calls()


def test_settings_are_saved(webui, server):
    server.options(subquad_query_chunk=128)
    assert json.loads((webui.data / "config.json").read_text(encoding="utf-8"))["subquad_query_chunk"] == 128


@pytest.fixture
def job(server, tmp_path) -> dict:
    """What the web UI needs to train the embedding "it", made anew, on one picture. It trains no SDXL model."""
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "pictures" / "one.png"
    )
    server.call("/sdapi/v1/create/embedding", {"name": "it", "num_vectors_per_token": 1, "overwrite_old": True})
    return {
        "id_task": "train", "embedding_name": "it", "learn_rate": "0.05", "batch_size": 1, "gradient_step": 1,
        "data_root": str(tmp_path / "pictures"), "log_directory": str(tmp_path / "training"), "training_width": 64,
        "training_height": 64, "varsize": False, "steps": 2, "clip_grad_mode": "disabled", "clip_grad_value": "0.1",
        "shuffle_tags": False, "tag_drop_out": 0, "latent_sampling_method": "once", "use_weight": False,
        "create_image_every": 0, "save_embedding_every": 1, "template_filename": "style.txt",
        "save_image_with_stored_embedding": False, "preview_from_txt2img": False, "preview_prompt": "",
        "preview_negative_prompt": "", "preview_steps": 1, "preview_sampler_name": "Euler", "preview_cfg_scale": 7,
        "preview_seed": 1, "preview_width": 64, "preview_height": 64,
    }  # fmt: skip


@only_sd1
def test_textual_inversion_trains_through_it(webui, server, model, job, tmp_path):
    """Two steps: U-Net forward and, the web UI's checkpoint of every block around it, once more for backward."""
    untrained = vector(webui)
    server.options(training_xattention_optimizations=True, training_write_csv_every=1)
    server.generate(steps=1)
    assert server.status()["calls"] == model.calls(1)
    assert "error: None" in server.call("/sdapi/v1/train/embedding", job)["info"]
    assert server.status()["calls"] - model.calls(1) == 2 * 2 * model.layers + 1  # the picture was encoded
    (losses,) = (tmp_path / "training").glob("*/it/textual_inversion_loss.csv")
    rows = losses.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and all(float(row.split(",")[3]) > 0 for row in rows[1:])
    assert (vector(webui) - untrained).abs().min() > 0.01  # each number has had a gradient


@only_sd1
def test_training_without_optimizations(server, model, job, expected):
    """For as long as it lasts the web UI takes them off without telling us, and the status does not claim otherwise."""
    server.options(training_xattention_optimizations=False)
    answers, active = [], []
    training = threading.Thread(
        target=lambda: answers.append(server.call("/sdapi/v1/train/embedding", {**job, "steps": 10}))
    )
    training.start()
    while training.is_alive():
        active.append(server.status()["active"])
    assert "error: None" in answers[0]["info"]
    assert False in active
    assert server.status()["active"]
    assert apart(server.generate()[0], expected) <= FARTHEST
    assert server.status()["calls"] == model.calls()
