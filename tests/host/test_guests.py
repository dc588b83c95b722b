"""Beside other extensions that capture, wrap or replace a forward: never a dead layer, never one wrapped twice."""

from __future__ import annotations

import itertools
from types import MethodType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

SELECTIONS = ("subquad", "sdp", "None")
close = torch.testing.assert_close


class Patient:
    """A layer, an input, and what the layer makes of it by itself."""

    def __init__(self, layer, *inputs):
        self.layer, self.inputs = layer.eval().requires_grad_(False), inputs
        self.plain = layer(*inputs)

    def factor(self, forward=None) -> int:
        """How many times a guest that doubles has had its way."""
        output = (forward or self.layer)(*self.inputs)
        change = output - self.inputs[0] if self.layer_is_residual else output
        plain = self.plain - self.inputs[0] if self.layer_is_residual else self.plain
        factor = round((change.flatten() @ plain.flatten() / plain.square().sum()).item())
        close(change, factor * plain, atol=1e-5, rtol=1e-4)
        return factor

    @property
    def layer_is_residual(self) -> bool:
        return type(self.layer).__name__ == "AttnBlock"


@pytest.fixture
def cross(host):
    from ldm.modules.attention import CrossAttention

    return Patient(CrossAttention(32, 24, heads=4, dim_head=8), torch.randn(2, 9, 32), torch.randn(2, 12, 24))


@pytest.fixture
def vae(host):
    from ldm.modules.diffusionmodules.model import AttnBlock

    return Patient(AttnBlock(32), torch.randn(1, 32, 3, 5))


@pytest.fixture
def block(host):
    from ldm.modules.attention import BasicTransformerBlock

    inner = BasicTransformerBlock(32, 4, 8, context_dim=24, checkpoint=False)
    return Patient(inner, torch.randn(2, 16, 32), torch.randn(2, 12, 24))


class Wrapper:
    """A guest that wraps the forward of a class, and takes itself off by putting back what it found."""

    def __init__(self, cls):
        self.cls, self.found, self.mine = cls, None, None

    def toggle(self):
        if self.mine is not None:
            self.cls.forward, self.mine = self.found, None
            return
        found = self.found = self.cls.forward

        def doubled(layer, x, *args, **kwargs):
            output = found(layer, x, *args, **kwargs)
            return output * 2 if output.dim() == 3 else x + (output - x) * 2

        self.mine = self.cls.forward = doubled


@pytest.mark.parametrize("kind", ["cross", "vae", "vae switched off"])
@settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(st.sampled_from([*SELECTIONS, "guest", "apply", "undo"]), max_size=8))
def test_a_wrapped_class(subquad, cross, vae, kind, steps):
    patient = cross if kind == "cross" else vae
    subquad.opts.data["subquad_vae"] = kind == "vae"
    guest, captured = Wrapper(type(patient.layer)), [patient.layer.forward]
    try:
        for step in steps:
            if step == "guest":
                guest.toggle()
            elif step in SELECTIONS:
                subquad.select(step)
            else:
                getattr(subquad.entry, step)()
            captured.append(patient.layer.forward)
            wrapped = guest.mine is not None and type(patient.layer).forward is guest.mine
            if wrapped or set(steps).isdisjoint(("apply", "undo")):
                assert patient.factor() == (2 if wrapped else 1)
            for forward in captured:
                assert patient.factor(forward) in (1, 2)
    finally:
        subquad.select("None")


def test_switched_off_for_the_vae_it_leaves_a_wrapper_that_stood_there_in_force(subquad, vae):
    subquad.opts.data["subquad_vae"] = False
    guest = Wrapper(type(vae.layer))
    guest.toggle()
    subquad.entry.apply()
    assert vae.factor() == 2
    subquad.opts.data["subquad_vae"] = True
    assert vae.factor() == 1
    subquad.entry.undo()
    assert vae.factor() == 2
    guest.toggle()
    assert vae.factor() == 1


def test_hypertile_captures_every_bound_forward_once(subquad, cross):
    captured = {}
    for name in SELECTIONS:
        subquad.select(name)
        captured[name] = lambda *args, original=cross.layer.forward: original(*args) * 2
    for name in itertools.chain(SELECTIONS, reversed(SELECTIONS)):
        subquad.select(name)
        before = subquad.status.generation().calls
        assert cross.factor(captured["subquad"]) == 2
        assert (subquad.status.generation().calls > before) == (name == "subquad")
        assert {cross.factor(forward) for forward in captured.values()} == {2}


