"""What the tab's buttons do, without a page: who waits for whom, and what Apply and Undo write."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import Settings

LOADED = "the loaded checkpoint"
QUESTION = (LOADED, 64, 64, 1)


@pytest.fixture
def laboratory(loaded):
    from lib_subquad.webui import laboratory

    return laboratory.Laboratory()


@pytest.fixture
def lock(loaded):
    from modules import call_queue

    return call_queue.queue_lock


def finished(steps):
    return list(steps)[-1]


def test_measure_holds_the_queue_and_gives_it_back(laboratory, lock):
    steps = laboratory.measure(*QUESTION)
    next(steps)
    assert not lock.acquire(blocking=False)
    answer, measurement = finished(steps)
    assert "recommended" in answer and measurement.exploration.trials and not measurement.running
    assert lock.acquire(blocking=False)
    lock.release()


@pytest.mark.parametrize(
    ("yours", "chosen", "words"),
    [
        (1.0, 1.0, ["Your setting, <b>portable 64 x auto</b>, is the best one here", "Measured 9 times"]),
        (2.0, 1.0, ["Recommended: <b>automatic</b>, 1.48 times as fast as yours", "today"]),
        (30.0, 1.0, ["many times as fast as yours, portable 64 x auto, was when tried once"]),
        (None, 1.0, ["Recommended: <b>automatic</b>. Your setting ran out of memory."]),
        (
            1.0,
            (0.6, 1.4, 1.4, 1.4, 1.4, 1.4),
            [
                "This computer was too busy to tell whether it is faster than yours, portable 64 x auto.",
                "Measured 18 times",
            ],
        ),
    ],
)
def test_what_measure_says(laboratory, loaded, monkeypatch, yours, chosen, words):
    """Times are made up: the present setting's, Automatic's, and six times as long for all others."""
    from lib_subquad.lab.tune.exploration import Exploration

    turns = itertools.cycle(chosen if isinstance(chosen, tuple) else (chosen,))
    best = yours == 1.0 and chosen == 1.0

    def measure(explored, problem, plan):
        mine = plan.engine == "portable" and plan.query_chunk == 64
        seconds = yours if mine else next(turns) * (2.0 if best else 1.0) if plan.engine == "fused" else 6.0
        run = (float("inf") if seconds is None else seconds, plan.workspace_bytes)
        explored._measured.setdefault((problem, plan.engine, plan.sizes), []).append(run)

    monkeypatch.setattr(Exploration, "_measure", measure)
    loaded.opts.data.update(subquad_engine="portable", subquad_query_chunk=64)
    answer, _ = finished(laboratory.measure(LOADED, 256, 256, 1))
    text = re.sub(r"<(?!/?b>)[^>]*>", " ", answer)
    for part in words:
        assert part in text


def test_what_measure_found_is_kept(laboratory, loaded, monkeypatch):
    from lib_subquad.engines import order
    from lib_subquad.lab.tune.exploration import Exploration
    from lib_subquad.webui import measuring

    answers = iter([{}, {"calls of some class": "the engine that was found"}])
    kept = []
    monkeypatch.setattr(Exploration, "found", lambda explored: next(answers))
    monkeypatch.setattr(measuring.file, "add", lambda path, machine, found: kept.append((machine, found)))
    for _ in range(2):
        finished(laboratory.measure(*QUESTION))
    assert kept == [(order.machine(torch.device("cpu")), {"calls of some class": "the engine that was found"})]


def test_it_waits_while_an_image_is_made(laboratory, lock):
    """And can be cancelled meanwhile."""
    with lock:
        steps = laboratory.measure(*QUESTION)
        answer, measurement = next(steps)
        assert answer == next(steps)[0] and "An image is being made: measuring begins when it is done." in answer
        assert measurement.waiting and not laboratory.measuring
    assert "recommended" in finished(steps)[0] and not measurement.busy
    with lock:
        steps = laboratory.measure(*QUESTION)
        _, measurement = next(steps)
        assert laboratory.cancel(measurement) == "Cancelled before its turn came: nothing was measured."
        assert list(steps) == []
    assert measurement.exploration is None
    assert lock.acquire(blocking=False)
    lock.release()


def test_who_makes_others_wait_is_asked_twice(laboratory, lock):
    with lock:
        asked, message = laboratory.request(None)
        assert "an image is being made" in message and "Press Measure all the same" in message
        assert not asked.busy and laboratory.is_to_be_confirmed(asked)
        assert list(laboratory.measure(*QUESTION, asked)) == []
        confirmed, message = laboratory.request(asked)
        assert confirmed.waiting and message == ""
        _, message = laboratory.request(None)  # somebody else
        assert "an image is being made" in message and "another page measures or is about to" in message
    assert laboratory.is_to_be_confirmed(asked)  # the other page still waits
    laboratory.cancel(confirmed)
    assert not laboratory.is_to_be_confirmed(asked)
    assert laboratory.request(None)[1] == ""


def test_others_are_counted(laboratory, monkeypatch):
    from lib_subquad.webui.hosts import host

    one, _ = laboratory.request(None)
    other, _ = laboratory.request(laboratory.request(None)[0])
    assert one.waiting and other.waiting
    monkeypatch.setattr(type(host()), "waiting", lambda host: 3)
    _, message = laboratory.request(None)
    assert "<bdi>3</bdi> images are being made or wait" in message
    assert "<bdi>2</bdi> other pages measure or are about to" in message


def test_a_page_that_was_closed_is_waited_for_no_more(laboratory, monkeypatch):
    from lib_subquad.webui import laboratory as module

    closed, _ = laboratory.request(None)
    assert "another page measures" in laboratory.request(None)[1]
    monkeypatch.setattr(module, "FORGOTTEN_SECONDS", -1)
    assert laboratory.request(None)[1] == "" and closed.waiting


@pytest.mark.parametrize("ending", ["cancel", "the page is closed", "an error"])
def test_the_queue_is_free_again_whatever_ends_it(laboratory, lock, ending, monkeypatch):
    from lib_subquad.lab import meter

    steps = laboratory.measure(*QUESTION)
    _, measurement = next(steps)
    if ending == "cancel":
        assert "stops when" in laboratory.cancel(measurement)
        assert "Cancelled" in finished(steps)[0]
    elif ending == "the page is closed":
        steps.close()
    else:
        monkeypatch.setattr(meter, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("no such device")))
        assert "Measuring stopped: no such device" in finished(steps)[0]
    assert lock.acquire(blocking=False)
    lock.release()


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (("/etc/passwd", 64, 64, 1), "There is no checkpoint"),
        ((LOADED, 10**9, 64, 1), "Width is 1000000000"),
        ((LOADED, 64, None, 1), "Height is empty or no number"),
        ((LOADED, 64, 64, float("nan")), "Batch size is nan"),
    ],
)
def test_a_question_that_cannot_be_answered(laboratory, lock, question, words):
    told, details = laboratory.look(*question)
    assert words in str(told) and words in details and not told.can_measure
    assert words in finished(laboratory.measure(*question))[0]
    assert lock.acquire(blocking=False)
    lock.release()


@pytest.mark.parametrize("where", ["the device cannot be asked", "its memory cannot be given back"])
def test_a_device_that_is_lost_does_not_lock_the_web_ui(laboratory, lock, monkeypatch, where):
    from lib_subquad import device as devices

    def lost(device):
        raise RuntimeError("device lost")

    steps = laboratory.measure(*QUESTION)
    if where == "the device cannot be asked":
        monkeypatch.setattr("lib_subquad.lab.tune.exploration.Exploration.__post_init__", lost)
        assert "Measuring stopped: device lost" in finished(steps)[0]
    else:
        next(steps)
        monkeypatch.setattr(devices, "release_cached", lost)
        with pytest.raises(RuntimeError, match="device lost"):
            list(steps)
    assert lock.acquire(blocking=False)
    lock.release()


def test_what_waits_for_its_turn_can_be_cancelled(laboratory, lock):
    waiting, message = laboratory.request(None)
    assert message == "" and waiting.waiting
    assert laboratory.cancel(waiting) == "Cancelled before its turn came: nothing was measured."
    assert waiting.withdrawn and not waiting.waiting
    assert list(laboratory.measure(*QUESTION, waiting)) == []  # its turn comes after all
    assert laboratory.cancel(waiting) == "Nothing is being measured on this page."
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_page_measures_one_thing_at_a_time(laboratory):
    measurement, _ = laboratory.request(None)
    assert laboratory.request(measurement) == (measurement, "This page is measuring already.")
    steps = laboratory.measure(*QUESTION, measurement)
    next(steps)
    assert laboratory.request(measurement) == (measurement, "This page is measuring already.")
    assert list(laboratory.measure(*QUESTION, measurement)) == []  # asked for twice
    assert measurement.running and "recommended" in finished(steps)[0]
    following, message = laboratory.request(measurement)
    assert following is not measurement and message == ""
    assert "recommended" in finished(laboratory.measure(*QUESTION, following))[0]


def test_it_says_who_is_busy(laboratory, lock):
    steps = laboratory.measure(*QUESTION)
    next(steps)
    waiting = laboratory.measure(*QUESTION)
    assert "Another page is measuring: this one begins when that is done." in next(waiting)[0]
    steps.close()
    assert "recommended" in finished(waiting)[0]


def test_markup_in_a_file_or_a_setting_stays_text(laboratory, loaded, monkeypatch):
    from dataclasses import replace

    from lib_subquad.webui import models, words

    evil = "<img src=x onerror=alert(1)>"
    found = replace(models.read(None), family=evil, notes=(evil,))
    loaded.select("subquad")
    loaded.opts.data["subquad_engine"] = evil
    with monkeypatch.context() as patch:
        patch.setattr(models, "read", lambda title: found)
        answer, details = laboratory.look(*QUESTION)
    refused, _ = laboratory.look(evil, 64, 64, 1)
    for told in (
        words.answer(answer.sentences, answer.step),
        details,
        laboratory.status(),
        words.answer(refused.sentences, None),
    ):
        assert "<img" not in told and "&lt;img" in told


def test_many_questions_at_once_are_answered_one_by_one(laboratory, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from lib_subquad.webui import models

    question, under_way, most = models.question, [], []

    def counted(*given):
        under_way.append(given)
        most.append(len(under_way))
        try:
            return question(*given)
        finally:
            under_way.remove(given)

    monkeypatch.setattr(models, "question", counted)
    asked = [(LOADED, width, 64, 1) for width in (64, None, "x", [], 10**400, 128, 192, 256)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda given: str(laboratory.look(*given)[0]), asked))
    assert max(most) == 1 and len(most) == len(asked)
    assert [("Width is" in told) for told in answers] == [False, True, True, True, True, False, False, False]


def test_apply_leaves_a_word_that_is_not_known_here(laboratory, loaded):
    """Automatic is in force where it stands, and recommended: there is nothing to set."""
    loaded.opts.data.update(subquad_query_chunk=1, subquad_engine="hyperformers")
    measurement, _ = laboratory.request(None)
    measurement.exploration = SimpleNamespace(recommended=lambda: SimpleNamespace(settings=Settings()))
    message, moved = laboratory.apply(measurement)
    assert "subquad_query_chunk" in moved and "subquad_engine" not in moved and "Engine" not in message
    assert loaded.opts.subquad_engine == "hyperformers"
    laboratory.undo()
    assert (loaded.opts.subquad_query_chunk, loaded.opts.subquad_engine) == (1, "hyperformers")
    measurement.exploration = SimpleNamespace(recommended=lambda: SimpleNamespace(settings=Settings(engine="portable")))
    assert "Engine: hyperformers → portable" in laboratory.apply(measurement)[0]
    assert laboratory.undo()[1]["subquad_engine"] == "hyperformers"


def test_apply_and_undo(laboratory, loaded):
    loaded.opts.set("subquad_query_chunk", 1)
    assert laboratory.offer(None) == laboratory.undoable() == ""
    _, measurement = finished(laboratory.measure(*QUESTION))
    recommended = measurement.exploration.recommended().settings
    assert f"query chunk {recommended.query_chunk or 'automatic'}" in laboratory.offer(measurement)
    message, moved = laboratory.apply(measurement)
    assert recommended.query_chunk != 1 and moved["subquad_query_chunk"] == recommended.query_chunk
    assert f"1 → {recommended.query_chunk}" in message
    assert loaded.opts.subquad_query_chunk == recommended.query_chunk
    assert laboratory.apply(measurement)[1] == {}  # in force already
    assert laboratory.offer(measurement) == "" and "query chunk 1" in laboratory.undoable()
    assert laboratory.undo()[1]["subquad_query_chunk"] == loaded.opts.subquad_query_chunk == 1
    assert laboratory.undo() == ("There is nothing to undo.", {})
    assert laboratory.undoable() == "" and laboratory.offer(measurement)


def test_a_frozen_setting_gets_a_message(laboratory, loaded, monkeypatch):
    loaded.opts.set("subquad_query_chunk", 1)
    _, measurement = finished(laboratory.measure(*QUESTION))

    def frozen(key, value):
        raise AssertionError("changing settings is disabled")

    monkeypatch.setattr(loaded.opts, "set", frozen, raising=False)
    message, moved = laboratory.apply(measurement)
    assert "changing settings is disabled" in message and moved == {}
    assert loaded.opts.subquad_query_chunk == 1


def test_pages_do_not_meddle_with_each_other(laboratory):
    """What one page cancels or applies is its own."""
    _, one = finished(laboratory.measure(*QUESTION))
    steps = laboratory.measure(*QUESTION)
    _, other = next(steps)
    assert laboratory.cancel(one) == laboratory.cancel(None) == "Nothing is being measured on this page."
    assert not other.cancelled
    assert laboratory.apply(other) == ("Measure first: there is nothing to apply yet.", {})
    steps.close()
    assert not other.running
