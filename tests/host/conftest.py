"""The extension, loaded by the demo host as the web UI loads it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.unmeasured import nothing_is_measured as nothing_is_measured


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def subquad(host):
    """The loaded extension: its modules, its entry, and `select(name)` as the settings page selects an entry."""
    host.load_extension()
    from modules import sd_hijack, shared

    from lib_subquad.webui import infotext, options, status
    from lib_subquad.webui.hosts import a1111

    return SimpleNamespace(
        entry=a1111.ENTRY,
        infotext=infotext,
        options=options,
        status=status,
        hijack=sd_hijack,
        opts=shared.opts,
        select=lambda name: sd_hijack.apply_optimizations(host.title_of(name)),
    )


@pytest.fixture
def loaded(host, subquad):
    """The same with a model in place."""
    from modules import sd_models

    sd_models.model_data.set_sd_model(copy.deepcopy(_model()))
    return subquad


@functools.cache
def _model():
    """To be copied: that takes a third of the time of making another."""
    from demo.model import random_model

    with contextlib.redirect_stdout(io.StringIO()):  # ldm's layers announce themselves
        return random_model()


@pytest.fixture
def fake_sgm(host, monkeypatch):
    """A stand-in for Stability's `sgm`: its two classes, whose forwards are their own."""
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.model import AttnBlock

    class SgmCrossAttention(CrossAttention):
        def forward(self, x, context=None, mask=None, additional_tokens=None, n_times_crossframe_attn_in_self=0):
            raise AssertionError("sgm's own forward")

    class SgmAttnBlock(AttnBlock):
        def forward(self, x, **kwargs):
            raise AssertionError("sgm's own forward")

    modules = {name: ModuleType(name) for name in ("sgm", "sgm.modules", "sgm.modules.attention",
                                                   "sgm.modules.diffusionmodules",
                                                   "sgm.modules.diffusionmodules.model")}  # fmt: skip
    modules["sgm.modules.attention"].CrossAttention = SgmCrossAttention
    modules["sgm.modules.diffusionmodules.model"].AttnBlock = SgmAttnBlock
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(CrossAttention=SgmCrossAttention, AttnBlock=SgmAttnBlock)
