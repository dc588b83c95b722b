"""What an image's infotext says of the settings, and that it brings them back."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from lib_subquad import Plan
from lib_subquad.engines.table import Found
from lib_subquad.settings import OPTIONS

CHANGED = {
    "subquad_query_chunk": 512,
    "subquad_kv_chunk": 256,
    "subquad_memory_limit": 35,
    "subquad_engine": "portable",
    "subquad_checkpointing": "never",
    "subquad_upcast": "always",
    "subquad_vae": False,
    "subquad_vae_bands": "always",
    "subquad_measure": False,
    "subquad_retry": False,
}


def params(subquad) -> dict:
    """What the extension adds to a request's parameters."""
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    subquad.infotext.finish_batch(p)
    return p.extra_generation_params


def test_nothing_is_written_while_everything_is_at_its_default(subquad):
    subquad.select("subquad")
    assert params(subquad) == {}


def test_nothing_is_written_while_another_entry_is_in_force(subquad):
    subquad.opts.data.update(CHANGED)
    subquad.select("sdp")
    assert params(subquad) == {}


def test_what_was_changed_is_written_and_restored(subquad):
    """The host restores by label, casting text to the type of the default: "512" must be an int's own text."""
    subquad.select("subquad")
    assert len(CHANGED) == len(OPTIONS)
    subquad.opts.data.update(CHANGED)
    written = params(subquad)
    labels = {info.infotext: key for key, info in subquad.opts.data_labels.items() if info.infotext}
    restored = {labels[label]: subquad.opts.cast_value(labels[label], str(text)) for label, text in written.items()}
    assert restored == CHANGED
    assert [type(value) for value in restored.values()] == [type(CHANGED[key]) for key in restored]


def test_a_grid_shares_the_parameters_of_its_images(subquad):
    """What was set, retried or measured for one is not written into the next."""
    subquad.select("subquad")
    p = SimpleNamespace(extra_generation_params={"Script": "X/Y/Z plot"})
    subquad.opts.data.update(CHANGED)
    subquad.infotext.begin(p)
    subquad.status.record(Plan("portable", 64, 64, 1, 1000, retries=1, measured=Found("portable", 64, 64, 1.5)))
    subquad.infotext.finish_batch(p)
    assert len(p.extra_generation_params) == 1 + len(CHANGED) + 2
    for name in CHANGED:
        subquad.opts.data[name] = OPTIONS[name.removeprefix("subquad_")].default
    subquad.infotext.begin(p)
    subquad.infotext.finish_batch(p)
    assert p.extra_generation_params == {"Script": "X/Y/Z plot"}


def test_measurements_are_written_once_each_without_what_is_quoted(subquad):
    subquad.select("subquad")
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    for found in (
        Found("portable", 512, 1024, 1.2),
        Found("fused", margin=1.3),
        Found("portable", 512, 1024, 1.4),
        Found("portable", 256, 0, 2.0),
    ):
        subquad.status.record(Plan(found.engine, 64, 64, 1, 1000, measured=found))
    subquad.infotext.finish_batch(p)
    assert p.extra_generation_params == {"Subquad measured": "fused; portable 256xauto; portable 512x1024"}


@pytest.mark.parametrize(("value", "written"), [("many", {}), (512.0, {"Subquad query chunk": 512}), (-3, {})])
def test_a_broken_value_is_written_as_it_was_used(subquad, value, written):
    subquad.select("subquad")
    subquad.opts.data["subquad_query_chunk"] = value
    assert str(params(subquad)) == str(written)


def test_retries_are_written(subquad):
    subquad.select("subquad")
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    for retries in (0, 2, 1):
        subquad.status.record(Plan("portable", 64, 64, 1, 1000, retries=retries))
    subquad.infotext.finish_batch(p)
    assert p.extra_generation_params == {"Subquad retries": 3}
    assert params(subquad) == {}  # the next image's own


