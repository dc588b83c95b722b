"""Small random models that the Forge family loads: a checkpoint in the layout of SD 1.5, a ControlNet, an IP-Adapter.

The U-Net has two levels of 320 channels with 7 transformers; VAE and text encoder are as large as they always are, for
the web UI knows them by that. Seeded; their sizes are set so that images have contrast and attention a say in them.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

CHANNELS, CONTEXT = 320, 768
TRANSFORMERS = 7
CALLS = 2 * TRANSFORMERS  # of attention, in each pass of the U-Net
SCALE = 0.18215  # of SD 1's latents
IP_ADAPTER_TOKENS = 4


def make_checkpoint(path: Path) -> None:
    """About 0.5 GB."""
    torch.manual_seed(0)
    with torch.no_grad():
        tensors = {
            **{f"model.diffusion_model.{name}": tensor for name, tensor in _unet().state_dict().items()},
            **{f"first_stage_model.{name}": tensor for name, tensor in _vae().state_dict().items()},
            **{f"cond_stage_model.transformer.{name}": tensor for name, tensor in _text_encoder().items()},
        }
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def make_controlnet(path: Path) -> None:
    """It reads a hint of three channels, and adds what it makes of it to the U-Net's skips."""
    torch.manual_seed(1)
    unet = {
        name: tensor
        for name, tensor in _unet_as_made().state_dict().items()
        if name.startswith(("time_embed.", "input_blocks.", "middle_block."))
    }
    outputs = {f"zero_convs.{number}.0": (CHANNELS, CHANNELS, 1, 1) for number in range(4)}
    outputs["middle_block_out.0"] = (CHANNELS, CHANNELS, 1, 1)
    widths = [3, 16, 16, 32, 32, 96, 96, 256, CHANNELS]
    hint = {f"input_hint_block.{2 * i}": (out, into, 3, 3) for i, (into, out) in enumerate(zip(widths, widths[1:]))}
    convolutions = {name: _random(*shape) for name, shape in {**outputs, **hint}.items()}
    tensors = {
        **unet,
        **{f"{name}.weight": tensor for name, tensor in convolutions.items()},
        **{f"{name}.bias": torch.zeros(len(tensor)) for name, tensor in convolutions.items()},
    }
    save_file({f"control_model.{name}": tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def make_ip_adapter(path: Path) -> None:
    """Keys and values for all layers of a whole SD 1.5, of which our U-Net has few."""
    torch.manual_seed(2)
    tensors = {
        "image_proj.proj.weight": _random(IP_ADAPTER_TOKENS * CONTEXT, CONTEXT),
        "image_proj.proj.bias": torch.zeros(IP_ADAPTER_TOKENS * CONTEXT),
        "image_proj.norm.weight": torch.ones(CONTEXT),
        "image_proj.norm.bias": torch.zeros(CONTEXT),
    }
    for number in range(1, 32, 2):
        for part in ("k", "v"):
            tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] = _random(CHANNELS, CONTEXT)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)


def make_image_encoder(path: Path) -> None:
    """CLIP's, of the size that IP-Adapters ask for; its layers are zeros, for which the file takes no space on disk."""
    torch.manual_seed(3)
    width, patches = 1024, (224 // 14) ** 2
    filled = {
        "vision_model.embeddings.class_embedding": torch.randn(width),
        "vision_model.embeddings.patch_embedding.weight": _random(width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": torch.randn(patches + 1, width),
        **_norm("vision_model.pre_layrnorm", width),
        **_norm("vision_model.post_layernorm", width),
        "visual_projection.weight": _random(CONTEXT, width),
    }
    _save_sparse(filled, dict(_layers("vision_model.encoder", 24, width)), path)


def _unet_as_made():
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=CHANNELS, attention_resolutions=[1, 2],
        num_res_blocks=1, channel_mult=[1, 1], num_heads=8, use_spatial_transformer=True, transformer_depth=1,
        context_dim=CONTEXT, legacy=False,
    ).eval()  # fmt: skip


def _unet():
    """It predicts noise of size 1, from scores that differ."""
    unet = _unet_as_made()
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:  # ldm makes the last layer of each block zero
            parameter.copy_(_random(*parameter.shape) * (2 if ".to_q." in name or ".to_k." in name else 1))
    made = unet(torch.randn(2, 4, 16, 16), torch.full((2,), 500), context=torch.randn(2, 77, CONTEXT))
    unet.out[2].weight.div_(made.std())
    return unet


def _vae():
    """It decodes to pixels about a middle grey, and encodes to latents of size 1 that have next to no noise."""
    from ldm.modules.diffusionmodules.model import Decoder, Encoder

    shape = dict(
        ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[], in_channels=3, resolution=256,
        z_channels=4,
    )  # fmt: skip
    vae = torch.nn.ModuleDict(
        {
            "encoder": Encoder(**shape, double_z=True),
            "decoder": Decoder(**shape),
            "quant_conv": torch.nn.Conv2d(8, 8, 1),
            "post_quant_conv": torch.nn.Conv2d(4, 4, 1),
        }
    ).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith(("attn_1.q.weight", "attn_1.k.weight")):
            parameter.mul_(4)
    encode, decode = vae["encoder"], vae["decoder"]
    latents = vae["post_quant_conv"](torch.randn(2, 4, 16, 16) / SCALE)
    decode.conv_out.weight.mul_(0.4 / decode(latents).std())
    decode.conv_out.bias.sub_(decode(latents).mean((0, 2, 3)))
    vae["quant_conv"].weight.copy_(torch.eye(8)[:, :, None, None])
    vae["quant_conv"].weight[4:].zero_()
    vae["quant_conv"].bias.copy_(torch.tensor([0.0] * 4 + [-10.0] * 4))
    encode.conv_out.weight.div_(encode(torch.rand(2, 3, 128, 128) * 2 - 1)[:, :4].std() * SCALE)
    return vae


def _text_encoder() -> dict[str, torch.Tensor]:
    """CLIP's, whose layers do nothing: what a prompt comes to is its words' own vectors."""
    filled = {
        "text_model.embeddings.token_embedding.weight": torch.randn(49408, CONTEXT),
        "text_model.embeddings.position_embedding.weight": torch.randn(77, CONTEXT),
        **_norm("text_model.final_layer_norm", CONTEXT),
    }
    layers = {name: torch.zeros(shape) for name, shape in _layers("text_model.encoder", 12, CONTEXT)}
    return {**filled, **layers}


def _layers(prefix: str, count: int, width: int):
    """(name, shape) of each tensor of CLIP's transformer."""
    for number in range(count):
        layer = f"{prefix}.layers.{number}"
        for name in ("layer_norm1", "layer_norm2"):
            yield from ((f"{layer}.{name}.{part}", (width,)) for part in ("weight", "bias"))
        for name, out, into in (
            *((f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            yield f"{layer}.{name}.weight", (out, into)
            yield f"{layer}.{name}.bias", (out,)


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _random(out: int, *into: int) -> torch.Tensor:
    """A weight that keeps the size of what it is applied to."""
    return torch.randn(out, *into) / np.prod(into) ** 0.5


def _save_sparse(filled: dict[str, torch.Tensor], zeros: dict[str, tuple[int, ...]], path: Path) -> None:
    """As safetensors.torch.save_file, in half precision; what is zero is a hole in the file."""
    shapes = {**{name: tuple(tensor.shape) for name, tensor in filled.items()}, **zeros}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in filled.values():  # they come first
            file.write(tensor.half().numpy().tobytes())
        file.truncate(8 + len(text) + end)
