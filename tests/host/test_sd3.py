"""SD 3 in the web UI 1.10: attention of the transformer and of the VAE is ours, that of the text encoders is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.host import sd3_host
from tests.host.test_guests import Patient, Wrapper

close = torch.testing.assert_close
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Model(nn.Module):
    """The parts of the web UI's model that attend."""

    def __init__(self):
        super().__init__()
        self.transformer = sd3_host.module("mmdit").MMDiT()
        self.vae = sd3_host.module("sd3_impls").AttnBlock(32)
        self.text_encoder = sd3_host.module("other_impls").CLIPAttention(32, 4)
        self.text, self.image, self.map = torch.randn(2, 7, 64), torch.randn(2, 20, 64), torch.randn(1, 32, 6, 5)

    @torch.no_grad()
    def forward(self):
        """(what the transformer makes, what the VAE's layer makes)"""
        weight = next(self.parameters())
        text, image, feature_map = (it.to(weight) for it in (self.text, self.image, self.map))
        return self.transformer(text, image), self.vae(feature_map)


@pytest.fixture
def sd3(subquad):
    """The extension, and a model of SD 3 that is loaded after it."""
    sd3_host.load()
    from modules import sd_models

    model = Model()
    sd_models.model_data.set_sd_model(model)
    return SimpleNamespace(**vars(subquad), model=model, plain=model())


def calls(subquad, made) -> int:
    subquad.status.begin()
    made()
    return subquad.status.generation().calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in which PyTorch 2.1 has the rest of it on a CPU
def test_it_is_ours_and_as_the_web_uis(sd3, dtype):
    sd3.model.to(dtype)
    plain = sd3.model()
    sd3.select("subquad")
    assert calls(sd3, sd3.model) == 3 + 1
    for found, expected in zip(sd3.model(), plain):
        assert found.dtype == dtype
        close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_in_every_precision(sd3, dtype):
    q, k, v = torch.randn(3, 2, 27, 64).to(dtype)
    expected = sd3_host.module("mmdit").attention(q.float(), k.float(), v.float(), 4)
    sd3.select("subquad")
    for values in (v, v.unflatten(-1, (4, -1))):
        found = sd3_host.module("mmdit").attention(q, k, values, 4)
        assert found.dtype == dtype
        close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_settings_hold_for_it(sd3):
    sd3.select("subquad")
    for settings in ({"query_chunk": 8, "kv_chunk": 4}, {"engine": "portable"}, {"upcast": "always"}, {"vae": False}):
        sd3.opts.data.update({f"subquad_{name}": value for name, value in settings.items()})
        assert calls(sd3, sd3.model) == 3 + settings.get("vae", True)
        close(sd3.model(), sd3.plain)
    assert sd3.status.generation().largest.engine == "portable"


@pytest.mark.parametrize("ours", ["web UI", "always", "never"])
@pytest.mark.parametrize("web_uis", [False, True])
def test_upcasting_follows_the_web_uis_setting_unless_told_otherwise(sd3, monkeypatch, web_uis, ours):
    from lib_subquad.layers import projections

    own, asked = projections.attention, []
    monkeypatch.setattr(
        projections, "attention", lambda *a, settings, **k: asked.append(settings.upcast) or own(*a, **k)
    )
    sd3.select("subquad")
    sd3.opts.data.update(upcast_attn=web_uis, subquad_upcast=ours)
    sd3.model()
    assert asked == [("always" if web_uis else "never") if ours == "web UI" else ours] * 4


def test_text_encoders_keep_the_web_uis_own_function(sd3):
    encoder, x = sd3.model.text_encoder, torch.randn(1, 9, 32)
    mask = torch.full((9, 9), -torch.inf).triu(1)
    plain = encoder(x, mask)
    sd3.select("subquad")
    assert sd3_host.module("other_impls").attention is not sd3_host.module("mmdit").attention
    assert calls(sd3, lambda: encoder(x, mask)) == 0
    assert torch.equal(encoder(x, mask), plain)