def test_chunks_remembered_from_an_earlier_image_are_written(subquad):
    from lib_subquad.retry import RETRY_REASON

    subquad.select("subquad")
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    subquad.status.record(Plan("portable", 64, 64, 1, 1000, reasons=(RETRY_REASON,)))
    subquad.infotext.finish_batch(p)
    assert p.extra_generation_params == {"Subquad retries": "remembered"}


def test_in_a_real_image(host, monkeypatch):
    host.start(optimizer="subquad")
    from modules import shared

    from demo.generate import generate

    shared.opts.set("subquad_query_chunk", 32)
    text = generate("a house", 1, 64, 64, 1, override_settings={"subquad_engine": "portable"}).infotext
    assert re.search(r"Subquad query chunk: 32, Subquad engine: portable$", text)
    assert "Subquad engine" not in generate("a house", 1, 64, 64, 1).infotext
    from lib_subquad.webui import status

    assert "fused, 32 x 64 tokens" in status.summary()


@pytest.mark.parametrize(("calls", "words"), [(1, "1 call, no retries."), (2, "2 calls, no retries.")])
def test_one_call_is_one_call(subquad, calls, words):
    subquad.status.begin()
    for _ in range(calls):
        subquad.status.record(Plan("portable", 64, 64, 1, 1000))
    assert subquad.status.summary().startswith(f"Last generation: {words}")


def test_calls_that_were_computed_again_exactly_are_written_and_told(subquad):
    subquad.select("subquad")
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    for reruns in (0, 1, 1):
        subquad.status.record(Plan("fused", 64, 64, 1, 1000, ("a reason",), reruns=reruns))
    subquad.infotext.finish_batch(p)
    assert p.extra_generation_params == {"Subquad exact reruns": 2}
    assert "3 calls, no retries, 2 computed again exactly. Largest" in subquad.status.summary()
    from lib_subquad.webui import api, words

    told = re.sub("<[^>]*>", "", words.last_generation(subquad.status.generation()))
    assert "no retries, 2 computed again exactly. The largest" in told
    assert api.status_route().reruns == 2


NOT_INSTALLED = ("the engine is set to xformers", "xformers is not installed")


def recorded(subquad, engine: str, *plans: Plan) -> dict:
    """What the infotext says of calls by these plans while this engine is set."""
    subquad.select("subquad")
    subquad.opts.data["subquad_engine"] = engine
    p = SimpleNamespace(extra_generation_params={})
    subquad.infotext.begin(p)
    for plan in plans:
        subquad.status.record(plan)
    subquad.infotext.finish_batch(p)
    return p.extra_generation_params


def test_an_engine_that_computed_nothing_is_not_the_images(subquad, capsys):
    subquad.infotext._said.clear()
    fused, portable = (Plan(name, 64, 64, 1, 1000, NOT_INSTALLED) for name in ("fused", "portable"))
    for _ in range(2):
        assert recorded(subquad, "xformers", fused, fused) == {"Subquad engine": "fused"}
    told = [line for line in capsys.readouterr().out.splitlines() if "is set to" in line]
    assert told == ["[subquad] the engine is set to xformers, but fused computed every call: xformers is not installed"]
    both = {"Subquad engine": "portable", "Subquad computed": "portable; fused"}
    assert recorded(subquad, "xformers", fused, portable, portable) == both
    mine = Plan("xformers", 64, 64, 1, 1000, ("the engine is set to xformers",))
    assert recorded(subquad, "xformers", mine) == {"Subquad engine": "xformers"}
    capsys.readouterr()
    some = {"Subquad engine": "xformers", "Subquad computed": "xformers; fused"}
    assert recorded(subquad, "xformers", mine, mine, fused) == some
    assert "but fused computed some of the calls: xformers is not installed" in capsys.readouterr().out
    assert recorded(subquad, "automatic", fused, portable) == {}


