"""The exploration: what it measures, what it recommends, and that it can be stopped. Times are made up here."""

import itertools

import pytest
import torch

from lib_subquad import Settings
from lib_subquad.device import GIB, MIB
from lib_subquad.lab import meter
from lib_subquad.lab.explain import Row
from lib_subquad.lab.explore import AUTOMATIC, Exploration
from lib_subquad.plan import plan_problem
from lib_subquad.problem import Problem

SHAPE = (1, 2, 512, 16)


def exploration(settings=Settings(), free=GIB):
    problem = Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, "cpu")
    rows = [Row("unet", "self", 3, problem, plan_problem(problem, settings, free))]
    return Exploration(rows, settings, torch.device("cpu"), free)


@pytest.fixture
def made_up_times(monkeypatch):
    """Every call takes its turn's number of seconds: the first measured is the fastest."""
    turns = itertools.count(1)
    monkeypatch.setattr(meter, "measure", lambda call, device: (call(), (float(next(turns)), 0))[1])


def finished(explored):
    for _ in explored.run():
        pass
    return explored


def test_automatic_and_the_present_setting_are_always_among_the_trials(made_up_times):
    explored = finished(exploration(Settings(query_chunk=96)))
    assert explored.today().settings.query_chunk == 96
    assert all(getattr(explored.automatic().settings, name) == value for name, value in AUTOMATIC.items())


def test_seconds_count_every_layer(made_up_times):
    explored = exploration()
    steps = explored.run()
    next(steps)
    next(steps)  # Automatic's only call has been measured: one second, three layers
    assert explored.automatic().seconds == 3.0


def test_automatic_stays_recommended_unless_another_is_clearly_faster(monkeypatch):
    for advantage, chosen in ((0.99, "automatic"), (0.5, "portable 256 x 256")):
        explored = exploration()

        def measured(problem, plan, explored=explored, advantage=advantage):
            fast = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256
            key = problem, plan.engine, plan.sizes
            explored._measured.setdefault(key, []).append((advantage if fast else 1.0, plan.workspace_bytes))

        monkeypatch.setattr(explored, "_measure", measured)
        assert finished(explored).recommended().label == chosen


def test_what_slowed_automatic_for_a_while_recommends_nothing_else(monkeypatch):
    """Most of its runs were slowed by something else, one was not."""
    explored = exploration()
    slowed = itertools.chain([1.0], itertools.repeat(2.0))

    def measured(problem, plan):
        key = problem, plan.engine, plan.sizes
        seconds = next(slowed) if plan.engine == "fused" and plan.query_chunk == 512 else 1.5
        explored._measured.setdefault(key, []).append((seconds, plan.workspace_bytes))

    monkeypatch.setattr(explored, "_measure", measured)
    finished(explored)
    assert explored.automatic().seconds == 3 * 2.0 and min(trial.seconds for trial in explored.trials) == 3 * 1.5
    assert explored.recommended().label == "automatic"


def test_what_was_measured_once_is_not_recommended(monkeypatch):
    """Three others were lucky once and became finalists; this one, never measured again, beats their medians."""
    explored = exploration()
    turns = {}

    def measured(problem, plan):
        key = problem, plan.engine, plan.sizes
        turns[key] = turns.get(key, 0) + 1
        rank = list(turns).index(key)
        lucky = {1: 0.80, 2: 0.81, 3: 0.82, 4: 0.90}.get(rank, 1.0) if turns[key] == 1 else 1.0
        explored._measured.setdefault(key, []).append((lucky, plan.workspace_bytes))

    monkeypatch.setattr(explored, "_measure", measured)
    finished(explored)
    assert min(trial.seconds for trial in explored.trials) == pytest.approx(3 * 0.90)
    assert explored.recommended().label == "automatic"


def test_a_setting_that_runs_out_of_memory_is_left_out(monkeypatch):
    def attend(query, key, value, settings):
        if settings.kv_chunk == 256:
            raise RuntimeError("out of memory")

    monkeypatch.setattr("lib_subquad.lab.explore.attention", attend)
    explored = finished(exploration())
    assert explored.trials and all(trial.settings.kv_chunk != 256 for trial in explored.trials)
    assert len(explored.trials) < len(explored._candidates())
    assert explored.recommended() is not None


def test_measured_again_takes_no_part_of_what_was_measured(monkeypatch):
    explored = exploration()
    for number, answer in enumerate((1.0, 7.0)):
        monkeypatch.setattr(meter, "measure", lambda call, device, answer=answer: (answer, 0))
        if not number:
            finished(explored)
    again = explored.measured_again([explored.automatic().settings, explored.trials[-1].settings], 3)
    assert [trial.seconds for trial in again] == [3 * 7.0] * 2
    assert explored.automatic().seconds == 3 * 1.0


def test_what_is_over_the_limit_is_not_recommended(made_up_times):
    explored = finished(exploration(Settings(memory_limit=1), free=16 * MIB))
    assert any(not trial.fits for trial in explored.trials) or explored.recommended().peak_bytes <= explored.limit_bytes
    assert explored.recommended().fits


def test_the_pareto_front_holds_what_nothing_beats(made_up_times):
    explored = finished(exploration())
    front = explored.pareto_front()
    assert front
    for trial in explored.trials:
        beaten = [
            other for other in explored.trials if other.seconds < trial.seconds and other.peak_bytes < trial.peak_bytes
        ]
        assert not (trial in front and beaten)


def test_stopping_keeps_what_was_measured(made_up_times):
    explored = exploration()
    for step in explored.run():
        assert step.total > 3
        if step.done == 3:
            break
    assert 0 < len(explored.trials) < len(explored._candidates())
    assert explored.recommended() is not None


def test_real_times_and_peaks_on_this_device():
    explored = finished(exploration())
    assert all(trial.seconds > 0 and trial.peak_bytes > 0 for trial in explored.trials)
    assert {trial.settings.engine for trial in explored.trials} == {"automatic", "portable"}


def test_the_picture_shows_every_trial_and_names_the_recommended(made_up_times, tmp_path):
    picture = pytest.importorskip("lib_subquad.lab.picture")
    explored = finished(exploration(Settings(query_chunk=96)))
    figure = picture.draw(explored)
    figure.savefig(tmp_path / "lab.png")
    points = figure.axes[0].collections[0].get_offsets()
    assert len(points) == len(explored.trials)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"recommended: {explored.recommended().label}" in words
    assert f"today: {explored.today().label}" in words
