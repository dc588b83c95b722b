"""What was sampled and could not be decoded: a file beside the images, and a list of such files."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..console import UserError, first_line, say
from ..lab.whole import write_whole

LIST = "subquad_latents.json"  # in the web UI's data folder
LATENTS, FORMAT = "latents", "subquad_latents"
LARGEST_LIST = 1 << 20  # bytes
TOLD = {"infotext": str, "seed": int, "prompt": str, "name": str, "part": bool}

_editing = threading.Lock()  # the list
_here: list[Path] = []  # what this process could not write there


@dataclass(frozen=True)
class Sampled:
    """Latents [images, channels, height, width] as the sampler left them, and what belongs to them.

    `made_by` tells what they are to be decoded with, as the web UI names it; `folder` is where their images would be;
    `images` tells of each what `TOLD` names: the name of its file is without number or ending, and `part` says that it
    was to be put into another picture.
    """

    latents: Tensor
    made_by: dict[str, object]
    folder: Path
    images: tuple[dict[str, object], ...]


def keep(
    latents: Tensor,
    made_by: Mapping[str, object],
    images: Sequence[Mapping[str, object]],
    folders: Iterable[Path],
    data_folder: Path | None,
) -> Path:
    """Write them to a file in the first of these folders that takes it, and note it in the data folder's list.

    `made_by` and `images` are those of `Sampled`.

    Raises:
        OSError: they can be written nowhere.
    """
    if latents.dim() != 4:
        raise ValueError("it is of no kind that can be decoded later")
    told = {FORMAT: "1", "made_by": json.dumps(made_by, default=str), "images": json.dumps(images, default=str)}
    content = save({LATENTS: latents.detach().to("cpu").contiguous()}, told)
    now = time.strftime("%Y%m%d-%H%M%S")
    why = OSError("there is no folder")
    for folder in folders:
        path = folder / f"subquad-latent-{now}-{time.monotonic_ns() % 10**6:06}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            why = error
            continue
        _put_on(path, data_folder)
        return path
    raise why


def read(path: Path) -> Sampled:
    """What `keep` wrote.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(str(path), "pt") as file:
            told, latents = file.metadata() or {}, file.get_tensor(LATENTS)
        images = tuple(map(_told, json.loads(told["images"])))
        made_by = json.loads(told["made_by"])
        is_sampled = (
            latents.dim() == 4 and latents.is_floating_point() and latents.numel() and latents.element_size() > 1
        )
        if told[FORMAT] != "1" or not (is_sampled and isinstance(made_by, dict) and len(latents) == len(images)):
            raise ValueError("its parts do not belong together")
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = first_line(error).rstrip(".")
        raise UserError(f"it is damaged, cut short or of another kind ({why}).") from error
    return Sampled(latents, made_by, path.parent, images)


def is_same(path: Path, kept: Sampled) -> bool:
    """Whether the file holds the same."""
    try:
        other = read(path)
    except UserError:
        return False
    return torch.equal(other.latents, kept.latents) and other.images == kept.images


def _told(image: dict[str, object]) -> dict[str, object]:
    """What it tells, if that is what it should be."""
    return {name: it if isinstance(it := image.get(name), kind) else None for name, kind in TOLD.items()}


def waiting(data_folder: Path | None) -> list[Path]:
    """The files on the list that are there now, the oldest first. Never raises."""
    with _editing:
        listed = list(_here)
        with contextlib.suppress(OSError):
            listed = _listed(data_folder)
    return list(filter(_is_file, listed))


def _edit_list(change: Callable[[list[Path]], Iterable[Path]], data_folder: Path | None) -> None:
    """What cannot be read is not written either: this process then remembers by itself what it would have written."""
    with _editing:
        with contextlib.suppress(OSError):
            if data_folder is not None:
                files = list(map(str, change(_listed(data_folder))))
                write_whole(data_folder / LIST, json.dumps({"files": files}, indent=1).encode())
                _here.clear()
                return
        _here[:] = change(_here)


def _listed(data_folder: Path | None) -> list[Path]:
    """All of the list but those that were deleted; what lies on a drive that is away may come back.

    Raises:
        OSError: it cannot be read.
    """
    found: list[object] = [] if data_folder is None else _read_list(data_folder / LIST)
    paths = map(Path, dict.fromkeys(str(it) for it in (*found, *_here)))
    return [path for path in paths if _is_file(path) or not _is_folder(path.parent)]


def _read_list(path: Path) -> list[object]:
    """One that is broken is put aside, for whoever looks for files that it named."""
    try:
        with open(path, "rb") as file:
            return list(json.loads(file.read(LARGEST_LIST))["files"])
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, RecursionError):
        names = (f"{path.stem}.broken{number or ''}.json" for number in itertools.count())
        aside = next(it for it in map(path.with_name, names) if not it.exists())
        path.replace(aside)
        say(
            f"[subquad] {path} is broken, and is {aside.name} now. There is a new list of what waits to be decoded: "
            "files that it named are taken in on the tab Attention, under About."
        )
        return []


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # no path of this system
        return path.is_file()
    return False


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def _put_on(path: Path, data_folder: Path | None) -> None:
    _edit_list(lambda paths: [*paths, path], data_folder)


def take_off(path: Path, data_folder: Path | None) -> None:
    """Its images are there, or nobody wants them any more: off the list. The file stays."""
    _edit_list(lambda paths: [it for it in paths if it != path], data_folder)
