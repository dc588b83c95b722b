"""The plot of what Measure compared, as the page draws it: where its marks are, and what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_subquad import Settings
from lib_subquad.device import GIB, MIB
from lib_subquad.lab import tables
from lib_subquad.lab.disturbance import Disturbance
from lib_subquad.lab.tune.exploration import Exploration, Progress
from lib_subquad.lab.tune.trials import COUNTING, Trial, judged, least_difference
from lib_subquad.webui import plot, results
from tests.busy_machine import rows_of

ROUNDS = 9


@pytest.fixture(scope="module")
def empty():
    return lambda: Exploration(rows_of((1, 1, 256, 16)), Settings(query_chunk=64), torch.device("cpu"), GIB)


def explored(empty, *found: tuple[float, int, bool], tried: int = 0) -> Exploration:
    """Settings of (seconds, bytes, whether it fits) that were compared, automatic and the present one first; of so many
    others, one run each."""
    exploration = empty()
    given = [Settings(), Settings(query_chunk=64), *(Settings(kv_chunk=16 * number) for number in range(1, 9))]
    trials = [
        Trial(settings, its, its, its, its, size, fits).in_rounds(its * (1 + number / 100) for number in range(ROUNDS))
        for settings, (its, size, fits) in zip(given, found)
    ]
    exploration.rounds, exploration.complete = ROUNDS, True
    exploration._judgement = judged(trials, trials[0])
    exploration.trials = list(exploration._judgement.trials)
    once = (Trial(Settings(kv_chunk=512 + number), *[9.0 + number] * 4, MIB, True) for number in range(tried))
    exploration.tried = list(once)
    return exploration


def drawn(html: str) -> ElementTree.Element:
    """Its elements: it must be well formed."""
    return ElementTree.fromstring(f"<div>{re.sub('<style>.*?</style>', '', html, flags=re.DOTALL)}</div>")


def marks(html: str) -> dict[str, tuple[float, float, set[str]]]:
    """What a mark says -> where it is, in per cent from the left and from above, and which shapes it has."""
    found = {}
    for group in drawn(html).iter("g"):
        at = group.find("svg")
        shapes = {it.get("class").removeprefix("subquad-") for it in at}
        found[group.find("title").text] = float(at.get("x")[:-1]), float(at.get("y")[:-1]), shapes - {"touch"}
    return found


sizes = st.integers(0, 3 * GIB)
found = st.lists(st.tuples(st.floats(1e-5, 100.0), sizes, st.booleans()), min_size=2, max_size=8)


@settings(deadline=None)  # a busy machine
@given(found)
def test_marks_and_axes_are_inside_and_tell_the_truth(empty, found):
    exploration = explored(empty, *found)
    html = plot.svg(exploration)
    at = marks(html)
    best = at[plot._value(exploration.recommended())]
    assert best[2] >= {"ring", "best"}
    for trial in exploration.trials:
        x, y, _ = at[plot._value(trial)]
        assert 0 <= x <= 100 and 0 <= y <= 100
        if trial.fits:
            assert x >= best[0] - 0.01  # nothing is drawn to be faster than what is recommended
    for text in drawn(html).iter("text"):
        assert not (text.text or "").startswith("-")
    for anchor, places in (("middle", "x"), ("end", "y")):
        ticks = [float(it.get(places)[:-1]) for it in drawn(html).iter("text") if it.get("text-anchor") == anchor]
        ticks.sort()
        assert ticks and all(0 <= tick <= 100 for tick in ticks)
        assert all(
            after - before >= plot.APART - 0.01 for before, after in zip(ticks, ticks[1:])
        )  # no label on another


@settings(deadline=None)  # a busy machine
@given(found)
def test_words_have_room_in_every_width(empty, found):
    ticks = {
        float(it.get("x")[:-1]): int(it.get("class").removeprefix("subquad-from-"))
        for it in drawn(plot.svg(explored(empty, *found))).iter("text")
        if it.get("text-anchor") == "middle"
    }
    widths = [0, *plot.ROOMS]
    assert set(ticks.values()) <= set(widths)
    for width in widths:
        shown = sorted(place for place, room in ticks.items() if room <= width)
        assert shown and (width < plot.ROOMS[-1] or len(shown) == len(ticks))
        assert all((after - before) * width / 100 >= plot.LABEL - 0.1 for before, after in zip(shown, shown[1:]))


def test_what_it_says_to_those_who_do_not_see_it(empty):
    exploration = explored(empty, (1.2, 31 * MIB, True), (2.4, 3 * MIB, True), (0.9, 2 * GIB, False))
    html = plot.svg(exploration)
    (image,) = (it for it in drawn(html).iter("svg") if it.get("role") == "img")
    assert image.get("aria-label").startswith("3 settings, time against memory. Recommended: automatic, 1.24 s, 31 MiB")
    legend = ["".join(item.itertext()) for item in drawn(html).iter("li")]
    assert legend[0] == "recommended: automatic, 1.24 s, 31 MiB" and legend[1].startswith("today: automatic 64 x auto")
    assert "memory limit: 717 MiB" in legend and "over the memory limit" in legend
    told = results.trial_table(exploration)
    for trial in exploration.trials:  # a table has the same
        assert trial.label in told and tables.seconds(trial.seconds) in told and tables.memory(trial.peak_bytes) in told


@pytest.mark.parametrize(("longest", "linear"), [(3.0, True), (9.0, False)])
def test_an_axis_begins_at_zero_or_has_none(empty, longest, linear):
    html = plot.svg(explored(empty, (1.0, MIB, True), (longest, 2 * MIB, True)))
    ticks = [it.text for it in drawn(html).iter("text") if it.get("text-anchor") == "middle"]
    assert (ticks[0] == "0") == linear and len(ticks) > 2


def test_nothing_compared_is_nothing_drawn(empty):
    assert plot.svg(empty()) == ""


def test_colours_follow_the_page(empty):
    html = plot.svg(explored(empty, (1.0, MIB, True), (2.0, MIB, True)))
    style, body = html.split("</style>")
    assert "currentColor" in style and ".dark .subquad-plot" in style and "#" not in body


# ----------------------------------------------------------------------------------------------------------- the table


def test_what_was_measured_once_stands_apart(empty):
    told = results.trial_table(explored(empty, (1.0, MIB, True), (2.0, MIB, True), tried=12))
    compared, once = told.split("<details")
    assert "Measured 9 times" in compared and "Measured once" not in compared
    assert "Measured once" in once and "12 settings; the fastest 8" in once and once.count("<tr>") == 1 + 8
    assert " open" not in once.split(">")[0]
    assert "recommended" in compared and "recommended" not in once


def test_today_is_in_the_table_however_slow_it_was(empty):
    exploration = explored(empty, (1.0, MIB, True), tried=12)
    exploration.tried.append(Trial(Settings(query_chunk=64), *[99.0] * 4, MIB, True))
    assert "today" in results.trial_table(exploration).split("<details")[1]


def test_numbers_that_people_can_use(empty):
    told = results.trial_table(explored(empty, (18.0022 / 1.03, 0, True), (40.0, 300, True)))
    assert ">18 s<" in told and "0.0 MiB" not in told and " ms" not in told and "0.3 KiB" in told


def test_a_verdict_is_that_of_the_table(empty):
    exploration = explored(empty, (1.0, MIB, True), (1.5, 2 * MIB, True))
    assert "1.50 times as fast as yours" in results.verdict(exploration)
    same = explored(empty, (1.0, MIB, True), (1.01, 2 * MIB, True))
    assert "is as fast within what repeats differ by" in results.verdict(same)
    assert same.remarks(same.today()) == ["no clear difference"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(1.0, 1.5), st.booleans()), min_size=2, max_size=5))
def test_a_verdict_says_of_todays_setting_what_the_table_says(empty, found):
    """Of (seconds, how much longer the slowest round takes, whether it fits)."""
    exploration = explored(empty, *((its, MIB, fits) for its, _, fits in found))
    spread = [
        replace(trial, fastest_seconds=its).in_rounds(its * (1 + (by - 1) * n / ROUNDS) for n in range(ROUNDS))
        for trial, (its, by, _) in zip(explored(empty, *((its, MIB, fits) for its, _, fits in found)).trials, found)
    ]
    exploration._judgement = judged(spread, next((it for it in spread if it.settings == Settings()), None))
    exploration.trials = list(exploration._judgement.trials)
    verdict, best, today = results.verdict(exploration), exploration.recommended(), exploration.today()
    remarks = exploration.remarks(today)
    assert (f"whether it is faster than yours, {today.label}" in verdict) <= ("too unsteady to tell" in remarks)
    assert ("as fast within" in verdict) <= (remarks == ["no clear difference"])
    assert ("is the best one here" in verdict) <= (today is best)
    if ratio := re.search(r"([\d.]+) times as fast", verdict):
        assert float(ratio[1]) > 1 and remarks == [] and best.seconds < today.seconds


# ------------------------------------------------------------------------------------------------------------ progress


def test_one_bar_one_estimate_and_what_disturbs_it():
    told = results.progress(Progress(250, 1000, 130.0, "4096 x 4096 tokens", Disturbance(0.4, 1.5)))
    assert 'max="1000" value="250"' in told and "aria-label" in told and "About 2 min left. 4096 x 4096 tokens" in told
    assert "Other programs take 40 % of the processor: times are about 1.5 times as long." in told
    quiet = results.progress(Progress(0, 1000, None, "4096 x 4096 tokens"))
    assert "left" not in quiet and "Other programs" not in quiet


@pytest.mark.parametrize(
    ("disturbance", "sentence"),
    [
        (Disturbance(None, 1.05, 1.04), ""),
        (Disturbance(0.05, 1.02, 1.04), ""),
        (
            Disturbance(0.4, 1.5, 1.12),
            "Other programs took 40 % of the processor: times were about 1.5 times as long, and what differs by "
            "less than 12 % cannot be told apart.",
        ),
        (Disturbance(0.3, 1.0), "Other programs took 30 % of the processor: times were hardly longer."),
        (Disturbance(None, 2.0), "Something else slowed it: times were about 2.0 times as long."),
    ],
)
def test_what_disturbed_it_in_words(disturbance, sentence):
    assert disturbance.sentence(past=True) == sentence


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_busy_processors_hide_nothing_on_an_accelerator(device):
    device = torch.device(device)
    assert Disturbance(0.4, 1.0).hides_something(device) is (device.type == "cpu")
    assert Disturbance(0.0, 1.2).hides_something(device) and not Disturbance(0.05, 1.05).hides_something(device)


def test_what_can_be_told_apart_is_what_would_be_told():
    """A setting that is faster by more is clearly faster, one that is faster by less is not."""
    rounds = [1.0 + number / 100 for number in range(COUNTING)]
    other = Trial(Settings(), 1.0, 1.0, 1.0, 1.0, MIB, True).in_rounds(rounds)
    least = least_difference([other])
    for times, clear in ((least * 1.001, True), (least * 0.999, None)):
        faster = replace(other, fastest_seconds=1.0 / times).in_rounds(its / times for its in rounds)
        assert bool(faster.faster_than(other)) is bool(clear)
