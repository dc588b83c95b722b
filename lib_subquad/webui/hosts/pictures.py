"""What the web UI makes of a request: where its images go, what is told of them, and what they are decoded with.

For whoever keeps what was sampled, and makes the images of it later.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from modules import shared
from PIL import Image

from ...console import UserError
from .. import latents
from .seam import module

if TYPE_CHECKING:
    from .base import Host

UNSAVED = "subquad-latents"  # within the data folder, for what was made of requests whose images are not saved


class Pictures:
    """Those of the last request that began, in this web UI."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._request: Callable[[], object] = lambda: None
        self._tell: Callable[[object], None] = lambda p: None

    def begin(self, p: object, tell: Callable[[object], None] = lambda p: None) -> None:
        """A request begins; what is to be known of it is asked of it until the next one does. `tell` writes into it
        what its infotexts are to tell so far."""
        self._request, self._tell = lambda: None, tell
        with contextlib.suppress(TypeError):
            self._request = weakref.ref(p)

    def folders(self) -> list[Path]:
        """Where the last request's images go, if they are saved; and where something may be written otherwise."""
        p, folders = self._request(), []
        named = getattr(p, "outpath_samples", "") or getattr(shared.opts, "outdir_samples", "")
        named = named or getattr(shared.opts, "outdir_txt2img_samples", "")
        saved = getattr(shared.opts, "samples_save", True) and not getattr(p, "do_not_save_samples", False)
        if named and saved:
            folders.append(Path(str(named)).absolute() / self._subfolder())
        if (data := self._host.data_folder()) is not None:
            folders.append(data / UNSAVED)
        return [*folders, Path(tempfile.gettempdir())]

    def _subfolder(self) -> str:
        """Within the folder of images, as the web UI's pattern has it."""
        if not getattr(shared.opts, "save_to_dirs", False):
            return ""
        with contextlib.suppress(Exception):  # what a pattern asks for may not be there
            told, pattern = self.told(0), shared.opts.directories_filename_pattern or "[prompt_words]"
            names = module("images").FilenameGenerator(self._request(), told["seed"], told["prompt"], None)
            return names.apply(pattern).strip(" ").rstrip("\\/")
        return ""

    def told(self, index: int) -> dict[str, object]:
        """Of an image of the last request's batch its infotext, seed, prompt and file's name, and whether it is a part
        that is put into another picture; None where it does not tell."""
        p = self._request()
        told: dict[str, object] = {**dict.fromkeys(latents.TOLD), "part": getattr(p, "paste_to", None) is not None}
        if getattr(shared.opts, "enable_pnginfo", True):  # a prompt may be part of it
            with contextlib.suppress(Exception):  # every web UI's own, of a request in any state
                told["name"] = _name(p, index)
        with contextlib.suppress(Exception):
            # Those of all batches: what names a LoRA is taken out of this batch's prompts while it is made.
            index = _number(p, index)
            told["seed"] = p.all_seeds[index]
            if getattr(shared.opts, "enable_pnginfo", True):
                self._tell(p)
                told["prompt"], given = p.all_prompts[index], (p.all_prompts, p.all_seeds, p.all_subseeds)
                told["infotext"] = module("processing").create_infotext(p, *given, index=index)
        return told

    def comment(self, sentence: str) -> None:
        """Say something below the images of the last request, where the web UI has a place for it."""
        with contextlib.suppress(Exception):  # every web UI's own
            self._request().comment(sentence)  # type: ignore[attr-defined]

    def made_by(self, model: object) -> dict[str, object]:
        """What this request's pictures are decoded with: checkpoint, VAE, which way of decoding, and whether their
        edges meet."""
        p, names = self._request(), {"vae": "sd_vae_name", "tiling": "tiling"}
        told = {key: getattr(p, name) for key, name in names.items() if hasattr(p, name)}
        return {"checkpoint": _checkpoint_of(model), "hash": _hash_of(model), "way": _way_of_decoding(), **told}

    def make_ready(self, made_by: Mapping[str, object]) -> None:
        """Load and set what these pictures are to be decoded with, as far as the user has chosen it.

        Raises:
            UserError: something else is chosen.
        """
        if not self._is_loaded(made_by):
            _load_chosen()
            if not self._is_loaded(made_by):
                wanted = made_by["checkpoint"]
                raise UserError(f"It was made with {wanted}.", "Choose that checkpoint, then decode.")
        named = getattr(module("sd_vae"), "get_loaded_vae_name", None)
        if callable(named) and "vae" in made_by and made_by["vae"] != (loaded := named()):
            was, now = (name or "the checkpoint's own" for name in (made_by["vae"], loaded))
            raise UserError(f"Its VAE was {was}, and now it is {now}.", "Choose that VAE, then decode.")
        if (way := made_by.get("way")) and way != (chosen := _way_of_decoding()):
            raise UserError(
                f"It was to be decoded with {way}, and now {chosen} is chosen.",
                f"Choose {way} under VAE in the settings, then decode.",
            )
        if "tiling" in made_by:
            _set_tiling(self._host.model(), made_by["tiling"])

    def _is_loaded(self, made_by: Mapping[str, object]) -> bool:
        """Whether its checkpoint is in memory, under whatever name; as far as it is known."""
        model, wanted, content = self._host.model(), made_by.get("checkpoint"), made_by.get("hash")
        return not wanted or wanted == _checkpoint_of(model) or bool(content) and content == _hash_of(model)

    @contextlib.contextmanager
    def job(self, name: str) -> Iterator[None]:
        """Work of ours, as the web UI does its own: whoever interrupts means this, and not what was before."""
        state = getattr(shared, "state", None)
        begin, end = (getattr(state, it, None) for it in ("begin", "end"))
        if callable(begin):
            begin(job=name)
        for flag in ("interrupted", "skipped"):
            if hasattr(state, flag):
                setattr(state, flag, False)
        try:
            yield
        finally:
            if callable(end):
                end()

    def save(self, picture: torch.Tensor, folder: Path, told: Mapping[str, object]) -> Path:
        """Write a picture as the web UI does; where it is. `told` as the method of that name has it.

        Raises:
            OSError: it cannot be written.
        """
        image = Image.fromarray((picture * 255).movedim(0, 2).to(torch.uint8).contiguous().numpy())
        how = {"extension": getattr(shared.opts, "samples_format", "png"), "save_to_dirs": False}
        if named := _in_turn(folder, str(told["name"] or ""), how["extension"]):
            how["forced_filename"] = named
        path, _ = module("images").save_image(
            image, str(folder), "", told["seed"], told["prompt"], info=told["infotext"], **how
        )
        return Path(path)


