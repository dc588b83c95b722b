"""Images through the real web UI's HTTP API: switched on they are its own, and every call is ours."""

from __future__ import annotations

import json
import re
import urllib.parse

import numpy as np
import pytest

from tests.forge.conftest import FARTHEST, USES, as_png
from tests.forge.models import CALLS

HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "denoising_strength": 0.9,
    "hr_additional_modules": ["Use same choices"],  # newer ones fail without
}


@pytest.fixture(scope="module")
def expected(server):
    server.use("off")
    return server.generate()[0]


def apart(image: np.ndarray, other: np.ndarray) -> int:
    return np.abs(image - other).max()


def test_it_was_installed_from_its_url(forge, server):
    assert "Installed into" in forge.said
    assert (forge.data / "extensions" / "subquad" / "scripts" / "subquad.py").is_file()
    assert [extension["name"] for extension in server.call("/sdapi/v1/extensions")].count("subquad") == 1


def test_before_the_first_image(server):
    """What the web UI will load, if it does so only then, is answered for, and nothing of ours is in place."""
    status, answer = server.status(), server.call("/subquad/v1/plan?width=512&height=768")
    assert not status["active"] and status["summary"] == "No image has been made with subquad yet."
    assert status["standing"].startswith("subquad is not active: the web UI uses its own sub-quadratic attention")
    assert answer["notes"][0] == "subquad is not active now: this is how it would compute attention."
    if not re.search(r"Model .*loaded in", server.log):  # some load one in the background as soon as they start
        assert answer["notes"][1] == "It is not loaded yet: the web UI loads it for the next image."
    assert server.holders() == []
    check_plan(answer, 64 * 96)


def test_switched_off_nothing_of_ours_is_there(server):
    image, infotext = server.generate()
    calls, status = server.calls(), server.status()
    assert sum(calls["own"].values()) == CALLS + 1 and not calls["ours"]
    assert not status["active"] and status["calls"] == 0
    assert status["summary"] == "The last generation used nothing of subquad."
    assert "Subquad" not in infotext and image.std() > 10
    assert server.holders() == []


@pytest.mark.parametrize("use", [use for use in USES if use != "off"])
def test_the_image_is_the_web_uis_own(server, use):
    own = server.check_ours(use=use)
    assert own.calls == CALLS + 1
    standing = server.status()["standing"]
    assert standing.startswith("subquad is active") and "without it the web UI would use" in standing
    assert ("in the VAE:" in standing, "in the U-Net or transformer:" in standing) == ("VAE" in use, "U-Net" in use)
    assert server.holders()


def test_switched_off_again_it_is_gone_with_the_next_image(server, expected):
    server.use("everything")
    server.generate()
    server.use("off")
    assert not server.status()["active"]
    assert apart(server.generate()[0], expected) == 0
    assert server.holders() == []


def test_a_copy_that_another_took_steps_aside(server):
    """A late import's is the web UI's own again; one that is kept where nothing finds it does what that would do."""
    server.use("everything")
    server.generate()
    server.call("/probe/copy", {})
    assert all(copy["ours"] and copy["acts"] for copy in server.call("/probe/copies").values())
    for use in ("VAE only", "off"):
        server.use(use)
        copies = server.call("/probe/copies")  # before an image, too
        assert not any(copy["acts"] for copy in copies.values())
    server.generate()
    assert "late_import.optimized_attention" not in server.holders()
    copies = server.call("/probe/copies")
    assert (copies["late"]["ours"], copies["hidden"]["ours"]) == (False, True)
    assert all(copy["error"] < 1e-5 and not copy["acts"] for copy in copies.values())


def test_the_web_ui_estimates_the_same_memory(server):
    server.use("off")
    server.generate()
    own = server.call("/probe/estimate")
    server.use("everything")
    server.generate()
    print(f"{own} bytes")
    assert server.call("/probe/estimate") == own > 0


