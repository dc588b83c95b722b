"""A web UI's VAE while it is ours: in bands where an image does not fit, and what was sampled is kept if nothing does.

What has the layers of a VAE is hooked at its class. Extensions that set the forward of the one decoder that is loaded,
as Tiled VAE does, pass us by.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import device as devices
from ... import retry, vae
from ...console import UserError, in_a_line, say
from .. import latents, status
from .hooks import Hook
from .pictures import Pictures

if TYPE_CHECKING:
    from .base import Host

HALVES = ("Decoder", "Encoder", "VAEDecoder", "VAEEncoder")
DECODE = "decode_latent_batch"  # of `modules.processing`: from what was sampled to pictures
PIXELS = 8  # of a latent, in each direction
INTERRUPTED = "Decoding was interrupted: what was not done is a sketch."
_NOTHING: tuple[Callable[[], object], Path | None] = (lambda: None, None)

# Whether this thread makes pictures to be kept, and not a preview or what another extension wants for itself.
_makes_pictures: ContextVar[bool] = ContextVar("subquad_makes_pictures", default=False)


class Vae:
    """The hooks. `serves` says whether the VAE is ours at this moment."""

    def __init__(self, host: Host, serves: Callable[[], bool]) -> None:
        self._host, self._serves = host, serves
        self.pictures = Pictures(host)
        self._halves: dict[type, Hook] = {}
        self._decode: Hook | None = None
        self.share = 0.0  # of the picture that is made in bands at this moment
        self._kept = _NOTHING  # the tensor that was kept last, and where

    def apply(self) -> None:
        self._find()
        for hook in self._hooks:
            hook.apply()

    def catch_up(self) -> None:
        """While in force: what was loaded since comes to us as well."""
        for hook in self._find():
            hook.apply()

    def undo(self) -> None:
        for hook in self._hooks:
            hook.undo()

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(self._halves)

    @property
    def _hooks(self) -> list[Hook]:
        return [*self._halves.values(), *filter(None, [self._decode])]

    def _find(self) -> list[Hook]:
        """What the web UI has loaded by now; what is new among it is returned."""
        new = []
        for home in vae.HOMES:
            for name in HALVES:
                owner = getattr(sys.modules.get(home), name, None)
                if isinstance(owner, type) and owner not in self._halves:
                    self._halves[owner] = Hook(owner, "forward", self._forward_of(owner))
                    new.append(self._halves[owner])
        processing = sys.modules.get("modules.processing")
        if self._decode is None and hasattr(processing, DECODE):
            self._decode = Hook(processing, DECODE, self._pictures)
            new.append(self._decode)
        return new

    def _forward_of(self, owner: type) -> Callable:
        def forward(half, x, *args, **kwargs):
            return self._computed(self._halves[owner], half, x, *args, **kwargs)

        return forward

    def _computed(self, hook: Hook, half, x: Tensor, *args, **kwargs) -> Tensor:
        own = functools.partial(hook.step_aside, half)
        if args or kwargs or not self._serves():
            return own(x, *args, **kwargs)
        how = {"settings": self._host.settings(), "forward": hook.beneath}
        if _half_encodes(half):
            return vae.as_it_fits(half, x, own, report=status.record_bands, **how)
        if not _makes_pictures.get():  # a preview may come from another thread, while this one decodes
            return vae.as_it_fits(half, x, own, processor=False, **how)
        cut_short = self._host.interrupted()  # before it began: what there is of it is decoded all the same
        with self._announcing() as progress:
            how |= {"interrupted": lambda: not cut_short and self._host.interrupted(), "progress": progress}
            return vae.as_it_fits(half, x, own, report=status.record_bands, **how)

    @contextlib.contextmanager
    def _announcing(self) -> Iterator[Callable[[float], None]]:
        """Shows how far the picture is, in the place of what the web UI showed, which comes back."""
        before: list[str | None] = []

        def progress(share: float) -> None:
            self.share = share
            replaced = self._host.announce(f"VAE: {share:.0%}")
            before.append(replaced) if not before else None

        try:
            yield progress
        finally:
            self.share = 0.0
            if before:
                self._host.announce(before[0])

    def _pictures(self, model, batch, *args, **kwargs):
        """What the web UI makes of what was sampled. What cannot be decoded, or is not to be waited for, is kept."""
        if _makes_pictures.get() or not (self._serves() and isinstance(batch, Tensor)):
            return self._decode.step_aside(model, batch, *args, **kwargs)
        made = []
        for start, entries in _entries(batch):  # what is done stays, when the user interrupts what comes next
            try:
                made.append(self._decoded(model, entries, *args, **kwargs))
            except vae.Interrupted:
                self._keep(model, batch, INTERRUPTED, start)
                made.append(_sketches(batch[start:], *args, **kwargs))
                break
            except Exception as error:
                if self._host.settings().retry and devices.is_out_of_memory(error):
                    retry.add_line(error, self._keep(model, batch, "There is too little memory to decode the image."))
                raise
        else:
            self._decoded_after_all(batch)
        pictures, *others = made
        for more in others:
            pictures.extend(more)
        return pictures

    def _decoded_after_all(self, batch: Tensor) -> None:
        """A web UI may decode again what was interrupted in its first pass: then nothing waits."""
        tensor, path = self._kept
        if path is not None and tensor() is batch:
            latents.take_off(path, self._host.data_folder())
            path.unlink(missing_ok=True)
            say(f"[subquad] It was decoded after all: {path} is not needed any more, and gone.")
            status.kept("")
            self._kept = _NOTHING

    def decoded(self, latents: Tensor) -> list[Tensor]:
        """The pictures [3, height, width], from 0 to 1, of what was sampled by the loaded checkpoint.

        Raises:
            UserError: this web UI shows no way to, or decodes by an approximation.
            Interrupted: the user has had enough of it.
            RuntimeError: the device's own out-of-memory.
        """
        if not hasattr(sys.modules.get("modules.processing"), DECODE):
            raise UserError("This web UI shows no way to decode.")
        with torch.no_grad():
            device = self._host.device()
            made = self._decoded(self._host.model(), latents.to(device), target_device=torch.device("cpu"))
        if made[0].shape[-1] <= latents.shape[-1]:
            raise UserError("This web UI made no more of it than a preview.")
        return [(picture.float() / 2 + 0.5).clamp(0, 1) for picture in made]

    def _decoded(self, model, batch, *args, **kwargs):
        """As the web UI does it, told how far it is. Raises what `decoded` does."""
        token = _makes_pictures.set(True)
        try:
            return getattr(sys.modules["modules.processing"], DECODE)(model, batch, *args, **kwargs)
        finally:
            _makes_pictures.reset(token)

    def _keep(self, model, batch: Tensor, why: str, first: int = 0) -> str:
        """Keep what was sampled, the `first` image of the batch and those after it: a sentence that says where."""
        try:
            told_of = [self.pictures.told(index) for index in range(first, len(batch))]
            how = self.pictures.made_by(model), told_of, self.pictures.folders(), self._host.data_folder()
            path = latents.keep(batch[first:], *how)
            self._kept = weakref.ref(batch), path
            told = f"{why} What was sampled is kept in {path}; the button on the tab Attention decodes it."
        except Exception as error:  # the host's own error is to come through, whatever this one is
            told = f"{why} What was sampled could not be kept: {in_a_line(error)}"
        say(f"[subquad] {told}")
        status.kept(told, sketched=why is INTERRUPTED)
        if why is INTERRUPTED:  # where it is an error, that says so
            self.pictures.comment(told)
        return told


def _half_encodes(half) -> bool:
    return "Encoder" in type(half).__name__


def _entries(batch: Tensor) -> list[tuple[int, Tensor]]:
    """One image after the other: (its number, its part of the batch)."""
    if batch.dim() != 4 or len(batch) < 2:
        return [(0, batch)]
    return [(start, batch[start : start + 1]) for start in range(len(batch))]


def _sketches(batch: Tensor, target_device: torch.device | None = None, *_, **__):
    """Pictures in the colours of what was sampled, as live previews show them, in the size of those to be."""
    processing, approximation = sys.modules["modules.processing"], sys.modules.get("modules.sd_vae_approx")
    batch = batch.detach().float()
    try:
        pictures = approximation.cheap_approximation(batch).float()
    except Exception:  # more channels than it knows
        pictures = batch.new_zeros(len(batch), 3, *batch.shape[2:])
    pictures = torch.nn.functional.interpolate(pictures, size=[PIXELS * side for side in batch.shape[2:]])
    made = getattr(processing, "DecodedSamples", list)()
    made.extend(pictures.to(target_device or pictures.device))
    return made
