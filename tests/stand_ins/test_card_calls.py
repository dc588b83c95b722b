"""On a card whose fused kernel is right, slow, wrong or unwilling: whatever it is, results are those of float64."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import Settings, attention
from lib_subquad.engines import fused
from tests import stand_in
from tests.devices import on_device
from tests.stand_ins.calls import PLAIN, SPOILED, drawn, what_is_wrong

CALLS = 1000


def test_random_calls_on_cards_at_random(reference):
    """None is wrong and none is lost, whatever the kernel."""
    chance, calls = random.Random(15), {name: [] for name in stand_in.KERNELS}
    for _ in range(CALLS):
        calls[chance.choice(list(calls))].append(drawn(chance))
    wrong, made = {}, Counter()
    for kernel, its in calls.items():
        stand_in.device(kernel)
        for call in its:
            made[kernel] += 1
            if words := what_is_wrong(call, reference):
                wrong.setdefault(kernel, []).append(f"{call}: {words}")
    count = sum(map(len, wrong.values()))
    lines = [f"{kernel}: {len(its)} of {made[kernel]}, such as {its[0]}" for kernel, its in wrong.items()]
    assert made.total() == CALLS and not count, "\n".join([f"{count} of {CALLS} calls are wrong", *lines])


@pytest.mark.parametrize("kernel", ["refuses", "refuses every second"])
@pytest.mark.parametrize("query_chunk", [0, 16])
def test_a_kernel_that_refuses_loses_no_call(kernel, query_chunk, reference):
    stand_in.device(kernel)
    plans = []
    for _ in range(4):
        assert not what_is_wrong(replace(PLAIN, query_chunk=query_chunk), reference, plans)
    assert plans[-1].engine == "portable" and any(stand_in.REFUSAL in reason for reason in plans[-1].reasons)


def test_a_kernel_that_runs_out_of_memory_is_not_distrusted(reference):
    """The call goes on in smaller chunks, and the next ones are the fused kernel's."""
    stand_in.device("out of memory once")
    plans, call = [], replace(PLAIN, queries=1024)
    for _ in range(3):
        assert not what_is_wrong(call, reference, plans)
    assert plans[0].retries and plans[0].query_chunk < 1024
    assert {plan.engine for plan in plans} == {"fused"}
    plans.clear()
    for _ in range(2):  # too few queries for smaller chunks: the next engine has this one call
        assert not what_is_wrong(PLAIN, reference, plans)


@pytest.mark.parametrize("kernel", SPOILED)
def test_a_wrong_kernel_is_passed_over_and_told(kernel, reference):
    """By the reason in the plan, of the first call too."""
    stand_in.device(kernel)
    plans = []
    for _ in range(2):
        assert not what_is_wrong(SPOILED[kernel], reference, plans)
    assert {plan.engine for plan in plans} == {"portable"}
    for plan in plans:
        assert any("fused" in reason and reason != fused.WHY for reason in plan.reasons)


def test_what_is_right_stays_with_the_fused_kernel(reference):
    """Of a kernel that is wrong for some sizes, those for which it is right are not taken away."""
    for kernel in ("right", "slow", "wrong above 256 tokens"):
        stand_in.device(kernel)
        plans = []
        for call in (PLAIN, replace(PLAIN, heads=4), replace(PLAIN, keys=200), PLAIN):
            assert not what_is_wrong(call, reference, plans)
        assert {plan.engine for plan in plans} == {"fused"}, kernel


@pytest.mark.parametrize("kernel", ["refuses", "wrong"])
def test_the_users_own_choice_of_engine_is_no_way_around_it(kernel):
    stand_in.device(kernel)
    tensors = torch.randn(3, 1, 2, 64, 8)
    plans = []
    found = on_device(attention)(*tensors, settings=Settings(engine="fused"), report=plans.append)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*tensors), atol=1e-5, rtol=1e-4)
    assert plans[0].engine == "portable"
