"""A small random checkpoint in the layout of SD 3 medium, all in one file, and a web UI that loads it.

The transformer has three blocks of three heads, each as wide as always; the VAE is as large as it always is, for the
web UI builds no other. Seeded; sizes are set so that images have contrast and attention a say in them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

BLOCKS = 3
WIDTH = 64 * BLOCKS  # the web UI reads one from the other
LATENT, PATCH, POSITIONS = 16, 2, 48
CONTEXT = 4096
# In place of those of CLIP-L and CLIP-G.
TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
SCALE, SHIFT = 1.5305, 0.0609  # of SD 3's latents


def make_checkpoint(path: Path) -> None:
    """About 0.2 GB."""
    torch.manual_seed(0)
    with torch.no_grad():
        tensors = {
            **{f"model.diffusion_model.{name}": tensor for name, tensor in _transformer().items()},
            **{f"first_stage_model.{name}": tensor for name, tensor in _vae().state_dict().items()},
            **{f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in _text_encoder().items()},
            **{f"text_encoders.clip_g.transformer.{name}": tensor for name, tensor in _text_encoder().items()},
        }
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def install_guest(extensions: Path, tokenizer: Path) -> None:
    """The extension without which the web UI builds text encoders of 3 GB and asks for their tokenizers."""
    folder = extensions / "small-sd3"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("sd3_guest.py"), folder / "scripts")
    shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "text_encoder.json").write_text(json.dumps(TEXT_ENCODER), encoding="utf-8")


def _transformer() -> dict[str, torch.Tensor]:
    tensors = {"pos_embed": torch.randn(1, POSITIONS**2, WIDTH)}
    layers = {
        "x_embedder.proj": (WIDTH, LATENT, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "y_embedder.mlp.0": (WIDTH, 2 * TEXT_ENCODER["hidden_size"]),
        "y_embedder.mlp.2": (WIDTH, WIDTH),
        "context_embedder": (WIDTH, CONTEXT),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * LATENT, WIDTH),
    }
    for number in range(BLOCKS):
        for part in ("context_block", "x_block"):
            block = f"joint_blocks.{number}.{part}"
            last = part == "context_block" and number == BLOCKS - 1  # whose text nobody reads
            layers[f"{block}.attn.qkv"] = (3 * WIDTH, WIDTH)
            layers[f"{block}.adaLN_modulation.1"] = ((2 if last else 6) * WIDTH, WIDTH)
            if not last:
                layers[f"{block}.attn.proj"] = (WIDTH, WIDTH)
                layers[f"{block}.mlp.fc1"] = (4 * WIDTH, WIDTH)
                layers[f"{block}.mlp.fc2"] = (WIDTH, 4 * WIDTH)
    for name, shape in layers.items():
        tensors[f"{name}.weight"] = _random(*shape)
        tensors[f"{name}.bias"] = torch.zeros(shape[0])
        if name.endswith("qkv"):
            tensors[f"{name}.weight"][: 2 * WIDTH] *= 2  # queries and keys: scores that differ
    return tensors


def _vae() -> torch.nn.Module:
    """It decodes to pixels about a middle grey, and encodes to latents of size 1 without noise."""
    from ldm.modules.diffusionmodules.model import Decoder, Encoder

    shape = dict(
        ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[], in_channels=3, resolution=256,
        z_channels=LATENT,
    )  # fmt: skip
    vae = torch.nn.ModuleDict({"encoder": Encoder(**shape, double_z=True), "decoder": Decoder(**shape)}).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith(("attn_1.q.weight", "attn_1.k.weight")):
            parameter.mul_(4)
    encode, decode = vae["encoder"], vae["decoder"]
    latents = torch.randn(2, LATENT, 16, 16) / SCALE + SHIFT
    decode.conv_out.weight.mul_(0.4 / decode(latents).std())
    decode.conv_out.bias.sub_(decode(latents).mean((0, 2, 3)))
    encode.conv_out.weight.div_(encode(torch.rand(2, 3, 128, 128) * 2 - 1)[:, :LATENT].std() * SCALE)
    encode.conv_out.weight[LATENT:].zero_()
    encode.conv_out.bias[LATENT:].fill_(-30.0)
    return vae


def _text_encoder() -> dict[str, torch.Tensor]:
    width, inner = TEXT_ENCODER["hidden_size"], TEXT_ENCODER["intermediate_size"]
    tensors = {
        "text_model.embeddings.token_embedding.weight": torch.randn(49408, width),
        "text_model.embeddings.position_embedding.weight": torch.randn(77, width),
        "text_projection.weight": torch.eye(width),
    }
    norms, layers = ["text_model.final_layer_norm"], {}
    for number in range(TEXT_ENCODER["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{number}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        layers |= {f"{layer}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        layers |= {f"{layer}.mlp.fc1": (inner, width), f"{layer}.mlp.fc2": (width, inner)}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    for name, shape in layers.items():
        tensors |= {f"{name}.weight": _random(*shape), f"{name}.bias": torch.zeros(shape[0])}
    return tensors


def _random(out: int, *into: int) -> torch.Tensor:
    """A weight that keeps the size of what it is applied to."""
    return torch.randn(out, *into) / np.prod(into) ** 0.5
