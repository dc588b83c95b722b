"""The entry among the host's optimizers: listed once, applied, undone, reloaded."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch


@pytest.fixture
def classes(host):
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.model import AttnBlock

    return CrossAttention, AttnBlock


def forwards(classes) -> list:
    return [cls.forward for cls in classes]


def is_ours(forward) -> bool:
    return forward.__module__.startswith("lib_subquad")


def test_it_is_listed_once_and_as_released(subquad):
    assert subquad.hijack.optimizers.count(subquad.entry) == 1
    assert subquad.entry.title() == "subquad - fast attention within a memory limit"
    assert subquad.entry.cmd_opt == "opt_sub_quad_attention"
    assert subquad.entry.is_available()


def test_without_a_model_the_web_ui_takes_no_selection(subquad):
    """So that is not the first thing to do."""
    from modules import sd_models

    from lib_subquad.webui.laboratory import LABORATORY

    subquad.select("sdp")
    for model, begins in ((None, "Load a checkpoint, then select “subquad"), (torch.nn.Identity(), "Select “subquad")):
        sd_models.model_data.set_sd_model(model)
        assert f"the web UI uses sdp - scaled dot product. {begins}" in LABORATORY.status()


@pytest.mark.parametrize("builtin", [10, 1000, None])
def test_automatic_takes_it_wherever_it_would_have_taken_the_builtin(subquad, monkeypatch, builtin):
    from modules import sd_hijack_optimizations, shared

    if builtin is not None:
        other = type("BuiltIn", (sd_hijack_optimizations.SdOptimization,), {"name": "sub-quadratic"})
        other.priority, other.cmd_opt = builtin, "opt_sub_quad_attention"
        monkeypatch.setattr(sd_hijack_optimizations, "SdOptimizationSubQuad", other, raising=False)
        monkeypatch.setattr(subquad.hijack, "optimizers", [*subquad.hijack.optimizers, other()])
        subquad.hijack.optimizers.sort(key=lambda entry: entry.priority, reverse=True)
    assert subquad.entry.priority == (builtin or 10) + 1
    monkeypatch.setattr(shared.cmd_opts, "opt_sub_quad_attention", True)
    subquad.hijack.apply_optimizations("Automatic")
    assert subquad.hijack.current_optimizer is subquad.entry


def test_a_builtin_that_raises_does_not_stop_the_start(subquad, monkeypatch):
    from modules import sd_hijack_optimizations

    monkeypatch.setattr(sd_hijack_optimizations, "SdOptimizationSubQuad", lambda: 1 / 0, raising=False)
    assert subquad.entry.priority == 11


def test_apply_and_undo_in_any_order(subquad, classes):
    own = forwards(classes)
    steps = {
        "apply": subquad.entry.apply,
        "undo": subquad.entry.undo,
        "reset": subquad.hijack.undo_optimizations,  # the host's, before it calls our undo or instead
    }
    for sequence in itertools.product(steps, repeat=4):
        for step in sequence:
            steps[step]()
            assert [is_ours(forward) for forward in forwards(classes)] == [step == "apply"] * 2, sequence
        subquad.entry.undo()
        assert forwards(classes) == own, sequence
        assert not subquad.entry.active, sequence


def test_other_entries_take_over_and_give_back(subquad, classes):
    own = forwards(classes)
    for name in ("subquad", "sdp", "subquad", "None"):
        subquad.select(name)
        assert [is_ours(forward) for forward in forwards(classes)] == [name == "subquad"] * 2
        assert subquad.entry.active == (name == "subquad")
    assert forwards(classes) == own


def test_reload_ui(subquad, host, classes):
    from modules import script_callbacks, shared

    shared.opts.data["cross_attention_optimization"] = subquad.entry.title()
    own = forwards(classes)
    subquad.select("subquad")
    for _ in range(2):
        script_callbacks.script_unloaded_callback()
        assert forwards(classes) == own
        assert subquad.hijack.current_optimizer is None
        host.reload_extension()
        assert subquad.hijack.current_optimizer is subquad.entry and all(map(is_ours, forwards(classes)))
        assert subquad.hijack.optimizers.count(subquad.entry) == 1
        assert len(script_callbacks.callback_map["callbacks_ui_tabs"]) == 1


def test_unloading_leaves_another_entry_in_force(subquad):
    subquad.select("sdp")
    in_force = subquad.hijack.current_optimizer
    from modules import script_callbacks

    script_callbacks.script_unloaded_callback()
    assert subquad.hijack.current_optimizer is in_force


def test_reloading_script_bodies_registers_nothing_twice(subquad, classes):
    from modules import script_callbacks, script_loading, scripts

    subquad.select("subquad")
    before = {name: len(registered) for name, registered in script_callbacks.callback_map.items()}
    (path,) = {data.path for data in scripts.scripts_data}
    for _ in range(2):
        script_loading.load_module(path)  # without unloading it first
    assert {name: len(registered) for name, registered in script_callbacks.callback_map.items()} == before
    assert script_callbacks.list_optimizers_callback().count(subquad.entry) == 1
    script_callbacks.script_unloaded_callback()
    assert not any(map(is_ours, forwards(classes)))


def test_disabling_the_extension(subquad, host, classes, tmp_path, monkeypatch):
    from modules import scripts, shared

    shared.opts.data["cross_attention_optimization"] = subquad.entry.title()
    subquad.select("subquad")
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(scripts, "extension_path", str(tmp_path))
    host.reload_extension()
    assert [entry.name for entry in subquad.hijack.optimizers] == ["sdp"]
    assert not any(map(is_ours, forwards(classes)))
    assert subquad.hijack.current_optimizer.name == "sdp"


def test_without_sgm(subquad, monkeypatch, classes):
    monkeypatch.setitem(sys.modules, "sgm", None)  # importing it raises
    entry = type(subquad.entry)()
    entry.apply()
    assert all(map(is_ours, forwards(classes)))
    entry.undo()


def test_sgms_classes_are_hooked_and_given_back(fake_sgm, subquad):
    from modules.hypernetworks import hypernetwork

    classes = (fake_sgm.CrossAttention, fake_sgm.AttnBlock)
    own = forwards(classes)
    subquad.entry.apply()
    layer, block = fake_sgm.CrossAttention(32, heads=4, dim_head=8), fake_sgm.AttnBlock(32)
    x, tokens = torch.randn(4, 9, 32), torch.randn(4, 3, 32)
    hypernetwork_forward = hypernetwork.attention_CrossAttention_forward
    expected = hypernetwork_forward(layer, torch.cat([tokens, x], 1))[:, 3:]
    torch.testing.assert_close(layer(x, additional_tokens=tokens), expected)
    frames = hypernetwork_forward(layer, x, x[[0, 0, 2, 2]])
    torch.testing.assert_close(layer(x, n_times_crossframe_attn_in_self=2), frames)
    torch.testing.assert_close(layer(x, None, None, tokens, 0, unknown=1), expected)
    assert block(torch.randn(1, 32, 3, 3), unknown=1).shape == (1, 32, 3, 3)
    captured = layer.forward
    fake_sgm.CrossAttention.forward = hypernetwork_forward  # how the web UI undoes it
    subquad.entry.undo()
    assert forwards(classes) == [hypernetwork_forward, own[1]]
    torch.testing.assert_close(captured(x), hypernetwork_forward(layer, x))
