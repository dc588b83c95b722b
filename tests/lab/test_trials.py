"""What is recommended, shown and drawn of trials: one judgement that does not contradict itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_subquad import Settings
from lib_subquad.device import MIB
from lib_subquad.lab.tune.trials import COUNTING, Trial, judged

AUTOMATIC = Settings()
seconds = st.floats(0.5, 2.0)
on_a_busy_machine = settings(deadline=None)


@st.composite
def trials(draw):
    """Settings measured in as many rounds, on a machine that slows whatever it likes; some that were tried once."""
    rounds = draw(st.integers(COUNTING, 12))
    found = []
    for number in range(draw(st.integers(1, 8))):
        chosen = replace(AUTOMATIC, query_chunk=64 * number)
        its, slowed = draw(seconds), st.floats(1.0, draw(st.sampled_from([1.0, 1.02, 3.0])))
        every = [its * draw(slowed) for _ in range(rounds)]
        first = its * draw(slowed)
        tried = Trial(
            chosen, first, first, first, min(first, *every), draw(st.integers(1, 9)) * MIB, draw(st.booleans())
        )
        found.append(tried.in_rounds(every) if number == 0 or draw(st.integers(0, 3)) else tried)
    return found


@on_a_busy_machine
@given(trials())
def test_what_is_recommended_is_what_the_table_and_the_plot_show(found):
    judgement = judged(found, found[0])
    best, compared = judgement.recommended, [trial for trial in found if trial.rounds]
    assert [trial.settings for trial in judgement.trials if trial is best] == [best.settings]
    assert {trial.settings for trial in judgement.trials} == {trial.settings for trial in compared}
    assert any(trial is best for trial in judgement.front)
    fitting = [trial for trial in judgement.trials if trial.fits]
    assert best.fits or not fitting
    for trial in fitting:
        assert trial.seconds >= best.seconds and not trial.faster_than(best)
    for trial in found:  # as it was measured
        assert not (trial.fits and trial.faster_than(best))
    usable = fitting or list(judgement.trials)
    for drawn in judgement.front:
        assert not any(other.seconds < drawn.seconds and other.peak_bytes <= drawn.peak_bytes for other in usable)
    for trial in usable:
        assert any(other.seconds <= trial.seconds and other.peak_bytes <= trial.peak_bytes for other in judgement.front)
    assert [trial.seconds for trial in judgement.trials] == sorted(trial.seconds for trial in judgement.trials)
    assert list(judgement.front) == sorted(judgement.front, key=lambda trial: -trial.peak_bytes)


@on_a_busy_machine
@given(trials())
def test_to_be_clearly_faster_is_an_order(found):
    for one in found:
        assert not one.faster_than(one)
        for other in found:
            if one.faster_than(other):
                assert one.rounds and other.rounds and not other.faster_than(one)
                assert one.seconds < other.seconds and one.fastest_seconds < other.fastest_seconds
                assert all(one.faster_than(third) for third in found if other.faster_than(third))


@on_a_busy_machine
@given(trials())
def test_automatic_gives_way_only_to_what_is_clearly_faster(found):
    best = judged(found, found[0]).recommended
    if found[0].fits and best.settings != found[0].settings:
        assert best.faster_than(found[0])


def test_what_was_measured_more_often_is_not_compared():
    one = Trial(AUTOMATIC, 1.0, 1.0, 1.0, 1.0, MIB, True)
    assert one.in_rounds([1.0] * 9).faster_than(one.in_rounds([2.0] * 7)) is None
    assert replace(one, fastest_seconds=0.5).faster_than(one) is None
    assert one.in_rounds([1.0] * 9).faster_than(replace(one, fastest_seconds=2.0).in_rounds([2.0] * 9)) is True


def test_rounds_that_a_busy_machine_slowed_do_not_count():
    """Load slows one of them, which is faster without it, more than the other."""
    one, other = (Trial(AUTOMATIC, its, its, its, its, MIB, True) for its in (0.7, 1.0))
    one, other = one.in_rounds([0.7] * 7 + [2.0] * 8), other.in_rounds([1.0] * 7 + [1.4] * 8)
    assert one.faster_than(other) and (one.seconds, one.low, one.high) == (0.7, 0.7, 0.7)
    assert not one.in_rounds([0.7] * 6 + [2.0] * 9).faster_than(other)


@pytest.mark.parametrize("fits", [True, False])
def test_nothing_compared_is_nothing_judged(fits):
    judgement = judged([Trial(AUTOMATIC, 1.0, 1.0, 1.0, 1.0, MIB, fits)], None)
    assert (judgement.trials, judgement.recommended, judgement.front) == ((), None, ())