def test_chunk_sizes_and_engine_change_from_one_request_to_the_next(server, expected):
    server.use("everything")
    for query_chunk, kv_chunk, engine in ((96, 32, "automatic"), (48, 0, "fused"), (0, 0, "portable"), (0, 0, "fused")):
        server.options(subquad_query_chunk=query_chunk, subquad_kv_chunk=kv_chunk, subquad_engine=engine)
        image, infotext = server.generate()
        assert apart(image, expected) <= FARTHEST
        assert (f"Subquad query chunk: {query_chunk}" in infotext) == (query_chunk > 0)
        assert (f"Subquad KV chunk: {kv_chunk}" in infotext) == (kv_chunk > 0)
        assert (f"Subquad engine: {engine}" in infotext) == (engine != "automatic")
        status = server.status()
        assert status["calls"] == CALLS + 1
        assert (status["query_chunk"] == query_chunk) == (query_chunk > 0)
        assert (status["kv_chunk"] == kv_chunk) == (kv_chunk > 0)
        assert status["engine"] == ("portable" if kv_chunk else "fused" if engine == "automatic" else engine)


def test_override_settings_hold_for_one_request(server, expected):
    override = {"subquad_use": "U-Net or transformer only", "subquad_query_chunk": 80, "subquad_engine": "portable"}
    image, infotext = server.generate(override_settings=override)
    assert apart(image, expected) <= FARTHEST
    for part in ("Subquad use: U-Net or transformer only", "Subquad query chunk: 80", "Subquad engine: portable"):
        assert part in infotext
    status = server.status()
    assert (status["engine"], status["query_chunk"], status["calls"]) == ("portable", 80, CALLS)
    assert (server.options()["subquad_use"], server.options()["subquad_query_chunk"]) == ("off", 0)
    assert not status["active"]
    image, infotext = server.generate()
    assert apart(image, expected) == 0 and "Subquad" not in infotext
    assert server.holders() == []


def test_one_request_without_it(server, expected):
    server.use("everything")
    image, infotext = server.generate(override_settings={"subquad_use": "off"})
    assert apart(image, expected) == 0 and "Subquad" not in infotext and server.status()["calls"] == 0
    server.generate()
    assert server.status()["calls"] == CALLS + 1


@pytest.mark.parametrize("value", ["quantum", None, 5, ["everything"]])
def test_broken_values_of_the_switch(server, expected, value):
    """As *off*, which is the default; an override is taken by the web UI without a word to us."""
    image, infotext = server.generate(override_settings={"subquad_use": value})
    assert apart(image, expected) == 0 and "Subquad" not in infotext
    assert server.status()["calls"] == 0 and server.options()["subquad_use"] == "off"


def test_settings_are_saved(forge, server):
    server.use("VAE only")
    assert json.loads((forge.data / "config.json").read_text(encoding="utf-8"))["subquad_use"] == "VAE only"


@pytest.mark.parametrize("size", [(64, 64), (192, 128)])
def test_other_sizes(server, size):
    server.check_ours(width=size[0], height=size[1])


def test_several_steps_and_images(server):
    own = server.check_ours(batch_size=2, n_iter=2, steps=2, width=64, height=64)
    assert own.calls == 2 * (2 * CALLS + 1)  # both images of a batch are decoded at once


def test_a_long_prompt(server):
    server.check_ours(prompt="a cat " * 80, negative_prompt="a dog")


def test_hires(server):
    latent = server.call("/sdapi/v1/latent-upscale-modes")[0]["name"]  # not the same in all of them
    own = server.check_ours(**HIRES, hr_upscaler=latent, width=64, height=64)
    assert own.image.shape == (128, 128, 3) and own.calls == 2 * CALLS + 1


def test_img2img(server, expected):
    own = server.check_ours("/sdapi/v1/img2img", init_images=[as_png(expected)], denoising_strength=0.9)
    assert own.calls == CALLS + 2  # the VAE encodes as well


def test_the_vae_alone_encodes_and_decodes(server, expected):
    server.check_ours("/sdapi/v1/img2img", "VAE only", init_images=[as_png(expected)], denoising_strength=0.9)


def test_the_plan_of_the_loaded_checkpoint_and_of_a_listed_one(server, expected):
    title = server.call("/probe/checkpoints")[0]
    loaded = server.call("/subquad/v1/plan?width=512&height=768&batch=2")
    listed = server.call(f"/subquad/v1/plan?width=512&height=768&batch=2&checkpoint={urllib.parse.quote(title)}")
    assert loaded == listed
    check_plan(loaded, 64 * 96)
    server.use("VAE only")
    assert {row["part"] for row in server.call("/subquad/v1/plan")["rows"]} == {"vae_encoder", "vae_decoder"}
    server.use("U-Net or transformer only")
    assert {row["part"] for row in server.call("/subquad/v1/plan")["rows"]} == {"unet"}


