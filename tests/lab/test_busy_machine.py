"""Measuring beside other programs that come and go: what is recommended, shown and promised then. No clock is real."""

from __future__ import annotations

import pytest

from lib_subquad import Settings
from tests.busy_machine import BusyMachine, Load, landscape, rows_of

SHAPES = (5, 1, 1024, 40), (5, 1, 256, 80)
LOADS = {"now and then": Load(3, 1), "half the time": Load(1, 1, 2), "for long": Load(2, 2, 2)}
# Middle and spread of portable's times: one of them usually wins; many are alike; all of them are slow.
LANDSCAPES = {"some are faster": (0.85, 0.1), "many are alike": (1.0, 0.08), "all are slower": (1.3, 0.15)}
PLANTED = "portable 256 x 512"

pytestmark = pytest.mark.usefixtures("fused_kernel")


@pytest.fixture(scope="module")
def rows():
    return rows_of(*SHAPES)


@pytest.mark.parametrize("load", [None, *LOADS])
@pytest.mark.parametrize("alike", LANDSCAPES)
def test_what_is_recommended_contradicts_nothing_and_loses_nothing(monkeypatch, rows, load, alike):
    for seed in range(40):
        machine = BusyMachine(seed, landscape(seed, *LANDSCAPES[alike]), LOADS.get(load))
        explored, _ = machine.explored(monkeypatch, rows, Settings(query_chunk=512) if seed % 2 else Settings())
        best, front = explored.recommended(), explored.pareto_front()
        assert best.fits and any(trial is best for trial in front)
        for trial in explored.trials:
            assert trial.repeats == explored.rounds and len(trial.rounds) == len(best.rounds)
            if trial.fits:
                assert trial.seconds >= best.seconds and not trial.faster_than(best)
        for drawn in front:
            assert not any(it.seconds < drawn.seconds and it.peak_bytes < drawn.peak_bytes for it in explored.trials)
        quiet = [machine.quiet_seconds(explored, it.settings) for it in (best, explored.automatic())]
        assert quiet[0] <= quiet[1] * 1.05


@pytest.mark.parametrize("load", [None, *LOADS])
@pytest.mark.parametrize("alike", ["many are alike", "all are slower"])
def test_a_planted_setting_is_found(monkeypatch, rows, load, alike):
    """It takes 1/1.5 of Automatic's time."""
    found = 0
    for seed in range(40):
        machine = BusyMachine(seed, landscape(seed, *LANDSCAPES[alike], 1 / 1.5), LOADS.get(load))
        explored, _ = machine.explored(monkeypatch, rows)
        found += explored.recommended().label == PLANTED
    assert found >= (40 if load is None else 30)


@pytest.mark.parametrize(("load", "share"), [(None, 0.95), ("now and then", 0.9), ("half the time", 0.85)])
def test_how_long_it_takes_is_told_within_a_third(monkeypatch, load, share):
    """In so many of all steps the whole takes as long as it is told to, give or take a third of that."""
    rows, held, bars = rows_of((5, 8, 4096, 40), (5, 8, 1024, 80)), [], []
    for seed, alike in enumerate([*LANDSCAPES.values(), (6.0, 0.5)] * 3):
        machine = BusyMachine(seed, landscape(seed, *alike), LOADS.get(load), seconds_of_cost=2e-11)
        _, told = machine.explored(monkeypatch, rows)
        known = [(now, step.seconds_left) for now, step in told if step.seconds_left is not None]
        assert known[0][0] < machine.now / 5
        held += [2 / 3 <= (now + left) / machine.now <= 4 / 3 for now, left in known]
        bars = [step.done for _, step in told]
        assert bars == sorted(bars) and {step.total for _, step in told} == {told[0][1].total}
        assert bars[-1] > 0.9 * told[-1][1].total
    assert sum(held) >= share * len(held)
