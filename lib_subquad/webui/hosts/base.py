"""What the rest of the extension asks of the web UI that it runs in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from modules import shared

from ...checkpoint import T5_TOKENS, Checkpoint
from ...console import UserError
from ...settings import Settings
from .. import options
from ..status import Reach, Standing
from .seam import module
from .vae import Vae

VAE, UNET = "vae", "unet"  # the two parts of a model in which attention can be ours; "unet" is a transformer's as well


# What part of a function's name says what computes attention.
KNOWN = {
    "pytorch": "PyTorch's attention",
    "xformers": "xformers",
    "sage": "SageAttention",
    "flash": "FlashAttention",
    "sub_quad": "its own sub-quadratic attention",
    "split": "split attention",
    "slice": "split attention",
    "normal": "split attention",
    "basic": "plain attention",
    "dynamic": "dynamic attention",
    "flex": "FlexAttention",
}
IN_WORDS = {UNET: "the U-Net or transformer", VAE: "the VAE"}


@dataclass(frozen=True)
class Loaded:
    """The model that makes the images.

    `filename` is its file, empty where it has none; `shapes` makes tensor name -> shape, under the names that
    checkpoints have; `note` is a sentence for whoever asked about it, if there is something to say.
    """

    filename: str = ""
    shapes: Callable[[], dict[str, tuple[int, ...]]] | None = None
    note: str = ""


class Host:
    """The least that a web UI can be: callbacks, scripts and options, and no attention that anybody could replace.

    A kind of web UI is a subclass in a file of its own. What it does not say otherwise is answered here by whatever the
    web UI happens to have loaded: nothing here needs a name that another one lacks.
    """

    t5_tokens = T5_TOKENS  # what a prompt is filled up to for T5, in models that read it
    has_switch = False  # whether *Use subquad* is a setting of ours, because the web UI offers no choice of attention
    active = False  # whether attention of the next image is ours
    vae: Vae | None = None  # its VAE, where we can take it over

    def callbacks(self) -> dict[str, Callable]:
        """What is to be called by callbacks that only this kind of web UI has: `on_...` -> function."""
        return {}

    def prepare(self) -> None:
        """Before a generation: what others put in our place, or loaded since, comes to us again."""

    def release(self) -> None:
        """After a generation, where the web UI tells of every one."""

    def undo(self) -> None:
        """Nothing of ours stays in the web UI: its scripts are unloaded."""

    def standing(self) -> Standing:
        return Standing(
            "subquad is not active here",
            "this web UI keeps its attention where no extension can replace it. The tab still tells what attention "
            "costs; the settings wait for a web UI that has a list of optimizations or attention as a function.",
        )

    def settings(self) -> Settings:
        """The user's, as they are now, with the web UI's own rule for upcasting in place."""
        return options.current(bool(getattr(shared.opts, "upcast_attn", False)))

    def does_not_run(self, checkpoint: Checkpoint) -> bool:
        """Whether this web UI has no classes for such a model, as far as that is known."""
        return False

    def parts(self, settings: Settings) -> tuple[str, ...]:
        """The parts of a model in which attention is ours, or would be."""
        return (UNET, VAE) if settings.vae else (UNET,)

    def reach(self, served: set[int]) -> Reach:
        """Which of the loaded model's places are not among `served`, the `id` of each that made a call."""
        return Reach()

    def loaded(self) -> Loaded:
        """The model in memory, or the one that will be with the next image.

        Raises:
            UserError: there is none, or it does not show its layers.
        """
        raise UserError("This web UI does not show the loaded checkpoint.", "Choose one from the list.")

    def nothing_loaded(self) -> UserError:
        """For whoever asks about the loaded model while there is none."""
        listed = "Choose one from the list, or make an image first."
        step = listed if self.checkpoints() else "Put one into the web UI's folder of checkpoints."
        return UserError("No checkpoint is loaded yet.", step)

    def checkpoints(self) -> dict[str, str]:
        """Title -> file of every checkpoint on the web UI's list."""
        listed = getattr(module("sd_models"), "checkpoints_list", {})
        return {title: str(info.filename) for title, info in listed.items()}

    def device(self) -> torch.device:
        device = getattr(shared, "device", None) or getattr(module("devices"), "device", None)
        return torch.device(device or "cpu")

    def dtype(self) -> torch.dtype:
        """What the U-Net or transformer computes in."""
        devices = module("devices")
        return getattr(devices, "dtype_unet", getattr(devices, "dtype", torch.float32))

    def waiting(self) -> int:
        """How many images are being made or wait for their turn, as far as the web UI tells: one at least while its
        lock is held."""
        lock = self.lock()
        if lock.acquire(blocking=False):
            lock.release()
            return 0
        return 1 + len(getattr(lock, "_pending_threads", ()))

    def lock(self) -> threading.Lock:
        """What the web UI holds while it makes an image; to be asked with `acquire(blocking=False)`."""
        return getattr(module("call_queue"), "queue_lock", _NO_QUEUE)

    def data_folder(self) -> Path | None:
        """Where the web UI keeps what is the user's own; None where it does not tell."""
        for paths in filter(None, map(module, ("paths", "paths_internal"))):
            folder = getattr(paths, "data_path", None)
            if isinstance(folder, str):
                return Path(folder or getattr(paths, "script_path", ""))  # empty: where the web UI is
        return None

    def announce(self, text: str | None) -> str | None:
        """Show a text where the web UI shows how far an image has come; the one that it takes the place of."""
        state = getattr(shared, "state", None)
        before = getattr(state, "textinfo", None)
        if hasattr(state, "textinfo"):
            state.textinfo = text
        return before

    def model(self) -> object:
        """The one that decodes: what is loaded, or is loaded for this."""
        return getattr(shared, "sd_model", None)

    def interrupted(self) -> bool:
        """Whether the user cut the generation short."""
        state = getattr(shared, "state", None)
        return bool(getattr(state, "interrupted", False) or getattr(state, "skipped", False))

    def interrupt(self) -> None:
        """Cut short what is under way, as the web UI's own button does."""
        state = getattr(shared, "state", None)
        if hasattr(state, "interrupted"):
            state.interrupted = True

    def set(self, key: str, value: object) -> bool:
        """Change one of the web UI's settings, as its own page does; whether it changed.

        Raises:
            AssertionError: settings are frozen; the message says why.
        """
        return shared.opts.set(key, value)

    def save(self) -> None:
        """Write the settings where the web UI finds them when it starts.

        Raises:
            AssertionError, OSError: they cannot be written.
        """
        if config := getattr(shared, "config_filename", None):  # the demo keeps none
            shared.opts.save(config)


