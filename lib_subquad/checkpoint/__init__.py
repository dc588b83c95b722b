"""The attention layers of a checkpoint, from the header of its `.safetensors` file alone.

Names in a checkpoint follow the modules that hold the tensors, so they and their shapes show where every attention
layer sits and how wide it is. `header` gets them out of the file, `families` says what they are.

Nothing in the file is executed and no tensor is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import families, header
from . import heads as rules
from .layers import PROMPT_TOKENS, T5_TOKENS, AttentionLayer, Checkpoint, CheckpointError
from .tensors import Tensors, named

__all__ = [
    "PROMPT_TOKENS",
    "T5_TOKENS",
    "AttentionLayer",
    "Checkpoint",
    "CheckpointError",
    "from_shapes",
    "read_attention_layers",
]


def read_attention_layers(path: str | os.PathLike[str], heads: int | None = None) -> Checkpoint:
    """The attention layers of the checkpoint at `path`, a `.safetensors` file.

    Args:
        path: the file. A `.yaml` of the same name beside it is asked for the number of heads, as the web UI does.
        heads: number of heads of every layer outside the VAE, if the caller knows better than file and convention.

    Raises:
        CheckpointError: the file is missing, is no intact `.safetensors` file, or holds shapes that contradict each
            other. A file that is intact but not recognised is no error: see `Checkpoint.family` and `notes`.
        ValueError: `heads` is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from lib_subquad.checkpoint import read_attention_layers
        >>> save_file({"decoder.mid.attn_1.q.weight": torch.zeros(64, 64, 1, 1)}, "vae.safetensors")
        >>> found = read_attention_layers("vae.safetensors")
        >>> found.family, [layer.name for layer in found.layers]
        ('VAE', ['decoder.mid.attn_1'])
    """
    path = Path(path)
    rule = rules.asked_for(heads)
    notes: tuple[str, ...] = ()
    try:
        tensors = header.read(path)
        if rule is None:
            rule, notes = rules.from_yaml(path.with_suffix(".yaml"))
        checkpoint = families.describe(tensors, rule)
    except CheckpointError as error:
        raise CheckpointError(f"{named(path.name)}: {error}") from error
    return replace(checkpoint, notes=checkpoint.notes + notes, about_model=checkpoint.about_model + notes)


def from_shapes(shapes: Mapping[str, Sequence[int]], heads: int | None = None) -> Checkpoint:
    """The attention layers of a model whose tensors have these names and shapes.

    Args:
        shapes: name -> shape, such as `{name: tensor.shape for name, tensor in model.state_dict().items()}`.
        heads: number of heads of every layer outside the VAE; None to follow the family's convention.

    Raises:
        CheckpointError: shapes that contradict each other, or channels that do not divide into the heads.
        ValueError: `heads` is not a whole number of at least 1.

    Example:
        >>> from lib_subquad.checkpoint import from_shapes
        >>> (layer,) = from_shapes({"decoder.mid.attn_1.q.weight": (512, 512, 1, 1)}).layers
        >>> query, key, value = layer.shapes(1024, 1024)  # of an image of 1024 x 1024 pixels
        >>> query  # batch, heads, tokens, head width
        (1, 1, 16384, 512)
    """
    return families.describe(Tensors(shapes), rules.asked_for(heads))