def test_an_engine_that_gave_way_is_told_with_what_was_wrong(subquad, capsys):
    subquad.infotext._said.clear()
    mine = ("it is set, and SageAttention takes these sizes",)
    plans = Plan("sage", 64, 64, 1, 1000, mine), Plan("fused", 64, 64, 1, 1000, (*mine, "it gave NaN"), reruns=1)
    written = recorded(subquad, "sage", *plans)
    assert written == {
        "Subquad engine": "sage",
        "Subquad computed": "sage; fused",
        "Subquad exact reruns": 1,
    }
    assert "the engine is set to sage, but fused computed some of the calls: it gave NaN\n" in capsys.readouterr().out


def test_an_infotext_that_was_made_before_is_told_what_came_after(subquad):
    """As a web UI does that makes those of a batch before it decodes: on the page, and in the file."""
    subquad.select("subquad")
    subquad.opts.data["subquad_engine"] = "fused"
    p = SimpleNamespace(extra_generation_params={}, iteration=0, batch_size=2)
    subquad.infotext.begin(p)
    made = "Subquad engine: x\nSteps: 1, Size: 8x8, Subquad engine: fused, Version: 1\n"
    files = []
    for p.iteration in range(2):
        if p.iteration == 1:
            subquad.status.record(Plan("portable", 64, 64, 1, 1, retries=3))
        subquad.infotext.finish_batch(p)
        params = SimpleNamespace(p=p, pnginfo={"parameters": made})
        subquad.infotext.before_image_saved(params)
        files.append(params.pnginfo["parameters"])
    second = "Subquad engine: x\nSteps: 1, Size: 8x8, Subquad engine: portable, Version: 1, Subquad retries: 3"
    assert [it.strip() for it in files] == [made.strip(), second]
    grid = ["grid", *[made] * 4, "of another"]
    processed = SimpleNamespace(infotexts=grid, info=grid[0], index_of_first_image=1, batch_size=2)
    subquad.infotext.postprocess(p, processed)
    assert [it.strip() for it in processed.infotexts] == ["grid", *[made.strip()] * 2, *[second] * 2, "of another"]
    subquad.infotext.postprocess(p, processed)
    assert processed.infotexts[3] == second  # once
    for params in (SimpleNamespace(p=None, pnginfo={"parameters": made}), SimpleNamespace(p=p, pnginfo={})):
        subquad.infotext.before_image_saved(params)
        assert set(params.pnginfo.values()) <= {made}
    subquad.infotext.postprocess(SimpleNamespace(), None)


def test_who_computed_is_written_so_that_it_is_read_back(subquad):
    """Released names stay, and pasting sets the engine that made the image."""
    written = recorded(subquad, "xformers", Plan("fused", 64, 64, 1, 1000, NOT_INSTALLED))
    labels = {info.infotext: key for key, info in subquad.opts.data_labels.items() if info.infotext}
    assert {labels[label]: text for label, text in written.items()} == {"subquad_engine": "fused"}
    assert subquad.infotext.COMPUTED not in labels
    for engine in OPTIONS["engine"].choices:  # as older images have them
        assert subquad.opts.cast_value("subquad_engine", engine) == engine


def test_in_a_real_image_of_an_engine_that_is_not_there(host, capsys, monkeypatch):
    host.start(optimizer="subquad")
    from demo.generate import generate
    from lib_subquad.engines import xformers
    from lib_subquad.webui import infotext
    from lib_subquad.webui.laboratory import LABORATORY

    monkeypatch.setattr(xformers.PACKAGE, "_installed", False)
    infotext._said.clear()
    for _ in range(2):
        text = generate("a house", 1, 64, 64, 1, override_settings={"subquad_engine": "xformers"}).infotext
        assert "Subquad engine: fused" in text or "Subquad engine: portable" in text
        assert "xformers" not in text
    assert capsys.readouterr().out.count("the engine is set to xformers, but ") == 1
    from modules import shared

    shared.opts.set("subquad_engine", "xformers")
    answer, _ = LABORATORY.look("the loaded checkpoint", 64, 64, 1)
    assert str(answer).startswith(
        "The engine is set to xformers, which computes nothing here: xformers is not installed"
    )
