"""What is measured before an image: when, how often, what is told of it, and where it is kept."""

from __future__ import annotations

import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib_subquad.engines import order
from lib_subquad.engines.table import Found, class_of
from lib_subquad.lab.measured import file, rounds

FASTER = Found("portable", 64, 128, 1.5)
pytestmark = pytest.mark.usefixtures("one_thread")
PARAMETERS = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "steps": 1}


@pytest.fixture
def nothing_is_measured():
    """Not here."""


@pytest.fixture
def measured(loaded, monkeypatch):
    """subquad selected, and measuring faked: the problems of each time; `answer` is what is found for each."""
    seen = SimpleNamespace(times=[], answer=FASTER, happens=lambda: None)

    def measure(problems, settings, seconds, telling):
        seen.times.append(problems)
        telling("64 x 64 tokens")
        seen.happens()
        if seen.answer is None or seen.answer.disturbed:
            rounds._tried.update((order.machine(problem.device), class_of(problem)) for problem in problems)
        if seen.answer is None:
            return {}
        return {class_of(problem): seen.answer for problem in problems}

    monkeypatch.setattr(rounds, "measured", measure)
    loaded.select("subquad")
    return seen


@pytest.fixture
def data_folder(host, tmp_path, monkeypatch):
    from modules import paths_internal

    monkeypatch.setattr(paths_internal, "data_path", str(tmp_path / "Jane Doe"), raising=False)
    (tmp_path / "Jane Doe").mkdir()
    return tmp_path / "Jane Doe"


def generate(**request):
    from demo.generate import generate

    return generate(**{**PARAMETERS, **request})


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[subquad]")]


def test_once_for_each_new_size_and_batch(measured, loaded, capsys):
    from lib_subquad.webui import measuring

    for size in ((64, 64), (64, 64), (256, 128), (64, 64), (256, 128)):
        generate(width=size[0], height=size[1])
    assert len(measured.times) == 2
    told = lines(capsys)
    assert [line for line in told if "is fastest" in line] == [
        f"[subquad] measuring which engine is fastest for {size}: up to 5 seconds, once"
        for size in ("64 x 64", "256 x 128")
    ]
    request = SimpleNamespace(width=64, height=64, batch_size=8, extra_generation_params={})
    for _ in range(2):
        loaded.infotext.begin(request)
        measuring.before(request)
    assert len(measured.times) == 3


def test_what_was_found_is_told_and_used(measured, loaded, capsys):
    generate()
    (found,) = [line for line in lines(capsys) if "measured for" in line]
    assert re.fullmatch(
        r"\[subquad\] measured for 64 x 64: portable in tiles of 64 x 128 is 1\.50 times as fast for \d+ of 21 layers"
        r"(; .*)?",
        found,
    )
    assert found.removeprefix("[subquad] m") in loaded.status.summary()
    from lib_subquad.webui.laboratory import LABORATORY

    assert "portable in tiles of 64 x 128 is 1.50 times as fast" in LABORATORY.status()
    assert loaded.status.generation().measured == {FASTER}
    generate()
    assert "measured for" not in loaded.status.summary()  # that was before another image


def test_nothing_faster_and_nothing_found_are_told_and_not_measured_again(measured, loaded, capsys):
    measured.answer = Found("fused")
    generate()
    assert lines(capsys)[-1] == "[subquad] measured for 64 x 64: nothing is clearly faster than what rules take"
    measured.answer = None
    generate(width=256, height=256)
    assert lines(capsys)[-1] == "[subquad] measured for 256 x 256: nothing could be told, so rules decide"
    for size in (64, 256):
        assert "Subquad" not in generate(width=size, height=size).infotext
    assert len(measured.times) == 2


def test_what_other_programs_disturbed_is_told_and_measured_again_after_the_next_start(measured, loaded, capsys, host):
    from lib_subquad.webui import api

    measured.answer = Found("fused").beside_others()
    generate()
    kinds = len(measured.times[0])
    assert lines(capsys)[-1] == (
        "[subquad] measured for 64 x 64: nothing is clearly faster than what rules take; other programs disturbed "
        f"{kinds} of {kinds} kinds of calls, which are measured again after the next start"
    )
    assert [row.disturbed for row in api.measured_route().measured] == [True] * kinds
    generate()
    assert len(measured.times) == 1
    host.reload_extension()
    loaded.select("subquad")
    generate()
    assert len(measured.times) == 2


