"""The web UI's VAE in bands, and what was sampled kept where it cannot be decoded, on the demo host."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vae.making import OUT_OF_MEMORY

CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.conv2d)  # the other one in inference mode
SIZE = {"seed": 1, "width": 128, "height": 64, "steps": 1}


class NoRoom(TorchDispatchMode):
    """No convolution of a map wider than `above` finds memory, and none higher than `rows` of those."""

    def __init__(self, above: int = 64, rows: int = 0) -> None:
        super().__init__()
        self.above, self.rows = above, rows

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in CONVOLUTIONS:
            *_, rows, columns = args[0].shape
            if columns > self.above and rows > self.rows:
                raise RuntimeError(OUT_OF_MEMORY)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ours(loaded, tmp_path, monkeypatch):
    """The extension in force; images go to `tmp_path / "images"`, and the web UI's data folder is `tmp_path`."""
    from modules import shared

    from demo.generate import generate
    from lib_subquad import vae
    from lib_subquad.webui import decoding, latents
    from lib_subquad.webui.hosts import host

    loaded.select("subquad")
    monkeypatch.setattr(type(shared.opts), "outdir_samples", str(tmp_path / "images"), raising=False)
    monkeypatch.setattr(type(host()), "data_folder", lambda self: tmp_path)
    loaded.vae = vae
    loaded.folder, loaded.host, loaded.decoding, loaded.latents = tmp_path, host(), decoding, latents
    loaded.generate = lambda **request: generate("a cat", **{**SIZE, **request})
    return loaded


def pixels(made) -> np.ndarray:
    image = made.image if hasattr(made, "image") else made
    return np.asarray(image.convert("RGB"), dtype=int)


def apart(one, other) -> int:
    return np.abs(pixels(one) - pixels(other)).max()


@pytest.mark.parametrize("bands", ["always", "when needed"])
def test_bands_make_the_same_image_and_the_infotext_tells(ours, bands):
    expected = ours.generate(override_settings={"subquad_vae_bands": "never"})
    assert "Subquad VAE bands: never" in expected.infotext and "computed: in" not in expected.infotext
    if bands == "always":
        made = ours.generate(override_settings={"subquad_vae_bands": "always"})
        assert "Subquad VAE bands: always" in made.infotext
    else:
        with NoRoom(rows=40):
            made = ours.generate()
    assert apart(made, expected) <= 1
    assert "Subquad VAE computed: in bands" in made.infotext
    assert "The VAE: bands of" in ours.status.summary()
    assert "Subquad" not in ours.generate().infotext and "bands" not in ours.status.summary()


def test_lower_bands_are_told_as_such(ours):
    expected = ours.generate()
    with NoRoom(rows=12):
        made = ours.generate()
    assert apart(made, expected) <= 1 and "Subquad VAE computed: in lower bands" in made.infotext
    assert "Subquad VAE computed" not in ours.generate().infotext


def test_it_is_ours_only_while_we_are_selected(ours):
    from ldm.modules.diffusionmodules.model import Decoder

    with NoRoom(rows=40):
        ours.generate()
        ours.select("sdp")
        assert Decoder.forward.__module__ == Decoder.__module__
        with pytest.raises(RuntimeError, match="can't allocate"):
            ours.generate()
        ours.select("subquad")
        ours.generate()
    assert not list(ours.folder.rglob("*.safetensors"))


def lost(ours, **request) -> str:
    """What the error says of an image that cannot be decoded."""
    with pytest.raises(RuntimeError) as raised, NoRoom():
        ours.generate(**request)
    return str(raised.value)


def kept(ours) -> list[Path]:
    return sorted(ours.folder.rglob("*.safetensors"))


def test_what_cannot_be_decoded_is_kept_and_decoded_later(ours):
    expected = ours.generate(seed=5)
    said = lost(ours, seed=5)
    (path,) = kept(ours)
    assert OUT_OF_MEMORY in said and f"What was sampled is kept in {path}; the button" in said
    assert path.parent == ours.folder / "images" and path.name.startswith("subquad-latent-")
    assert str(path) in ours.status.summary() and ours.decoding.waiting() == [path]
    with NoRoom():
        images, told = ours.decoding.decode()
    assert images == [] and "still too little memory" in told[0] and ours.decoding.waiting() == [path]
    (image,), (sentence,) = ours.decoding.decode()
    assert image.parent == path.parent and str(image) in sentence
    assert apart(Image.open(image), expected) <= 1
    assert path.is_file() and ours.decoding.waiting() == kept_again(ours) == []
    assert ours.decoding.decode() == ([], ["Nothing waits to be decoded."])


def kept_again(ours) -> list[Path]:
    """What a process finds that starts later."""
    ours.latents._here.clear()
    return ours.decoding.waiting()


def test_several_wait_also_for_a_web_ui_that_is_started_again(ours):
    for seed in (1, 2, 3):
        lost(ours, seed=seed)
    files = kept_again(ours)
    assert len(files) == 3 and set(files) == set(kept(ours))
    files[1].unlink()
    assert ours.decoding.waiting() == [files[0], files[2]]
    images, told = ours.decoding.decode()
    assert len(images) == len(told) == len(set(images)) == 2


