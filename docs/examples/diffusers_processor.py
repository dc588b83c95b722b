"""diffusers' models with this library's attention, whatever processors they have: SD 1 to SDXL, SD 3, Flux, the VAE.

    for model in (pipe.unet, pipe.vae):  # or pipe.transformer
        model.set_attn_processor(processors(model, Settings(memory_limit=50)))

A processor keeps its class, its weights and its arguments; only PyTorch's function in it is another one. To go back,
keep `model.attn_processors` from before and set them again.
"""

import copy
import functools

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lib_subquad import Settings, sdpa


class Subquadratic(TorchFunctionMode):
    """`with Subquadratic(): ...` computes this thread's calls of PyTorch's attention function with this library."""

    def __init__(self, settings: Settings = Settings()) -> None:
        super().__init__()
        self.settings = settings

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return sdpa(*args, **(kwargs or {}), settings=self.settings)
        return function(*args, **(kwargs or {}))


def processors(model, settings: Settings = Settings()) -> dict[str, object]:
    """The model's own attention processors with this library's attention, by name, for its `set_attn_processor`."""
    return {name: _served(processor, settings) for name, processor in model.attn_processors.items()}


def _served(processor, settings: Settings):
    own = type(processor)

    @functools.wraps(own.__call__)  # diffusers hands over only the arguments whose names it reads there
    def call(self, *args, **kwargs):
        with Subquadratic(settings):
            return own.__call__(self, *args, **kwargs)

    served = copy.copy(processor)
    served.__class__ = type(own.__name__, (own,), {"__call__": call})
    return served
