"""The examples for programs do what they say, with the real classes of diffusers on tiny models of random weights."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lib_subquad import Settings, sdpa

EXAMPLE = Path(__file__).parents[1] / "docs/examples/diffusers_processor.py"
TOKENS, CONTEXT = 64, 7


def unet():
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
    }
    more = {"layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": 2, "norm_num_groups": 4}
    prompt = torch.randn(2, CONTEXT, 24)
    mask = torch.ones(2, CONTEXT, dtype=torch.bool)
    mask[:, 5:] = False
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(10), "encoder_hidden_states": prompt}
    return "UNet2DConditionModel", {**blocks, **more}, {**given, "encoder_attention_mask": mask}


def sd3():
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    inputs = {"joint_attention_dim": 24, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, CONTEXT, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([10, 10]),
    }
    return "SD3Transformer2DModel", {**sizes, **heads, **inputs}, given


def flux():
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16}
    places = torch.zeros(TOKENS, 3)
    places[:, 1], places[:, 2] = torch.arange(TOKENS) // 8, torch.arange(TOKENS) % 8
    given = {
        "hidden_states": torch.randn(2, TOKENS, 4),
        "encoder_hidden_states": torch.randn(2, CONTEXT, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(CONTEXT, 3),
    }
    return "FluxTransformer2DModel", {**sizes, **heads}, given


def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    sizes = {"block_out_channels": (16,), "norm_num_groups": 4, "latent_channels": 4}
    return "AutoencoderKL", {**blocks, **sizes}, {"sample": torch.randn(1, 3, 16, 16)}


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def served(example, monkeypatch):
    """The plans of the calls that the example's attention served."""
    plans = []
    counting = example["Subquadratic"].__torch_function__.__globals__
    monkeypatch.setitem(counting, "sdpa", lambda *args, **more: sdpa(*args, **more, report=plans.append))
    return plans


@pytest.mark.parametrize("model", [unet, sd3, flux, vae], ids=lambda model: model.__name__)
def test_diffusers_processors(model, example, served, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    name, config, given = model()
    network = getattr(diffusers, name)(**config).eval()
    before, all_calls = dict(network.attn_processors), []
    with monkeypatch.context() as patched, torch.no_grad():
        own = F.scaled_dot_product_attention
        counted = lambda *args, **more: all_calls.append(0) or own(*args, **more)  # noqa: E731
        patched.setattr(F, "scaled_dot_product_attention", counted)
        expected = network(**given).sample
    assert all_calls

    network.set_attn_processor(example["processors"](network, Settings(engine="portable", query_chunk=64)))
    with torch.no_grad():
        torch.testing.assert_close(network(**given).sample, expected, rtol=1e-4, atol=1e-5)
    assert len(served) == len(all_calls) and {plan.engine for plan in served} == {"portable"}
    assert {type(it).__name__ for it in network.attn_processors.values()} == {
        type(it).__name__ for it in before.values()
    }

    network.set_attn_processor(before)
    with torch.no_grad():
        assert torch.equal(network(**given).sample, expected)
    assert len(served) == len(all_calls)


def test_any_code_in_a_block(example, served):
    query, key, value = torch.randn(3, 2, 4, 50, 40)
    expected = F.scaled_dot_product_attention(query, key, value)
    with example["Subquadratic"](Settings(engine="portable")):
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected)
    assert len(served) == 1
    F.scaled_dot_product_attention(query, key, value)
    assert len(served) == 1