@pytest.mark.parametrize(
    "override",
    [
        {"subquad_measure": False},
        {"subquad_engine": "portable"},
        {"subquad_engine": "fused"},
        {"subquad_query_chunk": 64},
        {"subquad_kv_chunk": 64},
    ],
    ids=str,
)
def test_whoever_chooses_waits_for_nothing(measured, loaded, override):
    generate(override_settings=override)
    assert not measured.times
    generate()
    assert len(measured.times) == 1
    assert "Subquad measured" not in generate(override_settings=override).infotext
    assert len(measured.times) == 1


def test_not_while_another_entry_is_in_force(measured, loaded):
    loaded.select("sdp")
    generate()
    assert not measured.times


def test_before_the_image_and_under_the_queues_lock(measured, loaded):
    from modules import call_queue, shared

    seen = []
    measured.happens = lambda: seen.append(
        (call_queue.queue_lock.locked(), loaded.status.generation().calls, loaded.status.summary())
    )
    steps = []
    generate(steps=2, progress=lambda done, of: steps.append(len(measured.times)))
    assert steps == [1, 1]
    (locked, calls, summary), *others = seen
    assert locked and calls == 0 and not others
    assert summary == "Measuring which engine is fastest for 64 x 64: up to 5 seconds, once."
    assert not hasattr(shared.state, "textinfo")  # this web UI has none


def test_it_is_announced_where_the_web_ui_shows_progress(measured, loaded, monkeypatch):
    from modules import shared

    monkeypatch.setattr(shared.state, "textinfo", "its own", raising=False)
    seen = []
    measured.happens = lambda: seen.append(shared.state.textinfo)
    generate()
    assert seen == ["Measuring which engine is fastest for 64 x 64: up to 5 seconds, once."]
    assert shared.state.textinfo == "its own"


@pytest.mark.parametrize("failing", ["measuring", "the file", "the question", "the words"])
def test_a_failure_costs_a_line_and_no_image(measured, loaded, failing, monkeypatch, capsys):
    from lib_subquad.webui import measuring, models

    def fail(*_):
        raise RuntimeError("device lost \ud800")

    where = {
        "the file": (file, "add"),
        "the question": (models, "question"),
        "the words": (measuring, "_in_words"),
    }
    if failing == "measuring":
        measured.happens = fail
    else:
        monkeypatch.setattr(*where[failing], fail)
    for _ in range(3):
        assert generate().image.size == (64, 64)
    told = lines(capsys)
    assert [line for line in told if "failed" in line] == [
        "[subquad] measuring failed, and rules go on to decide: RuntimeError: device lost \\ud800"
    ]
    assert len(measured.times) == (0 if failing == "the question" else 1)
    assert "Measuring" not in loaded.status.summary()


def test_a_checkpoint_that_cannot_be_read_costs_a_line(measured, loaded, monkeypatch, capsys):
    from lib_subquad.checkpoint import CheckpointError
    from lib_subquad.webui import models

    def unreadable(*_):
        raise CheckpointError("model.safetensors: it ends too early. Choose another one.")

    monkeypatch.setattr(models, "from_shapes", unreadable)
    for _ in range(3):
        assert generate().image.size == (64, 64)
    assert [line for line in lines(capsys) if "nothing is measured" in line] == [
        "[subquad] nothing is measured before an image, and rules decide: model.safetensors: it ends too early"
    ]


