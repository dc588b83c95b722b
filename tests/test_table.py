"""What was measured: what is chosen of it, what a table holds, and that no file can make it hold anything else."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lib_subquad.engines import table
from lib_subquad.engines.table import Candidate, Class, Found, Machine, Table, choose, class_of
from lib_subquad.problem import Problem

HERE = Machine("a card", "NVIDIA 550", "2.13.0", "1.1.0", "fused, portable")
CALLS = Class("float16", "float16", 40, 40, "none", 4, 12, 12)
PORTABLE = Found("portable", 512, 1024, 1.3)


def problem(query=(2, 8, 4096, 40), keys=None, dtype=torch.float32, **more) -> Problem:
    key = (*query[:2], keys or query[2], query[3])
    return Problem.from_shapes(query, key, key, dtype, "cpu", **more)


# ------------------------------------------------------------------------------------------------------ what is chosen


def in_rounds(rounds, noise, seed=0, **speeds) -> dict[Candidate, list[float]]:
    """Seconds of engines that take so long when nothing else runs; `noise`: the deviation of their logarithm."""
    dice = random.Random(seed)
    return {
        Candidate(name): [quiet * dice.lognormvariate(0, noise) for _ in range(rounds)]
        for name, quiet in speeds.items()
    }


@pytest.mark.parametrize("rounds", [5, 6, 7, 25])
@pytest.mark.parametrize("seed", range(20))
def test_one_that_takes_two_thirds_of_the_time_is_chosen_under_noise(rounds, seed):
    chosen = choose(in_rounds(rounds, 0.05, seed, rules=1.5, fast=1.0, slow=3.0, equal=1.5))
    assert chosen.engine == "fast" and 1.3 < chosen.margin < 1.75


@pytest.mark.parametrize("rounds", [5, 6, 7, 25])
@pytest.mark.parametrize("seed", range(20))
def test_equal_ones_and_slower_ones_change_nothing(rounds, seed):
    assert choose(in_rounds(rounds, 0.03, seed, rules=1.0, equal=1.0, as_fast=0.98, slow=1.2)) == Found("rules")


def test_what_is_faster_by_too_little_changes_nothing():
    assert choose({Candidate("rules"): [1.0] * 9, Candidate("other"): [0.96] * 9}) == Found("rules")
    assert choose({Candidate("rules"): [1.0] * 9, Candidate("other"): [0.94] * 9}) == Found("other", margin=1.06)


def test_rounds_that_disagree_change_nothing():
    """By the median it takes half the time; but in three rounds of ten it does not."""
    others = [0.5] * 7 + [1.5] * 3
    assert choose({Candidate("rules"): [1.0] * 10, Candidate("other"): others}) == Found("rules")
    assert choose({Candidate("rules"): [1.0] * 10, Candidate("other"): [0.5] * 8 + [1.5] * 2}).engine == "other"


def test_what_slows_a_round_slows_all_of_it():
    load = [1.0, 4.0, 1.0, 9.0, 2.0]
    seconds = {Candidate("rules"): load, Candidate("other", 512, 512): [0.8 * it for it in load]}
    assert choose(seconds) == Found("other", 512, 512, 1.25)


def test_of_several_the_fastest():
    seconds = {Candidate("rules"): [1.0] * 5, Candidate("b"): [0.9] * 5, Candidate("c"): [0.5] * 5}
    assert choose(seconds) == choose(seconds) == Found("c", margin=2.0)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_too_few_rounds_tell_nothing(rounds):
    assert choose({Candidate("rules"): [1.0] * rounds, Candidate("other"): [0.1] * rounds}) is None


def test_one_that_was_measured_less_often_is_not_chosen():
    assert choose({Candidate("rules"): [1.0] * 9, Candidate("other"): [0.1] * 2}) == Found("rules")


def test_what_takes_no_time_at_all_can_be_kept():
    chosen = choose({Candidate("rules"): [1.0] * 5, Candidate("other"): [1e-12] * 5})
    assert Table().with_found(HERE, {CALLS: chosen}).found(HERE, CALLS) == chosen


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (problem((1, 16, 4096, 40)), True),  # heads of a whole batch
        (problem((2, 8, 4608, 40)), True),
        (problem((2, 8, 5120, 40)), True),
        (problem((2, 8, 6144, 40)), False),
        (problem((2, 10, 4096, 40)), True),
        (problem((4, 8, 4096, 40)), False),
        (problem((2, 8, 4096, 64)), False),
        (problem(keys=77), False),
        (problem(dtype=torch.float16), False),
        (problem(dtype=torch.float16, upcast=True), False),  # its values are half as large
        (problem(value_dtype=torch.float16), False),
        (problem(mask_shape=(4096, 4096), mask_dtype=torch.bool), False),
    ],
)
def test_classes(other, same):
    assert (class_of(other) == class_of(problem())) is same


def test_masks_of_one_dtype_with_or_without_rows_are_one_class():
    masks = [((4096,), torch.bool), ((1, 8, 1, 4096), torch.bool), ((4096, 4096), torch.bool), ((4096,), torch.float32)]
    for_all, for_each_head, rows, added = (
        class_of(problem(mask_shape=shape, mask_dtype=dtype)) for shape, dtype in masks
    )
    assert for_all == for_each_head and len({for_all, rows, added}) == 3


@pytest.mark.parametrize("sizes", [(0, 8, 16, 8), (1, 8, 0, 8), (1, 1, 1, 1), (64, 48, 1 << 20, 512)])
def test_every_problem_has_a_class_that_can_be_kept(sizes):
    calls = class_of(problem(sizes, keys=1))
    assert Table.from_json(Table().with_found(HERE, {calls: PORTABLE}).to_json()).found(HERE, calls) == PORTABLE


# ------------------------------------------------------------------------------------------------------- what is held

words = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")), max_size=30)
machines = st.builds(Machine, *[words] * 5)
powers, chunks = st.integers(0, 40), st.one_of(st.just(0), st.integers(table.SMALLEST_CHUNK, 16384))
classes = st.builds(Class, words, words, st.integers(0, 512), st.integers(0, 512), words, powers, powers, powers)
findings = st.builds(Found, words, chunks, chunks, st.floats(1, 1e6), st.just(False))
tables = st.dictionaries(machines, st.dictionaries(classes, findings, max_size=5), max_size=4).map(Table)


@effort(max_examples=200, deadline=None, database=None)
@given(tables)
def test_what_is_written_is_read(written):
    read = Table.from_json(written.to_json())
    assert read == written and list(read.machines) == list(written.machines)
    for machine, its in written.machines.items():
        for calls, found in its.items():
            assert read.found(machine, calls) == found
            assert read.found(machine._replace(driver="another driver"), calls) is None


def test_the_fullest_table_is_read():
    """A file that is too large is ignored, and with it all that was measured."""
    full = Table()
    for number in range(2 * table.MOST_MACHINES):
        name = f"{number:02}" + "ä" * (table.LONGEST_NAME - 2)
        long = "x" * table.LONGEST_WORD
        its = {Class(long, long, width, 1 << 16, long, 40, 40, 40): Found(long, 16384, 16384, 1e6 - 1 / 3)
               for width in range(2 * table.MOST_FOUND)}  # fmt: skip
        full = full.with_found(Machine(*[name] * 5), its)
    assert len(full.machines) == table.MOST_MACHINES
    assert {len(its) for its in full.machines.values()} == {table.MOST_FOUND}
    assert Table.from_json(full.to_json()) == full


def test_a_table_of_before_is_read():
    """It says nothing of disturbances."""
    older = json.loads(Table().with_found(HERE, {CALLS: PORTABLE}).to_json())
    del older["machines"][0]["found"][0]["disturbed"]
    assert Table.from_json(json.dumps(older)).found(HERE, CALLS) == PORTABLE


def test_what_was_disturbed_takes_the_place_of_nothing_that_was_not():
    tie = Found("fused").beside_others()
    assert tie.disturbed and PORTABLE.beside_others() == PORTABLE
    for known, then, expected in ((PORTABLE, tie, PORTABLE), (Found("fused"), tie, Found("fused")), (tie, tie, tie),
                                  (tie, PORTABLE, PORTABLE), (tie, Found("fused"), Found("fused"))):  # fmt: skip
        assert Table().with_found(HERE, {CALLS: known}).with_found(HERE, {CALLS: then}).found(HERE, CALLS) == expected


def test_where_there_are_too_many_the_oldest_go():
    some = {replace_width(width): PORTABLE for width in range(table.MOST_FOUND)}
    again = Table().with_found(HERE, some).with_found(HERE, {replace_width(0): Found("fused")})
    full = again.with_found(HERE, {replace_width(1 << 10): PORTABLE})
    assert full.found(HERE, replace_width(0)) == Found("fused")  # it was measured again
    assert full.found(HERE, replace_width(1)) is None
    assert len(full.machines[HERE]) == table.MOST_FOUND


def replace_width(width: int) -> Class:
    return CALLS._replace(width=width)


@pytest.mark.parametrize("name", ["two\nlines", "x" * 300, "\ud800", "\u202e"])
def test_an_engine_of_whatever_name_breaks_no_file(name):
    kept = Table().with_found(HERE, {CALLS: Found(name, margin=2.0), replace_width(8): PORTABLE})
    assert Table.from_json(kept.to_json()) == kept == Table({HERE: {replace_width(8): PORTABLE}})


def test_a_machine_is_forgotten_alone():
    there = HERE._replace(torch="2.0.0")
    both = Table().with_found(HERE, {CALLS: PORTABLE}).with_found(there, {CALLS: Found("fused")})
    assert both.without(HERE) == Table({there: {CALLS: Found("fused")}}) and both.without(there).found(HERE, CALLS)


# ------------------------------------------------------------------------------------------------ what a file may say

GOOD = json.loads(Table().with_found(HERE, {CALLS: PORTABLE}).to_json())


def changed(path: tuple, value) -> str:
    read = json.loads(json.dumps(GOOD))
    it = read
    for step in path[:-1]:
        it = it[step]
    it[path[-1]] = value
    return json.dumps(read)


FOUND = ("machines", 0, "found", 0)
BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a word": '"table"',
    "another format": changed(("format",), 2),
    "a format that is true": changed(("format",), True),
    "no machines": json.dumps({"format": 1}),
    "machines by name": changed(("machines",), {}),
    "a machine that is none": changed(("machines", 0), None),
    "too many machines": changed(("machines",), GOOD["machines"] * 17),
    "too many findings": changed(("machines", 0, "found"), GOOD["machines"][0]["found"] * 257),
    "a name of two lines": changed(("machines", 0, "device"), "a\nb"),
    "a name that turns the line around": changed(("machines", 0, "device"), "\u202e"),
    "half a character": changed(("machines", 0, "device"), "\ud800"),
    "a long name": changed(("machines", 0, "device"), "x" * 201),
    "a number for a name": changed(("machines", 0, "driver"), 5),
    "a long engine": changed((*FOUND, "engine"), "x" * 41),
    "no engine": changed((*FOUND, "engine"), None),
    "a negative chunk": changed((*FOUND, "query_chunk"), -1),
    "a chunk that takes for ever": changed((*FOUND, "kv_chunk"), 1),
    "a huge chunk": changed((*FOUND, "kv_chunk"), 16385),
    "half a chunk": changed((*FOUND, "query_chunk"), 512.5),
    "a chunk that is true": changed((*FOUND, "query_chunk"), True),
    "a huge number": changed((*FOUND, "heads"), 10**15),
    "a number without end": changed((*FOUND, "heads"), 0).replace('"heads": 0', '"heads": ' + "9" * 100_000),
    "a disturbance that is none": changed((*FOUND, "disturbed"), "no"),
    "a disturbance in numbers": changed((*FOUND, "disturbed"), 1),
    "a margin that is none": changed((*FOUND, "margin"), float("nan")),
    "an infinite margin": changed((*FOUND, "margin"), float("inf")),
    "a margin below one": changed((*FOUND, "margin"), 0.5),
    "a margin of a million million": changed((*FOUND, "margin"), 1e12),
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep in a field": changed((*FOUND, "engine"), None).replace(
        '"engine": null', '"engine": ' + "[" * 900 + "]" * 900
    ),
    "large": " " * (table.LARGEST_FILE + 1),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_no_table_is_said_in_a_line(broken):
    assert Table.from_json(changed((*FOUND, "margin"), 2)).found(HERE, CALLS) == replace(PORTABLE, margin=2.0)
    with pytest.raises(ValueError) as said:
        Table.from_json(broken)
    assert str(said.value).isprintable() and len(str(said.value)) < 200
