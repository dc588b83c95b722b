"""Measuring for a few seconds: what is chosen, how long it takes, and what is none of its business. The clock is made
up: it goes on only while an engine computes, by what that engine takes for a query."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import Settings, memory, plan, trust
from lib_subquad.engines import order, portable
from lib_subquad.engines.base import Sizes
from lib_subquad.engines.table import Candidate, Found, Table, choose, class_of
from lib_subquad.lab import machine
from lib_subquad.lab.measured import rounds
from lib_subquad.plan import plan_problem
from lib_subquad.problem import Problem
from tests.threads import torch_threads

CPU = torch.device("cpu")
SHAPE = (1, 2, 512, 8)
SECONDS = 5.0


def problem(queries=512, keys=None, heads=2, **more) -> Problem:
    query, key = (1, heads, queries, 8), (1, heads, keys or queries, 8)
    return Problem.from_shapes(query, key, key, torch.float32, "cpu", **more)


class Clock:
    """What `time` is to the module that is tested."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """An engine as the last one, whole keys at a time, that takes `seconds` for every query; `does` may spoil a call of
    more queries than a small one has."""

    EXACT, SPLITS_KEYS, DIFFERENTIABLE = True, False, False

    def __init__(self, clock: Clock, name: str, seconds=1e-4, does=None) -> None:
        self.NAME, self.WHY, self.clock, self.seconds, self.does = name, f"it is {name}", clock, seconds, does
        self.calls: list[tuple[int, ...]] = []

    def __getattr__(self, name):
        return getattr(portable, name)

    def fitting(self, problem, settings, limit):
        return Sizes(min(settings.query_chunk or problem.queries, problem.queries), problem.keys, problem.heads), []

    def attend(self, problem, sizes, query, *others):
        if query.shape[2] <= trust.QUERIES:
            return portable.attend(problem, sizes, query, *others)
        self.clock.now += self.seconds * query.shape[2]
        self.calls.append(tuple(query.shape))
        if self.does is not None and (spoiled := self.does(problem)) is not None:
            output, statistics = portable.attend(problem, sizes, query, *others)
            return output + spoiled, statistics
        return portable.attend(problem, sizes, query, *others)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rounds, "time", clock)
    monkeypatch.setattr(machine, "processor_seconds", lambda: None)  # what others do here is none of these tests'
    engines, table = order.engines(), order.table()
    order.go_by(Table())
    rounds.forget()
    with torch_threads(1):
        yield clock
    order._change(engines)
    order.go_by(table)
    rounds.forget()


@pytest.fixture
def among(clock):
    """among(one=…, two=…): these engines, in this order, and then one that is very slow."""

    def take(**seconds):
        made = [Timed(clock, name, each) for name, each in seconds.items()]
        order._change((*made, Timed(clock, "last", 20 * max(seconds.values()))))
        return made

    return take


def found(problems=None, settings=Settings(), seconds=SECONDS):
    return rounds.measured(problems or [problem()], settings, seconds)


def only(problem=None, **more) -> Found | None:
    it = problem or globals()["problem"]()
    return found([it], **more).get(class_of(it))


# ---------------------------------------------------------------------------------------------------- what is chosen


def test_the_faster_one_is_chosen(among):
    among(one=1.5e-4, two=1e-4, three=1.2e-4)
    assert only() == Found("two", margin=1.5)


def test_an_equal_one_changes_nothing(among):
    among(one=1e-4, two=0.97e-4)
    assert only() == Found("one")


def test_a_slow_one_is_soon_given_up(among):
    fast, slow = among(one=1e-4, two=2.1e-4)
    assert only() == Found("one")
    assert slow.calls.count(SHAPE) == 1 and fast.calls.count(SHAPE) == 1  # there is nothing left to compare


def test_one_that_was_slow_once_is_not_given_up(among, clock):
    """Another program came."""
    _, two, _ = among(one=1.5e-4, two=1e-4, three=1.5e-4)
    two.does = lambda problem: setattr(clock, "now", clock.now + 0.05) if two.calls.count(SHAPE) == 1 else None
    assert only() == Found("two", margin=1.5)


def test_one_that_takes_other_tiles_faster(clock):
    def attend(problem, sizes, query, *others):
        clock.now += (1e-4 if sizes.keys < 512 else 1.5e-4) * query.shape[2]
        return portable.attend(problem, sizes, query, *others)

    order._change((SimpleNamespace(**vars(portable) | {"NAME": "one", "attend": attend}),))
    its = problem(keys=512)
    by_rules = plan_problem(its, Settings())
    chosen = only(its)
    assert chosen.engine == "one" and chosen.margin == 1.5 and chosen.kv_chunk == by_rules.kv_chunk // 2
    order.go_by(Table().with_found(order.machine(CPU), {class_of(its): chosen}))
    assert plan_problem(its, Settings()).kv_chunk == by_rules.kv_chunk // 2


def test_where_keys_are_few_chunks_of_queries_are_tried():
    its = problem(keys=64, queries=4096)
    wanted = [it.query_chunk for it in rounds.candidates(its, Settings()) if it.engine == "portable"]
    own, *others = (plan_problem(its, Settings(engine="portable", query_chunk=size)).sizes for size in wanted)
    assert {own.keys, *(sizes.keys for sizes in others)} == {64}
    assert [own.queries // sizes.queries for sizes in others] == [2, 4]


def test_from_measuring_to_automatic(among):
    among(one=1.5e-4, two=1e-4)
    (asked,) = rounds.unknown([(problem(), 16)], Settings())
    order.go_by(order.table().with_found(order.machine(CPU), found([asked])))
    made = plan(SHAPE, SHAPE, SHAPE, torch.float32, "cpu")
    assert made.engine == "two" and "1.50 times as fast" in made.reasons[0]
    assert rounds.unknown([(problem(), 16)], Settings()) == []


def test_what_the_user_has_chosen_is_not_what_is_compared(among):
    among(one=1.5e-4, two=1e-4)
    assert only(settings=Settings(engine="last", query_chunk=64)) == Found("two", margin=1.5)


def test_measured_again_by_the_rules(among):
    """What was found before is no part of what is compared."""
    among(one=1.5e-4, two=1e-4)
    order.go_by(Table().with_found(order.machine(CPU), found()))
    assert only() == Found("two", margin=1.5)


def test_an_inexact_one_is_not_compared(among):
    _, two = among(one=1.5e-4, two=1e-4)
    two.EXACT = False
    assert only() == Found("one") and two.calls == []


def test_what_does_not_fit_the_memory_limit_is_not_compared(among):
    _, two = among(one=1.5e-4, two=1e-4)
    two.workspace_bytes = lambda problem, sizes: 1 << 60
    assert only() == Found("one") and two.calls == []


# ------------------------------------------------------------------------------------------- those that cannot do it


def raising(error: Exception):
    def does(problem):
        raise error

    return does


FAILING = {
    "refuses": raising(RuntimeError("no such kernel")),
    "runs out of memory": raising(RuntimeError("out of memory")),
    "is wrong": lambda problem: 1.0,
    "gives no numbers": lambda problem: float("nan"),
    "fails": raising(ValueError("head_dim must be 64")),
}


@pytest.mark.parametrize("does", FAILING.values(), ids=FAILING)
def test_one_that_fails_is_not_chosen(does, among, caplog):
    """Its calls are computed by another engine, or by nobody; the others are compared all the same."""
    _, two, three = among(one=1.5e-4, two=0.1e-4, three=1e-4)
    two.does = does
    assert only() == Found("three", margin=1.5)
    assert len(two.calls) == 1 and not any("going on with smaller chunks" in line for line in caplog.messages)


@pytest.mark.parametrize("does", FAILING.values(), ids=FAILING)
def test_where_the_first_one_fails_the_next_is_what_rules_come_to(does, among):
    one, _, _ = among(one=0.1e-4, two=1e-4, three=0.99e-4)
    one.does = does
    assert only() == Found("two")


@pytest.mark.parametrize("after", range(2, 8))
def test_one_that_fails_later_is_not_chosen(after, among):
    _, two, three = among(one=1.5e-4, two=0.1e-4, three=1e-4)
    two.does = lambda problem: 1 / 0 if len(two.calls) == after else None
    assert only() == Found("three", margin=1.5) and len(two.calls) == after


@pytest.mark.parametrize("after", range(1, 8))
def test_where_the_first_one_fails_later(after, among):
    one, _, _ = among(one=1e-4, two=1e-4, three=0.5e-4)
    one.does = lambda problem: 1 / 0 if len(one.calls) == after else None
    assert only() == Found("three", margin=2.0)


def test_where_all_fail_nothing_is_told(among):
    for engine in among(one=1e-4, two=1e-4):
        engine.does = FAILING["runs out of memory"]
    order.engines()[-1].does = FAILING["runs out of memory"]
    assert found() == {} and rounds.tried(problem())


def test_a_device_that_computes_nothing_any_more_ends_it_in_a_line(among, caplog):
    one, two = among(one=1.5e-4, two=1e-4)
    two.does = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert found() == {} and "engines cannot be measured: CUDA error: an illegal memory" in caplog.messages[-1]


def test_a_problem_for_which_there_is_no_memory_is_passed_over(among, monkeypatch):
    among(one=1.5e-4, two=1e-4)
    large, small = problem(heads=8), problem()
    tensors = rounds.tensors

    def made(its):
        if its == large:
            raise RuntimeError("out of memory")
        return tensors(its)

    monkeypatch.setattr(rounds, "tensors", made)
    assert found([large, small]) == {class_of(small): Found("two", margin=1.5)}
    assert rounds.tried(large) and not rounds.tried(small)


# ------------------------------------------------------------------------------------------------- how long it takes


@pytest.mark.parametrize("each", [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 1.0])
@pytest.mark.parametrize("count", [1, 4])
def test_the_time_is_kept_within_one_call(each, count, among, clock):
    """Whatever a call takes: it is on fewer queries then, with all of the heads."""
    engines = among(one=each, two=each, three=0.7 * each, four=0.5 * each)
    problems = [problem(heads=heads) for heads in (16, 8, 4, 2)[:count]]
    start = clock.now
    chosen = found(problems)
    longest = max(engine.seconds * shape[2] for engine in order.engines() for shape in engine.calls)
    assert clock.now - start <= SECONDS + longest
    assert {shape[1] for engine in engines for shape in engine.calls} <= {it.heads for it in problems}
    if each <= 1e-4:
        assert {it.engine for it in chosen.values()} == {"four"} and len(chosen) == count
    if each == 1e-3:
        assert max(shape[2] for engine in engines for shape in engine.calls) < problem().queries


def test_short_calls_are_computed_whole_and_often(among):
    one, _ = among(one=1e-6, two=1e-6)
    assert only() == Found("one")
    assert one.calls[-1] == SHAPE and len(one.calls) > rounds.MOST_ROUNDS


def test_of_too_few_rounds_nothing_is_chosen(among):
    """One round of three is done when the time is over."""
    among(one=1.5e-4, two=1e-4)
    assert found(seconds=0.15) == {}
    assert only() == Found("two", margin=1.5)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-9])
def test_without_time_nothing_is_computed(seconds, among):
    one, two = among(one=1e-4, two=1e-4)
    assert found(seconds=seconds) == {} and len(one.calls) <= 1 and two.calls == []


def test_what_other_programs_disturbed_is_not_measured_before_each_image(among, clock):
    one, two = among(one=1e-4, two=1e-4)
    asked = [(problem(), 16), (problem(keys=77), 16)]
    assert len(rounds.unknown(asked, Settings())) == 2
    one.does = lambda problem: setattr(clock, "now", clock.now + 60)  # another program came
    assert found(rounds.unknown(asked, Settings())) == {}
    assert rounds.tried(problem()) and rounds.unknown(asked, Settings()) == []
    assert len(rounds.worth_measuring(asked, Settings())) == 2  # who asks for it gets it
    one.does = None
    order._change((one, two))  # another set of engines is another machine
    assert len(rounds.unknown(asked, Settings())) == 2
    rounds.forget()
    assert not rounds.tried(problem())


# ----------------------------------------------------------------------------------------- beside other programs


@pytest.fixture
def busy(monkeypatch):
    """busy(share): other programs take this share of the processors from now on."""

    def take(share):
        seconds = iter(range(10**6))
        monkeypatch.setattr(machine, "processor_seconds", lambda: (now := next(seconds), now * share, 0.0))

    return take


def test_that_nothing_is_faster_is_not_believed_beside_other_programs(among, busy):
    among(one=1e-4, two=1e-4)
    busy(0.4)
    assert only() == Found("one", disturbed=True)
    assert rounds.tried(problem()) and rounds.unknown([(problem(), 16)], Settings()) == []  # not before each image
    order.go_by(Table().with_found(order.machine(CPU), found()))
    rounds.forget()  # or after the next start
    assert rounds.unknown([(problem(), 16)], Settings()) == [problem()]
    busy(0.02)
    assert only() == Found("one")
    order.go_by(order.table().with_found(order.machine(CPU), found()))
    rounds.forget()
    assert rounds.unknown([(problem(), 16)], Settings()) == []


def test_what_is_given_up_soon_beside_other_programs_is_not_believed_to_be_slower(among, busy):
    among(one=1e-4, two=2.1e-4)
    busy(0.4)
    assert only() == Found("one", disturbed=True)


def test_what_is_clearly_faster_beside_other_programs_is_believed(among, busy):
    among(one=1.5e-4, two=1e-4)
    busy(0.4)
    assert only() == Found("two", margin=1.5) and not rounds.tried(problem())


def test_where_nobody_tells_what_others_do_their_traces_are_seen(among, clock):
    """A third of the rounds took three times as long."""
    one, _ = among(one=1e-4, two=1e-4)
    one.does = lambda problem: setattr(clock, "now", clock.now + 0.1) if len(one.calls) % 3 == 0 else None
    assert only() == Found("one", disturbed=True)


def test_a_watch_tells_what_others_did(among, busy, clock):
    one, _ = among(one=1e-4, two=1e-4)
    one.does = lambda problem: setattr(clock, "now", clock.now + 0.1) if len(one.calls) % 3 == 0 else None
    busy(0.4)
    watch = rounds.Watch()
    rounds.measured([problem()], Settings(), SECONDS, watch=watch)
    seen = watch.disturbance()
    assert seen.felt and abs(seen.share - 0.4) < 0.01 and 1.1 < seen.longer < 2 and seen.difference >= 1 / 0.95
    assert rounds.Watch().disturbance().longer == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_the_least_difference_is_what_would_be_told(noise):
    dice = random.Random(1)
    first = [1.0] * 15
    ratios = [dice.lognormvariate(0, noise) for _ in first]
    ratios = [it / statistics.median(ratios) for it in ratios]
    watch = rounds.Watch()
    watch.rounds = [{Candidate("one"): first, Candidate("two"): ratios}]
    least = watch.disturbance().difference
    for times, clear in ((least * 1.001, True), (least * 0.999, False)):
        seconds = {Candidate("one"): first, Candidate("two"): [it / times for it in ratios]}
        assert (choose(seconds).margin > 1) is clear


# ----------------------------------------------------------------------------------------------- what is worth it


def test_what_is_worth_measuring(among):
    among(one=1e-4, two=1e-4)
    large, cross, small = problem(heads=8), problem(heads=8, keys=77), problem(64, heads=1)
    asked = [(small, 1), (cross, 16), (large, 16), (replace(large, heads=7), 1), (replace(large, grad=True), 99)]
    assert rounds.unknown(asked[:4], Settings()) == [large, cross]
    assert rounds.unknown(asked, Settings()) == [large]  # of all that gradients cost, the cross attention is little
    assert rounds.unknown([], Settings()) == rounds.unknown([(problem(0, keys=64), 16)], Settings()) == []
    order.go_by(Table().with_found(order.machine(CPU), {class_of(large): Found("one")}))
    assert rounds.unknown(asked[:4], Settings()) == [cross]


def test_where_there_is_one_way_there_is_nothing_to_measure(among, monkeypatch):
    _, two = among(one=1e-4, two=1e-4)
    for engine in (two, order.engines()[-1]):
        engine.why_not = lambda problem: ["it is too wide"]
    assert rounds.unknown([(problem(), 16)], Settings()) == []


# -------------------------------------------------------------------------------------------- what it leaves alone


def test_random_numbers_are_not_touched(among):
    among(one=1.5e-4, two=1e-4)
    before = torch.random.get_rng_state(), random.getstate()
    rounds.unknown([(problem(), 16)], Settings())
    assert only(problem(mask_shape=(512, 512), mask_dtype=torch.bool)) == Found("two", margin=1.5)
    assert torch.equal(before[0], torch.random.get_rng_state()) and random.getstate() == before[1]


def test_grad_mode_and_plans_are_as_before(among):
    one, two = among(one=1.5e-4, two=1e-4)
    two.does = FAILING["runs out of memory"]
    before = plan_problem(problem(), Settings(), memory.reading(CPU).bytes)
    found()
    assert torch.is_grad_enabled()
    assert plan_problem(problem(), Settings(), memory.reading(CPU).bytes) == before


def test_for_real(monkeypatch):
    """With the clock on the wall and the engines that there are."""
    import time

    monkeypatch.setattr(rounds, "time", time)
    its = problem(256, heads=4)
    told = []
    chosen = rounds.measured([its], Settings(), 30.0, told.append)
    assert told == ["4 heads and 256 x 256 tokens, 8 wide, float32"] and chosen[class_of(its)].engine in order.names()
