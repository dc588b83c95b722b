"""What a checkpoint holds, family by family.

A family is a file here and its name in `FAMILIES`. The file has two functions:

    prefixes(tensors: Tensors) -> list[str]
        What stands before the model's names, for each such model in a file; [] for a file that holds none. Ask for
        names that every file of the family has, and that parts of it such as a ControlNet lack:
        `tensors.prefixes(NEEDED)`.

    read(model: Tensors, heads: Heads | None, latent_factor: int) -> Checkpoint
        The family's name, its attention layers in the order they run, and notes, from the names behind the prefix.
        `heads` is what the caller or a `.yaml` beside the file says of them; None where the family's convention
        decides. `latent_factor` is the side of a latent pixel in pixels of the image. Where shapes contradict each
        other it raises CheckpointError: `model.shape(name, dimensions)` and `Heads.divide` do.

The VAE is read apart (`vae.py`): its attention is the same in every family. Files of other kinds are called what they
are by `others.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ..heads import Heads
from ..layers import Checkpoint
from ..tensors import Tensors, named
from . import flux, others, sd3, unet, vae


class Family(Protocol):
    def prefixes(self, tensors: Tensors) -> list[str]: ...

    def read(self, model: Tensors, heads: Heads | None, latent_factor: int) -> Checkpoint: ...


FAMILIES: list[Family] = [unet, sd3, flux]

# What the web UIs look for. The last is what files have that hold a transformer or a U-Net only.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

NO_VAE = "No VAE attention in this file: the web UI uses a separate VAE, whose layers are not listed here."


def describe(tensors: Tensors, heads: Heads | None) -> Checkpoint:
    """What the names and shapes of a file tell.

    Raises:
        CheckpointError: they contradict each other.
    """
    found = [(prefix, family) for family in FAMILIES for prefix in family.prefixes(tensors)]
    known = sorted((PREFIXES.index(prefix), number) for number, (prefix, _) in enumerate(found) if prefix in PREFIXES)
    if found and not known:
        where = f"its model's names start with {named(found[0][0])}, where the web UI expects {PREFIXES[0]!r}"
        return Checkpoint("unknown", notes=(f"Not recognised: {where}.",))
    if not known and (other := others.read(tensors)) is not None:
        return other

    vae_layers, latent_factor, vae_notes = vae.read(tensors)
    encoder, decoder = vae.halves(tensors)
    if not known:
        if vae_layers:
            notes = ("Only a VAE: the file holds no U-Net or transformer.", *vae_notes)
            return Checkpoint("VAE", vae_layers, notes, encoder=encoder, decoder=decoder)
        return Checkpoint("unknown", notes=(f"Not recognised. The names in it start with {tensors.beginnings()}.",))

    prefix, family = found[known[0][1]]
    model = family.read(tensors.under(prefix), heads, latent_factor)
    notes = (*model.notes, *vae_notes, *([] if vae_layers else [NO_VAE]))
    layers = model.layers + vae_layers
    return replace(model, layers=layers, notes=notes, about_model=model.notes, encoder=encoder, decoder=decoder)
