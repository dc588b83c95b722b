"""Calls that come again: what is remembered of them, for how long, and what makes it anew. The clock is the test's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import lib_subquad
from lib_subquad import Settings, attention, calls, memory
from lib_subquad import device as devices
from lib_subquad.engines import order
from tests.threads import torch_threads

MIB = 1 << 20


class Watched:
    """The clock, the device's free memory, and how often each was asked for by whom."""

    def __init__(self) -> None:
        self.now, self.free = 1000.0, 1000 * MIB
        self.asked = self.planned = 0


@pytest.fixture
def watched(monkeypatch):
    watched = Watched()

    def free_bytes(device):
        watched.asked += 1
        return watched.free

    planned = calls._planned

    def plan(*arguments):
        watched.planned += 1
        return planned(*arguments)

    monkeypatch.setattr(memory, "clock", lambda: watched.now)
    monkeypatch.setattr(devices, "free_bytes", free_bytes)
    monkeypatch.setattr(calls, "_planned", plan)
    lib_subquad.forget()
    return watched


def call(settings=Settings(), shape=(1, 2, 512, 8), **more):
    plans = []
    query, key, value = (torch.randn(shape) for _ in range(3))
    attention(query, key, value, settings=settings, report=plans.append, **more)
    return plans[0]


def test_a_step_asks_for_memory_once_and_plans_each_shape_once(watched):
    for _ in range(50):
        for tokens in (64, 256, 512):
            call(shape=(1, 2, tokens, 8))
    assert watched.asked == 1 and watched.planned == 3


def test_equal_settings_are_the_same_settings(watched):
    for _ in range(5):
        call(Settings(query_chunk=128))
    assert watched.planned == 1


def test_a_reading_grows_old(watched):
    call()
    watched.now += 0.9 * memory.GREATEST_AGE
    call()
    assert watched.asked == 1
    watched.now += 0.2 * memory.GREATEST_AGE
    call()
    assert watched.asked == watched.planned == 2


def test_a_clock_that_is_put_back_makes_no_reading_eternal(watched):
    call()
    watched.now -= 1e6
    call()
    assert watched.asked == 2


def test_less_memory_acts_when_it_is_read(watched, monkeypatch):
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], least_tile_bytes=1 << 10))
    before = call(Settings(engine=order.names()[-1]))
    watched.free = MIB // 4
    assert call(Settings(engine=order.names()[-1])) == before
    watched.now += memory.GREATEST_AGE
    assert call(Settings(engine=order.names()[-1])).workspace_bytes <= MIB // 4 * 0.7 < before.workspace_bytes


@pytest.mark.parametrize(
    "changed", [{"memory_limit": 1}, {"query_chunk": 64}, {"kv_chunk": 64}, {"engine": "last"}, {"upcast": "always"}]
)
def test_a_setting_acts_at_once(watched, changed):
    if changed.get("engine") == "last":
        changed = {"engine": order.names()[-1]}
    call()
    call(Settings(**changed))
    assert watched.planned == 2 and watched.asked == 1


@pytest.mark.parametrize("forget", [lib_subquad.forget, memory.forget])
def test_told_to_forget(watched, forget):
    call()
    forget()
    call()
    assert watched.asked == watched.planned == 2


def test_an_out_of_memory_asks_anew(watched, monkeypatch):
    call()
    engine, failed = order.engines()[-1], []
    attend = engine.attend

    def failing(*arguments):
        if not failed:
            failed.append(1)
            raise RuntimeError("out of memory")
        return attend(*arguments)

    monkeypatch.setattr(engine, "attend", failing)
    settings = Settings(engine=engine.NAME)
    assert call(settings).retries == 1 and watched.asked == 2
    assert call(settings).retries == 0 and "out-of-memory" in call(settings).reasons[-1]


def test_what_differs_is_another_call(watched):
    bools, floats = torch.ones(512, 512, dtype=torch.bool), torch.zeros(512, 512)
    for mask in (None, bools, floats, floats.half(), floats[:1], bools[None]):
        call(mask=mask)
    for dtype in (torch.float64, torch.bfloat16):
        query, key, value = (torch.randn(1, 2, 512, 8, dtype=dtype) for _ in range(3))
        attention(query, key, value)
    query.requires_grad_()
    attention(query, key, value)
    with torch.no_grad():
        attention(query, key, value)
    assert watched.planned == 9  # the last one is like one before
    call(shape=(2, 512, 8))
    assert watched.planned == 10


@pytest.mark.usefixtures("fused_kernel")
def test_as_many_threads_as_there_are(watched):
    """Each has a workspace. With gradients, whose plans hold until memory runs out or is forgotten."""
    query, key, value = (torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3))
    plans = []
    for count in (1, 3, 1):
        with torch_threads(count):
            attention(query, key, value, report=plans.append)
    assert plans[0] == plans[2] and plans[0].workspace_bytes < plans[1].workspace_bytes


def test_a_kernel_that_is_switched_off(watched, monkeypatch):
    call()
    monkeypatch.setattr(devices, "_SWITCHES", [lambda: False])
    call()
    assert watched.planned == 2


def test_it_is_bounded(watched, monkeypatch):
    monkeypatch.setattr(calls, "MOST_KNOWN", 10)
    for tokens in range(1, 100):
        call(shape=(1, 1, tokens, 4))
        assert len(calls._known) <= 10


@pytest.mark.parametrize("wrong", [{"key": "no tensor"}, {"mask": [1, 2]}, {"settings": {"query_chunk": 5}}])
def test_what_makes_no_attention_is_said_each_time(watched, wrong):
    query = torch.randn(1, 2, 16, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match="key is a str|mask is a list|settings is"):
            attention(**{"query": query, "key": query, "value": query, **wrong})


def test_a_result_written_over_its_own_call(watched):
    """The plan is remembered and no tensor is: the next call of the same sizes computes anew."""
    query, key, value = (torch.randn(1, 2, 64, 8) for _ in range(3))
    first = attention(query, key, value).clone()
    second = attention(query * 2, key, value)
    assert not torch.equal(first, second) and torch.equal(first, attention(query, key, value))


def test_threads_that_change_settings_and_forget():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 96, 8) for _ in range(3))
    right = ((query @ key.mT * 8**-0.5).softmax(-1) @ value).detach()
    wrong, choices = [], [Settings(), Settings(query_chunk=32), Settings(kv_chunk=32), Settings(memory_limit=1)]

    def work(number):
        for turn in range(200):
            output = attention(query, key, value, settings=choices[(turn + number) % len(choices)])
            if not torch.allclose(output, right, atol=1e-5):
                wrong.append(turn)
            if turn % 17 == number:
                lib_subquad.forget()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