def test_a_captured_forward_goes_on_to_the_entry_now_in_force(subquad, cross):
    subquad.select("subquad")
    captured, seen = cross.layer.forward, []
    subquad.select("None")
    type(cross.layer).forward = lambda layer, *args: seen.append(layer) or args[0]
    captured(*cross.inputs)
    assert seen == [cross.layer]


@pytest.mark.parametrize("first", [*SELECTIONS])
def test_ip_adapter_adds_to_a_captured_forward(subquad, cross, first):
    """It keeps the bound method, calls it with text alone and adds attention over image tokens."""
    subquad.select(first)
    original = cross.layer.forward
    cross.layer.forward = MethodType(lambda _, x, context: original(x, context[:, :8]) + x * 0.5, cross.layer)
    x, context = cross.inputs
    expected = Patient(type(cross.layer)(32, 24, heads=4, dim_head=8), x, context)
    expected.layer.load_state_dict(cross.layer.state_dict())
    subquad.select("None")
    expected = expected.layer(x, context[:, :8]) + x * 0.5
    for name in SELECTIONS:
        subquad.select(name)
        close(cross.layer(x, context), expected, atol=1e-5, rtol=1e-5)
    del cross.layer.forward
    assert cross.factor() == 1


def test_negpip_replaces_the_forward_of_instances(subquad, cross):
    """Its own attention stays its own; taken off again, the layer is ours or the host's as selected."""
    for applied, removed in itertools.product(SELECTIONS, repeat=2):
        subquad.select(applied)
        cross.layer.forward = lambda x, context=None, mask=None: torch.full_like(x, 3.0)
        close(cross.layer(*cross.inputs), torch.full((2, 9, 32), 3.0))
        subquad.select(removed)
        close(cross.layer(*cross.inputs), torch.full((2, 9, 32), 3.0))
        del cross.layer.forward
        assert cross.factor() == 1


def test_lllite_wraps_the_projections_of_instances(subquad, cross):
    def lllite(linear):
        original = linear.forward
        linear.forward = lambda x: original(x + 0.25)

    for linear in (cross.layer.to_q, cross.layer.to_k, cross.layer.to_v):
        lllite(linear)
    expected = cross.layer(*cross.inputs)
    for name in SELECTIONS:
        subquad.select(name)
        close(cross.layer(*cross.inputs), expected, atol=1e-5, rtol=1e-5)


def test_controlnet_reference_replaces_a_blocks_inner_forward(subquad, block):
    """It lets self-attention look at a remembered image as well."""
    bank = torch.randn(2, 16, 32)

    def reference(self, x, context=None):
        normed = self.norm1(x)
        x = self.attn1(normed, context=torch.cat([normed, bank], dim=1)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x

    block.layer._original = block.layer._forward
    block.layer._forward = MethodType(reference, block.layer)
    expected = block.layer(*block.inputs)
    for name in SELECTIONS:
        subquad.select(name)
        close(block.layer(*block.inputs), expected, atol=1e-5, rtol=1e-5)
    block.layer._forward = block.layer._original
    for name in SELECTIONS:
        subquad.select(name)
        close(block.layer(*block.inputs), block.plain, atol=1e-5, rtol=1e-5)


def test_tomesd_gives_a_block_another_class(subquad, block):
    """Self-attention then sees fewer tokens, here every two merged into one."""
    own_class = type(block.layer)

    class Merging(own_class):
        def _forward(self, x, context=None):
            fewer = self.norm1(x).unflatten(1, (-1, 2)).mean(2)
            merged = self.attn1(fewer)
            x = interpolate(merged.transpose(1, 2), scale_factor=2).transpose(1, 2) + x
            return self.ff(self.norm3(self.attn2(self.norm2(x), context=context) + x)) + x

    results = []
    for name in SELECTIONS:
        subquad.select(name)
        block.layer.__class__ = Merging
        results.append(block.layer(*block.inputs))
        block.layer.__class__ = own_class
        close(block.layer(*block.inputs), block.plain, atol=1e-5, rtol=1e-5)
    for result in results:
        close(result, results[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], block.plain, atol=1e-3)
