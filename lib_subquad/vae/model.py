"""The halves of Stable Diffusion's VAE in plain PyTorch, with random weights: for whoever has no web UI, as `bench`.

Modules are named as latent diffusion names them, and hold at a time what the web UI's own classes hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attention import attention

CHANNELS, BLOCKS, LATENT_CHANNELS = (128, 256, 512, 512), 2, 4  # of Stable Diffusion 1, 2 and XL

Half = TypeVar("Half", bound=nn.Module)


class ResnetBlock(nn.Module):
    """[batch, into, height, width] to [batch, out, height, width]. `in_place`: SiLU overwrites what it is given."""

    def __init__(self, into: int, out: int, in_place: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels = into, out
        self.norm1, self.conv1 = _norm(into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        if in_place:
            self.swish = nn.SiLU(inplace=True)
        if into != out:
            self.nin_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor, time: None = None) -> Tensor:
        swish = getattr(self, "swish", _swish)
        inside = self.norm1(x)
        inside = swish(inside)
        inside = self.conv1(inside)
        inside = self.norm2(inside)
        inside = swish(inside)
        inside = self.conv2(inside)
        if self.in_channels != self.out_channels:
            x = self.nin_shortcut(x)
        return x + inside


class AttnBlock(nn.Module):
    """Every position attends to every other, with one head of all channels; computed by `attention`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            project(normed).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v)
        )
        output = attention(query, key, value)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(output)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Decoder(nn.Module):
    """Latents [batch, latent channels, height, width] to pictures [batch, 3, 8 * height, 8 * width].

    Args:
        channels: at each resolution, that of the picture first; each after the first doubles the sides.
        blocks: residual blocks at each resolution, beside the one more that a decoder has.
        latent_channels: 4 in Stable Diffusion 1, 2 and XL, 16 in 3 and Flux.
        in_place: whether SiLU in the residual blocks overwrites what it is given, as in the Forge family and SD 3.
    """

    mid: Any
    up: Any

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        blocks: int = BLOCKS,
        latent_channels: int = LATENT_CHANNELS,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks = len(channels), blocks
        now = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, now, 3, padding=1)
        self.mid = _middle(now, in_place)
        levels: list[nn.Module] = []
        for level in reversed(range(len(channels))):
            up = nn.Module()
            up.block, now = _blocks(blocks + 1, now, channels[level], in_place)
            if level:
                up.upsample = Upsample(now)
            levels.insert(0, up)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _norm(now), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        x = self.mid.block_1(x)
        x = self.mid.attn_1(x)
        x = self.mid.block_2(x)
        for level in reversed(range(self.num_resolutions)):
            for block in self.up[level].block:  # here, for a level's own forward would keep what it was given
                x = block(x)
            if level:
                x = self.up[level].upsample(x)
        x = self.norm_out(x)
        x = _swish(x)
        return self.conv_out(x)


class Encoder(nn.Module):
    """Pictures [batch, 3, height, width] to the latents' means and variances [batch, 2 * latent channels, height / 8,
    width / 8]; its arguments are the decoder's."""

    mid: Any
    down: Any

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        blocks: int = BLOCKS,
        latent_channels: int = LATENT_CHANNELS,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks = len(channels), blocks
        now = channels[0]
        self.conv_in = nn.Conv2d(3, now, 3, padding=1)
        levels = []
        for level in range(len(channels)):
            down = nn.Module()
            down.block, now = _blocks(blocks, now, channels[level], in_place)
            if level + 1 < len(channels):
                down.downsample = Downsample(now)
            levels.append(down)
        self.down = nn.ModuleList(levels)
        self.mid = _middle(now, in_place)
        self.norm_out, self.conv_out = _norm(now), nn.Conv2d(now, 2 * latent_channels, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.conv_in(pictures)
        for level, down in enumerate(self.down):
            for block in down.block:
                x = block(x)
            if level + 1 < self.num_resolutions:
                x = down.downsample(x)
        x = self.mid.block_1(x)
        x = self.mid.attn_1(x)
        x = self.mid.block_2(x)
        x = self.norm_out(x)
        x = _swish(x)
        return self.conv_out(x)


def with_random_weights(half: Half, seed: int = 1) -> Half:
    """The same half, to be called only: its numbers neither grow nor vanish from layer to layer, and all norms and
    biases matter."""
    generator = torch.Generator().manual_seed(seed)
    half.eval().requires_grad_(False)
    for module in half.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.uniform_(-1, 1, generator=generator)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.uniform_(-1, 1, generator=generator)
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
    return half


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _middle(channels: int, in_place: bool) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(channels, channels, in_place)
    middle.attn_1 = AttnBlock(channels)
    middle.block_2 = ResnetBlock(channels, channels, in_place)
    return middle


def _blocks(count: int, into: int, out: int, in_place: bool) -> tuple[nn.ModuleList, int]:
    """(residual blocks, the channels that come out of them)"""
    return nn.ModuleList(ResnetBlock(into if not number else out, out, in_place) for number in range(count)), out
