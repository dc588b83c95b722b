"""The exploration: what it measures, what it recommends, and that it can be stopped. Times are made up here."""

import itertools
import random

import pytest
import torch

from lib_subquad import Settings, refusals
from lib_subquad.device import GIB, MIB
from lib_subquad.engines import order
from lib_subquad.engines.table import Found, Table, class_of
from lib_subquad.lab import machine, meter
from lib_subquad.lab.explain.rows import Row
from lib_subquad.lab.tune.estimate import Estimate
from lib_subquad.lab.tune.exploration import MOST_ROUNDS, STEADY_ROUNDS, Exploration
from lib_subquad.lab.tune.trials import AUTOMATIC
from lib_subquad.plan import plan_problem
from lib_subquad.problem import Problem

SHAPE = (1, 2, 512, 16)


def exploration(settings=Settings(), free=GIB):
    problem = Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, "cpu")
    rows = [Row("unet", "self", 3, problem, plan_problem(problem, settings, free))]
    return Exploration(rows, settings, torch.device("cpu"), free)


@pytest.fixture
def made_up_times(monkeypatch):
    """Every call takes as long as its tile is small."""
    plant(monkeypatch, lambda plan, turn: 1.0 + 1e5 / (plan.query_chunk * plan.kv_chunk))


def plant(monkeypatch, seconds):
    """Every call takes `seconds(plan, how many were measured before)`."""
    turns = itertools.count()

    def measure(explored, problem, plan):
        run = seconds(plan, next(turns)), plan.workspace_bytes
        explored._measured.setdefault((problem, plan.engine, plan.sizes), []).append(run)

    monkeypatch.setattr(Exploration, "_measure", measure)


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
    next(steps)  # Automatic's only call has been measured, for three layers
    assert explored.automatic().seconds == pytest.approx(3 * (1 + 1e5 / 512**2))


@pytest.mark.parametrize(("advantage", "chosen"), [(0.99, "automatic"), (0.5, "portable 256 x 256")])
def test_automatic_stays_recommended_unless_another_is_clearly_faster(monkeypatch, advantage, chosen):
    def seconds(plan, turn):
        return advantage if plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256 else 1.0

    plant(monkeypatch, seconds)
    assert finished(exploration()).recommended().label == chosen


@pytest.mark.usefixtures("fused_kernel")
def test_what_slowed_automatic_for_a_while_recommends_nothing_else(monkeypatch):
    """Most of its runs were slowed by something else, one was not."""
    slowed = itertools.chain([1.0], itertools.repeat(2.0))

    def seconds(plan, turn):
        return next(slowed) if plan.engine == "fused" and plan.query_chunk == 512 else 1.5

    plant(monkeypatch, seconds)
    explored = finished(exploration())
    assert explored.recommended().label == "automatic" and explored.automatic().seconds == 3 * 2.0
    assert {trial.low for trial in explored.undecided()} == {3 * 1.5}
    assert min(trial.seconds for trial in explored.trials) == 3 * 2.0  # nothing is shown to be faster


def test_what_was_measured_once_stands_beside_nothing(monkeypatch):
    """Every setting but Automatic was lucky once, in a different measure: only what is compared counts."""
    seen = {}

    def seconds(plan, turn):
        first = seen.setdefault((plan.engine, plan.sizes), turn) == turn
        return 0.5 + turn / 100 if first and turn else 1.0

    plant(monkeypatch, seconds)
    explored = finished(exploration())
    assert explored.recommended().label == "automatic"
    assert len({trial.repeats for trial in explored.trials}) == 1 and explored.trials[0].repeats >= 7
    assert all(not trial.rounds for trial in explored.tried)
    assert min(trial.seconds for trial in explored.trials) == 3 * 1.0
    assert any(trial is explored.recommended() for trial in explored.pareto_front())