def test_a_checkpoints_file_is_read_once(measured, loaded, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from lib_subquad.webui import models
    from lib_subquad.webui.hosts import base, host

    path = tmp_path / "vae.safetensors"
    save_file({"decoder.mid.attn_1.q.weight": torch.zeros(64, 64, 1, 1)}, path)
    read = []
    monkeypatch.setattr(type(host()), "loaded", lambda self: base.Loaded(str(path)))
    monkeypatch.setattr(models, "read_attention_layers", lambda name: read.append(name) or loaded_shapes(path))
    loaded_shapes = __import__("lib_subquad.checkpoint", fromlist=["x"]).read_attention_layers
    for size in (64, 128, 256, 64):
        generate(width=size, height=size)
    assert read == [str(path)]
    save_file({"decoder.mid.attn_1.q.weight": torch.zeros(128, 128, 1, 1)}, path)
    generate()
    assert len(read) == 2


@pytest.mark.parametrize("button", ["interrupted", "skipped"])
def test_an_interrupted_image_is_not_waited_for(measured, loaded, button, monkeypatch, capsys):
    from modules import shared

    monkeypatch.setattr(shared.state, button, True)
    generate()
    assert not measured.times
    monkeypatch.setattr(shared.state, button, False)
    monkeypatch.setattr(rounds, "measured", interrupting(shared.state, button, rounds.measured))
    generate()
    assert measured.times == [] and lines(capsys)[-1].endswith("once") and "Measuring" not in loaded.status.summary()
    monkeypatch.setattr(shared.state, button, False)
    monkeypatch.setattr(rounds, "measured", rounds.measured.beneath)
    generate()
    assert len(measured.times) == 1  # it was put off, and not given up


def interrupting(state, button, beneath):
    def measure(problems, settings, seconds, telling):
        setattr(state, button, True)
        telling("64 x 64 tokens")
        return beneath(problems, settings, seconds, telling)

    measure.beneath = beneath
    return measure


def test_the_infotext_tells_the_engine(measured, loaded):
    made = generate()
    assert re.search(r", Subquad measured: portable 64x128$", made.infotext)
    assert "Subquad measured" not in generate(override_settings={"subquad_engine": "fused"}).infotext
    assert generate().infotext == made.infotext  # found already


def test_an_infotext_that_is_pasted_sets_nothing_by_it(measured, loaded):
    labels = {info.infotext for info in loaded.opts.data_labels.values() if info.infotext}
    assert loaded.infotext.MEASURED not in labels
    value = re.search(r"Subquad measured: (.*)$", generate().infotext)[1]
    assert not re.search(r'[",:]', value)  # the web UI splits there
    assert not re.fullmatch(r"\d+x\d+", value)  # which it takes for the size of an image


def test_hires_fix_makes_a_second_size(measured, loaded, capsys):
    from lib_subquad.webui import measuring

    first = {"width": 64, "height": 128, "batch_size": 1, "enable_hr": True, "extra_generation_params": {}}
    for given, second in (
        ({"hr_scale": 2.0, "hr_resize_x": 0, "hr_resize_y": 0}, (128, 256)),
        ({"hr_scale": 9.0, "hr_resize_x": 256, "hr_resize_y": 0}, (256, 512)),
        ({"hr_scale": 9.0, "hr_resize_x": 0, "hr_resize_y": 256}, (128, 256)),
        ({"hr_scale": 9.0, "hr_resize_x": 192, "hr_resize_y": 256}, (192, 256)),
        ({"hr_scale": 1.0, "hr_resize_x": 0, "hr_resize_y": 0}, (64, 128)),
    ):
        assert loaded.infotext.sizes(SimpleNamespace(**first, **given)) == list(dict.fromkeys([(64, 128), second]))
    request = SimpleNamespace(**first, hr_scale=4.0, hr_resize_x=0, hr_resize_y=0)
    loaded.infotext.begin(request)
    measuring.before(request)
    assert "fastest for 64 x 128 and 256 x 512: up to 5 seconds, once" in lines(capsys)[0]
    assert max(problem.queries for problem in measured.times[0]) == 32 * 64


def test_it_is_kept_in_the_data_folder_over_a_reload(data_folder, measured, loaded, host):
    generate()
    text = (data_folder / file.NAME).read_text(encoding="utf-8")
    assert json.loads(text)["machines"] and "Jane Doe" not in text and str(data_folder.parent) not in text
    assert {path.name for path in data_folder.iterdir()} <= {file.NAME, f"{file.NAME}.lock"}
    found = order.table()
    order.go_by(type(found)())
    host.reload_extension()
    loaded.select("subquad")
    assert order.table() == found
    generate()
    assert len(measured.times) == 1
    (data_folder / file.NAME).unlink()
    host.reload_extension()
    loaded.select("subquad")
    generate()
    assert len(measured.times) == 2


def test_without_a_data_folder_it_is_known_until_the_end(measured, loaded, host):
    from lib_subquad.webui.hosts import host as here

    assert here().data_folder() is None
    generate()
    host.reload_extension()
    loaded.select("subquad")
    generate()
    assert len(measured.times) == 1


@pytest.mark.parametrize("module", ["paths", "paths_internal"])
def test_the_data_folder_is_where_web_uis_say(subquad, module, tmp_path, monkeypatch):
    import sys

    from lib_subquad.webui.hosts import host as here

    paths = SimpleNamespace(data_path=str(tmp_path), script_path="where it is")
    monkeypatch.setitem(sys.modules, f"modules.{module}", paths)
    assert here().data_folder() == tmp_path
    paths.data_path = ""  # SD.Next's, unless it was told another
    assert str(here().data_folder()) == "where it is"


def test_a_broken_file_costs_a_line_and_is_replaced(data_folder, measured, loaded, host):
    (data_folder / file.NAME).write_text('{"format": 1, "machines": 5}', encoding="utf-8")
    host.reload_extension()
    loaded.select("subquad")
    generate()
    assert json.loads((data_folder / file.NAME).read_text(encoding="utf-8"))["machines"]


def test_forgetting(data_folder, measured, loaded):
    from modules import call_queue

    from lib_subquad.webui.laboratory import LABORATORY

    assert LABORATORY.forget() == ("Nothing has been measured on this device.", {})
    assert "Measured on this device" not in LABORATORY.status()
    generate()
    kinds = len(measured.times[0])
    text = re.sub("<[^>]*>", "", LABORATORY.status())
    assert f"Measured on this device: {kinds} kinds of calls, {kinds} of them faster than by rules." in text
    loaded.opts.data["subquad_engine"] = "fused"
    assert "It is not used: your settings choose otherwise." in LABORATORY.status()
    loaded.opts.data["subquad_engine"] = "automatic"
    with call_queue.queue_lock:
        assert LABORATORY.forget() == ("An image is being made: forget when it is done.", {})
    message, moved = LABORATORY.forget()
    assert message == f"Forgotten: {kinds} kinds of calls. They are measured again before the next image."
    assert moved == {}
    assert call_queue.queue_lock.acquire(blocking=False)
    call_queue.queue_lock.release()
    assert not json.loads((data_folder / file.NAME).read_text(encoding="utf-8"))["machines"]
    for told in (LABORATORY.status(), loaded.status.summary()):
        assert "Measured for" not in told and "Last generation" in told
    generate()
    assert len(measured.times) == 2


def test_what_was_measured_is_shown_as_the_command_shows_it(measured, loaded):
    from lib_subquad.lab.measured.words import calls_in_words, found_in_words
    from lib_subquad.webui import measuring, tab
    from lib_subquad.webui.laboratory import LABORATORY

    assert re.sub("<[^>]*>", "", LABORATORY.findings()) == "Nothing has been measured on this device yet."
    generate()
    looked = tab._look(tab.Visit(), "the loaded checkpoint", 64, 64, 1)
    (found,) = [it for it in looked if "What was measured" in str(it)[:80]]
    shown = [html.unescape(line) for line in re.findall("<li><bdi>(.*?)</bdi></li>", found)]
    assert shown == [f"{calls_in_words(calls)}: {found_in_words(it)}" for calls, it in measuring.known().items()]
    assert "portable in tiles of 64 x 128, 1.50 times as fast as the rules' choice" in shown[0]
    LABORATORY.forget()
    assert "<li>" not in LABORATORY.findings()


def test_one_true_measurement(loaded, data_folder, monkeypatch):
    """Of the demo's model; nothing of it is seen in an image but the choice, nor in anybody's random numbers."""
    from lib_subquad.webui import measuring

    loaded.select("sdp")
    expected = np.asarray(generate(width=256, height=256).image, dtype=int)
    loaded.select("subquad")
    threw, before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    said = []
    monkeypatch.setattr(measuring, "_say_once", said.append)
    made = generate(width=256, height=256)
    assert not said
    assert torch.equal(torch.random.get_rng_state(), threw) and (np.random.get_state()[1] == before).all()
    assert np.abs(np.asarray(made.image, dtype=int) - expected).max() <= 1
    known = measuring.known()
    for calls, found in known.items():
        assert found.engine in order.names() and found.margin >= 1
        assert calls.dtype == "float32"
    assert file.read(data_folder / file.NAME) == order.table()
    assert generate(width=256, height=256).infotext == made.infotext
