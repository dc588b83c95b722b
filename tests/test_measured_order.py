"""Automatic by what was measured: what a finding changes, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import Settings, attention, identity, plan
from lib_subquad.engines import order, portable
from lib_subquad.engines.table import Found, Machine, Table, class_of
from lib_subquad.plan import limit_bytes, plan_problem, why_another
from lib_subquad.problem import Problem
from tests.threads import torch_threads

CPU = torch.device("cpu")
SHAPE = (1, 2, 512, 8)
PLENTY = 1 << 34
PROBLEM = Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, "cpu")


def twin(name: str, **other) -> SimpleNamespace:
    """An engine that computes as the last one does."""
    return SimpleNamespace(**vars(portable) | {"NAME": name, "WHY": "it is a twin"} | other)


@pytest.fixture(autouse=True)
def twins(monkeypatch):
    """Three engines that all can: the rules take `one`, and then `two`. The one that comes last is `three`."""
    engines, table = order.engines(), order.table()
    made = [twin("one"), twin("two"), twin("three")]
    order._change(tuple(made))
    order.go_by(Table())
    with torch_threads(2):
        yield made
    order._change(engines)
    order.go_by(table)


def measured(found: Found, machine: Machine | None = None, problem: Problem = PROBLEM) -> None:
    order.go_by(Table().with_found(machine or order.machine(CPU), {class_of(problem): found}))


def planned(settings=Settings(), free_bytes=PLENTY, **more):
    return plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu", settings, free_bytes=free_bytes, **more)


BY_RULES = ("one", ("it is a twin",))
FASTER = Found("two", margin=1.3)
REASON = "measured on this device: 1.30 times as fast as what rules would take"


def chosen(made) -> tuple[str, tuple[str, ...]]:
    return made.engine, made.reasons


# -------------------------------------------------------------------------------------------------- what it changes


def test_a_finding_changes_the_engine_and_says_so():
    assert chosen(planned()) == BY_RULES
    measured(FASTER)
    assert chosen(planned()) == ("two", (REASON,))
    made = []
    attention(*torch.randn(3, *SHAPE), report=made.append)
    assert chosen(made[0]) == ("two", (REASON,))


def test_a_finding_changes_the_tile():
    measured(Found("one", 128, 256, 1.3))
    made = planned()
    assert (made.engine, made.query_chunk, made.kv_chunk, made.reasons) == ("one", 128, 256, (REASON,))


@pytest.mark.parametrize("tile", [{"query_chunk": 64}, {"kv_chunk": 256}], ids=["of queries", "of keys"])
def test_a_finding_changes_chunks_of_one_kind(tile):
    measured(Found("two", **tile, margin=1.3))
    made = planned()
    assert made.sizes == planned(Settings(engine="two", **tile)).sizes and made.measured is not None


def test_that_the_rules_are_the_fastest_changes_nothing():
    """Nobody has set the engine that the rules came to, either."""
    order.engines()[0].why_not = lambda problem: ["it is too wide"]
    by_rules = planned()
    assert chosen(by_rules) == ("two", ("it is too wide",))
    for found, words in (
        (Found("two"), "measured on this device: nothing is clearly faster"),
        (Found("two").beside_others(), "measured on this device beside other programs: nothing is clearly faster"),
    ):
        measured(found)
        assert order.found(PROBLEM) == found
        assert planned() == replace(by_rules, reasons=("it is too wide", words))
    for other in (Settings(measure=False), Settings(engine="two"), Settings(query_chunk=64)):
        assert not any("measured" in reason for reason in planned(other).reasons)


def test_of_other_classes_nothing_is_known():
    measured(FASTER, problem=replace(PROBLEM, keys=77))
    assert chosen(planned()) == BY_RULES


def test_calls_that_are_known_are_planned_anew():
    given, made = torch.randn(3, *SHAPE), []
    for table in (Table(), Table({order.machine(CPU): {class_of(PROBLEM): FASTER}}), Table()):
        order.go_by(table)
        for _ in range(2):
            attention(*given, report=made.append)
    assert [it.engine for it in made] == ["one", "one", "two", "two", "one", "one"]


def test_what_fitted_by_the_rules_is_planned_anew():
    """After an out-of-memory its sizes are remembered; those of an engine that is measured to be faster are its own."""
    given, made, engine = torch.randn(3, *SHAPE), [], order.engines()[0]
    attend, exhausted = engine.attend, []

    def short_of_memory(problem, *others):
        if problem == PROBLEM and not exhausted:
            exhausted.append(problem)
            raise RuntimeError("out of memory")
        return attend(problem, *others)

    engine.attend = short_of_memory
    attention(*given, report=made.append)
    attention(*given, report=made.append)
    measured(FASTER)
    attention(*given, report=made.append)
    assert [(it.engine, it.retries) for it in made] == [("one", 1), ("one", 0), ("two", 0)]
    assert made[0].sizes == made[1].sizes != made[2].sizes


def test_what_is_measured_for_other_calls_forgets_no_out_of_memory(monkeypatch):
    """Nor does what is measured for this one and leaves it as it was."""
    given, made, engine = torch.randn(3, *SHAPE), [], order.engines()[0]
    attend, exhausted = engine.attend, []

    def short_of_memory(problem, sizes, *others):
        if problem == PROBLEM and sizes.queries == SHAPE[2]:
            exhausted.append(sizes)
            raise RuntimeError("out of memory")
        return attend(problem, sizes, *others)

    monkeypatch.setattr(engine, "attend", short_of_memory)
    attention(*given, report=made.append)
    before = len(exhausted)
    for calls, found in (
        (replace(PROBLEM, keys=77), FASTER),
        (replace(PROBLEM, width=40), FASTER),
        (PROBLEM, Found("one")),
    ):
        order.go_by(order.table().with_found(order.machine(CPU), {class_of(calls): found}))
        attention(*given, report=made.append)
    assert [(it.engine, it.retries) for it in made] == [("one", before)] + [("one", 0)] * 3
    assert len(exhausted) == before > 0
    order.go_by(order.table().with_found(order.machine(CPU), {class_of(PROBLEM): FASTER}))
    attention(*given, report=made.append)
    assert made[-1].engine == "two"  # whose sizes are its own


def test_another_table_makes_nobody_compare_engines_again(monkeypatch):
    calls, engine = [], order.engines()[0]
    attend = engine.attend
    engine.attend = lambda problem, *others: calls.append(problem.queries) or attend(problem, *others)
    planned()
    compared = list(calls)
    measured(Found("one", 128, 128, 1.3))
    planned()
    assert compared and calls == compared


# --------------------------------------------------------------------------------------------- what it does not change


@pytest.mark.parametrize(
    "settings",
    [{"engine": "one"}, {"engine": "three"}, {"query_chunk": 64}, {"kv_chunk": 64}],
    ids=["the first", "another", "queries", "keys"],
)
def test_what_the_user_has_chosen_wins(settings):
    by_rules = planned(Settings(**settings))
    measured(Found("two", 128, 128, 1.3))
    assert planned(Settings(**settings)) == by_rules


def test_where_nothing_is_to_be_measured_nothing_measured_is_gone_by():
    by_rules = planned()
    measured(Found("two", 128, 128, 1.3))
    assert planned(Settings(measure=False)) == by_rules and planned().engine == "two"


def test_why_another_engine_than_the_one_that_is_set():
    order.engines()[1].why_not = lambda problem: ["it is too wide"]
    order.engines()[0].why_not = lambda problem: ["it is too narrow"]
    for engine, why in (
        ("two", "it is too wide"),
        ("one", "it is too narrow"),  # the first one, of which no plan says that it is set
        ("three", ""),
        ("automatic", ""),
    ):
        assert why_another(planned(Settings(engine=engine)), engine) == why


@pytest.mark.parametrize("limit", [1, 5, 70])
def test_the_memory_limit_holds(limit):
    settings, free = Settings(memory_limit=limit), 32 << 20
    shape = (2, 8, 4096, 40)
    problem = Problem.from_shapes(shape, shape, shape, torch.float32, "cpu")
    measured(Found("two", 16384, 16384, 1.3), problem=problem)
    made = plan_problem(problem, settings, free)
    assert made.engine == "two" and made.reasons[0] == REASON
    assert made.workspace_bytes <= limit_bytes(problem, settings, free)
    assert plan_problem(problem, settings, PLENTY).workspace_bytes > made.workspace_bytes
    assert not any("chunk size" in reason for reason in made.reasons)  # nobody has set one


def test_what_an_engine_refuses_holds():
    order.engines()[1].why_not = lambda problem: ["it is too wide"]
    measured(FASTER)
    assert chosen(planned()) == ("one", (REASON, "it is too wide"))


def test_what_has_refused_is_not_asked_again():
    calls, engine = [], order.engines()[1]

    def refuses(problem, *others):
        calls.append(problem.queries)
        raise RuntimeError("no such kernel")

    measured(FASTER)
    planned()  # a small call is right
    engine.attend = refuses
    made, given = [], torch.randn(3, *SHAPE)
    for _ in range(2):
        attention(*given, report=made.append)
    assert [it.engine for it in made] == ["one", "one"] and len(calls) == 1
    assert "no such kernel" in made[1].reasons[-1]


def test_what_is_not_trusted_is_not_taken(reference):
    engine = order.engines()[1]
    attend = engine.attend
    engine.attend = lambda *arguments: (attend(*arguments)[0] + 1, None)
    measured(FASTER)
    assert planned().engine == "one" and "wrong results" in planned().reasons[1]
    given = torch.randn(3, *SHAPE)
    torch.testing.assert_close(attention(*given).double(), reference(*given), atol=1e-5, rtol=0)


def test_gradients_are_planned_as_ever():
    by_rules = planned(grad=True)
    measured(FASTER, problem=replace(PROBLEM, grad=True))
    assert planned(grad=True) == by_rules and planned().engine == "two"


@pytest.mark.parametrize("name", ["four", "automatic", "", "../one"])
def test_an_engine_that_there_is_not_is_ignored(name):
    measured(Found(name, 128, 128, 1.3))
    assert order.found(PROBLEM) is None and chosen(planned()) == BY_RULES
    assert order.all_found(CPU) == {}


@pytest.mark.parametrize("tile", [(16, 0), (64, 0), (255, 0), (0, 128), (512, 128), (16, 16)], ids=str)
def test_a_tile_that_an_engine_has_none_of_is_ignored(tile):
    """One that takes all keys at once is asked for a few hundred queries at least; the next measurement says better."""
    order.engines()[1].SPLITS_KEYS = False
    measured(Found("two", *tile, margin=3.0))
    assert order.found(PROBLEM) is None and chosen(planned()) == BY_RULES and order.all_found(CPU) == {}
    for right in ((0, 0), (256, 0), (1024, 0)):
        measured(Found("two", *right, margin=1.3))
        assert chosen(planned()) == ("two", (REASON,))
    measured(Found("three", *tile, margin=1.3))
    assert planned().engine == "three"


def test_an_inexact_engine_is_not_taken_unasked():
    """Whatever the file says."""
    order.engines()[1].EXACT = False
    measured(FASTER)
    assert order.found(PROBLEM) is None and chosen(planned()) == BY_RULES
    assert planned(Settings(engine="two")).engine == "two"


def test_after_an_out_of_memory_the_next_of_the_same_engines_goes_on():
    """They are asked in the order that was measured: after `three`, which comes first then, `one`."""
    given, made, calls = torch.randn(3, *SHAPE), [], []

    def exhausted(problem, *others):
        calls.append(problem)
        raise RuntimeError("out of memory")

    measured(Found("three", margin=1.3))
    order.engines()[2].attend, order.engines()[2].smaller = exhausted, lambda problem, sizes: None
    attention(*given, report=made.append)
    assert made[0].engine == "one" and made[0].retries == 1 and len(calls) == 1


# ------------------------------------------------------------------------------------------------- for whom it holds


@pytest.mark.parametrize("field", Machine._fields)
def test_what_another_machine_has_found_is_not_gone_by(field):
    here = order.machine(CPU)
    measured(FASTER, here._replace(**{field: getattr(here, field) + "x"}))
    assert order.found(PROBLEM) is None and chosen(planned()) == BY_RULES
    measured(FASTER, here)
    assert planned().engine == "two"


@pytest.mark.parametrize(
    ("holder", "name"),
    [(identity, "device_name"), (identity, "driver"), (torch, "__version__"), (None, "engines"), (None, "subquad")],
)
def test_what_changes_is_measured_again(holder, name, monkeypatch):
    import lib_subquad

    measured(FASTER)
    order.machine.cache_clear()  # another process
    if name == "engines":
        order.register(twin("four"))
    elif name == "subquad":
        monkeypatch.setattr(lib_subquad, "__version__", "0.0.1")
    else:
        monkeypatch.setattr(holder, name, "0.0.1" if holder is torch else lambda device: "another")
    try:
        assert order.found(PROBLEM) is None and chosen(planned()) == BY_RULES
    finally:
        order.machine.cache_clear()


@pytest.mark.parametrize("told", [None, 5, "a\nb", "x" * 5000, b"\xff", OSError("no such program"), KeyError("name")])
def test_a_device_that_tells_nothing_of_use_has_a_name_that_can_be_kept(told, monkeypatch):
    def tell(device):
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(identity, "device_name", tell)
    monkeypatch.setattr(identity, "driver", tell)
    order.machine.cache_clear()
    try:
        measured(FASTER)
        assert Table.from_json(order.table().to_json()) == order.table() and planned().engine == "two"
        assert type(order.machine(CPU).torch) is str
    finally:
        order.machine.cache_clear()