@pytest.mark.parametrize("bands", ["", ", Subquad VAE computed: in bands"])
def test_the_infotext_comes_along(ours, monkeypatch, bands):
    """And tells of bands, if decoding it later takes them."""
    from modules import processing

    class Request(SimpleNamespace):
        pass

    monkeypatch.setattr(processing, "create_infotext", lambda p, prompts, *_, index: f"{prompts[index]}, infotext")
    prompts = ["x <lora:x:1>", "y", "a <lora:it:1>", "b"]
    p = Request(all_seeds=[5, 6, 7, 8], all_prompts=prompts, all_subseeds=[0] * 4, iteration=1, batch_size=2)
    p.prompts = ["a", "b"]  # without what names a LoRA
    ours.host.vae.pictures.begin(p)
    p.extra_generation_params = {}
    model = ours.host.model()
    with pytest.raises(RuntimeError), NoRoom(above=0):
        processing.decode_latent_batch(model, torch.randn(2, 4, 8, 8))
    ours.host.vae.pictures.begin(None)
    with NoRoom(above=32, rows=40) if bands else contextlib.nullcontext():
        images, _ = ours.decoding.decode()
    told = [Image.open(it).info["parameters"] for it in images]
    assert told == [f"a <lora:it:1>, infotext{bands}", f"b, infotext{bands}"]
    assert ours.status.generation().bands is None  # which is of another image
    assert [it.stem.split("-")[1] for it in images] == ["7", "8"]


@pytest.mark.parametrize("bands", ["when needed", "always", "never"])
def test_whatever_the_setting(ours, bands):
    assert "What was sampled is kept in" in lost(ours, override_settings={"subquad_vae_bands": bands})


def test_without_retrying_nothing_is_kept(ours):
    assert "kept" not in lost(ours, override_settings={"subquad_retry": False})
    assert not kept(ours)


def test_another_checkpoint_than_the_one_that_made_it(ours, monkeypatch):
    model = ours.host.model()
    model.sd_checkpoint_info = SimpleNamespace(name="one.safetensors")
    lost(ours)
    model.sd_checkpoint_info = SimpleNamespace(name="other.safetensors")
    _, (told,) = ours.decoding.decode()
    assert "It was made with one.safetensors. Choose that checkpoint, then decode." in told
    model.sd_checkpoint_info = SimpleNamespace(name="one.safetensors")
    assert len(ours.decoding.decode()[0]) == 1


def test_not_while_an_image_is_made(ours):
    lost(ours)
    with ours.host.lock():
        later = "The device was busy with an image or a measurement just then: decode when that is done."
        assert ours.decoding.decode() == ([], [later])
    assert len(ours.decoding.decode()[0]) == 1
    assert not ours.host.waiting()


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_a_file_that_is_broken_stays_and_says_so(ours, content):
    from safetensors.torch import save

    lost(ours)
    (path,) = kept(ours)
    path.write_bytes(
        save({"latents": torch.zeros(1, 4, 8, 8)}, {"subquad_latents": "2"}) if content is None else content
    )
    images, (told,) = ours.decoding.decode()
    assert images == [] and told.startswith(f"{path.name} is not decoded, and stays where it is until you delete it: ")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": 3}', '{"files": [3, null, {}]}', "[" * 100_000, '{"files": ["\\u0000"]}']
)
def test_a_list_that_is_broken_is_no_list(ours, content, capsys):
    (ours.folder / ours.latents.LIST).write_text(content, encoding="utf-8")
    assert ours.decoding.waiting() == []
    assert ("is broken, and is subquad_latents.broken.json now" in capsys.readouterr().out) == (
        not content.startswith('{"files": [')
    )
    lost(ours)
    assert len(ours.decoding.waiting()) == 1
    aside = [it.read_text(encoding="utf-8") for it in ours.folder.glob("subquad_latents.broken.json")]
    assert aside == ([] if content.startswith('{"files": [') else [content])
    assert json.loads((ours.folder / ours.latents.LIST).read_text(encoding="utf-8"))["files"] == [str(*kept(ours))]


def test_every_list_that_was_broken_is_there(ours):
    for content in ("one", "two"):
        (ours.folder / ours.latents.LIST).write_text(content, encoding="utf-8")
        assert ours.decoding.waiting() == []
    assert sorted(it.name for it in ours.folder.glob("*.json")) == [
        "subquad_latents.broken.json",
        "subquad_latents.broken1.json",
    ]


