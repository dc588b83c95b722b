"""What commands are asked: a checkpoint, an image size, a device and settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch

from ...checkpoint import T5_TOKENS, CheckpointError, read_attention_layers
from ...console import UserError
from ...settings import OPTIONS, Option, Settings
from ..explain.question import Question
from ..explain.sizes import parse_size
from .arguments import DTYPES, argument, best_device, positive, usable


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


OF_A_CHECKPOINT = ("--heads", "--size", "--batch", "--t5-tokens", "--vae")
SETTINGS = tuple(map(_flag, OPTIONS))


class _Given(argparse.Action):
    """Stores a value, and by which option one was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*getattr(namespace, "given", ()), self.option_strings[0]]


def add_arguments(parser: argparse.ArgumentParser, named_by: str = "--checkpoint", **how: Any) -> None:
    """The checkpoint is `named_by` this option, which differs by `how`; a setting of that name is not asked for."""
    what = {"required": True, "metavar": "FILE", "help": "a .safetensors file (its header is read)", **how}
    parser.add_argument(named_by, dest="checkpoint", **what)
    parser.add_argument(
        "--heads",
        action=_Given,
        type=positive,
        metavar="N",
        help="heads of every layer outside the VAE (default: as the file's family has them)",
    )
    parser.add_argument(
        "--size",
        action=_Given,
        default="512",
        metavar="PIXELS",
        help="of the image: 512 or 1024x1536 (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        action=_Given,
        type=positive,
        default=1,
        metavar="N",
        help="images made at once (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        action=_Given,
        choices=DTYPES,
        help="what the model computes in (default: float16 on a GPU, float32 on the CPU)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu (default: the best this machine has)")
    parser.add_argument(
        "--t5-tokens",
        action=_Given,
        type=positive,
        default=T5_TOKENS,
        metavar="N",
        help="length of the prompt for T5, which SD 3, Flux and Chroma read: 256 in the Forge family, 77 in the web UI "
        "1.10 (default: %(default)s)",
    )
    group = parser.add_argument_group("settings")
    for name, option in OPTIONS.items():
        if _flag(name) == named_by:
            continue
        more: dict[str, Any] = {"default": option.default}
        if isinstance(option.default, bool):
            more = {"choices": ("on", "off"), "default": "on" if option.default else "off"}
        elif option.choices:
            more["choices"] = option.choices
        else:
            more |= {"type": _whole(option), "metavar": "N"}
        words = option.help.replace("%", "%%").removesuffix(".")
        group.add_argument(_flag(name), action=_Given, help=f"{words} (default: {more['default']}).", **more)


def refuse(arguments: argparse.Namespace, options: Collection[str], why: str) -> None:
    """Nothing that was typed is passed over in silence.

    Raises:
        UserError: one of these options was given; `why` says why it has no meaning.
    """
    if given := [it for it in dict.fromkeys(getattr(arguments, "given", ())) if it in options]:
        raise UserError(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no meaning {why}")


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The settings that were given.

    Raises:
        UserError: one is out of its range.
    """
    values = {name: getattr(arguments, name, option.default) for name, option in OPTIONS.items()}
    for name, option in OPTIONS.items():
        if isinstance(option.default, bool) and hasattr(arguments, name):
            values[name] = values[name] == "on"
    settings = Settings(**values)
    # There is no web UI to follow.
    return dataclasses.replace(settings, upcast="never") if settings.upcast == "web UI" else settings


def read_dtype(arguments: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What the model computes in on this device."""
    dtype: torch.dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "float16"))
    return dtype


def read(arguments: argparse.Namespace, named_by: str = "--checkpoint") -> Question:
    """The question that was asked, the checkpoint named by this option.

    Raises:
        UserError: something in it cannot be.
    """
    settings = read_settings(arguments)
    width, height = parse_size(arguments.size)
    device = read_device(arguments)
    try:
        checkpoint = read_attention_layers(arguments.checkpoint, arguments.heads)
    except CheckpointError as error:  # which names the file without its folder
        raise UserError(f"{named_by} {arguments.checkpoint}: {error.__cause__ or error}") from error
    if not checkpoint.layers:
        raise UserError(f"no attention layer that subquad serves. {' '.join(checkpoint.notes)}")
    question = Question(
        checkpoint,
        width,
        height,
        arguments.batch,
        read_dtype(arguments, device),
        device,
        settings,
        t5_tokens=arguments.t5_tokens,
        vae=settings.vae,
    )
    if not question.layers:
        raise UserError("the file holds a VAE and no U-Net, and with --vae off the VAE is left out")
    return question


def read_device(arguments: argparse.Namespace) -> torch.device:
    """The device that was asked for, or the best that there is.

    Raises:
        UserError: it cannot be used.
    """
    return usable(arguments.device or str(best_device()))


def _whole(option: Option) -> Callable[[str], object]:
    @argument
    def whole(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r}; expected {option.expected}") from None

    return whole
