"""SD 3 in the real web UI: its own classes with random weights, and a guest that puts its function in our place."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

TITLE = "subquad - fast attention within a memory limit"
SDP = "sdp - scaled dot product"
# Part -> how often it attends with attention of ours, as the guest of these tests makes it.
CALLS = {"transformer": 4, "block": 1, "vae_layer": 1, "vae": 2, "clip": 0, "t5": 0}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest number
GUEST = """
from modules import script_callbacks
from modules.models.sd3 import mmdit

def blind(q, k, v, heads, mask=None):
    return q

def stay():
    global found
    found, mmdit.attention = mmdit.attention, blind

def leave():
    mmdit.attention = found

def mount(_page, app):
    app.add_api_route("/blind/stay", stay, methods=["GET"])
    app.add_api_route("/blind/leave", leave, methods=["GET"])

script_callbacks.on_app_started(mount)
"""


@pytest.fixture(scope="module", autouse=True)
def guest(webui):
    """An extension beside ours, for the server of this file."""
    folder = webui.data / "extensions" / "a-blind-guest"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "blind.py").write_text(GUEST, encoding="utf-8")
    yield
    shutil.rmtree(folder)


@pytest.fixture
def sd3(webui, server):
    """A checkpoint of SD 3, loaded."""
    model = webui.model("SD 3")
    server.load(model)
    return model


def output(server, part: str, dtype: str = "float32") -> np.ndarray:
    """What a part makes of random numbers in this dtype; T5 computes in float32 whatever it is given."""
    answer = server.call(f"/sd3/output?part={part}&dtype={dtype}")
    assert answer["dtype"] == f"torch.{dtype}" or part == "t5"
    return np.array(answer["numbers"])


def names(server) -> dict[str, list]:
    return server.call("/sd3/names")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("part", CALLS)
def test_each_part_alone(server, sd3, part, dtype):
    """Text encoders are the web UI's to the last bit."""
    before = server.status()
    found = output(server, part, dtype)
    after = server.status()
    assert (after["calls"] - before["calls"], after["passed_on"]) == (CALLS[part], before["passed_on"])
    server.select(SDP)
    expected = output(server, part, dtype)
    assert server.status()["calls"] == after["calls"]
    server.select(TITLE)
    assert np.isfinite(expected).all() and expected.std() > 0.01
    apart = np.abs(found - expected).max()
    assert apart <= (TOLERANCE[dtype] * np.abs(expected).max() if CALLS[part] else 0)


def test_settings_hold_for_each_part(server, sd3):
    for part in ("transformer", "vae"):
        expected = output(server, part)
        server.options(subquad_engine="portable", subquad_query_chunk=96, subquad_kv_chunk=40)
        assert np.abs(output(server, part) - expected).max() <= 1e-5 * np.abs(expected).max()
        server.options(subquad_engine="automatic", subquad_query_chunk=0, subquad_kv_chunk=0)
    server.options(subquad_vae=False)
    before = server.status()["calls"]
    output(server, "vae")
    assert server.status()["calls"] == before


def test_the_names_are_given_back(server, sd3):
    server.select(SDP)
    own = names(server)
    assert {home for _, home in own.values()} == {"modules.models.sd3.other_impls", "modules.models.sd3.sd3_impls"}
    for title in (TITLE, "None", TITLE, "sub-quadratic", TITLE, SDP):
        server.select(title)
        ours = {name for name, (_, home) in names(server).items() if home.startswith("lib_subquad")}
        assert ours == ({"mmdit.attention", "sd3_impls.AttnBlock.forward"} if title == TITLE else set())
        assert title == TITLE or names(server) == own
    server.select(TITLE)


def test_reload_ui(webui, sd3):
    """It unloads our script, and runs it again while what it imported stays."""
    with webui.running(cross_attention_optimization=TITLE, sd_model_checkpoint=sd3.path.name) as server:
        server.wait_for("Applying attention optimization: sub-quadratic (subquad)... done.")
        server.generate()
        ours = names(server)
        server.call("/sd3/reload")
        server.wait_for("Startup time:", 2)
        image, _ = server.generate()
        assert server.status()["calls"] == sd3.calls() and names(server) == ours
        assert np.abs(server.generate_with_sdp() - image).max() <= 1
        server.select(SDP)
        assert not any(home.startswith("lib_subquad") for _, home in names(server).values())
        assert "Traceback" not in server.log


def test_a_guests_function_stays_and_is_named(server, sd3):
    expected, _ = server.generate()
    for title in (SDP, TITLE):
        server.select(title)
        server.call("/blind/stay")
        image, _ = server.generate()
        assert np.abs(image - expected).max() > 20  # attention has a say in it
        server.call("/blind/leave")
    status = server.status()
    assert status["active"] and status["calls"] == 1  # the VAE's
    assert "3 of 3 layers were out of reach: a-blind-guest (3) computed them." in status["summary"]
    image, _ = server.generate()
    assert np.abs(image - expected).max() <= 1 and server.status()["calls"] == sd3.calls()
    assert (server.status()["layers"], server.status()["out_of_reach"]) == (sd3.layers, {})


def test_a_long_prompt(server, sd3):
    """More tokens of text with it than without: the web UI asks twice a step, or fills up the shorter one."""
    request = {"prompt": "a cat and a dog and a bird " * 20}
    for fill_up in (False, True):
        server.options(pad_cond_uncond=fill_up)
        expected = server.generate_with_sdp(**request)
        image, _ = server.generate(**request)
        assert np.abs(image - expected).max() <= 1
        assert server.status()["calls"] == (1 if fill_up else 2) * 3 * sd3.layers + 1