def test_a_list_that_cannot_be_opened_for_a_moment_loses_nothing(ours, monkeypatch):
    """As where a scanner of viruses holds it."""
    for seed in (1, 2):
        lost(ours, seed=seed)
    files = ours.decoding.waiting()

    def no_list(path, *how):
        if Path(path).name == ours.latents.LIST:
            raise PermissionError(13, "sharing violation")
        return open(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(ours.latents, "open", no_list, raising=False)
        lost(ours, seed=3)
        (new,) = ours.decoding.waiting()
    assert ours.decoding.waiting() == [*files, new]
    lost(ours, seed=4)
    assert kept_again(ours) == [*files, new, *(set(kept(ours)) - {*files, new})]


def test_a_broken_list_that_cannot_be_put_aside_stays(ours, monkeypatch):
    path = ours.folder / ours.latents.LIST
    path.write_text("broken", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: open(ours.folder))  # no file
        lost(ours)
        assert ours.decoding.waiting() == kept(ours) and path.read_text(encoding="utf-8") == "broken"
    assert ours.decoding.waiting() == kept(ours) and not path.exists()


def test_what_lies_on_a_drive_that_is_away_stays_on_the_list(ours, monkeypatch):
    lost(ours, seed=1)
    (ours.folder / "images").rename(ours.folder / "away")
    monkeypatch.setattr(type(ours.opts), "outdir_samples", str(ours.folder / "others"))
    lost(ours, seed=2)
    assert len(ours.decoding.waiting()) == 1 and len(ours.decoding.decode()[0]) == 1
    (ours.folder / "away").rename(ours.folder / "images")
    assert len(kept_again(ours)) == 1


def test_decoding_later_is_of_no_generation(ours):
    """And what the status said of the file is over with it."""
    lost(ours)
    ours.generate(seed=7)
    before = ours.status.summary()
    assert len(ours.decoding.decode()[0]) == 1 and ours.status.summary() == before
    lost(ours)
    assert "is kept in" in ours.status.summary()
    ours.decoding.decode()
    assert "is kept in" not in ours.status.summary()


def before_saving(ours, monkeypatch, act) -> None:
    """`act` comes before each image of what was kept is saved."""
    save = type(ours.host.vae.pictures).save
    monkeypatch.setattr(type(ours.host.vae.pictures), "save", lambda *given: (act(), save(*given))[1])


def test_where_an_error_comes_from_stands_on_the_console(ours, monkeypatch, capsys):
    """Also of one that comes before the first image."""
    lost(ours)
    monkeypatch.setattr(ours.host.vae.pictures, "make_ready", lambda made_by: 1 / 0)
    capsys.readouterr()
    assert "division by zero" in ours.decoding.decode()[1][0] and "make_ready" in capsys.readouterr().out


def test_what_the_status_tells_is_of_images_while_something_is_decoded_later(ours, monkeypatch):
    lost(ours)
    ours.generate(seed=7)
    before, during = ours.status.summary(), []

    def told_on_a_page():
        page = threading.Thread(target=lambda: during.append(ours.status.summary()))
        with ours.status.apart():
            page.start()
            page.join()

    before_saving(ours, monkeypatch, told_on_a_page)
    assert len(ours.decoding.decode()[0]) == 1 and during == [before]


def test_what_is_dismissed_while_another_is_decoded_is_not_decoded(ours, monkeypatch):
    for seed in (1, 2):
        lost(ours, seed=seed)
    before_saving(ours, monkeypatch, ours.decoding.dismiss)
    images, told = ours.decoding.decode()
    assert len(images) == len(told) == 1 and ours.decoding.waiting() == []


class NansException(Exception):
    """As the web UI's."""


def gives_nan(ours, monkeypatch, check: bool):
    """The VAE gives no number; the web UI finds out, if it is told to and can."""
    from modules import processing

    def decode(model, batch, target_device=None, check_for_nans=False):
        made = processing.DecodedSamples(torch.full((len(batch), 3, 64, 64), torch.nan))
        if check and check_for_nans:
            raise NansException("A tensor with NaNs was produced in VAE.")
        return made

    ours.select("sdp")
    monkeypatch.setattr(processing, "decode_latent_batch", decode)
    ours.select("subquad")


@pytest.mark.parametrize("check", [True, False], ids=["the web UI checks", "it does not"])
def test_what_gives_no_picture_is_not_decoded(ours, monkeypatch, check):
    lost(ours)
    with monkeypatch.context() as patch:
        gives_nan(ours, patch, check)
        images, (told,) = ours.decoding.decode()
    assert images == [] and ("A tensor with NaNs" if check else "The VAE gave no picture.") in told
    assert ours.decoding.waiting() == kept(ours) and len(kept(ours)) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [(NansException("NaNs in VAE"), "The VAE gave no picture."), (KeyError("a layer"), "Decoding failed.")],
)
def test_whatever_keeps_it_from_being_decoded_it_is_kept(ours, monkeypatch, error, said):
    from modules import processing

    def broken(*_, **__):
        raise error

    vae = {"vae": "one.vae"}
    monkeypatch.setattr(type(ours.host.vae.pictures), "made_by", lambda self, model: {"checkpoint": "one", **vae})
    monkeypatch.setattr(ours.vae, "as_it_fits", broken)
    with pytest.raises(type(error)) as raised:
        processing.decode_latent_batch(ours.host.model(), torch.randn(1, 4, 8, 8))
    (path,) = kept(ours)
    assert f"{said} " in raised.value.args[0] and str(path) in raised.value.args[0]
    # With another VAE than the one that gives none it may be decoded.
    made_by = ours.latents.read(path).made_by
    assert made_by["checkpoint"] == "one" and ("vae" in made_by) == isinstance(error, KeyError)
    path.unlink()
    with pytest.raises(type(error)):  # a model that gave nothing has nothing to be kept
        processing.decode_latent_batch(ours.host.model(), torch.full((1, 4, 8, 8), torch.nan))
    assert not kept(ours)