class Switched(Host):
    """A web UI that offers no choice of attention: whether subquad is used, and for what, is a setting of ours."""

    has_switch = True

    @property
    def active(self) -> bool:
        return bool(self.parts_in_use())

    def standing(self) -> Standing:
        own, parts = {part: self.own_in_words(part) for part in (UNET, VAE)}, self.parts_in_use()
        both = own[UNET] if own[UNET] == own[VAE] else f"{own[UNET]}, and in the VAE {own[VAE]}"
        if not parts:
            return Standing(
                "subquad is not active",
                f"the web UI uses {both}.",
                f"Set \u201c{options.USE.label}\u201d (in Settings, Sub-quadratic attention, or in Quicksettings if "
                "you have put it there).",
            )
        if len(parts) > 1:
            return Standing("subquad is active", f"without it the web UI would use {both}.")
        (ours,), (other,) = parts, [part for part in own if part not in parts]
        return Standing(
            f"subquad is active in {IN_WORDS[ours]}",
            f"without it the web UI would use {own[ours]}. It does use {own[other]} in {IN_WORDS[other]}.",
        )

    def parts(self, settings: Settings) -> tuple[str, ...]:
        """What the switch says, and it alone: `settings.vae` is that of web UIs without one."""
        return options.use() or (UNET, VAE)

    def parts_in_use(self) -> tuple[str, ...]:
        """The parts of a model in which attention is ours now."""
        return options.use()

    def own_in_words(self, part: str) -> str:
        """What the web UI computes attention by in this part, where it is not ours."""
        raise NotImplementedError


def in_words(name: str) -> str:
    """What a function of this name computes attention by."""
    return next((words for part, words in KNOWN.items() if part in name), name)


def readable(filename: object) -> str:
    """`filename` if a checkpoint can be read there without its model, else empty."""
    filename = str(filename or "")
    return filename if filename.endswith(".safetensors") and Path(filename).exists() else ""


_NO_QUEUE = threading.Lock()
