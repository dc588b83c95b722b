"""The device that images are made on."""

import contextlib
import gc

import torch
from modules.shared_cmd_options import cmd_opts


def get_optimal_device() -> torch.device:
    """The graphics card if PyTorch sees one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


device = get_optimal_device()


def autocast():
    """Half precision where the web UI would use it: on CUDA, unless --no-half."""
    if device.type == "cuda" and not cmd_opts.no_half:
        return torch.autocast("cuda")
    return contextlib.nullcontext()


def without_autocast(disable=False):
    """Autocast off, if it is on and `disable` is false."""
    if torch.is_autocast_enabled() and not disable:
        return torch.autocast("cuda", enabled=False)
    return contextlib.nullcontext()


def torch_gc() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