def test_where_memory_is_short_it_is_kept_meanwhile(ours, monkeypatch, capsys):
    """A system that has none left ends the process without a word: then it waits when the web UI is started again."""
    from fastapi import FastAPI
    from modules import script_callbacks

    expected, seen = ours.generate(), []
    in_bands = ours.vae.fallbacks.in_bands

    def watched(*given, **how):
        (path,) = kept(ours)
        seen.append((path, ours.decoding.waiting(), ours.latents.waiting(ours.folder)))
        return in_bands(*given, **how)

    monkeypatch.setattr(ours.vae.fallbacks, "in_bands", watched)
    with NoRoom(rows=40):
        assert apart(ours.generate(), expected) <= 1
    ((path, waiting, listed),) = seen
    assert waiting == [] and listed == [path]
    assert kept(ours) == ours.latents.waiting(ours.folder) == [] and "kept" not in ours.status.summary()

    def ended(*_, **__):
        raise SystemExit

    monkeypatch.setattr(ours.vae.fallbacks, "in_bands", ended)
    with pytest.raises(SystemExit), NoRoom(rows=40):
        ours.generate()
    monkeypatch.undo()
    monkeypatch.setattr(type(ours.host), "data_folder", lambda self: ours.folder)
    assert kept_again(ours) == kept(ours) and len(kept(ours)) == 1
    script_callbacks.app_started_callback(None, FastAPI())
    assert "What was sampled and not decoded waits in 1 file: the tab Attention" in capsys.readouterr().out
    ((image,), _) = ours.decoding.decode()
    assert apart(Image.open(image), expected) <= 1


def test_a_file_that_cannot_be_removed_costs_no_image(ours, monkeypatch):
    def open_elsewhere(self, missing_ok=False):
        raise PermissionError("another program has it open")

    expected = ours.generate()
    monkeypatch.setattr(Path, "unlink", open_elsewhere)
    with NoRoom(rows=40):
        assert apart(ours.generate(), expected) <= 1
    assert len(kept(ours)) == 1 and ours.decoding.waiting() == []


def test_what_was_kept_meanwhile_is_kept_once(ours, monkeypatch):
    lost(ours)
    assert len(kept(ours)) == 1
    monkeypatch.setattr(ours.vae.fallbacks, "_seems_to_fit", lambda *_: False)
    batch_decoded(ours, monkeypatch, stop_at=1)
    assert len(kept(ours)) == 2 and set(ours.decoding.waiting()) == set(kept(ours))
    assert sorted(len(ours.latents.read(path).latents) for path in kept(ours)) == [1, 2]


def test_names_of_files_are_those_of_the_request(ours, monkeypatch):
    """Which is gone by the time that the image is made; a file from elsewhere names none outside its folder."""
    from modules import images

    class Names:
        def __init__(self, p, seed, prompt, image):
            self.told = p, seed, prompt, image

        def apply(self, pattern):
            p, seed, prompt, image = self.told
            return f"{pattern}|{p.batch_index}|{seed}|{prompt}|{image.width}x{image.height}"

    named = []

    def save_image(image, path, basename, seed=None, prompt=None, forced_filename=None, **_):
        named.append(forced_filename)
        return f"{path}/{forced_filename}.png", None

    monkeypatch.setattr(images, "FilenameGenerator", Names, raising=False)
    monkeypatch.setattr(images, "get_next_sequence_number", lambda path, basename: 7, raising=False)
    monkeypatch.setattr(images, "save_image", save_image)
    monkeypatch.setattr(type(ours.opts), "samples_filename_pattern", "[a]/../[b]", raising=False)
    pictures = ours.host.vae.pictures
    p = SimpleNamespace(width=64, height=32, iteration=1, batch_size=2, batch_index=0)
    p.all_seeds, p.all_prompts = [3, 4, 5, 6], ["a", "b", "c", "d"]
    pictures._request = lambda: p
    told = [pictures.told(index) for index in (0, 1)]
    assert p.batch_index == 0 and [it["part"] for it in told] == [False, False]
    for it in told:
        pictures.save(torch.zeros(3, 8, 8), ours.folder, it)
    monkeypatch.setattr(type(ours.opts), "save_images_add_number", False, raising=False)
    pictures.save(torch.zeros(3, 8, 8), ours.folder, told[1])
    pictures.save(torch.zeros(3, 8, 8), ours.folder, dict.fromkeys(told[1]))
    first, second = "[a]_.._[b]_0_5_c_64x32", "[a]_.._[b]_1_6_d_64x32"
    assert named == [f"00007-{first}", f"00007-{second}", second, None]


def test_a_part_of_a_picture_is_told_as_such(ours, monkeypatch):
    from modules import processing

    ours.host.vae.pictures.begin(p := Inpainting())
    with pytest.raises(RuntimeError), NoRoom(above=0):
        processing.decode_latent_batch(ours.host.model(), torch.randn(1, 4, 8, 8))
    _, (told,) = ours.decoding.decode()
    assert "That is the inpainted part alone" in told and p.paste_to


class Inpainting:
    paste_to = (0, 0, 64, 64)


