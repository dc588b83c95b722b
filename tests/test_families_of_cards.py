"""Every family of cards in what PyTorch would answer there: never an engine that keeps all scores while another exact
one would not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import lib_subquad
from lib_subquad import Settings
from lib_subquad import device as devices
from lib_subquad.checkpoint import AttentionLayer, Checkpoint
from lib_subquad.engines import cudnn, fused, order, padded
from lib_subquad.engines.table import Table
from lib_subquad.lab.explain.question import Question

MATH, FLASH, EFFICIENT, CUDNN, OTHER = range(5)
HALF, FULL = torch.float16, torch.float32


@dataclass(frozen=True)
class Family:
    """A kind of device, what PyTorch takes there by (dtype, width, whether values are as wide), and what *automatic*
    should take for SD 1.5 (heads 40, 80 and 160 wide), SDXL (64), SD 2 and a VAE (512): by width."""

    kind: str
    kernels: object
    expected: dict[tuple[torch.dtype, int], str] = field(default_factory=dict)
    otherwise: str = "fused"
    torch: str = "2.13.0"
    takes_scale: bool = True
    masks_are_right: bool = True


def efficient(dtype, width, same):
    return EFFICIENT if width % (8 if dtype == HALF else 4) == 0 else MATH


def flash(dtype, width, same):
    return FLASH if dtype == HALF and same and width <= 256 else efficient(dtype, width, same)


def aotriton(dtype, width, same):
    """Flash as on CUDA; the other one takes equal widths up to 256 that are multiples of 8."""
    return FLASH if dtype == HALF and same and width <= 256 else EFFICIENT if same and width <= 256 else MATH


def math(dtype, width, same):
    return MATH


def xpu(dtype, width, same):
    return OTHER if same and width <= 256 else MATH


def cpu(dtype, width, same):
    return FLASH if same else MATH


def all_but(engine, *widths):
    return {(dtype, width): engine for width in widths for dtype in (HALF, FULL)}


FAMILIES = {
    "GTX 10, GTX 16, RTX 20": Family("cuda", efficient, torch="2.1.2", masks_are_right=False),
    "RTX 30 to 50, Linux": Family("cuda", flash),
    "RTX, Windows": Family("cuda", efficient),
    "RDNA 3 and 4": Family("rocm", aotriton, all_but("portable", 512)),
    "RDNA 3 and 4 without AOTriton's variable": Family("rocm", math, otherwise="portable"),
    "RDNA 2": Family("rocm", math, otherwise="portable"),
    "ZLUDA": Family("zluda", math, otherwise="portable"),
    "Arc": Family("xpu", xpu, all_but("portable", 512)),
    "DirectML": Family("directml", cpu, otherwise="portable"),
    "Apple Silicon, torch 2.12": Family("mps", math, otherwise="portable", torch="2.12.1"),
    # That of 2.13 is not known to the operator that tells of kernels.
    "Apple Silicon, torch 2.13": Family(
        "mps", math, all_but("padded", 40, 160) | all_but("portable", 512), torch="2.13.0"
    ),
    "CPU, torch 2.0": Family("cpu", cpu, otherwise="portable", torch="2.0.1", takes_scale=False),
    "CPU, torch 2.1.2": Family("cpu", cpu, torch="2.1.2", masks_are_right=False),
    "CPU": Family("cpu", cpu),
}


@pytest.fixture
def play(monkeypatch):
    """play(family): PyTorch answers as it would there."""

    def choice(family, query, key, value, mask=None, *more, **named):
        return family.kernels(query.dtype, query.shape[-1], query.shape[-1] == value.shape[-1])

    def become(family):
        monkeypatch.setattr(devices, "kind", lambda device: family.kind)
        monkeypatch.setattr(torch, "__version__", family.torch)
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **named: choice(family, *given, **named))
        monkeypatch.setattr(fused, "TAKES_SCALE", family.takes_scale)
        monkeypatch.setattr(fused, "MASKS_ARE_RIGHT", family.masks_are_right)
        order.go_by(Table())
        forget()

    def forget():
        for remembered in (fused._kernel_reasons, padded._widened, cudnn._kernel_reasons):
            remembered.cache_clear()
        lib_subquad.forget()

    yield become
    forget()


def layer(part, heads, width, value_width=None, kind="self", scale=8):
    return AttentionLayer(f"{part} {width}", part, kind, heads, width, scale, None, None)


def model():
    unet = [layer("unet", 8, 40), layer("unet", 8, 80, scale=16), layer("unet", 8, 160, scale=32)]
    return Checkpoint("all of them", (*unet, layer("unet", 10, 64), layer("vae", 1, 512)), ())


def keeps_all_scores(row, family):
    """PyTorch's kernel at the width that it is given."""
    problem = row.problem
    if row.plan.engine == order.names()[-1]:
        return False
    width = padded._wide(problem).width if row.plan.engine == "padded" else problem.width
    if family.kind == "mps" and family.torch >= "2.13":
        return width not in (32, 64, 72, 80, 96, 128, 256)
    return family.kernels(problem.dtype, width, True) == MATH


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("trusted")
def test_explain_shows_no_engine_that_keeps_all_scores(play, name, size, dtype):
    family = FAMILIES[name]
    play(family)
    question = Question(model(), size, size, 1, dtype, torch.device("cpu"), Settings(), free_bytes=8 << 30)
    rows = question.rows()
    assert {row.problem.width for row in rows} == {40, 80, 160, 64, 512}
    for row in rows:
        assert not keeps_all_scores(row, family), (row.problem, str(row.plan))
        expected = family.expected.get((dtype, row.problem.width), family.otherwise)
        assert row.plan.engine == expected, (row.problem, str(row.plan))
        assert len(set(row.plan.reasons)) == len(row.plan.reasons) <= 2, row.plan.reasons


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize(
    "name, width, value_width, engine",
    [
        ("RTX 30 to 50, Linux", 41, 41, {HALF: "fused", FULL: "padded"}),
        ("RTX, Windows", 41, 41, {HALF: "padded", FULL: "padded"}),
        ("RDNA 3 and 4", 64, 40, {HALF: "padded", FULL: "padded"}),
        ("RDNA 2", 64, 40, {HALF: "portable", FULL: "portable"}),
        ("Arc", 64, 40, {HALF: "padded", FULL: "padded"}),
        ("Apple Silicon, torch 2.13", 64, 40, {HALF: "padded", FULL: "padded"}),
        ("DirectML", 64, 40, {HALF: "portable", FULL: "portable"}),
        ("CPU", 64, 40, {HALF: "portable", FULL: "portable"}),
    ],
)
@pytest.mark.usefixtures("trusted")
def test_heads_of_unusual_widths(play, name, width, value_width, engine, dtype):
    play(FAMILIES[name])
    shapes = (1, 8, 1024, width), (1, 8, 1024, width), (1, 8, 1024, value_width)
    assert lib_subquad.plan(*shapes, dtype, "cpu", free_bytes=8 << 30).engine == engine[dtype]


@pytest.mark.usefixtures("trusted")
def test_it_would_be_seen(play, monkeypatch):
    """With Apple's rule dropped, what is planned for SD 1.5 keeps all scores."""
    play(FAMILIES["Apple Silicon, torch 2.13"])
    monkeypatch.setattr(fused, "_by_rule", lambda problem, widths: [])
    question = Question(model(), 512, 512, 1, HALF, torch.device("cpu"), Settings(), free_bytes=8 << 30)
    family = FAMILIES["Apple Silicon, torch 2.13"]
    assert {row.problem.width for row in question.rows() if keeps_all_scores(row, family)} == {40, 160, 512}
