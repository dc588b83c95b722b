"""On DirectML: no fused kernel, no float64, and no operator that leaves the device."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import Settings, attention
from lib_subquad import device as devices
from lib_subquad.lab import meter
from tests import stand_in
from tests.stand_ins.calls import drawn, what_is_wrong

CALLS = 200
BROUGHT_HERE = {"_to_copy", "_local_scalar_dense", "is_nonzero"}  # for each the device would be waited for


@pytest.fixture
def directml():
    return stand_in.device(stand_in.DIRECTML)


def test_it_is_what_directml_is(directml):
    assert directml.type == "privateuseone" and devices.kind(directml) == "directml"
    with pytest.raises(RuntimeError, match="float64|Float64"):
        torch.ones(3).to(directml).double()
    with stand_in.watched() as operators:
        F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 16, 8).to(directml))
    assert "_safe_softmax" in operators  # PyTorch keeps all scores


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "settings", [Settings(), Settings(query_chunk=16, kv_chunk=20), Settings(engine="fused")], ids=str
)
def test_a_call_stays_on_the_device(directml, settings, grad):
    tensors, plans = [it.to(directml).requires_grad_(grad) for it in torch.randn(3, 1, 2, 64, 8)], []
    with stand_in.watched() as operators:
        output = attention(*tensors, settings=settings, report=plans.append)
        if grad:
            output.sum().backward()
    assert output.device == directml and plans[0].engine == "portable"
    assert "bmm" in operators or "baddbmm" in operators
    assert not BROUGHT_HERE & set(operators)
    assert not [name for name in operators if "scaled_dot_product" in name]


def test_a_measurement_waits_for_what_was_asked_of_the_device(directml):
    """It has no function for that; a number that is fetched comes after all that was asked before."""
    with stand_in.watched() as operators:
        meter.measure(lambda: torch.ones(2, device=directml) + 1, directml)
    assert "_to_copy" in operators[operators.index("add") :]


def test_random_calls(directml, reference):
    chance = random.Random(16)
    found = {str(call): what_is_wrong(call, reference) for call in (drawn(chance) for _ in range(CALLS))}
    wrong = [f"{call}: {words}" for call, words in found.items() if words]
    assert not wrong, f"{len(wrong)} of {CALLS} calls are wrong, such as {wrong[0]}"