def test_a_checkpoint_of_another_name_is_the_same(ours, monkeypatch):
    model = ours.host.model()
    monkeypatch.setattr(model, "sd_checkpoint_info", SimpleNamespace(name="one", sha256="abc"), raising=False)
    lost(ours)
    model.sd_checkpoint_info.name = "renamed"
    model.sd_checkpoint_info.sha256 = "def"
    assert "It was made with one." in ours.decoding.decode()[1][0]
    model.sd_checkpoint_info.sha256 = "abc"
    assert len(ours.decoding.decode()[0]) == 1


def test_it_tells_how_far_it_is_and_can_be_stopped(ours, monkeypatch):
    from modules import shared

    from lib_subquad.webui.laboratory import LABORATORY

    assert LABORATORY.stop_decoding() == "Nothing is being decoded."
    monkeypatch.setattr(type(shared.state), "textinfo", None, raising=False)
    lost(ours)
    (path,) = kept(ours)
    ours.opts.subquad_vae_bands = "always"
    reached, going_on, announce = threading.Event(), threading.Event(), type(ours.host).announce

    def announced(host, text):
        reached.set()
        going_on.wait(30)
        return announce(host, text)

    monkeypatch.setattr(type(ours.host), "announce", announced)
    steps = LABORATORY.decode()
    assert next(steps) == "" and reached.wait(30)
    told, waits, busy = LABORATORY.waiting()
    assert re.search(f"Decoding <bdi>{path.name}</bdi>(, <bdi>[0-9]+%</bdi>)?[.]", told)
    assert waits and busy
    assert LABORATORY.stop_decoding() == "" == next(steps) and "stops as soon as" in LABORATORY.waiting()[0]
    going_on.set()
    assert list(steps)[-1] == ""
    told, waits, busy = LABORATORY.waiting()
    assert f"Decoding {path.name} was interrupted. It stays where it is." in told and waits and not busy
    assert ours.decoding.waiting() == [path] and not ours.host.vae.share
    ours.opts.subquad_vae_bands = "when needed"
    shared.state.interrupted = False


def test_it_tells_which_file_and_which_image_of_it(ours, monkeypatch):
    folder = ours.folder / "images"
    for count in (1, 2):
        ours.latents.keep(torch.randn(count, 4, 8, 8), {}, [{"seed": 1}] * count, [folder], ours.folder)
    one, two = (path.name for path in ours.decoding.waiting())
    told = []
    before_saving(ours, monkeypatch, lambda: told.append(str(ours.decoding.progress())))
    assert len(ours.decoding.decode()[0]) == 3 and ours.decoding.progress() is None
    assert told == [
        f"Decoding {one}, file 1 of 2.",
        f"Decoding {two}, file 2 of 2, image 1 of 2.",
        f"Decoding {two}, file 2 of 2, image 2 of 2.",
    ]


@pytest.mark.parametrize("full", [False, True])
def test_after_a_stop_the_other_images_of_a_file_wait(ours, monkeypatch, full):
    """Also where each is computed all at once; in the same file where the disk takes no other."""
    path = ours.latents.keep(torch.randn(3, 4, 8, 8), {}, [{"seed": 1}] * 3, [ours.folder / "images"], ours.folder)
    before_saving(ours, monkeypatch, ours.decoding.stop)
    if full:
        monkeypatch.setattr(ours.latents, "write_whole", lambda *_: open(ours.folder))  # no file
    images, told = ours.decoding.decode()
    (left,) = ours.decoding.waiting()
    assert len(images) == 1 and images[0].is_file() and str(images[0]) in told[0]
    where = "which waits on with all of its images" if full else "in a separate file that waits"
    assert told[1] == f"Not decoded: 2 images of {path.name}, {where}: Decoding was interrupted."
    assert (left == path) == full and len(ours.latents.read(left).images) == (3 if full else 2)


def test_of_several_those_that_come_after_a_stop_wait(ours, monkeypatch):
    for seed in (1, 2, 3):
        lost(ours, seed=seed)
    files = ours.decoding.waiting()
    before_saving(ours, monkeypatch, ours.decoding.stop)
    images, told = ours.decoding.decode()
    assert len(images) == 1 and f"Decoding {files[1].name} was interrupted" in told[1] and len(told) == 2
    assert ours.decoding.waiting() == files[1:]
    monkeypatch.undo()


def test_where_no_folder_takes_it_the_next_one_does(ours, monkeypatch):
    (ours.folder / "images").write_text("a file", encoding="utf-8")
    lost(ours)
    assert [it.parent for it in kept(ours)] == [ours.folder / "subquad-latents"]
    monkeypatch.setattr(type(ours.host.vae.pictures), "folders", lambda self: [ours.folder / "images" / "more"])
    assert "What was sampled could not be kept: " in lost(ours)


def test_an_interrupt_ends_the_decoding_and_keeps_what_was_sampled(ours, monkeypatch, capsys):
    from modules import shared

    asked = []

    def interrupted(self):
        asked.append(None)
        return len(asked) > 20

    expected = ours.generate()
    monkeypatch.setattr(type(ours.host), "interrupted", interrupted)
    made = ours.generate(override_settings={"subquad_vae_bands": "always"})
    assert pixels(made).shape == pixels(expected).shape and apart(made, expected) > 20
    assert "Decoding was interrupted" in capsys.readouterr().out
    assert len(kept(ours)) == 1 and ours.decoding.waiting() == kept(ours)
    monkeypatch.undo()
    shared.state.interrupted = True  # before it begins
    assert apart(ours.generate(override_settings={"subquad_vae_bands": "always"}), expected) <= 1
    shared.state.interrupted = False