@pytest.mark.parametrize("shape", [(27, 27), (1, 1, 1, 27), (2, 1, 27, 27), (2, 27, 27)])
def test_a_mask_is_read_as_the_web_uis_function_reads_it(sd3, shape):
    """Two images, two heads: a mask of three dimensions could be for either."""
    q, k, v = torch.randn(3, 2, 27, 64)
    mask = torch.randn(shape)
    own = sd3_host.module("mmdit").attention
    sd3.select("subquad")
    attention = sd3_host.module("mmdit").attention
    assert calls(sd3, lambda: attention(q, k, v, 2, mask)) == 1
    close(attention(q, k, v, 2, mask=mask), own(q, k, v, 2, mask))
    close(attention(q=q, k=k, v=v, heads=2), own(q, k, v, 2))


def test_what_it_cannot_compute_is_the_web_uis_and_is_told(sd3):
    q, k, v = torch.randn(3, 2, 27, 64)
    mask = torch.randn(27, 27, requires_grad=False).to(torch.complex64)
    sd3.select("subquad")
    with pytest.raises(RuntimeError):  # PyTorch's words for it
        sd3_host.module("mmdit").attention(q, k, v, 2, mask)
    assert sd3.status.generation().passed_on == {"a mask of a kind that is not known": 1}


# --------------------------------------------------------------------------------------------------------------- undo


def test_selected_others_and_back(sd3):
    own = sd3_host.held()
    for name in ("subquad", "sdp", "subquad", "None", "subquad", "subquad", "sdp"):
        sd3.select(name)
        assert calls(sd3, sd3.model) == (3 + 1 if name == "subquad" else 0)
        close(sd3.model(), sd3.plain)
        if name != "subquad":
            assert sd3_host.held() == own


def test_reload_ui_and_unloaded(sd3, host):
    from modules import script_callbacks

    own = sd3_host.held()
    sd3.opts.data["cross_attention_optimization"] = host.title_of("subquad")
    sd3.select("subquad")
    host.reload_extension()
    assert calls(sd3, sd3.model) == 3 + 1
    script_callbacks.script_unloaded_callback()
    assert sd3_host.held() == own and calls(sd3, sd3.model) == 0


@pytest.mark.parametrize("earlier", ["before it is selected", "while it is in force"])
def test_whenever_the_web_ui_loads_it(subquad, earlier):
    """While it is in force the web UI tells of a model by applying anew, and of an image by asking to process."""
    if earlier == "while it is in force":
        subquad.select("subquad")
    sd3_host.load()
    own, model = sd3_host.held(), Model()
    if earlier == "while it is in force":
        subquad.infotext.begin(SimpleNamespace(extra_generation_params={}))
    else:
        subquad.select("subquad")
    assert calls(subquad, model) == 3 + 1
    subquad.select("None")
    assert sd3_host.held() == own


def test_a_late_import_that_took_ours_along_has_the_web_uis_again(sd3):
    q, k, v = torch.randn(3, 2, 27, 64)
    sd3.select("subquad")
    taken = sd3_host.module("mmdit").attention
    plain = sd3_host.module("other_impls").attention(q, k, v, 4)
    for name, ours in (("subquad", 1), ("sdp", 0), ("subquad", 1), ("None", 0)):
        sd3.select(name)
        assert calls(sd3, lambda: taken(q, k, v, 4)) == ours
        close(taken(q, k, v, 4), plain)


def test_the_web_ui_switches_it_off_without_telling_us(sd3):
    """As it does for training, and when a model goes: it knows of none of these names."""
    sd3.select("subquad")
    sd3.hijack.undo_optimizations()
    assert not sd3.entry.active
    assert calls(sd3, sd3.model) == 0
    close(sd3.model(), sd3.plain)
    sd3.select("subquad")
    assert calls(sd3, sd3.model) == 3 + 1


