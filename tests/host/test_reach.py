"""Layers that guests leave pinned, guests that choose by name, and a host that undoes without telling us."""

from __future__ import annotations

import functools
import json
from types import MethodType, SimpleNamespace

import pytest
import torch


@pytest.fixture
def unet(loaded):
    """The U-Net's cross-attention layers, of the model in memory."""
    from ldm.modules.attention import CrossAttention
    from modules import sd_models

    model = sd_models.model_data.sd_model
    return [layer for layer in model.modules() if isinstance(layer, CrossAttention)]


@pytest.fixture
def generate(loaded):
    """Make a small image: how many cross-attention layers were ours, and the status line."""
    from demo.generate import generate

    def made():
        generate("a cat", 1, 64, 64, 1)
        return len(loaded.status.generation().served)

    return made


def pin(layer) -> None:
    """As a guest leaves a layer that puts back by assignment what it found."""
    found = layer.forward
    layer.forward = lambda *args, **kwargs: found(*args, **kwargs)
    layer.forward = found


def guest(layer, x, *args, **kwargs):
    """The forward of a guest that computes attention itself."""
    return torch.zeros_like(x)


@pytest.mark.parametrize("earlier", ["sdp", "None", "subquad"])
def test_what_is_pinned_is_taken_back_when_we_are_selected(loaded, unet, generate, earlier):
    loaded.select(earlier)
    for layer in unet:
        pin(layer)
    loaded.select("subquad")
    assert not any("forward" in vars(layer) for layer in unet)
    assert generate() == len(unet)
    assert "out of reach" not in loaded.status.summary()


def test_what_is_pinned_later_is_taken_back_before_the_next_image(loaded, unet, generate):
    from modules.sdp_attention import cross_attention_forward

    loaded.select("subquad")
    unet[0].forward = MethodType(cross_attention_forward, unet[0])
    assert generate() == len(unet)
    assert "forward" not in vars(unet[0])


def test_a_guest_that_pins_when_it_is_asked_to_process_comes_too_late(loaded, unet, generate, monkeypatch):
    from modules import scripts
    from modules.sdp_attention import cross_attention_forward

    class Guest(scripts.Script):
        def process(self, p):
            unet[0].forward = MethodType(cross_attention_forward, unet[0])

    loaded.select("subquad")
    monkeypatch.setattr(
        scripts.scripts_txt2img, "alwayson_scripts", [*scripts.scripts_txt2img.alwayson_scripts, Guest()]
    )
    assert generate() == len(unet)


def test_pins_are_left_alone_while_another_entry_is_in_force(loaded, unet, generate):
    loaded.select("sdp")
    pin(unet[0])
    assert generate() == 0 and "forward" in vars(unet[0])


@pytest.mark.parametrize(
    "make", [lambda layer: MethodType(guest, layer), lambda layer: functools.partial(guest, layer)]
)
def test_what_is_foreign_stays_and_the_status_tells_whose(loaded, unet, generate, make):
    loaded.select("subquad")
    foreign = unet[0].forward = make(unet[0])
    assert generate() == len(unet) - 1
    assert unet[0].forward is foreign
    expected = f"1 of {len(unet)} layers were out of reach: {__name__} (1) computed them."
    assert expected in loaded.status.summary()
    from lib_subquad.webui.laboratory import LABORATORY

    assert expected in LABORATORY.status()


def test_the_owner_is_named_by_its_folder(loaded, unet, generate):
    names = {"__name__": "sneaky.py"}
    for number, folder in enumerate(("/web ui/extensions/sd-fabric/scripts", r"C:\webui\extensions-builtin\hypertile")):
        exec(compile("def forward(self, x, *a, **k): return x * 0", f"{folder}/x.py", "exec"), names)
        unet[number].forward = MethodType(names["forward"], unet[number])
    loaded.select("subquad")
    assert generate() == len(unet) - 2
    assert "sd-fabric (1), hypertile (1) computed them" in loaded.status.summary()


