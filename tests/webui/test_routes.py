"""Our HTTP routes beside the web UI's own, and our axes in its X/Y/Z plot."""

from __future__ import annotations

import urllib.parse

import pytest

from tests.servers import infotexts, status_of

TITLE = "subquad - fast attention within a memory limit"
PATHS = ("/subquad/v1/status", "/subquad/v1/plan", "/subquad/v1/measured")
XYZ = "x/y/z plot"


# What a plan says of each: family, the part that makes the image, the most tokens at 512 x 768, what looks at what.
TOLD = {
    "SD 1": ("Stable Diffusion 1", "unet", 64 * 96, {"self", "cross"}),
    "SDXL": ("SDXL", "unet", 32 * 48, {"self", "cross"}),
    "SD 3": ("Stable Diffusion 3", "transformer", 32 * 48 + 77 + 77, {"self", "joint"}),
}


@pytest.mark.parametrize("model", TOLD, indirect=True)
def test_the_plan_of_the_loaded_checkpoint(server, model):
    family, part, tokens, kinds = TOLD[model.kind]
    answer = server.call("/subquad/v1/plan?width=512&height=768&batch=2")
    rows = answer["rows"]
    assert family in answer["family"]
    limited = model.kind == "SD 3"  # has places for no larger image, however much memory there is
    assert answer["largest_image"] == [512, 768] if limited else answer["largest_image"][0] > 512
    assert sum(row["layers"] for row in rows if row["part"] == part) == model.layers
    first = max(rows, key=lambda row: row["query_tokens"] * (row["part"] == part))
    assert first["query_tokens"] == tokens
    assert first["engine"] == "fused" and first["reasons"]
    assert {row["kind"] for row in rows} == kinds and {row["part"] for row in rows} > {part}


def test_a_checkpoint_by_its_title_and_none_by_a_path(server):
    title = server.call("/sdapi/v1/sd-models")[0]["title"]
    assert server.call(f"/subquad/v1/plan?checkpoint={urllib.parse.quote(title)}")["rows"]
    for stranger in ("/etc/passwd", "../../../etc/passwd", "nothing"):
        with pytest.raises(AssertionError, match="422 .*There is no checkpoint"):
            server.call(f"/subquad/v1/plan?checkpoint={urllib.parse.quote(stranger)}")


@pytest.mark.parametrize("query", ["width=0", "height=99999", "batch=-1", "width=many", "batch=1e99"])
def test_a_wrong_question_is_answered_in_words(server, query):
    with pytest.raises(AssertionError, match="422 "):
        server.call(f"/subquad/v1/plan?{query}")


def test_they_are_in_its_openapi_page(server):
    paths = server.call("/openapi.json")["paths"]
    for path in PATHS:
        answer = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer["$ref"].endswith(("PlanResponse", "StatusResponse", "MeasuredResponse"))


def test_behind_the_same_password(webui):
    with webui.running("--nowebui", "--api-auth", "me:secret") as server:
        own = status_of(server, "/sdapi/v1/options")
        assert {own, *(status_of(server, path) for path in PATHS)} == {401}
        assert status_of(server, PATHS[0], "me:wrong") == 401
        for path in PATHS:
            assert status_of(server, path, "me:secret") == 200


@pytest.fixture(scope="module")
def with_a_page(webui):
    with webui.running() as running:
        running.select(TITLE)
        yield running


@pytest.mark.parametrize(
    ("label", "values", "written"),
    [
        ("[Subquad] Query chunk", "64, 128", ["Subquad query chunk: 64", "Subquad query chunk: 128"]),
        ("[Subquad] KV chunk", "0, 200", ["", "Subquad KV chunk: 200"]),
        ("[Subquad] Engine", "automatic, portable", ["", "Subquad engine: portable"]),
        ("[Subquad] Engine", "portable, automatic", ["Subquad engine: portable", ""]),
        ("[Subquad] Memory limit", "70, 30", ["", "Subquad memory limit: 30"]),
    ],
)
def test_an_axis(with_a_page, label, values, written):
    answer = plot(with_a_page, label, values)
    written_into = infotexts(answer)[1:]  # after the grid
    assert len(written_into) == 2
    for infotext, part in zip(written_into, written):
        assert part in infotext and (part or "Subquad" not in infotext)
    assert not any(value for key, value in with_a_page.options().items() if key == "subquad_query_chunk")


def test_a_wrong_value_on_an_axis_says_so(with_a_page):
    with pytest.raises(AssertionError):
        plot(with_a_page, "[Subquad] Engine", "quantum")
    assert "[Subquad] Engine: 'quantum' is not" in with_a_page.log


def plot(server, label: str, values: str) -> dict:
    info = next(info for info in server.call("/sdapi/v1/script-info") if info["name"] == XYZ and not info["is_img2img"])
    types = next(argument for argument in info["args"] if argument["label"] == "X type")["choices"]
    assert sum(choice == label for choice in types) == 1
    arguments = [types.index(label), values, [], 0, "", [], 0, "", []] + [False, True, False, False] + [False] * 3
    request = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "steps": 1, "sampler_name": "Euler"}
    return server.call("/sdapi/v1/txt2img", {**request, "script_name": XYZ, "script_args": [*arguments, 0, True]})