def check_plan(answer: dict, tokens: int) -> None:
    """As of the checkpoint, for an image of so many positions."""
    unet = [row for row in answer["rows"] if row["part"] == "unet"]
    assert "Stable Diffusion 1" in answer["family"] and answer["largest_image"][0] > 512
    assert sum(row["layers"] for row in unet) == CALLS
    assert max(row["query_tokens"] for row in unet) == tokens
    assert {row["kind"] for row in unet} == {"self", "cross"}
    assert {row["part"] for row in answer["rows"]} == {"unet", "vae_encoder", "vae_decoder"}
    assert all(row["reasons"] for row in answer["rows"])


@pytest.mark.parametrize("query", ["width=0", "batch=1e99", "checkpoint=/etc/passwd"])
def test_a_wrong_question_is_answered_in_words(server, query):
    with pytest.raises(AssertionError, match="422 "):
        server.call(f"/subquad/v1/plan?{query}")


def test_the_routes_are_in_its_openapi_page(server):
    paths = server.call("/openapi.json")["paths"]
    assert {"/subquad/v1/status", "/subquad/v1/plan"} <= set(paths)


# --------------------------------------------------------------------------------------- what the web UI has built in


@pytest.fixture(scope="module")
def controlnet(server, expected):
    """controlnet(module, model): a request with one unit; skipped where it has no such module."""
    models = {name.split(" [")[0]: name for name in server.call("/controlnet/model_list")["model_list"]}
    modules = server.call("/controlnet/module_list")["module_list"]

    def request(module: str, model: str = "None") -> dict:
        if module not in modules:
            pytest.skip(f"there is no preprocessor {module} here")
        unit = {
            "enabled": True, "image": as_png(expected), "weight": 1.0, "processor_res": 128, "module": module,
            "model": models[model], "threshold_a": 0.5, "threshold_b": 0.5,
        }  # fmt: skip
        return server.script("controlnet", unit)

    return request


def test_controlnet_reference_only(server, expected, controlnet):
    """It asks the other image's keys as well, by the name that its home has."""
    own = server.check_ours(**controlnet("reference_only"))
    assert own.calls == 3 * CALLS + 2 and apart(own.image, expected) > 20


def test_a_controlnet(server, expected, controlnet):
    own = server.check_ours(**controlnet("None", "tiny-controlnet"))
    assert own.calls > CALLS + 1 and apart(own.image, expected) > 20


def test_an_ip_adapter(server, expected, controlnet):
    own = server.check_ours(**controlnet("CLIP-ViT-H (IPAdapter)", "tiny-ip-adapter"))
    assert own.calls == CALLS + 3 + 1 and apart(own.image, expected) > 20


def test_self_attention_guidance(server):
    """It needs the scores of one layer, which only an attention of its own gives it; all else is ours."""
    request = server.script("selfattentionguidance", True, 0.75, 2.0, steps=2)
    server.use("off")
    own, _ = server.generate(**request)
    made = server.calls()["own"]
    server.use("everything")
    image, _ = server.generate(**request)
    served = server.calls()
    assert apart(image, own) <= FARTHEST
    assert {caller for caller in served["own"] if "sag" not in caller} == set()
    assert sum(served["ours"].values()) == sum(made.values()) - sum(served["own"].values()) == server.status()["calls"]


def test_style_align(server):
    """The images of a batch look at each other's keys."""
    server.check_ours(**server.script("stylealign", True, 1.0, batch_size=2))


def test_hypertile(server):
    """Queries of each tile, each with a part of the keys."""
    server.check_ours(**server.script("hypertile", True, 32, 2, 1, False, width=256, height=128))


@pytest.mark.parametrize("ratio", [0.5])
def test_token_merging(server, expected, ratio):
    server.options(token_merging_ratio=ratio)
    assert apart(server.check_ours().image, expected) > 20


def test_a_tiled_vae(server):
    try:
        server.check_ours(**server.script("never oom", False, True, width=256))
    finally:
        server.generate(**server.script("never oom", False, False))  # it is a state of the process