def batch_decoded(ours, monkeypatch, stop_at):
    """A batch of three of which decoding is interrupted at this image: (pictures, the latents)."""
    from modules import processing

    begun, latents = [], torch.randn(3, 4, 8, 8)
    as_it_fits = ours.vae.as_it_fits

    def counted(half, x, own, **how):
        begun.append(x)
        return as_it_fits(half, x, own, **how)

    monkeypatch.setattr(ours.vae, "as_it_fits", counted)
    monkeypatch.setattr(type(ours.host), "interrupted", lambda self: len(begun) > stop_at)
    ours.opts.subquad_vae_bands = "always"
    with torch.no_grad():
        made = processing.decode_latent_batch(ours.host.model(), latents, target_device=torch.device("cpu"))
    ours.opts.subquad_vae_bands = "when needed"
    monkeypatch.setattr(type(ours.host), "interrupted", lambda self: False)
    return made, latents


def test_what_was_done_of_a_batch_is_done(ours, monkeypatch):
    from safetensors.torch import load_file

    made, latents = batch_decoded(ours, monkeypatch, stop_at=1)
    with torch.no_grad():
        expected = ours.host.model().decode(latents) * 2 - 1
    assert len(made) == 3 and {it.shape for it in made} == {(3, 64, 64)}
    assert torch.allclose(made[0], expected[0], atol=1e-3) and not torch.allclose(made[1], expected[1], atol=0.1)
    (path,) = kept(ours)
    assert torch.equal(load_file(path)["latents"], latents[1:])


def test_what_is_decoded_again_waits_no_more(ours, monkeypatch):
    """As hires fix does it after an interrupt in its first pass."""
    from modules import processing

    _, latents = batch_decoded(ours, monkeypatch, stop_at=0)
    assert len(ours.decoding.waiting()) == 1
    with torch.no_grad():
        processing.decode_latent_batch(ours.host.model(), latents)
    assert ours.decoding.waiting() == kept(ours) == [] and "kept" not in ours.status.summary()


def test_an_interrupt_that_is_over_ends_nothing_and_a_new_one_ends_all(ours, monkeypatch):
    from modules import shared

    for seed in (1, 2, 3):
        lost(ours, seed=seed)
    shared.state.interrupted = True
    ours.opts.subquad_vae_bands = "always"
    done, as_it_fits = [], ours.vae.as_it_fits

    def interrupted_in_the_second(half, x, own, **how):
        assert not shared.state.interrupted
        shared.state.interrupted = len(done) == 1
        done.append(None)
        how["interrupted"] = lambda: shared.state.interrupted
        return as_it_fits(half, x, own, **how)

    monkeypatch.setattr(ours.vae, "as_it_fits", interrupted_in_the_second)
    images, told = ours.decoding.decode()
    assert len(images) == 1 and len(told) == len(done) == 2 and "was interrupted" in told[1]
    assert len(ours.decoding.waiting()) == 2
    shared.state.interrupted, ours.opts.subquad_vae_bands = False, "when needed"


def test_images_that_are_not_saved_leave_nothing_among_those_that_are(ours, monkeypatch):
    monkeypatch.setattr(type(ours.opts), "samples_save", False, raising=False)
    monkeypatch.setattr(type(ours.opts), "enable_pnginfo", False, raising=False)
    lost(ours)
    (path,) = kept(ours)
    assert path.parent == ours.folder / "subquad-latents" and b"a cat" not in path.read_bytes()
    ((image,), _) = ours.decoding.decode()
    assert image.parent == path.parent


def test_a_way_of_decoding_is_remembered(ours, monkeypatch):
    """What was sampled for the VAE is not decoded by a small stand-in for it without a word."""
    monkeypatch.setattr(type(ours.opts), "sd_vae_decode_method", "Full", raising=False)
    lost(ours)
    with monkeypatch.context() as patch:
        patch.setattr(type(ours.opts), "sd_vae_decode_method", "TAESD")
        images, (told,) = ours.decoding.decode()
        assert "It was to be decoded with Full, and now TAESD is chosen. Choose Full under VAE in the settings" in told
        assert images == []
    assert len(ours.decoding.decode()[0]) == 1


def test_tiling_and_another_vae_are_remembered(ours, monkeypatch):
    import sys
    from types import ModuleType

    from modules import processing, sd_hijack

    set_to, now = [], ["one.vae"]
    hijack = SimpleNamespace(apply_circular=set_to.append)
    monkeypatch.setattr(sd_hijack, "model_hijack", hijack, raising=False)
    sd_vae = ModuleType("modules.sd_vae")
    sd_vae.get_loaded_vae_name = lambda: now[0]
    monkeypatch.setitem(sys.modules, "modules.sd_vae", sd_vae)

    class Request(SimpleNamespace):
        pass

    p = Request(tiling=True, sd_vae_name="one.vae")
    ours.host.vae.pictures.begin(p)
    with pytest.raises(RuntimeError), NoRoom(above=0):
        processing.decode_latent_batch(ours.host.model(), torch.randn(1, 4, 8, 8))
    now[0] = None
    _, (told,) = ours.decoding.decode()
    assert "Its VAE was one.vae, and now it is the checkpoint's own. Choose that VAE, then decode." in told
    assert set_to == []
    now[0] = "one.vae"
    assert len(ours.decoding.decode()[0]) == 1 and set_to == [True]