def _number(p: object, index: int) -> int:
    """Of an image of this batch among those of all batches."""
    return index + getattr(p, "iteration", 0) * p.batch_size  # type: ignore[attr-defined]


def _name(p: object, index: int) -> str:
    """Of an image's file, without the number that it begins with: as its request has it, which is gone when the image
    is made at last."""
    usual = "[seed]" if getattr(shared.opts, "save_to_dirs", False) else "[seed]-[prompt_spaces]"
    pattern = shared.opts.samples_filename_pattern or usual
    width = getattr(p, "hr_upscale_to_x", 0) or p.width
    height = getattr(p, "hr_upscale_to_y", 0) or p.height
    number = _number(p, index)
    before, p.batch_index = getattr(p, "batch_index", 0), index
    try:
        size = Image.new("1", (width, height))
        of_image = p.all_seeds[number], p.all_prompts[number], size
        return module("images").FilenameGenerator(p, *of_image).apply(pattern)
    finally:
        p.batch_index = before


def _in_turn(folder: Path, name: str, extension: str) -> str:
    """That name with the number that is next in the folder, if the web UI gives them, or one that no other image has;
    empty where the web UI is to find one."""
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name)  # it comes from a file
    if name and not getattr(shared.opts, "save_images_add_number", True):
        names = (name, *(f"{name}-{number}" for number in range(1, 1000)))
        return next((it for it in names if not (folder / f"{it}.{extension}").exists()), "")
    with contextlib.suppress(Exception):  # every web UI's own
        return name and f"{module('images').get_next_sequence_number(str(folder), ''):05}-{name}"
    return ""


def _checkpoint_of(model: object) -> str:
    """The name of its file, as the web UI's list has it; empty where it does not tell."""
    info = getattr(model, "sd_checkpoint_info", None)
    return str(getattr(info, "name", "") or getattr(info, "title", ""))


def _hash_of(model: object) -> str:
    """Of its file; empty where it does not tell, or nobody has asked for it yet."""
    return str(getattr(getattr(model, "sd_checkpoint_info", None), "sha256", None) or "")


def _way_of_decoding() -> str:
    """By the VAE, or by a small stand-in for it; empty where the user has no choice."""
    return str(getattr(shared.opts, "sd_vae_decode_method", ""))


def _load_chosen() -> None:
    """Load the checkpoint that the settings name, where another one is in memory, as a refiner is."""
    load = getattr(module("sd_models"), "reload_model_weights", None)
    if callable(load):
        load()


def _set_tiling(model: object, tiling: object) -> None:
    """Whether edges meet. The web UI sets it anew for each request."""
    processing, hijack = module("processing"), getattr(module("sd_hijack"), "model_hijack", None)
    if callable(apply := getattr(processing, "apply_circular_forge", None)):
        apply(model, tiling)
    elif callable(apply := getattr(hijack, "apply_circular", None)):
        apply(tiling)