@pytest.mark.parametrize("stop", [0.3, 0.9])
def test_after_cancel_single_runs_recommend_nothing(monkeypatch, stop):
    plant(monkeypatch, lambda plan, turn: 1.0 if plan.engine == "fused" else 0.5)
    explored = exploration()
    for step in explored.run():
        if step.done >= stop * step.total or "again" in step.what:
            break
    assert explored.trials and explored.recommended() is None and explored.pareto_front() == []
    assert {trial.repeats for trial in explored.trials} == {1}


# ------------------------------------------------------------------------------------ while other programs are running

ONE = "portable 256 x 256"


def load(seed):
    """How many times as long a call takes, call by call: other programs come for some calls and go for some."""
    dice = random.Random(seed)
    while True:
        for _ in range(dice.randint(1, 40)):  # quiet, but for what always goes on
            yield dice.uniform(1.0, 1.04)
        for _ in range(dice.randint(1, 40)):
            yield dice.choice((1.0, dice.uniform(1.1, 4.0)))


@pytest.mark.parametrize(("factor", "least", "most"), [(1 / 1.5, 15, 20), (1.3, 0, 0), (1.0, 0, 2)])
@pytest.mark.usefixtures("fused_kernel")
def test_a_planted_setting_on_a_busy_machine(monkeypatch, factor, least, most):
    """One setting is faster, slower or as fast; all others are out of the question. How often is it recommended?"""
    labels = []
    for seed in range(20):
        busy = load(seed)

        def seconds(plan, turn, busy=busy):
            one = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256
            return next(busy) * (factor if one else 1.0 if plan.engine == "fused" else 6.0)

        plant(monkeypatch, seconds)
        explored = finished(exploration())
        labels.append(explored.recommended().label)
        front = explored.pareto_front()
        assert any(trial is explored.recommended() for trial in front)
        assert not any(trial.faster_than(explored.recommended()) for trial in explored.trials if trial.fits)
    assert set(labels) <= {ONE, "automatic"}
    assert least <= labels.count(ONE) <= most


def test_whenever_it_is_stopped_a_slower_setting_is_not_recommended(monkeypatch):
    """The present one takes half of Automatic's time: it is recommended as soon as anything is."""
    plant(monkeypatch, lambda plan, turn: 1.0 if plan.query_chunk == 96 else 2.0 if plan.engine == "fused" else 12.0)
    steps = (explored := exploration(Settings(query_chunk=96))).run()
    while next(steps, None):
        assert explored.recommended() is None or explored.recommended() is explored.today()
        assert not explored.complete
    assert explored.complete and explored.recommended() is explored.today()


def test_where_nothing_fits_what_takes_the_least_is_compared(monkeypatch):
    def measure(explored, problem, plan):
        run = 1.0, GIB * plan.query_chunk * plan.kv_chunk
        explored._measured.setdefault((problem, plan.engine, plan.sizes), []).append(run)

    monkeypatch.setattr(Exploration, "_measure", measure)
    explored = finished(exploration())
    least = min((*explored.trials, *explored.tried), key=lambda trial: trial.peak_bytes)
    assert explored.recommended() is least and not least.fits and least.rounds


@pytest.mark.parametrize(("disturbed", "rounds"), [(0, STEADY_ROUNDS), (1, 13), (3, MOST_ROUNDS)])
@pytest.mark.usefixtures("fused_kernel")
def test_the_less_steady_the_machine_the_more_rounds(monkeypatch, disturbed, rounds):
    """So many of every four of Automatic's times are longer."""
    uneven = itertools.cycle([1.0] * (4 - disturbed) + [1.5] * disturbed)
    plant(monkeypatch, lambda plan, turn: next(uneven) if plan.engine == "fused" and plan.query_chunk == 512 else 6.0)
    assert finished(exploration()).rounds == pytest.approx(rounds, abs=1 if disturbed == 1 else 0)


@pytest.mark.usefixtures("fused_kernel")
def test_a_machine_too_busy_to_tell_is_said(monkeypatch):
    uneven = itertools.cycle((0.8, 1.2, 1.2))

    def seconds(plan, turn):
        one = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256
        return next(uneven) if one else 1.0 if plan.engine == "fused" else 6.0

    plant(monkeypatch, seconds)
    explored = finished(exploration())
    assert [trial.label for trial in explored.undecided()] == [ONE]
    assert explored.remarks(*explored.undecided()) == ["too unsteady to tell"]


