"""What `plan` and `lab` are asked on the command line: a checkpoint, an image size, a device and settings."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint, CheckpointError, read_attention_layers
from ..settings import OPTIONS, Option, Settings
from . import cli
from .explain import LARGEST_SIDE, SIZE_STEP, Row, explain, with_size_note

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Question:
    checkpoint: Checkpoint
    width: int
    height: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    settings: Settings

    def rows(self) -> list[Row]:
        return explain(self.layers, self.width, self.height, self.batch, self.dtype, self.device, self.settings)

    @property
    def layers(self):
        return [layer for layer in self.checkpoint.layers if self.settings.vae or layer.part == "unet"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a .safetensors file (its header is read)")
    parser.add_argument(
        "--heads",
        type=cli.positive,
        metavar="N",
        help="heads of every U-Net layer (default: as the file's family has them)",
    )
    parser.add_argument(
        "--size", default="512", metavar="PIXELS", help="of the image: 512 or 1024x1536 (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=cli.positive, default=1, metavar="N", help="images made at once (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the model computes in (default: float16 on a GPU, float32 on the CPU)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu (default: the best this machine has)")
    group = parser.add_argument_group("settings")
    for name, option in OPTIONS.items():
        more: dict = {"default": option.default}
        if isinstance(option.default, bool):
            more = {"choices": ("on", "off"), "default": "on" if option.default else "off"}
        elif option.choices:
            more["choices"] = option.choices
        else:
            more |= {"type": _whole(option), "metavar": "N"}
        words = option.help.replace("%", "%%").removesuffix(".")
        group.add_argument(_flag(name), help=f"{words} (default: {more['default']}).", **more)


def read(arguments: argparse.Namespace) -> Question:
    """The question that was asked.

    Raises:
        ValueError: something in it cannot be; the message is a sentence for the user.
    """
    values = {name: getattr(arguments, name) for name in OPTIONS}
    for name, option in OPTIONS.items():
        if isinstance(option.default, bool):
            values[name] = values[name] == "on"
    settings = Settings(**values)
    if settings.upcast == "web UI":
        settings = dataclasses.replace(settings, upcast="never")  # there is none to follow
    width, height = parse_size(arguments.size)
    try:
        device = torch.device(arguments.device) if arguments.device else best_device()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {arguments.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    dtype = DTYPES[arguments.dtype] if arguments.dtype else torch.float32 if device.type == "cpu" else torch.float16
    try:
        checkpoint = read_attention_layers(arguments.checkpoint, arguments.heads)
    except CheckpointError as error:  # which names the file without its folder
        raise ValueError(f"--checkpoint {arguments.checkpoint}: {error.__cause__ or error}") from error
    if not checkpoint.layers:
        raise ValueError(f"no attention layer that subquad serves. {' '.join(checkpoint.notes)}")
    checkpoint = with_size_note(checkpoint, width, height)
    question = Question(checkpoint, width, height, arguments.batch, dtype, device, settings)
    if not question.layers:
        raise ValueError("the file holds a VAE and no U-Net, and with --vae off the VAE is left out")
    return question


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "512" or "1024x1536".

    Raises:
        ValueError: anything else, or more or less than `largest_image` goes to.
    """
    match = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", text.strip())
    if match is None:
        raise ValueError(f"size is {text!r}; expected pixels such as 512 or 1024x1536")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(SIZE_STEP <= side <= LARGEST_SIDE for side in (width, height)):
        raise ValueError(f"size is {text!r}; expected from {SIZE_STEP} to {LARGEST_SIDE} pixels")
    return width, height


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    for name in ("xpu", "mps"):
        backend = getattr(torch, name, None)
        if backend is not None and getattr(backend, "is_available", lambda: False)():
            return torch.device(name)
    return torch.device("cpu")


def _whole(option: Option) -> Callable[[str], object]:
    @cli.argument
    def whole(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r}; expected {option.expected}") from None

    return whole


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
