"""A VAE's half goes its own way where that fits, in bands where it does not, and to the processor at last."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_subquad import Settings, retry
from lib_subquad.vae import Interrupted, as_it_fits, bands, fallbacks, halves
from tests import stand_in
from tests.vae.making import CRAMPED, OUT_OF_MEMORY, ROOMY, Fails, as_good, given, half

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("name", ["decoder", "encoder"])


@pytest.fixture(autouse=True)
def low_bands(monkeypatch):
    """So that small pictures have several; and what is said once is said in each test."""
    monkeypatch.setattr(bands, "LEAST_ROWS", 3)
    retry.forget()


class Own:
    """A half's own forward, and how often it was taken."""

    def __init__(self, half_: nn.Module) -> None:
        self.half, self.calls = half_, 0

    def __call__(self, x):
        self.calls += 1
        return type(self.half).forward(self.half, x)


def computed(half_, x, plans=None, **how):
    own = Own(half_)
    return as_it_fits(half_, x, own, report=None if plans is None else plans.append, **how), own.calls


def late_operator(half_, x) -> int:
    """The number of one near the end of its own way."""
    with Fails() as counted:
        computed(half_, x, free_bytes=ROOMY)
    return counted.count - 3


@both
@pytest.mark.parametrize(
    ("vae_bands", "free", "own"),
    [
        ("when needed", ROOMY, 1),
        ("when needed", CRAMPED, 0),
        ("always", ROOMY, 0),
        ("always", CRAMPED, 0),
        ("never", ROOMY, 1),
        ("never", CRAMPED, 1),
    ],
)
def test_which_way_is_taken(name, vae_bands, free, own):
    made, x, plans = half(name), given(name), []
    found, calls = computed(made, x, plans, settings=Settings(vae_bands=vae_bands), free_bytes=free)
    as_good(made, x, found)
    assert calls == own and len(plans) == 1 - own


def test_the_estimate_is_of_the_whole_batch_and_within_the_limit():
    made, x, plans = half("decoder"), given("decoder", batch=4), []
    one = bands.usual_bytes(halves.parts.steps_of(made), *x.shape[2:], x.dtype)
    settings = Settings(memory_limit=50)
    assert computed(made, x, settings=settings, free_bytes=8 * one)[1] == 1
    found, calls = computed(made, x, plans, settings=settings, free_bytes=8 * one - 2)
    as_good(made, x, found)
    assert calls == 0 and len(plans) == 1


def test_what_is_not_known_goes_its_own_way():
    made, x = half("decoder"), given("decoder")

    class Another(type(made)):
        def forward(self, z):
            return super().forward(z) + 1

    made.__class__ = Another
    found, calls = computed(made, x, settings=Settings(vae_bands="always"), free_bytes=CRAMPED)
    assert calls == 1 and torch.equal(found, made(x))


@both
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_out_of_memory_at_any_operator_costs_no_picture(name, after):
    """Of the half's own way: bands follow it."""
    made, x = half(name, ch_mult=(1, 2)), given(name, 10, 1) if name == "decoder" else given(name, 4, 0)
    expected, plans = made(x), []
    with Fails() as counted:
        assert computed(made, x, free_bytes=ROOMY)[1] == 1
    assert counted.count > 60
    for number in range(1, counted.count + 1):
        with Fails({number}, after):
            found, calls = computed(made, x, plans, free_bytes=ROOMY)
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4), number
    assert len(plans) > 50


@both
def test_one_that_lasts_is_the_devices_own_error(name):
    made, x = half(name), given(name)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised, Fails(range(100, 10**9)):
        computed(made, x, free_bytes=ROOMY)
    assert halves.SMALLEST in str(raised.value)


def test_without_retrying_the_first_one_is_the_users():
    made, x = half("decoder"), given("decoder")
    with pytest.raises(RuntimeError) as raised, Fails({late_operator(made, x)}):
        computed(made, x, settings=Settings(retry=False), free_bytes=ROOMY)
    assert str(raised.value) == OUT_OF_MEMORY


def test_an_interrupt_is_no_failure():
    with pytest.raises(Interrupted):
        computed(half("decoder"), given("decoder"), free_bytes=CRAMPED, interrupted=lambda: True)


def test_it_is_said_once(caplog):
    made, x = half("decoder"), given("decoder")
    late = late_operator(made, x)
    for _ in range(2):
        with Fails({late}):
            computed(made, x, free_bytes=ROOMY)
    assert [it.message for it in caplog.records] == ["[subquad] out of memory in the VAE: going on in bands"]


# ------------------------------------------------------------------------------------------------------------ on a card


class NoRoom(TorchDispatchMode):
    """No convolution of the device finds memory; those of the processor do, while `but` of them are left."""

    def __init__(self, but: int = 10**9) -> None:
        super().__init__()
        self.left = but

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.left -= args[0].device.type == "cpu"
            if args[0].device.type != "cpu" or self.left < 0:
                raise RuntimeError(OUT_OF_MEMORY)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def card():
    if reason := stand_in.why_not():
        pytest.skip(reason)
    return stand_in.device(stand_in.DIRECTML)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_goes_on_for_a_card(card, caplog, name, dtype):
    made, x, plans, shares = half(name), given(name), [], []
    there = half(name).to(card, dtype)
    before = {key: id(it) for key, it in there.named_parameters()}
    with NoRoom():
        found, calls = computed(there, x.to(card, dtype), plans, free_bytes=ROOMY, progress=shares.append)
    assert calls == 1 and found.device == card and found.dtype == dtype
    made = made.to(dtype).float()
    x = x.to(dtype).float()
    assert torch.allclose(found.to("cpu").float(), made(x), atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0.01)
    assert fallbacks.ON_PROCESSOR in plans[-1].reasons and shares[-1] == pytest.approx(1)
    assert {key: id(it) for key, it in there.named_parameters()} == before
    assert there.conv_in.weight.device == card and there.conv_in.weight.dtype == dtype
    assert caplog.records[-1].message == f"[subquad] out of memory in the VAE: going on {fallbacks.ON_PROCESSOR}"


def test_the_processor_can_be_left_out(card):
    there = half("decoder").to(card)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised, NoRoom():
        computed(there, given("decoder").to(card), free_bytes=ROOMY, processor=False)
    assert halves.SMALLEST in str(raised.value)


def test_where_that_has_no_memory_either_all_is_as_it_was(card):
    there = half("decoder").to(card)
    with pytest.raises(RuntimeError, match="can't allocate memory"), NoRoom(but=20):
        computed(there, given("decoder").to(card), free_bytes=ROOMY)
    assert there.conv_in.weight.device == card


def test_how_long_it_takes_is_said_as_soon_as_that_can_be_told(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(fallbacks.time, "monotonic", lambda: now[0])
    passed = []
    told = fallbacks._Estimate(passed.append)
    for seconds, share in ((1, 0.01), (2, 0.04), (4, 0.1), (20, 0.5)):
        now[0] = 100.0 + seconds
        told(share)
    assert passed == [0.01, 0.04, 0.1, 0.5]
    assert capsys.readouterr().out == "[subquad] the VAE on the processor: about 36 seconds more\n"
