"""A real latent-diffusion U-Net and VAE decoder: with random weights, or those of a checkpoint in the SD 1 layout."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from demo.layout import SD1_HEADS, UNET, VAE, Architecture, architecture
from lib_subquad.checkpoint.heads import Heads, from_yaml
from lib_subquad.console import UserError

# the layers of ldm announce themselves on stdout
with contextlib.redirect_stdout(io.StringIO()):
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.model import AttnBlock, Decoder
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

LATENT_SCALE = 0.18215
TOKENS = 77
TOKEN_SPREAD = 0.3  # a text encoder's tokens are much alike; unrelated ones of full size drive a U-Net to extremes

SMALL = Architecture(
    unet={
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "channel_mult": (1, 2, 4),
        "num_res_blocks": 1,
        "attention_resolutions": (1, 2, 4),
        "num_heads": SD1_HEADS,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 64,
        "legacy": False,
    },
    decoder={
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1, 2, 4, 4),
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "in_channels": 3,
        "resolution": 256,
        "z_channels": 4,
    },
    embed_dim=4,
)


class LatentDiffusion(nn.Module):
    """The parts of a Stable Diffusion model that make an image, under the names that a checkpoint gives them.

    There is no text encoder: a prompt's tokens are random numbers that depend on the prompt alone.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        self.context_dim = arch.unet["context_dim"]
        self.model = nn.Module()
        self.first_stage_model = nn.Module()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model.diffusion_model = UNetModel(**arch.unet)
            self.first_stage_model.decoder = Decoder(**arch.decoder)
        self.first_stage_model.post_quant_conv = nn.Conv2d(arch.embed_dim, arch.decoder["z_channels"], 1)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float(), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def predict_noise(self, latent: Tensor, timestep: int, context: Tensor) -> Tensor:
        """The U-Net: latent [B, 4, H, W], context [B, 77, C] -> noise [B, 4, H, W]."""
        timesteps = torch.full((len(latent),), timestep, device=latent.device)
        return self.model.diffusion_model(latent, timesteps, context=context).float()

    def decode(self, latent: Tensor) -> Tensor:
        """The VAE: latent [B, 4, H, W] -> image [B, 3, 8 H, 8 W] within 0 to 1."""
        stage = self.first_stage_model
        image = stage.decoder(stage.post_quant_conv(latent / LATENT_SCALE)).float()
        return (image / 2 + 0.5).clamp(0, 1)

    def encode_prompt(self, prompt: str) -> Tensor:
        """[1, 77, context_dim], the same for the same prompt on every machine."""
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        tokens = torch.randn(1, TOKENS, self.context_dim, generator=torch.Generator().manual_seed(seed))
        return (TOKEN_SPREAD * tokens).to(self.device)


def random_model(seed: int = 0) -> LatentDiffusion:
    """A small model in the manner of SD 1 with random weights, such that its attention matters to the image."""
    model = LatentDiffusion(SMALL)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # ldm starts some layers at zero, which would make every block an identity
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, CrossAttention):
            sharper, stronger = (module.to_q, module.to_k), (module.to_v, module.to_out[0])
        elif isinstance(module, AttnBlock):
            sharper, stronger = (module.q, module.k), (module.v, module.proj_out)
        else:
            continue
        for layer in sharper:  # a softmax that is nearly even would hide every mistake in it
            layer.weight.mul_(1.5)
        for layer in stronger:
            layer.weight.mul_(2.0)
    model.first_stage_model.decoder.conv_out.weight.mul_(0.4)  # most pixels within range: clamping hides differences
    return model


def load_checkpoint(path: str) -> LatentDiffusion:
    """The model in a .safetensors file of the SD 1 layout, in float32.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"checkpoint {path!r}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            model = LatentDiffusion(architecture(shapes, _heads_beside(path)))
            wanted = model.state_dict()
            lacking = wanted.keys() - shapes.keys()
            if lacking:
                raise UserError(f"checkpoint is not in the SD 1 layout: it lacks {min(lacking)}")
            surplus = {key for key in shapes if key.startswith((UNET, VAE + "decoder."))} - wanted.keys()
            if surplus:
                raise UserError(f"checkpoint is not in the SD 1 layout: it has {min(surplus)}")
            for key, parameter in wanted.items():
                if parameter.shape != shapes[key]:
                    raise UserError(
                        f"checkpoint is not in the SD 1 layout: {key} is {list(shapes[key])}, "
                        f"expected {list(parameter.shape)}"
                    )
                parameter.copy_(file.get_tensor(key))
    except SafetensorError as e:
        raise UserError(f"checkpoint {path!r} is not a safetensors file: {e}") from e
    model.sd_checkpoint_info = SimpleNamespace(filename=os.path.abspath(path))  # as the web UI tells of its models
    return model


def _heads_beside(path: str) -> Heads:
    """As the model's configuration beside it has them, which the web UI and the tab go by as well."""
    heads, _ = from_yaml(Path(path).with_suffix(".yaml"))
    return heads or Heads(count=SD1_HEADS)
