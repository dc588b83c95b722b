"""A web UI's VAE while it is ours: in bands where an image does not fit, and what was sampled is kept if nothing does.

What has the layers of a VAE is hooked at its class. Extensions that set the forward of the one decoder that is loaded,
as Tiled VAE does, pass us by.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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

# What this thread does where memory is short, while it makes pictures that are to stay; None where it makes a preview,
# or what another extension wants for itself.
_when_short: ContextVar[Callable[[], None] | None] = ContextVar("subquad_when_short", default=None)


class _Why(Enum):
    """What was sampled is kept."""

    INTERRUPTED = "Decoding was interrupted: what was not done is a sketch."
    TOO_LITTLE = "There is too little memory to decode the image."
    NO_PICTURE = "The VAE gave no picture. Choose another, or a wider dtype for it, and decode again."
    FAILED = "Decoding failed."


class _Kept(NamedTuple):
    """Where a batch is kept, the `first` of its images and those after it."""

    batch: Callable[[], object] = lambda: None
    path: Path = Path()
    first: int = 0


class Vae:
    """The hooks. `serves` says whether the VAE is ours at this moment."""

    def __init__(self, host: Host, serves: Callable[[], bool]) -> None:
        self._host, self._serves = host, serves
        self.pictures = Pictures(host)
        self._halves: dict[type, Hook] = {}
        self._decode: Hook | None = None
        self.share = 0.0  # of the picture that is made in bands at this moment
        self._kept = _Kept()  # what was kept last
        self.secured: Path | None = None  # what is decoded at this moment, kept in case that the process ends

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
        if (short := _when_short.get()) is None:  # a preview may come from another thread, while this one decodes
            return vae.as_it_fits(half, x, own, processor=False, **how)
        cut_short = self._host.interrupted()  # before it began: what there is of it is decoded all the same
        with self._announcing() as progress:
            how |= {"interrupted": lambda: not cut_short and self._host.interrupted(), "progress": progress}
            how["short"] = short
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
        if _when_short.get() or not (self._serves() and isinstance(batch, Tensor)):
            return self._decode.step_aside(model, batch, *args, **kwargs)
        made = []
        try:
            short = functools.partial(self._secure, model, batch)
            for entries in _entries(batch):  # what is done stays, when the user interrupts what comes next
                made.append(self._decoded(short, model, entries, *args, **kwargs))
            self._decoded_after_all(batch)
        except vae.Interrupted:
            self._keep(model, batch, _Why.INTERRUPTED, len(made))
            made.append(_sketches(batch[len(made) :], *args, **kwargs))
        except Exception as error:
            if self._host.settings().retry and (why := _why_lost(error, batch, len(made))):
                retry.add_line(error, self._keep(model, batch, why))
            elif self.secured is not None:
                self._discard()
            raise
        finally:
            self.secured = None
        pictures, *others = made
        for more in others:
            pictures.extend(more)
        return pictures

    def _decoded_after_all(self, batch: Tensor) -> None:
        """A web UI may decode again what was interrupted in its first pass: then nothing waits."""
        if self._kept.batch() is batch:
            if self.secured is None:
                say(f"[subquad] It was decoded after all: {self._kept.path} is not needed any more.")
            self._discard()
            status.kept("")

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
            how: dict[str, object] = {"target_device": torch.device("cpu")}
            if self._checks_for_nans():
                how["check_for_nans"] = True
            made = self._decoded(lambda: None, self._host.model(), latents.to(device), **how)
        if any(picture.isnan().all() for picture in made):
            raise UserError("The VAE gave no picture.", "Choose another, or a wider dtype for it, then decode.")
        if made[0].shape[-1] <= latents.shape[-1]:
            raise UserError("This web UI made no more of it than a preview.")
        return [(picture.float() / 2 + 0.5).clamp(0, 1) for picture in made]

    def _checks_for_nans(self) -> bool:
        """Whether the web UI finds out itself, as it does for new images, and knows what to do then."""
        standing = getattr(sys.modules["modules.processing"], DECODE)
        own = standing if self._decode is None else self._decode.beneath
        with contextlib.suppress(TypeError, ValueError):  # it may be anything that can be called
            return "check_for_nans" in inspect.signature(own).parameters
        return False

    def _decoded(self, short: Callable[[], None], model, batch, *args, **kwargs):
        """As the web UI does it, told how far it is. Raises what `decoded` does."""
        token = _when_short.set(short)
        try:
            return getattr(sys.modules["modules.processing"], DECODE)(model, batch, *args, **kwargs)
        finally:
            _when_short.reset(token)

    def _keep(self, model, batch: Tensor, why: _Why, first: int = 0) -> str:
        """Keep what was sampled, the `first` image of the batch and those after it: a sentence that says where."""
        try:
            path = self._written(model, batch, first, why is not _Why.NO_PICTURE)
            told = f"{why.value} What was sampled is kept in {path}; the button on the tab Attention decodes it."
        except Exception as error:  # the host's own error is to come through, whatever this one is
            told = f"{why.value} What was sampled could not be kept: {in_a_line(error)}"
        say(f"[subquad] {told}")
        status.kept(told, sketched=why is _Why.INTERRUPTED)
        if why is _Why.INTERRUPTED:  # where it is an error, that says so
            self.pictures.comment(told)
        return told

    def _secure(self, model, batch: Tensor) -> None:
        """Keep all of it as long as it is decoded: the system may end a process that takes too much memory."""
        if self.secured is None and self._host.settings().retry:
            with contextlib.suppress(Exception):  # whatever keeps it from that, the image may be made all the same
                self.secured = self._written(model, batch)

    def _written(self, model, batch: Tensor, first: int = 0, by_this_vae: bool = True) -> Path:
        """Where it is kept from its `first` image on, in the one file that there is of it."""
        is_known = self._kept.batch() is batch and self._kept.path in latents.waiting(self._host.data_folder())
        if is_known and self._kept.first == first and by_this_vae:
            return self._kept.path
        made_by = self.pictures.made_by(model)
        if not by_this_vae:
            made_by.pop("vae", None)
        told_of = [self.pictures.told(index) for index in range(first, len(batch))]
        try:
            path = latents.keep(batch[first:], made_by, told_of, self.pictures.folders(), self._host.data_folder())
        except OSError:
            if is_known and self._kept.first <= first:
                return self._kept.path  # which holds more than is wanted
            raise
        if is_known:
            self._discard()
        self._kept = _Kept(weakref.ref(batch), path, first)
        return path

    def _discard(self) -> None:
        """The file is not needed any more."""
        latents.take_off(self._kept.path, self._host.data_folder())
        with contextlib.suppress(OSError):  # somebody may have it open; no image is to be lost for that
            self._kept.path.unlink(missing_ok=True)
        self._kept = _Kept()


def _why_lost(error: Exception, batch: Tensor, index: int) -> _Why | None:
    """Why this image of what was sampled cannot be decoded; None where there is nothing to be kept."""
    if devices.is_out_of_memory(error):
        return _Why.TOO_LITTLE
    if _is_nothing(batch):
        return None
    by_vae = type(error).__name__ == "NansException" and not _is_nothing(batch[index : index + 1])
    return _Why.NO_PICTURE if by_vae else _Why.FAILED


def _is_nothing(sampled: Tensor) -> bool:
    with contextlib.suppress(Exception):  # a device that is lost tells nothing
        return bool(sampled.isnan().all())
    return False


def _half_encodes(half) -> bool:
    return "Encoder" in type(half).__name__


def _entries(batch: Tensor) -> Sequence[Tensor]:
    """One image after the other."""
    return (batch,) if batch.dim() != 4 or len(batch) < 2 else batch.split(1)


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
