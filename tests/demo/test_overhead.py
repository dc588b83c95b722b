"""python -m demo.overhead: a layer in the host beside the same layer with PyTorch's function written in."""

import torch

from demo import overhead
from lib_subquad.lab.bench.overhead import measured


def test_a_layer_in_the_host_is_served_and_computes_what_pytorch_does(host):
    cases = overhead.cases()
    from lib_subquad.webui import status  # of the host that has just been started

    with torch.no_grad():
        (pairs,) = (case("cpu") for case in cases.values())
        theirs, ours = next(pairs)
        status.begin()
        torch.testing.assert_close(ours(), theirs())
    assert status.generation().calls == 1
    (found,) = measured(rounds=1, calls=2, cases=cases)
    assert found.what in cases and found.theirs > 0
