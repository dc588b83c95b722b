"""What is read, against the U-Net and VAE that really run."""

from __future__ import annotations

import pytest

from lib_subquad.checkpoint import from_shapes
from tests.checkpoint.making import REFINER, SD1, SD2, unet


def test_tokens_and_heads_are_those_of_a_real_unet(monkeypatch):
    """A small U-Net runs on 13 × 9 latent pixels, odd at every level, and every layer's own numbers are compared."""
    pytest.importorskip("ldm")
    import torch
    from ldm.modules import attention
    from ldm.modules.diffusionmodules import openaimodel

    class Torch:  # as the web UI does it: fit the way up to the skip connection
        def __getattr__(self, name):
            return getattr(torch, name)

        def cat(self, tensors, dim):
            first, second = tensors
            first = torch.nn.functional.interpolate(first, second.shape[-2:])
            return torch.cat((first, second), dim)

    monkeypatch.setattr(openaimodel, "th", Torch())
    model = openaimodel.UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1, 2, 4],
        num_res_blocks=1, channel_mult=[1, 2, 2], num_heads=4, use_spatial_transformer=True, transformer_depth=2,
        context_dim=[24, 24], legacy=False, use_checkpoint=False,
    ).eval()  # fmt: skip
    ran = []
    for name, layer in model.named_modules():
        if isinstance(layer, attention.CrossAttention):
            layer.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: ran.append((name, layer.heads, args[0].shape)), with_kwargs=True
            )
    with torch.no_grad():
        model(torch.zeros(2, 4, 9, 13), torch.zeros(2), context=[torch.zeros(2, 77, 24)] * 2)
    checkpoint = from_shapes({name: tensor.shape for name, tensor in model.state_dict().items()}, heads=4)
    told = []
    for layer in checkpoint.layers:
        batch, heads, tokens, width = layer.shapes(13 * 8, 9 * 8)[0]
        told.append((layer.name, heads, (batch, tokens, heads * width)))
    assert told == ran and len(ran) == 40


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_tokens_are_those_of_a_real_vae(half):
    pytest.importorskip("ldm")
    import torch
    from ldm.modules.diffusionmodules import model as ldm

    config = {
        "ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3,
        "resolution": 64, "z_channels": 4, "double_z": True, "attn_type": "vanilla",
    }  # fmt: skip
    network = (ldm.Encoder if half == "encoder" else ldm.Decoder)(**config).eval()
    ran = {}
    for name, layer in network.named_modules():
        if isinstance(layer, ldm.AttnBlock):
            layer.register_forward_pre_hook(lambda _, args, name=name: ran.update({f"{half}.{name}": args[0].shape}))
    with torch.no_grad():
        network(torch.zeros(1, 3, 72, 104) if half == "encoder" else torch.zeros(1, 4, 9, 13))
    shapes = {f"{half}.{name}": tensor.shape for name, tensor in network.state_dict().items()}
    told = {layer.name: layer for layer in from_shapes(shapes).layers}
    assert told.keys() == ran.keys() and len(ran) > 1
    for name, (_, channels, height, width) in ran.items():
        assert told[name].shapes(104, 72)[0] == (1, 1, height * width, channels)


@pytest.mark.parametrize(
    "made, config",
    [
        (SD1, {"num_heads": 8, "context_dim": 768}),
        (SD1 | {"inputs": 9}, {"num_heads": 8, "context_dim": 768, "in_channels": 9}),
        (SD2, {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}),
        (
            REFINER,
            {
                "model_channels": 384, "attention_resolutions": [4, 2], "transformer_depth": 4, "num_head_channels": 64,
                "context_dim": [1280] * 4, "use_linear_in_transformer": True, "num_classes": 10,
            },
        ),
    ],
    ids=["SD1", "SD1 inpainting", "SD2", "refiner"],
)  # fmt: skip
def test_full_size_unets_of_the_real_class(made, config):
    """The published configurations, built without memory for their weights, against the checkpoints made here."""
    pytest.importorskip("ldm")
    import torch
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    base = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
        "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True,
        "legacy": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = UNetModel(**(base | config))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert unet(prefix="", **made).items() <= shapes.items()
    real = {name: layer.heads for name, layer in model.named_modules() if isinstance(layer, CrossAttention)}
    assert {layer.name: layer.heads for layer in from_shapes(shapes).layers} == real