def test_whatever_keeps_it_from_being_kept_hides_no_error(ours, monkeypatch):
    monkeypatch.setattr(ours.latents, "save", lambda *_: 1 / 0)
    said = lost(ours)
    assert OUT_OF_MEMORY in said and "What was sampled could not be kept: ZeroDivisionError" in said
    assert not kept(ours)


def test_a_web_ui_without_us_in_force_decodes_what_waits(ours):
    lost(ours)
    ours.select("sdp")
    assert len(ours.decoding.decode()[0]) == 1


def test_how_far_it_is_is_shown_and_gone_afterwards(ours, monkeypatch):
    from modules import shared

    monkeypatch.setattr(shared.state, "textinfo", "before", raising=False)
    seen, announce = [], type(ours.host).announce

    def watched(self, text):
        seen.append(text)
        return announce(self, text)

    monkeypatch.setattr(type(ours.host), "announce", watched)
    ours.generate(override_settings={"subquad_vae_bands": "always"})
    shares = [int(text[5:-1]) for text in seen[:-1]]
    assert shares == sorted(shares) and shares[0] < 20 and shares[-1] == 100 and len(shares) > 10
    assert shared.state.textinfo == seen[-1] == "before"
    seen.clear()
    ours.generate()
    assert seen == []


def test_a_preview_neither_shows_that_nor_is_it_kept(ours, monkeypatch):
    """It is decoded on another thread, or at least not by the web UI's function for pictures."""
    model, found = ours.host.model(), []
    ours.opts.subquad_vae_bands = "always"
    monkeypatch.setattr(type(ours.host), "announce", lambda self, text: pytest.fail("of a preview"))
    monkeypatch.setattr(type(ours.host), "interrupted", lambda self: True)

    def preview():
        with torch.no_grad():
            found.append(model.decode(torch.randn(1, 4, 8, 8)))
            with NoRoom(above=0), pytest.raises(RuntimeError):
                model.decode(torch.randn(1, 4, 8, 8))

    for run in (preview, lambda: [thread.start() for thread in [threading.Thread(target=preview)]]):
        run()
    for thread in threading.enumerate():
        thread is threading.current_thread() or thread.daemon or thread.join()
    assert len(found) == 2 and not kept(ours)
    ours.opts.subquad_vae_bands = "when needed"


def test_a_guest_that_tiles_passes_us_by_and_leaves_nothing_pinned(ours):
    """As Tiled VAE does it: with a forward for the one decoder that is loaded, and what it found put back."""
    decoder = ours.host.model().first_stage_model.decoder
    found, calls = decoder.forward, []

    def tiled(z):
        calls.append(z.shape)
        return found(z)

    expected = ours.generate()
    decoder.forward = tiled
    made = ours.generate(override_settings={"subquad_vae_bands": "always"})
    assert calls and apart(made, expected) <= 1
    decoder.forward = MethodType(type(decoder).forward, decoder)
    assert "in bands" in ours.generate(override_settings={"subquad_vae_bands": "always"}).infotext
    assert "forward" not in vars(decoder)


def test_the_api(ours):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from modules import script_callbacks

    app = FastAPI()
    app.add_api_route("/sdapi/v1/options", lambda: {})
    script_callbacks.app_started_callback(None, app)
    client = TestClient(app)
    assert client.get("/subquad/v1/kept").json() == {"waiting": []}
    lost(ours)
    assert client.get("/subquad/v1/kept").json() == {"waiting": [it.name for it in kept(ours)]}
    answer = client.post("/subquad/v1/kept").json()
    assert len(answer["images"]) == 1 and (ours.folder / "images" / answer["images"][0]).is_file()
    assert client.get("/subquad/v1/kept").json() == {"waiting": []}

    for seed in (1, 2, 3):
        lost(ours, seed=seed)
    first, second, third = (path.name for path in ours.decoding.waiting())
    (told,) = client.delete(f"/subquad/v1/kept?file={second}").json()["told"]
    assert second in told and client.get("/subquad/v1/kept").json() == {"waiting": [first, third]}
    (told,) = client.post(f"/subquad/v1/kept?file={third}").json()["told"]
    assert told.startswith(f"Decoded {third}: ") and client.get("/subquad/v1/kept").json() == {"waiting": [first]}
    assert client.post("/subquad/v1/kept?file=x").json() == {"images": [], "told": ["x does not wait to be decoded."]}
    for method in ("POST", "DELETE"):  # whoever means to name a file means no other
        assert client.request(method, "/subquad/v1/kept", json={"file": "x"}).status_code == 422
        assert client.request(method, "/subquad/v1/kept?file=x", json={}).status_code == 200
        assert client.request(method, "/subquad/v1/kept?file=").json()["told"] == ["No file was chosen."]
    assert ours.decoding.waiting()
    assert len(client.delete("/subquad/v1/kept").json()["told"]) == 1
    assert client.delete("/subquad/v1/kept").json() == {"told": ["Nothing waits to be decoded."]}