def test_a_class_that_somebody_else_took_over(loaded, unet, generate, monkeypatch):
    from ldm.modules.attention import CrossAttention

    loaded.select("subquad")
    monkeypatch.setattr(CrossAttention, "forward", guest)
    assert generate() == 0
    assert f"{len(unet)} of {len(unet)} layers were out of reach: {__name__}" in loaded.status.summary()


def test_a_class_put_in_the_place_of_one(subquad, monkeypatch):
    """As GLIGEN does; its layers are served like the web UI's own, and given back."""
    import ldm.modules.attention

    class Gated(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            self.heads, self.scale = own.heads, own.scale
            self.to_q, self.to_k, self.to_v, self.to_out = own.to_q, own.to_k, own.to_v, own.to_out

        def forward(self, x, context=None, mask=None):
            return x * 0

    own, x = ldm.modules.attention.CrossAttention(32, heads=4, dim_head=8).eval(), torch.randn(2, 9, 32)
    plain, layer = own(x), Gated(own)
    subquad.select("sdp")
    monkeypatch.setattr(ldm.modules.attention, "CrossAttention", Gated)
    subquad.select("subquad")
    for served in (layer, own):
        torch.testing.assert_close(served(x), plain)
    subquad.select("None")
    assert not Gated.forward.__module__.startswith("lib_subquad") and not subquad.entry.active


def test_a_guest_that_wraps_us_is_no_reason_to_complain(loaded, unet, generate):
    loaded.select("subquad")
    found = unet[0].forward
    unet[0].forward = lambda *args, **kwargs: found(*args, **kwargs)
    assert generate() == len(unet)
    assert "out of reach" not in loaded.status.summary()


def test_an_interrupted_image_says_nothing_of_layers(loaded, unet):
    from modules import shared

    loaded.select("subquad")
    for interrupted in (True, False):
        shared.state.interrupted = interrupted
        p = SimpleNamespace(extra_generation_params={})
        loaded.infotext.begin(p)
        loaded.infotext.finish_batch(p)
        assert ("out of reach" in loaded.status.summary()) == (not interrupted)


def test_hypertile_keeps_a_forward_inside(loaded, unet, generate):
    """It wraps a layer once for as long as the model is loaded, and keeps what it found."""
    loaded.select("sdp")
    params = SimpleNamespace(forward=unet[0].forward)

    @functools.wraps(params.forward)
    def wrapper(*args, **kwargs):
        return params.forward(*args, **kwargs)

    setattr(unet[0], "__webui_hypertile_params", params)
    unet[0].forward = wrapper
    loaded.select("subquad")
    assert unet[0].forward is wrapper and generate() == len(unet)
    loaded.select("sdp")
    assert generate() == 0
    loaded.select("subquad")
    assert generate() == len(unet)


def test_a_model_that_the_host_keeps_for_later(loaded, unet):
    from modules import sd_models

    loaded.select("sdp")
    pin(unet[0])
    model = sd_models.model_data.sd_model
    sd_models.model_data.loaded_sd_models = [None, model, model]
    sd_models.model_data.sd_model = None
    loaded.select("subquad")
    assert "forward" not in vars(unet[0])
    assert loaded.entry.out_of_reach(set()) == (0, {})


# ------------------------------------------------------------------------------------------------------- by name


def test_to_those_who_choose_by_name_it_is_what_it_replaces(loaded):
    loaded.hijack.model_hijack.apply_optimizations(loaded.entry.title())
    for name in (loaded.hijack.model_hijack.optimization_method, loaded.hijack.current_optimizer.name):
        assert name == "sub-quadratic" and name.lower() in ("sdp", "sub-quadratic") and name in {"sub-quadratic": 1}
        assert f"{name}" == "sub-quadratic (subquad)" == str(name) and json.dumps(name) == '"sub-quadratic"'
    assert loaded.entry.title() == "subquad - fast attention within a memory limit"


@pytest.mark.parametrize("engine", ["automatic", "portable"])
def test_whoever_calls_the_built_in_function_is_served(subquad, monkeypatch, engine):
    from modules import sub_quadratic_attention

    own = sub_quadratic_attention.efficient_dot_product_attention
    query, key, value = torch.randn(2, 50, 16), torch.randn(2, 70, 16), torch.randn(2, 70, 16)
    expected = own(query, key, value)
    subquad.opts.data.update(subquad_engine=engine, subquad_query_chunk=32)
    for name in ("subquad", "sdp", "subquad", "None"):
        subquad.select(name)
        subquad.status.begin()
        found = sub_quadratic_attention.efficient_dot_product_attention(query, key, value, 1024, kv_chunk_size=8)
        torch.testing.assert_close(found, expected)
        assert subquad.status.generation().calls == (name == "subquad")
        if name == "subquad":
            assert subquad.status.generation().largest.query_chunk == 32  # the user's, not the caller's
        else:
            assert sub_quadratic_attention.efficient_dot_product_attention is own


def test_mixed_dtypes_reach_the_built_in_function(subquad):
    from modules import sub_quadratic_attention

    subquad.select("subquad")
    query, key, value = torch.randn(2, 50, 16), torch.randn(2, 70, 16), torch.randn(2, 70, 16).half()
    found = sub_quadratic_attention.efficient_dot_product_attention(query, key.double(), value)
    assert found.shape == query.shape


@pytest.mark.parametrize(
    "wrap", [functools.partial, lambda found: type("Guest", (), {"__call__": lambda _, *a: found(*a)})()]
)
def test_a_wrapper_without_code_of_its_own_ends(subquad, monkeypatch, wrap):
    from modules import sub_quadratic_attention as module

    query, key, value = torch.randn(3, 2, 50, 16)
    own = module.efficient_dot_product_attention
    subquad.select("subquad")
    monkeypatch.setattr(module, "efficient_dot_product_attention", wrap(module.efficient_dot_product_attention))
    subquad.select("None")
    torch.testing.assert_close(module.efficient_dot_product_attention(query, key, value), own(query, key, value))


def test_who_found_the_built_in_function_while_we_served_it_keeps_a_working_one(subquad):
    from modules import sub_quadratic_attention

    query, key, value = torch.randn(3, 2, 50, 16)
    subquad.select("subquad")
    found = sub_quadratic_attention.efficient_dot_product_attention
    subquad.hijack.undo_optimizations()
    subquad.status.begin()
    for select in ("sdp", None, "subquad"):
        torch.testing.assert_close(
            found(query, key, value), torch.nn.functional.scaled_dot_product_attention(query, key, value)
        )
        assert subquad.status.generation().calls == 0
        if select:
            subquad.select(select)


# ------------------------------------------------------------------------------------- undone without a word to us


@pytest.mark.parametrize("captured", [False, True])
def test_training_undoes_without_telling_us(loaded, unet, captured):
    from modules import sub_quadratic_attention

    loaded.select("subquad")
    forward = unet[0].forward
    loaded.hijack.undo_optimizations()  # as hypernetwork training does, and undo_hijack when a model is unloaded
    assert not loaded.entry.active
    loaded.status.begin()
    x = torch.randn(1, 16, unet[0].to_q.in_features)
    (forward if captured else unet[0].forward)(x)
    sub_quadratic_attention.efficient_dot_product_attention(*torch.randn(3, 1, 4, 8))
    assert loaded.status.generation().calls == 0
    assert "subquad is selected, but not active" in status_line()
    p = SimpleNamespace(extra_generation_params={})
    loaded.opts.data["subquad_query_chunk"] = 64
    loaded.infotext.begin(p)
    loaded.infotext.finish_batch(p)
    assert p.extra_generation_params == {} and "out of reach" not in loaded.status.summary()
    loaded.select("subquad")
    assert loaded.entry.active and "subquad is active" in status_line()
    unet[0].forward(x)
    assert loaded.status.generation().calls == 1


def status_line() -> str:
    from lib_subquad.webui.laboratory import LABORATORY

    return LABORATORY.status()