def test_a_setting_that_runs_out_of_memory_is_left_out(monkeypatch):
    def attend(query, key, value, settings):
        if settings.kv_chunk == 256:
            raise RuntimeError("out of memory")

    monkeypatch.setattr("lib_subquad.lab.tune.calls.attention", attend)
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


def test_what_is_over_the_limit_is_not_recommended(monkeypatch):
    """Plans stay inside it; what is measured may not."""

    def measure(explored, problem, plan):
        fast = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256
        explored._measured.setdefault((problem, plan.engine, plan.sizes), []).append(
            (0.5, GIB) if fast else (1.0, plan.workspace_bytes)
        )

    monkeypatch.setattr(Exploration, "_measure", measure)
    explored = finished(exploration(free=GIB))
    assert [trial.label for trial in (*explored.trials, *explored.tried) if not trial.fits] == [ONE]
    assert explored.recommended().label == "automatic" and explored.recommended().fits


def test_where_nothing_seems_free_what_is_efficient_fits(made_up_times):
    explored = finished(exploration(Settings(memory_limit=1), free=MIB))
    assert explored.recommended().fits and explored.automatic().fits
    assert explored.recommended().peak_bytes <= explored.limit_bytes  # the one that is shown, and drawn


def test_what_runs_out_of_memory_when_measured_again(monkeypatch):
    explored = exploration()
    monkeypatch.setattr(meter, "measure", lambda call, device: (1.0, 0))
    finished(explored)

    def exhausted(call, device):
        raise MemoryError

    monkeypatch.setattr(meter, "measure", exhausted)
    assert explored.measured_again([explored.automatic().settings], 2) == [None]


def test_the_pareto_front_holds_what_nothing_beats(made_up_times):
    explored = finished(exploration())
    front, best = explored.pareto_front(), explored.recommended()
    assert any(trial is best for trial in front)
    for trial in explored.trials:
        beaten = [
            other for other in explored.trials if other.seconds < trial.seconds and other.peak_bytes < trial.peak_bytes
        ]
        assert not (any(trial is other for other in front) and beaten) or trial is best


# --------------------------------------------------------------------------------------------- what a table keeps of it


@pytest.mark.usefixtures("fused_kernel")
def test_a_row_is_labelled_with_the_engine_that_computed(made_up_times):
    """xFormers has no kernels for a CPU, installed or not."""
    explored = finished(exploration(Settings(engine="xformers")))
    mine = explored.today()
    assert mine.settings.engine == "xformers" and mine.set_in_vain and mine.computed == ("fused",)
    assert mine.label == "fused auto x auto" and "xformers is set, but computed nothing" in explored.remarks(mine)
    others = [trial for trial in (*explored.trials, *explored.tried) if trial is not mine]
    assert not any(trial.set_in_vain or "xformers" in trial.label for trial in others)


@pytest.fixture
def table():
    before = order.table()
    yield
    order.go_by(before)


@pytest.fixture
def quiet(monkeypatch):
    """quiet(share): only made-up times differ, and other programs take this share of the processors."""

    def others(share):
        now = itertools.count()
        monkeypatch.setattr(Estimate, "slowed", lambda its: 1.0)
        monkeypatch.setattr(machine, "processor_seconds", lambda: (at := next(now), at * share, 0.0))

    others(0.0)
    return others


def found(explored) -> Found | None:
    return explored.found().get(class_of(explored.rows[0].problem))


