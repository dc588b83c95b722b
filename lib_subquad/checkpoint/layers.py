"""What is answered about a checkpoint: its attention layers, each with the shapes it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..console import UserError
from ..settings import shown
from ..steps import UP, VaeStep

Shape = tuple[int, int, int, int]

PROMPT_TOKENS = 77  # CLIP reads a prompt in pieces of 75 tokens between a start and an end token
# T5 reads it whole, filled up to so many tokens by the Forge family; the web UI 1.10.1 takes as many as CLIP's.
T5_TOKENS = 256


class CheckpointError(UserError):
    """A file or a set of shapes that cannot be a checkpoint."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a checkpoint.

    Attributes:
        name: the module's name, such as "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1".
        part: "unet", "transformer", "vae_encoder" or "vae_decoder".
        kind: "self" (the image looks at itself), "cross" (the image looks at the prompt) or "joint" (image and prompt
            in one sequence look at all of it).
        heads: number of heads.
        head_width: channels of one head; heads × head_width is the layer's width.
        downsampling: pixels along one side of the image for one token: 8, 16, 32 or 64 in a U-Net, 16 in a transformer.
        context_tokens: CLIP's tokens of one piece of the prompt (77), or 0 where it is not looked at; None for
            self-attention.
        context_width: channels of a prompt token as the model is given it; None for self-attention, and where the file
            does not tell.
        reads_t5: whether T5's tokens of the prompt are looked at (too).
        guidance_copies: how many times one image passes through this layer at once when a negative prompt is in use
            (classifier-free guidance): 2 in a U-Net, 3 in instruct-pix2pix, 1 in a VAE.
        latent_factor: pixels along one side of the image for one latent pixel (8 in every Stable Diffusion).
        fills_up: whether latent pixels that fill no whole token make one more, as behind a convolution with padding;
            they are left out otherwise.
    """

    name: str
    part: str
    kind: str
    heads: int
    head_width: int
    downsampling: int
    context_tokens: int | None = None
    context_width: int | None = None
    reads_t5: bool = False
    guidance_copies: int = 1
    latent_factor: int = 8
    fills_up: bool = False

    @property
    def is_vae(self) -> bool:
        """Whether it is a part of the VAE, and not of the model that makes the latent image."""
        return self.part in ("vae_encoder", "vae_decoder")

    def tokens(self, width: int, height: int) -> int:
        """Positions of an image of `width` × `height` pixels in this layer.

        Raises:
            ValueError: a side that is not a whole number, or is shorter than one latent pixel.
        """
        for side in (width, height):
            check_whole("an image side", side, self.latent_factor)
        return self._side(width) * self._side(height)

    def _side(self, pixels: int) -> int:
        if self.part != "vae_encoder":  # the only one that is given pixels
            pixels -= pixels % self.latent_factor
        return max((pixels + self.fills_up * (self.downsampling - 1)) // self.downsampling, 1)

    @property
    def size_step(self) -> int:
        """Sides of an image that this layer sees whole are multiples of so many pixels."""
        return self.downsampling if self.part == "transformer" and not self.fills_up else self.latent_factor

    def shapes(
        self,
        width: int,
        height: int,
        batch: int = 1,
        guidance: bool = True,
        prompt_tokens: int = PROMPT_TOKENS,
        t5_tokens: int = T5_TOKENS,
    ) -> tuple[Shape, Shape, Shape]:
        """The shapes of query, key and value, each (batch, heads, tokens, head width).

        Args:
            width, height: of the image, in pixels.
            batch: images generated at once. The web UI passes them through the VAE one by one.
            guidance: whether a negative prompt is in use, so that each image passes through the model more than once.
            prompt_tokens: length of the prompt for CLIP: 77, or a multiple of it for prompts of more than 75 tokens.
            t5_tokens: length of the prompt for T5.

        Raises:
            ValueError: a size, batch or prompt length out of range; the message names it.
        """
        check_whole("batch", batch, 1)
        check_whole("prompt_tokens", prompt_tokens, 1)
        check_whole("t5_tokens", t5_tokens, 1)
        if prompt_tokens % PROMPT_TOKENS:
            raise ValueError(f"prompt_tokens is {prompt_tokens}; expected a multiple of {PROMPT_TOKENS}")
        if self.is_vae:
            batch = 1
        elif guidance:
            batch *= self.guidance_copies
        queries = keys = self.tokens(width, height)
        context = (self.context_tokens or 0) * (prompt_tokens // PROMPT_TOKENS) + self.reads_t5 * t5_tokens
        if self.kind == "cross":
            keys = context
        elif self.kind == "joint":
            queries = keys = queries + context
        query = (batch, self.heads, queries, self.head_width)
        key = (batch, self.heads, keys, self.head_width)
        return query, key, key


@dataclass(frozen=True)
class Checkpoint:
    """What a header told.

    Attributes:
        family: such as "Stable Diffusion 1.x", "SDXL base, inpainting", "Flux dev", "VAE" or "unknown".
        layers: the attention layers that this extension serves, the model's in the order they run, then the VAE's.
            Empty for a model that is recognised but not served, and for one that is not recognised.
        notes: sentences for the user: where the number of heads comes from, what is missing, what was not recognised.
        about_model: those of the notes that are about the U-Net or transformer alone.
        largest_side: pixels along the longest side of an image that the model knows positions for; None for any.
        encoder, decoder: the VAE's layers in the order they run; empty where there is none, or none that is known.
    """

    family: str
    layers: tuple[AttentionLayer, ...] = ()
    notes: tuple[str, ...] = ()
    largest_side: int | None = None
    about_model: tuple[str, ...] = ()
    encoder: tuple[VaeStep, ...] = ()
    decoder: tuple[VaeStep, ...] = ()

    @property
    def latent_factor(self) -> int:
        """Pixels along one side of the image for one latent pixel of the VAE."""
        return 2 ** sum(step.resizes == UP for step in self.decoder)


def check_whole(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number of at least {minimum}")
