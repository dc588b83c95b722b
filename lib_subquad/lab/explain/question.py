"""What Explain, Measure, the API and the command line are asked, and the answer in rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from ... import device as devices
from ...checkpoint import PROMPT_TOKENS, T5_TOKENS, AttentionLayer, Checkpoint
from ...plan import plan_problem
from ...problem import Problem
from ...settings import Settings
from ...steps import VaeStep
from ...vae import lowest, plan_bands
from . import sizes
from .halves import COUNTS, PROCESSOR, Half
from .rows import Row

LARGEST_BATCH = 64


@dataclass(frozen=True)
class Question:
    """How attention is computed for images of a size, made with a checkpoint on a device under these settings.

    Attributes:
        width, height: of an image, in pixels; batch: images made at once. Taken as they were typed or sent.
        t5_tokens: how long a prompt is for T5, where the model reads it.
        model, vae: whether attention is ours in the U-Net or transformer, and in the VAE.
        free_bytes: of the device; asked for where it is not given, once, so that all answers go by the same.

    Raises:
        UserError: a size or batch out of range.
    """

    checkpoint: Checkpoint
    width: int
    height: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    settings: Settings
    t5_tokens: int = T5_TOKENS
    model: bool = True
    vae: bool = True
    free_bytes: int = None  # type: ignore[assignment]  # asked for before anybody sees it

    def __post_init__(self) -> None:
        checked = {name: sizes.side(name.title(), getattr(self, name)) for name in ("width", "height")}
        checked["batch"] = sizes.whole("Batch size", self.batch, 1, LARGEST_BATCH)
        if self.free_bytes is None:
            checked["free_bytes"] = devices.free_bytes(self.device)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> list[AttentionLayer]:
        """Those whose attention is ours."""
        return [layer for layer in self.checkpoint.layers if (self.vae if layer.is_vae else self.model)]

    @property
    def notes(self) -> tuple[str, ...]:
        """The checkpoint's, and a sentence where the prompt's or the image's size may not be as asked for."""
        notes: tuple[str, ...] = self.checkpoint.notes
        if all(layer.is_vae for layer in self.layers):
            notes = tuple(note for note in notes if note not in self.checkpoint.about_model)
        return (*notes, *self._prompt_note(), *self._side_note(), *self._size_note())

    def _prompt_note(self) -> list[str]:
        """How many tokens of the prompt stand in one sequence with the image's: of their number plans depend."""
        layer = next((layer for layer in self.layers if layer.kind == "joint"), None)
        if layer is None or not layer.reads_t5:
            return []
        clip = f"{PROMPT_TOKENS} tokens of CLIP and " if layer.context_tokens else ""
        return [f"The prompt is counted as {clip}{self.t5_tokens} tokens of T5; a longer one has more."]

    def _size_note(self) -> list[str]:
        step, (width, height) = self._step, self._computed_size
        if (width, height) == (self.width, self.height):
            return []
        asked = f"{self.width} x {self.height}"
        return [f"Sizes go in steps of {step} pixels: {asked} is computed as {width} x {height}."]

    def _side_note(self) -> list[str]:
        most = self.checkpoint.largest_side
        if most is None:
            return []
        return [f"This model makes no image with a side over {most} pixels, however much memory there is."]

    @property
    def _step(self) -> int:
        """Sides of an image that all of the model sees whole, the VAE too, are multiples of so many pixels."""
        return max((layer.size_step for layer in self.checkpoint.layers), default=1)

    @property
    def _computed_size(self) -> tuple[int, int]:
        return self.width - self.width % self._step, self.height - self.height % self._step

    def rows(self) -> list[Row]:
        """A row for every distinct shape among the layers, the costliest first."""
        counted: Counter[tuple[str, str, Problem]] = Counter()
        alike = Counter(replace(layer, name="") for layer in self.layers)  # a model has few kinds, and many of each
        for layer, count in alike.items():
            shapes = layer.shapes(*self._computed_size, self.batch, t5_tokens=self.t5_tokens)
            upcast = self.settings.upcast == "always"
            problem = Problem.from_shapes(*shapes, self.dtype, self.device, upcast=upcast)
            counted[layer.part, layer.kind, problem] += count
        rows = [
            Row(part, kind, count, problem, plan_problem(problem, self.settings, self.free_bytes))
            for (part, kind, problem), count in counted.items()
        ]
        return sorted(rows, key=lambda row: row.problem.queries * row.problem.keys * row.problem.heads, reverse=True)

    def halves(self) -> list[Half]:
        """How the VAE's convolutions are computed, the decoder's first; nothing of what the checkpoint does not tell.

        Whoever makes images without a picture to begin with needs no encoder; it takes less than the decoder.
        """
        width, height = self._computed_size
        factor = self.checkpoint.latent_factor
        asked = (
            ("vae_decoder", self.checkpoint.decoder, height // factor, width // factor),
            ("vae_encoder", self.checkpoint.encoder, height, width),
        )
        return [self._half(*half) for half in asked if half[1]]

    def _half(self, part: str, steps: tuple[VaeStep, ...], height: int, width: int) -> Half:
        made = plan_bands(steps, height, width, self.dtype, self.settings, free_bytes=self.free_bytes)
        layers = sum(COUNTS.get(step.kind, 0) for step in steps)
        least = lowest(made, steps, height, width, self.dtype)
        on_card = self.device.type != "cpu"
        return Half(part, layers, self._computed_size, made, least.bytes, self.free_bytes, self.settings, on_card)

    def largest_image(self) -> tuple[int, int] | None:
        """(width, height) of the largest image in these proportions that `fits`; None where not even the smallest does.

        Multiples of `sizes.STEP`, at most `sizes.LARGEST_SIDE` and the model's own largest side. What the model needs
        beside attention and the VAE is not known here.
        """
        most = self.checkpoint.largest_side or sizes.LARGEST_SIDE
        candidates = [size for size in sizes.in_proportion(self.width, self.height) if max(size) <= most]
        low, high = 0, len(candidates)  # candidates[:low] fit, candidates[high:] do not
        while low < high:
            middle = (low + high) // 2
            width, height = candidates[middle]
            fits = replace(self, width=width, height=height).fits()
            low, high = (middle + 1, high) if fits else (low, middle)
        return candidates[low - 1] if low else None

    def fits(self) -> bool:
        """Whether every attention call of this size stays inside the memory limit, all that it holds included, and so
        does each half of the VAE, in bands if need be."""
        return self.attention_fits() and all(half.fits for half in self.halves())

    def attention_fits(self) -> bool:
        """Whether every attention call does."""
        return all(row.call_bytes <= self.limit_bytes for row in self.rows())

    def last_resort(self) -> str:
        """How the VAE comes through although an image of this size takes more than the memory limit, as `Half` has it;
        empty where it does not, or attention takes more as well."""
        resorts = {half.last_resort for half in self.halves() if not half.fits}
        if "" in resorts or not self.attention_fits():
            return ""
        return PROCESSOR if PROCESSOR in resorts else "".join(resorts)

    @property
    def limit_bytes(self) -> int:
        """The user's share of the free memory."""
        return self.free_bytes * self.settings.memory_limit // 100
