"""Images, previews and training through hooked layers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def model(host):
    host.start(optimizer="subquad")
    from modules import shared

    return shared.sd_model


@pytest.fixture
def hooked(subquad):
    """A cross-attention layer of ldm under the applied entry, and the same output without."""
    from ldm.modules.attention import CrossAttention

    layer, x, context = CrossAttention(32, 24, 4, 8).eval(), torch.randn(2, 9, 32), torch.randn(2, 12, 24)
    plain = layer(x, context)
    subquad.select("subquad")
    return layer, x, context, plain


def test_whole_images_are_those_of_ldm(host, model):
    from demo.generate import generate

    images = {}
    for name in ("None", "subquad"):
        host.use_optimizer(host.title_of(name))
        images[name] = np.asarray(generate("a boat", 3, 128, 64, 2).image, dtype=int)
    assert np.abs(images["None"] - images["subquad"]).max() <= 1
    assert images["None"].std() > 10  # a picture of something


def test_hypernetworks_make_the_contexts_of_keys_and_values(hooked):
    from modules import shared

    class Network:
        layers = {24: (lambda context: context + 1, lambda context: context * 2)}

    layer, x, context, plain = hooked
    shared.loaded_hypernetworks.append(Network())
    changed = layer(x, context)
    assert not torch.allclose(changed, plain)
    from modules.hypernetworks import hypernetwork
    from modules.sdp_attention import cross_attention_forward

    torch.testing.assert_close(changed, cross_attention_forward(layer, x, context))
    assert hypernetwork.apply_hypernetworks([], context) == (context, context)


def test_a_hypernetwork_stays_out_of_the_model(hooked):
    """As a part of a layer it would travel with it, to the CPU with --lowvram, and be saved with the model."""
    from modules import shared

    class Network:
        layers = {24: (torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))}

    layer, x, context, plain = hooked
    before = set(layer.state_dict())
    shared.loaded_hypernetworks.append(Network())
    assert not torch.allclose(layer(x, context), plain)
    assert set(layer.state_dict()) == before
    layer.to("meta")
    assert Network.layers[24][0].weight.device.type == "cpu"


@pytest.mark.parametrize("vae", [True, False])
def test_vae_decides_at_each_call(subquad, vae):
    from ldm.modules.diffusionmodules.model import AttnBlock

    block, x = AttnBlock(64), torch.randn(1, 64, 3, 5)
    plain = block(x)
    subquad.select("subquad")
    for on in (vae, not vae):
        subquad.opts.data["subquad_vae"] = on
        subquad.status.begin()
        torch.testing.assert_close(block(x), plain)
        assert subquad.status.generation().calls == on


@pytest.mark.parametrize("hosts", [True, False])
def test_upcast_attn_is_read_at_each_call(subquad, hooked, monkeypatch, hosts):
    seen = []
    from lib_subquad.webui.hosts import a1111

    monkeypatch.setattr(a1111.ldm, "cross_attention", lambda *_, settings, **__: seen.append(settings.upcast))
    layer, x, context, _ = hooked
    subquad.opts.data["upcast_attn"] = hosts
    layer(x, context)
    assert seen == ["always" if hosts else "never"]


@pytest.mark.parametrize("engine", ["fused", "portable"])
@pytest.mark.parametrize("checkpointing", ["automatic", "never"])
def test_training_goes_through_it_in_eval_mode(subquad, hooked, engine, checkpointing):
    """As textual inversion does it: only the context learns, under torch's own checkpoint of the block around."""
    layer, x, context, plain = hooked
    layer.requires_grad_(False)
    subquad.opts.data.update(subquad_engine=engine, subquad_checkpointing=checkpointing, subquad_query_chunk=5)
    subquad.status.begin()
    context.requires_grad_()
    gradients = []
    for name in ("subquad", "None"):
        subquad.select(name)
        output = checkpoint(layer, x, context, use_reentrant=False)
        torch.testing.assert_close(output, plain)
        gradients += torch.autograd.grad(output.square().sum(), context)
    torch.testing.assert_close(*gradients)
    assert subquad.status.generation().calls == 2  # forward, and once more for backward
    plan = subquad.status.generation().largest
    assert (plan.engine, plan.query_chunk) == (engine, 5)


def test_a_preview_decodes_on_another_thread_meanwhile(model):
    """Under settings that differ from one moment to the next, as sliders do."""
    from modules import shared

    from demo.generate import generate

    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected_preview = model.decode(latent)
    expected = np.asarray(generate("a boat", 3, 64, 64, 2).image, dtype=int)
    done, previews, failures = threading.Event(), [], []

    def preview():
        try:
            while not done.is_set():
                shared.opts.data["subquad_query_chunk"] = 16 * (len(previews) % 5)
                with torch.inference_mode():
                    previews.append((model.decode(latent) - expected_preview).abs().max().item())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=preview)
    thread.start()
    try:
        images = [np.asarray(generate("a boat", 3, 64, 64, 2).image, dtype=int) for _ in range(5)]
    finally:
        done.set()
        thread.join()
    assert not failures
    assert max(np.abs(image - expected).max() for image in images) <= 1
    assert previews and max(previews) < 1e-4


def test_a_short_soak(host):
    """`python -m tools.soak` in little; the whole of it makes a thousand images."""
    from tools import soak

    report = soak.soak(soak.DemoHost(), iter(range(10)), side=64)
    assert report.failures == []
    assert report.images == 10 and report.selections == 2 and report.changes > 0
    assert report.growth < 100 * 2**20
