"""What a look at a call takes on the device: memory is short there."""

from __future__ import annotations

import pytest
import torch

from lib_subquad import attention, trust
from tests import stand_in

SHAPE = (2, 4, 4096, 40)
HEAD_BYTES = 4096 * 40 * 4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)], ids=str)
def test_no_head_is_put_together_there(order, monkeypatch):
    """Wherever its numbers lie: with heads between its rows, as layers have them, or with rows between its channels."""
    device, sizes, check = stand_in.device("right"), [], trust.check

    def weighed(*call):
        with stand_in.weighed() as made:
            check(*call)
        sizes.append(made)

    monkeypatch.setattr(trust, "check", weighed)
    laid = torch.randn(3, *(SHAPE[dim] for dim in order)).to(device)
    query, key, value = (it.permute([order.index(dim) for dim in range(4)]) for it in laid)
    plans = []
    attention(query, key, value, report=plans.append)
    assert plans[0].engine == "fused" and len(sizes) == 1 and sizes[0]
    assert max(sizes[0]) <= HEAD_BYTES / 2


def test_what_is_made_there_is_weighed():
    """As PyTorch makes it: a copy of what does not lie together is one there as well."""
    there = torch.randn(8, 4, 2).to(stand_in.device("right"))
    with stand_in.weighed() as made:
        there[:, 1:]
        there.to("cpu")
        assert made == []
        there + 1
        there[:, 1].to("cpu")
    assert made == [256, 64]
