"""A card's fused kernels are right, slow, wrong or unwilling, as their names say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import attention
from lib_subquad import device as devices
from tests import stand_in
from tests.devices import on_device
from tests.stand_ins.calls import ALLOWED, PLAIN, SPOILED, Drawn

UNWILLING = {
    "refuses": stand_in.REFUSAL,
    "refuses every second": stand_in.REFUSAL,
    "out of memory once": stand_in.OUT_OF_MEMORY,
}


def is_right(call: Drawn, reference) -> bool:
    """Whether PyTorch's own function is, with nothing of ours between."""
    tensors, _ = call.tensors()
    found = on_device(F.scaled_dot_product_attention)(*tensors).double()
    return (found - reference(*tensors)).abs().max().item() <= ALLOWED[call.dtype]


@pytest.mark.parametrize("kernel", stand_in.KERNELS)
def test_a_kernel_does_what_its_name_says(kernel, reference):
    stand_in.device(kernel)
    if kernel in UNWILLING:
        with pytest.raises(RuntimeError, match=UNWILLING[kernel]):
            for _ in range(2):
                is_right(PLAIN, reference)
        return
    assert is_right(PLAIN, reference) == (SPOILED.get(kernel) != PLAIN)
    if kernel in SPOILED:
        assert not is_right(SPOILED[kernel], reference)


def test_the_slow_one_is_slow():
    """By the work that it does, not by the clock, which other programs move."""
    products = []
    for kernel in ("right", "slow"):
        there = torch.randn(3, 1, 2, 64, 8).to(stand_in.device(kernel))
        with torch.autograd.profiler.profile() as profile:
            F.scaled_dot_product_attention(*there)
        products.append(sum(event.name == "aten::bmm" for event in profile.function_events))
    assert products[1] >= 4 * products[0] > 0


def test_it_is_an_accelerator_with_a_fused_kernel():
    device, plans = stand_in.device("right"), []
    with stand_in.watched() as operators:
        output = attention(*torch.randn(3, 1, 2, 64, 8).to(device), report=plans.append)
    assert output.device == device and devices.kind(device) == "other" and plans[0].engine == "fused"
    assert "_scaled_dot_product_fused_attention_overrideable" in operators
    assert "bmm" not in operators