# ------------------------------------------------------------------------------------------------------------- guests


def test_a_guests_function_stays_and_the_status_tells_whose(sd3):
    names, mmdit = {}, sd3_host.module("mmdit")
    exec(compile("def guest(q, k, v, heads, mask=None): return q", "/web ui/extensions/sd-guest/x.py", "exec"), names)
    for first, then in (("sdp", "subquad"), ("subquad", "sdp")):
        sd3.select(first)
        own, mmdit.attention = mmdit.attention, names["guest"]
        sd3.infotext.begin(SimpleNamespace(extra_generation_params={}))
        found = sd3.model()
        assert not torch.allclose(found[0], sd3.plain[0], atol=1e-2)
        sd3.infotext.finish_batch(SimpleNamespace(extra_generation_params={}))
        if first == "subquad":
            assert "3 of 3 layers were out of reach: sd-guest (3) computed them." in sd3.status.summary()
            sd3.select(then)
            assert mmdit.attention is names["guest"]
        mmdit.attention = own
        sd3.select("None")
    close(sd3.model(), sd3.plain)


@pytest.mark.parametrize("order", ["found ours", "was there before"])
def test_a_guest_that_wraps_the_function_has_its_way_once(sd3, order):
    q, k, v = torch.randn(3, 2, 27, 64)
    mmdit = sd3_host.module("mmdit")
    own, plain = mmdit.attention, mmdit.attention(q, k, v, 4)
    if order == "found ours":
        sd3.select("subquad")
    found = mmdit.attention
    guest = mmdit.attention = lambda *args, **kwargs: found(*args, **kwargs) * 2
    close(mmdit.attention(q, k, v, 4), plain * 2)
    if order == "found ours":
        sd3.select("sdp")
        close(mmdit.attention(q, k, v, 4), plain * 2)
        assert mmdit.attention is guest
        mmdit.attention = found  # it takes itself off
    else:
        sd3.select("subquad")
        close(mmdit.attention(q, k, v, 4), plain)  # as other entries replace what a guest put there
        sd3.select("sdp")
        assert mmdit.attention is guest
        close(mmdit.attention(q, k, v, 4), plain * 2)
        mmdit.attention = own
    close(mmdit.attention(q, k, v, 4), plain)


def test_a_guest_on_the_class_of_the_vae(sd3):
    patient = Patient(sd3.model.vae, sd3.model.map)
    guest = Wrapper(type(sd3.model.vae))
    sd3.select("subquad")
    guest.toggle()
    assert patient.factor() == 2
    sd3.select("sdp")
    assert patient.factor() == 2
    guest.toggle()
    assert patient.factor() == 1


def test_what_a_guest_left_pinned_on_the_vae_is_taken_back(sd3):
    vae = sd3.model.vae
    vae.forward = type(vae).forward.__get__(vae)
    sd3.select("subquad")
    assert calls(sd3, sd3.model) == 3 + 1 and "forward" not in vars(vae)


# ------------------------------------------------------------------------------------------------- status and infotext


def test_the_status_counts_the_blocks_and_the_infotext_tells_the_settings(sd3):
    sd3.select("subquad")
    sd3.opts.data["subquad_query_chunk"] = 16
    p = SimpleNamespace(extra_generation_params={})
    sd3.infotext.begin(p)
    sd3.model()
    sd3.infotext.finish_batch(p)
    seen = sd3.status.generation()
    assert (seen.calls, seen.reach.places, seen.reach.owners) == (3 + 1, 3, {})
    assert sd3.status.summary().startswith("Last generation: 4 calls, no retries.")
    assert p.extra_generation_params == {"Subquad query chunk": 16}


def test_the_loaded_model_shows_its_layers(sd3):
    from lib_subquad.webui.hosts import host

    assert host().loaded().shapes()["transformer.joint_blocks.0.of_text.weight"] == (192, 64)
