"""Images of what was kept because it could not be decoded."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import NamedTuple

from .. import device as devices
from ..console import UserError, in_a_line, say
from ..vae import Interrupted
from . import infotext, latents, status, words
from .hosts import host
from .words import Said


class _UnderWay(NamedTuple):
    """The name of a file and its number of so many, and the number of one of its images."""

    file: str
    number: int
    files: int
    image: int = 1
    images: int = 1


_under_way: _UnderWay | None = None
_became: tuple[int, list[str]] = 0, []  # the generation after which it was decoded, and what became of it


def waiting(file: str | None = None) -> list[Path]:
    """The files of what is to be decoded, or those of this name. Not what an image is made of at this moment."""
    now = host().vae.secured if host().vae is not None else None
    return [path for path in latents.waiting(host().data_folder()) if file in (None, path.name) and path != now]


def remind(*_) -> None:
    """Say when the web UI starts that something waits: whatever ended it before may have been too little memory."""
    if files := waiting():
        say(f"[subquad] {Said(words.REMINDER, count=status.counted(len(files), 'file', 'files'))}")


def decode(file: str | None = None) -> tuple[list[Path], list[str]]:
    """Decode every one, or those of this name: the images, and a sentence about each file. Not while an image is made.

    Never raises: what cannot be decoded stays where it is, and the sentence says why.
    """
    global _under_way, _became
    files = waiting(file)
    if not files:
        return [], [_none(file)]
    if host().vae is None:
        return [], [words.NO_DECODER]
    if not host().lock().acquire(blocking=False):
        return [], [words.DECODE_LATER]
    made: list[Path] = []
    told: list[str] = []
    try:
        with host().vae.pictures.job("subquad"):
            _under_way = _UnderWay(files[0].name, 1, len(files))
            host().prepare()
            for number, path in enumerate(files, 1):
                _under_way = _UnderWay(path.name, number, len(files))
                if host().interrupted():
                    told.append(str(Said(words.DECODING_INTERRUPTED, file=path.name)))
                    break
                if path not in waiting():  # it was dismissed meanwhile
                    continue
                images, sentences, goes_on = _outcome(path)
                made += images
                told += sentences
                if not goes_on:
                    break
    finally:
        _became = status.generation().number, [*told, words.FILES_STAY] if made else told
        _under_way = None
        try:
            devices.release_cached(host().device())
        finally:  # without the lock no image is made any more
            host().lock().release()
    return made, told


def progress() -> Said | None:
    """How far it is, while something that was kept is decoded."""
    if (now := _under_way) is None:
        return None
    if host().interrupted():
        return Said(words.DECODING_STOPS)
    how_far: list[object] = [now.file]
    if now.files > 1:
        how_far.append(Said(words.FILE_OF, number=now.number, count=now.files))
    if now.images > 1:
        how_far.append(Said(words.IMAGE_OF, number=now.image, count=now.images))
    if share := host().vae.share:  # of what is not computed in bands nobody knows it
        how_far.append(f"{share:.0%}")
    return Said(words.DECODING, how_far=tuple(how_far))


def became() -> list[str]:
    """What became of what was decoded last, as long as no other image is made: a sentence about each file, and one of
    them all."""
    number, told = _became
    return told if number == status.generation().number else []


def stop() -> str:
    """End it after the band that is under way, as `progress` says then: a sentence if nothing is decoded. What has not
    been decoded waits on."""
    if _under_way is None:
        return words.NOT_DECODING
    host().interrupt()
    return ""


def dismiss(file: str | None = None) -> list[str]:
    """Take every one off the list, or those of this name: a sentence about each file."""
    global _became
    told, _became = [], (0, [])
    for path in waiting(file):
        latents.take_off(path, host().data_folder())
        _forget(path)
        told.append(str(Said(words.DISMISSED, file=path)))
    return told or [_none(file)]


def take_in(path: Path | None) -> str:
    """Put on the list, as a copy, what is kept in a file that is on none, of this web UI or another: a sentence."""
    if (vae := host().vae) is None:
        return words.NO_DECODER
    if path is None:
        return words.NO_FILE
    try:
        kept = latents.read(path)
        if again := next((it for it in waiting() if latents.is_same(it, kept)), None):
            return str(Said(words.WAITS_ALREADY, file=again))
        copy = latents.keep(kept.latents, kept.made_by, kept.images, vae.pictures.folders(), host().data_folder())
    except (OSError, UserError) as error:
        return str(Said(words.NOT_TAKEN_IN, why=str(error).rstrip(".")))
    return str(Said(words.TAKEN_IN, file=copy))


def _none(file: str | None) -> str:
    if file is None:
        return words.NOTHING_KEPT
    return str(Said(words.NO_SUCH_FILE, file=file)) if file else words.NO_FILE


def _forget(path: Path) -> None:
    """What the status says of it is over."""
    if str(path) in status.generation().kept:
        status.kept("")


def _outcome(path: Path) -> tuple[list[Path], list[str], bool]:
    """The images of a file, what became of it, and whether nobody interrupted that. What there is none of waits on."""
    images: list[Path] = []
    told: list[str] = []
    left, error, is_part = 0, None, False
    try:
        kept = latents.read(path)
        host().vae.pictures.make_ready(kept.made_by)
        is_part = any(it["part"] for it in kept.images)
        images, left, error = _decoded(path, kept)
    except Exception as raised:  # of any web UI, with any model
        error = _told_of(raised)
    if images:
        form = words.DECODED_PART if is_part else words.DECODED
        told.append(str(Said(form, file=path.name, images=", ".join(map(str, images)))))
    if error is not None and not images:
        form = words.DECODING_INTERRUPTED if isinstance(error, Interrupted) else words.NOT_DECODED
        told.append(str(Said(form, file=path.name, why=_in_words(error))))
    elif left:
        form = words.ALL_STAY if path in waiting() else words.SOME_LEFT
        count = status.counted(left, "image", "images")
        told.append(str(Said(form, count=count, file=path.name, why=_in_words(error))))
    for sentence in told:
        say(f"[subquad] {sentence}")
    return images, told, not isinstance(error, Interrupted)


def _decoded(path: Path, kept: latents.Sampled) -> tuple[list[Path], int, Exception | None]:
    """The images, of how many there is none, and why: those wait on in a file of their own, if there are others."""
    global _under_way
    images: list[Path] = []
    left: list[int] = []
    why = None
    for index in range(len(kept.images)):
        if _under_way is not None:
            _under_way = _under_way._replace(image=index + 1, images=len(kept.images))
        try:
            if index and host().interrupted():  # what is computed all at once does not ask
                raise Interrupted
            images.append(_image(kept, index))
        except Exception as error:
            left.append(index)
            why = _told_of(error)
            if isinstance(error, (Interrupted, OSError)) or devices.is_out_of_memory(error):
                left += range(index + 1, len(kept.images))
                break
    if images and (not left or _are_kept_apart(path, kept, left)):
        latents.take_off(path, host().data_folder())
        _forget(path)
    return images, len(left), why


def _are_kept_apart(path: Path, kept: latents.Sampled, left: list[int]) -> bool:
    """Whether these images of a file could be written to one of their own."""
    told = [kept.images[index] for index in left]
    try:
        latents.keep(kept.latents[left], kept.made_by, told, [path.parent], host().data_folder())
    except OSError as error:
        _told_of(error)
        return False
    return True


def _image(kept: latents.Sampled, index: int) -> Path:
    with status.apart() as seen:
        (picture,) = host().vae.decoded(kept.latents[index : index + 1])
    told = kept.images[index]
    told = {**told, "infotext": infotext.decoded_later(told["infotext"], seen)}
    return host().vae.pictures.save(picture, kept.folder, told)


def _told_of(error: Exception) -> Exception:
    """The console says where an error comes from that has no sentence of ours; its frames, which hold tensors, go."""
    if not isinstance(error, (Interrupted, UserError)):
        say("".join(traceback.format_exception(error)))
    return error.with_traceback(None)


def _in_words(error: Exception | None) -> str:
    if isinstance(error, Interrupted):
        return words.WAS_INTERRUPTED
    if isinstance(error, UserError):
        return str(error)
    return words.STILL_TOO_LITTLE if devices.is_out_of_memory(error) else f"{in_a_line(error)}."
