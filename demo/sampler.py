"""DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 without noise) with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from demo.model import LatentDiffusion


def sample(
    model: LatentDiffusion,
    latent: Tensor,
    context: Tensor,
    negative_context: Tensor,
    steps: int,
    cfg_scale: float = 7.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Denoise `latent` in `steps` steps; `on_step(done)` follows each."""
    alphas = model.alphas_cumprod
    timesteps = torch.linspace(len(alphas) - 1, 0, steps + 1).round().long().tolist()
    both = torch.cat([negative_context, context])
    for done, (now, then) in enumerate(pairwise(timesteps), 1):
        without, with_prompt = model.predict_noise(latent.repeat(2, 1, 1, 1), now, both).chunk(2)
        noise = without + cfg_scale * (with_prompt - without)
        clean = (latent - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
        latent = alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * noise
        if on_step:
            on_step(done)
    return latent
