"""The model's weights, random or from a file in the SD 1 layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ldm.modules.attention import CrossAttention
from safetensors.torch import save_file

from demo.layout import architecture
from demo.model import SMALL, LatentDiffusion, load_checkpoint, random_model
from lib_subquad.console import UserError

SHARED = Path(__file__).parents[3] / "shared" / "checkpoints"


@pytest.fixture(scope="module")
def model():
    return random_model()


def noise_of(model):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return model.predict_noise(latent, 500, model.encode_prompt("a"))


def save(model, path, **changes):
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()} | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return str(path)


def test_random_weights_are_always_the_same(model):
    assert torch.equal(noise_of(model), noise_of(random_model()))


def test_prompts_differ_and_repeat(model):
    assert torch.equal(model.encode_prompt("a"), model.encode_prompt("a"))
    assert not torch.equal(model.encode_prompt("a"), model.encode_prompt("b"))


def test_attention_matters(model, monkeypatch):
    """With even attention in place of the real one the U-Net says something quite different."""
    real = noise_of(model)

    def even(self, x, context=None, mask=None):
        values = self.to_v(x if context is None else context)
        return self.to_out(values.mean(1, keepdim=True).expand(-1, x.shape[1], -1))

    monkeypatch.setattr(CrossAttention, "forward", even)
    assert (noise_of(model) - real).norm() > 0.3 * real.norm()


def test_decode_gives_an_image(model):
    image = model.decode(torch.randn(1, 4, 8, 8))
    assert image.shape == (1, 3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1


def test_architecture_is_read_off_the_shapes(model):
    found = architecture({key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert LatentDiffusion(found).state_dict().keys() == model.state_dict().keys()
    assert found.unet["channel_mult"] == SMALL.unet["channel_mult"]
    assert found.unet["attention_resolutions"] == SMALL.unet["attention_resolutions"]
    assert found.decoder == SMALL.decoder


@pytest.mark.skipif(not (SHARED / "headers" / "sd15.json").is_file(), reason="no header of SD 1.5 beside the project")
def test_architecture_of_sd15():
    header = json.loads((SHARED / "headers" / "sd15.json").read_text(encoding="utf8"))
    found = architecture({key: tuple(shape) for key, (_, shape) in header.items()})
    assert found.unet["model_channels"] == 320
    assert found.unet["channel_mult"] == (1, 2, 4, 4)
    assert found.unet["num_res_blocks"] == [2, 2, 2, 2]
    assert found.unet["attention_resolutions"] == (1, 2, 4)
    assert found.unet["context_dim"] == 768
    assert (found.decoder["ch"], found.decoder["ch_mult"], found.decoder["num_res_blocks"]) == (128, (1, 2, 4, 4), 2)


def test_checkpoint_round_trip(model, tmp_path):
    loaded = load_checkpoint(save(model, tmp_path / "model.safetensors"))
    assert (noise_of(loaded) - noise_of(model)).norm() < 0.02 * noise_of(model).norm()


def test_heads_come_from_the_yaml_beside_the_checkpoint(model, tmp_path):
    path = save(model, tmp_path / "model.safetensors")
    for said, heads in (("num_heads: 4", {4}), ("num_head_channels: 16\n        num_heads: -1", {4, 8, 16})):
        config = f"num_heads: 2\nmodel:\n  params:\n    unet_config:\n      params:\n        {said}\n"
        (tmp_path / "model.yaml").write_text(config, encoding="utf8")
        loaded = load_checkpoint(path)
        assert {module.heads for module in loaded.modules() if isinstance(module, CrossAttention)} == heads


def test_the_tab_tells_the_heads_that_compute(model, tmp_path, host):
    path = save(model, tmp_path / "model.safetensors")
    config = "model:\n  params:\n    unet_config:\n      params:\n        num_heads: 4\n"
    (tmp_path / "model.yaml").write_text(config, encoding="utf8")
    host.start(path, "subquad")
    from lib_subquad.webui.laboratory import LABORATORY

    _, details = LABORATORY.look("the loaded checkpoint", 64, 64, 1)
    assert "Heads: 4 in each layer, from &#x27;model.yaml&#x27; beside the file." in details and "guess" not in details
    assert "<bdi>4 × 16 to 64</bdi>" in details


@pytest.mark.skipif(not (SHARED / "tiny-sd1").is_dir(), reason="no tiny checkpoint beside the project")
def test_tiny_checkpoint_loads():
    tiny = load_checkpoint(str(SHARED / "tiny-sd1" / "tiny-sd1.safetensors"))
    assert {module.heads for module in tiny.modules() if isinstance(module, CrossAttention)} == {4}
    assert noise_of(tiny).isfinite().all()


def test_wrong_checkpoints_are_refused_in_words(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(str(path))
    path.write_bytes(b"PK\x03\x04 not safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(str(path))
    with pytest.raises(UserError, match="SDXL layout"):
        load_checkpoint(save(model, path, **{"conditioner.x": torch.zeros(1)}))
    with pytest.raises(UserError, match="SD 2 layout"):
        load_checkpoint(save(model, path, **{"cond_stage_model.model.x": torch.zeros(1)}))
    with pytest.raises(UserError, match="lacks first_stage_model.decoder.mid.block_1.conv1.bias"):
        load_checkpoint(save(model, path, **{"first_stage_model.decoder.mid.block_1.conv1.bias": None}))
    with pytest.raises(UserError, match=r"time_embed.0.bias is \[3\]"):
        load_checkpoint(save(model, path, **{"model.diffusion_model.time_embed.0.bias": torch.zeros(3)}))
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not in the SD 1 layout"):
        load_checkpoint(str(path))