def test_the_tab_offers_to_decode_what_waits(ours):
    from lib_subquad.webui import models, tab

    def shown():
        return tab._look(tab.Visit(), models.LOADED, 64, 64, 1)[4:6]

    nothing = tab._update({"visible": False})
    assert shown() == ["", nothing]
    lost(ours)
    (path,) = kept(ours)
    waits, button = shown()
    assert f"<li><bdi>{path}</bdi></li>" in waits and button == tab._update({"visible": True})
    (_, _, _, decode, stop, dismiss), *_, last = tab._decode()
    assert not decode["interactive"] and stop["visible"] and not dismiss["interactive"]
    told, row, decode, stop, dismiss = last[1:]
    assert last[0] == "" and f"Decoded {path.name}: " in told and row == nothing
    assert decode["interactive"] and not stop["visible"] and dismiss["interactive"]
    assert shown() == [told, nothing]  # on each page, until another image is made
    ours.generate()
    assert shown() == ["", nothing]


def test_what_nobody_wants_is_dismissed(ours):
    from lib_subquad.webui.laboratory import LABORATORY

    lost(ours)
    (path,) = kept(ours)
    assert "is kept in" in ours.status.summary()
    told = LABORATORY.dismiss()
    assert f"Taken off the list: {path}." in told and "stays where it is" in told and path.is_file()
    assert kept_again(ours) == [] and "is kept in" not in ours.status.summary()
    assert "Nothing waits" in LABORATORY.dismiss()


def test_what_was_dismissed_or_comes_from_elsewhere_is_taken_in(ours, tmp_path):
    from lib_subquad.webui.laboratory import LABORATORY

    expected = ours.generate()
    lost(ours)
    (path,) = kept(ours)
    LABORATORY.dismiss()
    elsewhere = tmp_path / "elsewhere.safetensors"
    path.rename(elsewhere)
    told = LABORATORY.take_in(elsewhere)
    (copy,) = ours.decoding.waiting()
    assert str(copy) in told and copy.parent == path.parent and elsewhere.is_file()
    ((image,), _) = ours.decoding.decode(copy.name)
    assert apart(Image.open(image), expected) <= 1
    assert "No file was chosen." in LABORATORY.take_in(None)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_kept_file_is_not_taken_in(ours, tmp_path, content):
    from lib_subquad.webui.laboratory import LABORATORY

    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    told = LABORATORY.take_in(path)
    assert "It is not taken in: it is damaged, cut short or of another kind (" in told and ".." not in told
    assert ours.decoding.waiting() == []


def test_where_nothing_can_be_written_nothing_is_taken_in(ours, monkeypatch):
    from lib_subquad.webui.laboratory import LABORATORY

    lost(ours)
    (path,) = kept(ours)
    assert f"It waits to be decoded already: {path}" in LABORATORY.take_in(path) and kept(ours) == [path]
    LABORATORY.dismiss()
    monkeypatch.setattr(type(ours.host.vae.pictures), "folders", lambda self: [])
    assert "there is no folder" in LABORATORY.take_in(path) and ours.decoding.waiting() == []


@pytest.mark.parametrize("ends", ["an image that is none", "an interrupt", "no memory"])
def test_of_a_file_with_several_images_those_that_can_be_are_decoded(ours, monkeypatch, ends):
    """The others wait on, in a file of their own."""
    latents = torch.randn(3, 4, 8, 8)
    if ends == "an image that is none":
        latents[1] = torch.nan
    ours.latents.keep(latents, {}, [{"seed": 1}, {"seed": 2}, {"seed": 3}], [ours.folder], ours.folder)
    if ends != "an image that is none":
        decoded, begun = type(ours.host.vae).decoded, []

        def second_fails(self, given):
            begun.append(given)
            if len(begun) == 2:
                raise ours.vae.Interrupted if ends == "an interrupt" else RuntimeError(OUT_OF_MEMORY)
            return decoded(self, given)

        monkeypatch.setattr(type(ours.host.vae), "decoded", second_fails)
    images, (told, left) = ours.decoding.decode()
    (path,) = ours.decoding.waiting()
    seeds = [it["seed"] for it in ours.latents.read(path).images]
    assert (len(images), seeds) == ((2, [2]) if ends == "an image that is none" else (1, [2, 3]))
    assert told.startswith("Decoded ") and left.startswith(f"Not decoded: {len(seeds)} image")


def test_what_cannot_be_written_anew_is_still_where_it_was(ours, monkeypatch):
    """An interrupt keeps less than what was secured, for which there may be no room."""

    def no_room(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ours.vae.fallbacks, "_seems_to_fit", lambda *_: False)
    written, keep = [], ours.latents.keep

    def once(*given):
        written.append(given)
        return keep(*given) if len(written) == 1 else no_room()

    monkeypatch.setattr(ours.latents, "keep", once)
    made, _ = batch_decoded(ours, monkeypatch, stop_at=1)
    assert len(made) == 3 and len(written) == 2
    (path,) = ours.decoding.waiting()
    assert str(path) in ours.status.summary() and len(ours.latents.read(path).latents) == 3