@pytest.mark.parametrize("fast", [0.99, 0.5])
def test_what_was_compared_is_found_by_the_margin_of_a_table(monkeypatch, fast, table, quiet):
    def seconds(plan, turn):
        return fast if plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256 else 1.0

    plant(monkeypatch, seconds)
    explored = exploration()
    for _ in explored.run():
        assert explored.found() == {}
    by_rules = explored.rows[0].plan
    assert found(explored) == (Found("portable", 256, 256, 2.0) if fast < 0.9 else Found(by_rules.engine))
    order.go_by(Table().with_found(order.machine(torch.device("cpu")), explored.found()))
    again = plan_problem(explored.rows[0].problem, Settings(), GIB)
    assert again.query_chunk == (256 if fast < 0.9 else by_rules.query_chunk)


def test_rounds_that_disagree_are_found_to_change_nothing(monkeypatch, quiet):
    uneven = itertools.cycle((0.5, 0.5, 1.5))

    def seconds(plan, turn):
        return next(uneven) if plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256 else 1.0

    plant(monkeypatch, seconds)
    explored = finished(exploration())
    assert found(explored) == Found(explored.rows[0].plan.engine)


@pytest.mark.parametrize(("share", "believed"), [(0.02, True), (0.4, False)])
def test_that_nothing_is_faster_is_not_believed_beside_other_programs(monkeypatch, quiet, share, believed):
    quiet(share)
    plant(monkeypatch, lambda plan, turn: 1.0)
    explored = finished(exploration())
    assert found(explored) == Found(explored.rows[0].plan.engine, disturbed=not believed)
    quiet(0.4)  # what they do when it is complete
    assert found(explored).disturbed is not believed and explored.disturbance().felt is not believed


def test_what_is_over_the_limit_or_refused_is_not_found(monkeypatch):
    def measure(explored, problem, plan):
        fast = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256
        small = plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 512
        run = (0.5, GIB) if fast else (0.7 if small else 1.0, plan.workspace_bytes)
        explored._measured.setdefault((problem, plan.engine, plan.sizes), []).append(run)

    monkeypatch.setattr(Exploration, "_measure", measure)
    explored = finished(exploration(free=GIB))
    before = found(explored)
    assert (before.query_chunk, before.kv_chunk) != (256, 256)
    refusals.remember(explored.rows[0].problem, "portable", "the portable kernel refused these sizes")
    assert found(explored) is None or found(explored).engine != "portable"


@pytest.mark.usefixtures("fused_kernel")
def test_measuring_goes_by_the_table_and_puts_it_right(monkeypatch, table, quiet):
    """What the rules would take is compared all the same."""
    its = class_of(exploration().rows[0].problem)
    by_rules = exploration().rows[0].plan
    order.go_by(Table().with_found(order.machine(torch.device("cpu")), {its: Found("portable", 256, 256, 2.0)}))

    def seconds(plan, turn):
        return 0.5 if plan.engine == "portable" and plan.query_chunk == plan.kv_chunk == 256 else 1.0

    plant(monkeypatch, seconds)
    explored = finished(exploration())
    assert explored.automatic().seconds == 3 * 0.5 and explored.recommended().label == "automatic"
    assert explored.found() == {its: Found("portable", 256, 256, 2.0)}
    plant(monkeypatch, lambda plan, turn: 1.0)
    assert finished(exploration()).found() == {its: Found(by_rules.engine)}


def test_real_times_and_peaks_on_this_device():
    explored = finished(exploration())
    assert all(trial.seconds > 0 and trial.peak_bytes > 0 for trial in explored.trials)
    assert {trial.settings.engine for trial in explored.trials} == {"automatic", "portable"}


@pytest.mark.usefixtures("fused_kernel")
def test_the_picture_shows_every_trial_and_names_the_recommended(made_up_times, tmp_path):
    picture = pytest.importorskip("lib_subquad.lab.tune.picture")
    explored = finished(exploration(Settings(query_chunk=96)))
    figure = picture.draw(explored)
    figure.savefig(tmp_path / "lab.png")
    assert figure.axes[0].get_xlim()[0] == 0
    compared, once = (figure.axes[0].collections[number].get_offsets() for number in (0, 1))
    assert (len(compared), len(once)) == (len(explored.trials), len(explored.tried))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"recommended: {explored.recommended().label}" in words
    assert f"today: {explored.today().label}" in words
