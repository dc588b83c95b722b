"""One question, answered in rows, in the largest image and in words, for real checkpoints' headers and for layers of
every kind."""

import dataclasses

import pytest
import torch

from lib_subquad import Settings
from lib_subquad.checkpoint import AttentionLayer, Checkpoint, from_shapes
from lib_subquad.console import UserError
from lib_subquad.device import GIB
from lib_subquad.lab import tables
from lib_subquad.lab.explain.question import LARGEST_BATCH, Question
from lib_subquad.lab.explain.rows import grouped
from lib_subquad.lab.explain.sizes import LARGEST_SIDE, parse_size
from lib_subquad.lab.explain.words import layers_in_words, size_in_words
from tests.checkpoint import public_models

CPU = torch.device("cpu")


def checkpoint(name):
    return from_shapes(public_models.tensors(name))


def question(found, width=512, height=None, free=8 * GIB, dtype=torch.float32, settings=Settings(), **parts):
    return Question(found, width, height or width, 1, dtype, CPU, settings, free_bytes=free, **parts)


def table(name, size, **settings):
    return question(checkpoint(name), size, settings=Settings(**settings)).rows()


def layers_in(rows, part, kind):
    return sum(row.layers for row in rows if row.part.startswith(part) and row.kind == kind)


# --------------------------------------------------------------------------------------------------------------- rows


def test_sdxl_base_at_1024_has_140_layers_and_the_vae():
    rows = table("sdxl_base", 1024)
    assert layers_in(rows, "unet", "self") == layers_in(rows, "unet", "cross") == 70
    assert layers_in(rows, "vae", "self") == 2
    assert {row.problem.queries for row in rows if row.part == "unet"} == {4096, 1024}


def test_sd15_at_512_has_32_layers_and_the_vae():
    rows = table("sd15", 512)
    assert layers_in(rows, "unet", "self") + layers_in(rows, "unet", "cross") == 32
    assert layers_in(rows, "vae", "self") == 2


def test_the_table_says_what_a_setting_brings_about():
    row = next(row for row in table("sd15", 512, kv_chunk=256) if row.problem.queries == 4096 == row.problem.keys)
    assert row.cells()["Engine"] == "portable"
    assert row.cells()["KV chunk"] == "256"
    assert "splits 4096 keys" in row.cells()["Why"]


@pytest.mark.parametrize(
    ("parts", "layers", "of_the_vae"),
    [({}, 34, {False, True}), ({"model": False}, 2, {True}), ({"vae": False}, 32, {False})],
)
def test_only_what_is_ours_is_answered(parts, layers, of_the_vae):
    asked = question(checkpoint("sd15"), **parts)
    assert len(asked.layers) == layers and {row.is_vae for row in asked.rows()} == of_the_vae


def test_a_question_goes_by_one_reading_of_free_memory(monkeypatch):
    readings = iter([8 * GIB])
    monkeypatch.setattr("lib_subquad.device.free_bytes", lambda device: next(readings))
    asked = question(checkpoint("sd15"), free=None)
    assert asked.rows() and asked.largest_image() and asked.free_bytes == 8 * GIB
    assert question(checkpoint("sd15"), free=0).free_bytes == 0


def test_a_size_that_is_computed_smaller_is_noted():
    found = checkpoint("sd15")
    assert question(found, 512, 768).notes == found.notes
    note = "Sizes go in steps of 8 pixels: 500 x 519 is computed as 496 x 512."
    assert question(found, 500, 519).notes == (*found.notes, note)


def test_layers_that_share_a_plan_are_told_together(fused_kernel):
    groups = [group.cells() for group in grouped(table("sd15", 512))]
    assert [(it["Where"], it["Layers"], it["Tokens"], it["Heads"]) for it in groups] == [
        ("U-Net, self", "16", "64² to 8²", "8 × 40 to 160"),
        ("VAE, self", "2", "64²", "1 × 512"),
        ("U-Net, cross", "16", "64² to 8², prompt 77", "8 × 40 to 160"),
    ]
    assert {it["At a time"] for it in groups} == {"all at once"}
    assert groups[0]["Memory"].endswith(" at most") and not groups[1]["Memory"].endswith(" at most")
    (joint,) = grouped(question(Checkpoint("x", layer("transformer", "joint", 57), ()), 1024).rows())
    assert (joint.layers, joint.cells()["Tokens"]) == (57, "4352")  # of no square
    other = [group.cells()["Heads"] for group in grouped(table("sdxl_base", 1024))]
    assert "10 to 20 × 64" in other


def test_what_is_computed_otherwise_is_told_apart(fused_kernel):
    groups = [group.cells() for group in grouped(table("sd15", 512, query_chunk=512))]
    assert {it["At a time"] for it in groups if it["Where"] == "U-Net, self"} == {"512 × all", "all at once"}
    groups = [group.cells() for group in grouped(table("sd15", 512, kv_chunk=256))]
    assert {"portable", "fused"} == {it["Engine"] for it in groups if it["Where"] == "U-Net, self"}
    assert sum(int(it["Layers"]) for it in groups) == 34


def test_notes_about_the_model_are_for_whoever_asks_about_it():
    found = checkpoint("sd15")
    assert any("Prompt tokens" in note for note in question(found).notes)
    told = question(found, model=False).notes
    assert not any("Prompt" in note or "Heads" in note for note in told)
    assert (
        "Sizes go in steps of 8 pixels: 500 x 512 is computed as 496 x 512."
        in question(found, 500, 512, model=False).notes
    )


def test_heads_are_those_of_a_layer():
    assert {row.cells()["Heads"] for row in table("sd15", 512) if not row.is_vae} == {"8 x 40", "8 x 80", "8 x 160"}


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"), (1, "0.1 KiB"), (12 * 1024, "12 KiB"), (2**20 // 10 + 1, "0.1 MiB"), (31 * 2**20, "31 MiB"),
        (2**20 * 3 // 2, "1.5 MiB"), (int(123.4 * 2**20), "123 MiB"), (25 * GIB // 2, "12.5 GiB"), (None, "–"),
    ],
)  # fmt: skip
def test_memory_is_told_in_a_unit_that_leaves_something_of_it(count, words):
    assert tables.memory(count) == words


# -------------------------------------------------------------------------------------------------------------- sizes


def test_the_largest_image_grows_with_memory_and_every_call_of_it_fits():
    sd15, sizes = checkpoint("sd15"), []
    for free in (GIB // 4, GIB, 4 * GIB):
        size = question(sd15, 768, 512, free, torch.float16).largest_image()
        rows = question(sd15, *size, free, torch.float16).rows()
        assert max(row.call_bytes for row in rows) <= free * 70 // 100
        assert size[0] % 64 == size[1] % 64 == 0
        assert size[0] / size[1] == pytest.approx(1.5, rel=0.1)
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_no_image_fits_no_memory():
    asked = question(checkpoint("sd15"), free=1000, dtype=torch.float16)
    assert asked.largest_image() is None
    assert size_in_words(asked) == (
        "An image of 512 × 512 does not fit. Not even the smallest image keeps its attention and decoding inside the "
        "memory limit."
    )


def test_a_size_between_two_steps_that_fits_is_not_said_not_to():
    asked = question(checkpoint("sd15"), 1000)
    enough = max(half.bytes for half in dataclasses.replace(asked, free_bytes=0).halves()) * 100 // 70 + 1
    assert "does not fit" not in size_in_words(dataclasses.replace(asked, free_bytes=enough))
    larger = size_in_words(question(asked.checkpoint, 1024, free=enough))
    assert "An image of 1024 × 1024 takes more than the memory limit." in larger


def test_the_largest_image_that_is_named_can_be_asked_about():
    asked = question(checkpoint("sd15"), 768, 512, free=2**60)
    assert asked.largest_image()[0] == LARGEST_SIDE
    assert question(asked.checkpoint, *asked.largest_image()).rows()
    assert size_in_words(asked).startswith(
        "Up to 16384 × 10944, the largest in these proportions, images keep their attention and decoding inside the "
        "memory limit. The"
    )


@pytest.mark.parametrize("value", [0, -64, 63, 64.5, LARGEST_SIDE + 1, "wide", "", None, True, float("nan"), 10**400])
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_side_that_makes_no_image_is_said(side, value):
    with pytest.raises(UserError, match=rf"^{side.title()} is .*; it must be a whole number from 64 to 16384\.$"):
        dataclasses.replace(question(checkpoint("sd15")), **{side: value})


@pytest.mark.parametrize("value", [0, LARGEST_BATCH + 1, 1.5, None])
def test_a_batch_that_cannot_be_is_said(value):
    with pytest.raises(UserError, match=r"^Batch size is .*; it must be a whole number from 1 to 64\.$"):
        dataclasses.replace(question(checkpoint("sd15")), batch=value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", (512, 512)), ("1024x1536", (1024, 1536)), (" 64X128 ", (64, 128)), ("16384×65", (LARGEST_SIDE, 65))],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("huge", "size is 'huge'; expected pixels such as 512 or 1024x1536"),
        ("64x64x64", "expected pixels"),
        ("-64", "expected pixels"),
        ("63", "Width is 63; it must be a whole number from 64 to 16384"),
        ("64x16385", "Height is 16385; it must be a whole number from 64 to 16384"),
    ],
)
def test_what_is_no_size_is_said(text, words):
    with pytest.raises(UserError, match=words):
        parse_size(text)


@pytest.mark.parametrize(("text", "name"), [("100", "Width"), ("64x100", "Height"), ("64x576", "Height")])
def test_a_size_for_a_model_that_goes_in_steps(text, name):
    with pytest.raises(UserError, match=rf"^{name} is \d+; it must be a multiple of 64 from 64 to 512\.$"):
        parse_size(text, step=64, largest=512)


# ------------------------------------------------------------------------------------------------------------ the VAE


def decoder(side=1024, free=8 * GIB, name="sd15", dtype=torch.float32, **settings):
    return question(checkpoint(name), side, free=free, dtype=dtype, settings=Settings(**settings)).halves()[0]


def test_what_a_decoder_takes_all_at_once_and_in_bands():
    made = decoder()
    assert made.plan.usual_bytes == 8 * 128 * 1024**2 * 4 and made.plan.bytes < 0.41 * made.plan.usual_bytes
    assert not made.in_bands and made.fits and made.bytes == made.plan.usual_bytes
    assert made.cells() == {
        "Where": "VAE decoder, convolutions", "Layers": "33", "Tokens": "1024 × 1024 pixels", "Heads": "–",
        "Engine": "as usual", "Query chunk": "–", "KV chunk": "–", "Workspace": "4096 MiB",
        "Why": f"all at once, which fits the memory limit; bands would take {tables.memory(made.plan.bytes)}",
    }  # fmt: skip
    assert decoder(dtype=torch.float16).plan.usual_bytes == made.plan.usual_bytes // 2
    wide = question(checkpoint("sd15"), 1024, 512).halves()[0]
    assert wide.sides == (1024, 512) and wide.plan.usual_bytes == made.plan.usual_bytes // 2


def test_bands_where_the_usual_way_takes_more_than_the_limit():
    made = decoder(free=5 * GIB)
    assert made.in_bands and made.fits and made.bytes == made.plan.bytes
    cells = made.group_cells()
    assert (cells["Engine"], cells["At a time"]) == ("in bands", f"{made.plan.rows} rows")
    assert cells["Memory"] == tables.memory(made.plan.bytes)
    assert cells["Why"].startswith("all at once it takes 4096 MiB, more than the memory limit")
    assert not decoder(free=GIB).fits and decoder(free=GIB).in_bands


def test_what_the_setting_says_of_bands():
    roomy, tight = decoder(), decoder(free=5 * GIB)
    always, never = (dataclasses.replace(roomy, settings=Settings(vae_bands=when)) for when in ("always", "never"))
    assert always.in_bands and always.bytes == roomy.plan.bytes
    assert "more than" not in always.reasons[0] and not never.in_bands and "as you have set it" in never.reasons[0]
    refused = dataclasses.replace(tight, settings=Settings(vae_bands="never"))
    assert not refused.in_bands and not refused.fits and refused.bytes == tight.plan.usual_bytes


def test_what_takes_more_than_the_limit_may_come_through_all_the_same():
    """In lower bands when memory runs out, and on the processor where a card has no room even for the lowest."""
    made = decoder()
    assert made.lowest_bytes < made.plan.bytes and not made.last_resort
    enough = decoder(free=made.lowest_bytes, memory_limit=50)
    assert not enough.fits and enough.last_resort == "in lower bands"
    assert not decoder(free=made.lowest_bytes - 1, memory_limit=50).last_resort
    assert not decoder(free=made.lowest_bytes, retry=False).last_resort
    assert not decoder(free=made.lowest_bytes, vae_bands="never").last_resort
    on_card = dataclasses.replace(decoder(free=made.lowest_bytes - 1), on_card=True)
    assert on_card.last_resort == "on the processor"


@pytest.mark.parametrize(("device", "sentence"), [("cpu", "for which there is enough"), ("meta", "on the processor")])
def test_an_image_beyond_the_limit_that_comes_through_is_not_said_not_to_fit(device, sentence):
    asked = question(checkpoint("sd15"), 1024)
    lowest = max(half.lowest_bytes for half in asked.halves())
    free = lowest if device == "cpu" else lowest - 1
    asked = dataclasses.replace(asked, device=torch.device(device), free_bytes=free)
    told = size_in_words(asked)
    assert "An image of 1024 × 1024 takes more than the memory limit." in told and sentence in told
    assert "does not fit" not in told and "Largest image" in told
    cramped = dataclasses.replace(asked, device=torch.device("cpu"), free_bytes=lowest - 1)
    assert "An image of 1024 × 1024 does not fit." in size_in_words(cramped)


def test_an_encoder_takes_less_than_its_decoder():
    both = question(checkpoint("sdxl_base"), 1024).halves()
    assert [half.part for half in both] == ["vae_decoder", "vae_encoder"]
    assert both[1].plan.usual_bytes < both[0].plan.usual_bytes and both[1].plan.bytes < both[0].plan.bytes
    assert both[1].layers == 25


def test_rows_of_both_kinds_have_the_same_cells():
    asked = question(checkpoint("sd15"))
    assert list(asked.rows()[0].cells()) == list(asked.halves()[0].cells())
    assert list(grouped(asked.rows())[0].cells()) == list(asked.halves()[0].group_cells())


@pytest.mark.parametrize("family", ["sd15", "sdxl_base", "sd3_medium"])
def test_the_largest_image_is_one_whose_decoding_fits_as_well(family):
    asked = question(checkpoint(family), free=4 * GIB)
    width, height = asked.largest_image()
    of_attention = dataclasses.replace(asked, checkpoint=dataclasses.replace(asked.checkpoint, encoder=(), decoder=()))
    assert width < of_attention.largest_image()[0]
    assert dataclasses.replace(asked, width=width, height=height).fits()
    assert not dataclasses.replace(asked, width=width + 64, height=height + 64).fits()
    assert f"whose attention and decoding stay inside the memory limit: {width} × {height}." in size_in_words(asked)


def test_the_largest_image_without_bands_is_smaller():
    asked = question(checkpoint("sd15"), free=4 * GIB)
    largest = asked.largest_image()
    asked = dataclasses.replace(asked, settings=Settings(vae_bands="never"))
    assert asked.largest_image()[0] ** 2 < 0.5 * largest[0] ** 2


def test_where_the_file_tells_of_no_decoder_it_is_about_attention_and_says_so():
    told = size_in_words(question(checkpoint("flux_dev"), free=4 * GIB))
    assert "whose attention stays inside the memory limit" in told
    assert told.endswith("and so does the VAE, of which this file tells nothing.")
    assert "tells nothing" not in size_in_words(question(checkpoint("sd15"), free=4 * GIB))


# ------------------------------------------------------------------------------------------------ models of any family


def layer(part, kind, count=1):
    more = {"cross": {"context_tokens": 77}, "joint": {"reads_t5": True}}.get(kind, {})
    downsampling = 16 if part == "transformer" else 8
    return (AttentionLayer("a layer", part, kind, 24, 64, downsampling, **more),) * count


MODELS = {
    "a transformer that joins them": (
        layer("transformer", "joint", 57) + layer("vae_encoder", "self") + layer("vae_decoder", "self"),
        "57 attention layers in the transformer, 2 in the VAE",
        "57 attention layers in the transformer (57 in which image and text look at each other), 2 in the VAE",
    ),
    "a transformer alone": (
        layer("transformer", "joint", 24) + layer("transformer", "self", 13),
        "37 attention layers in the transformer",
        "37 attention layers in the transformer (24 in which image and text look at each other, 13 in which the image "
        "looks at itself)",
    ),
    "a U-Net": (
        layer("unet", "self", 2) + layer("unet", "cross", 3),
        "5 attention layers in the U-Net",
        "5 attention layers in the U-Net (2 in which the image looks at itself, 3 in which the image looks at the "
        "prompt)",
    ),
    "a VAE": (layer("vae_decoder", "self", 2), *["2 attention layers in the VAE"] * 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_counted_in_words(name):
    layers, plain, with_kinds = MODELS[name]
    rows = question(Checkpoint(name, layers, ())).rows()
    assert (layers_in_words(rows), layers_in_words(rows, kinds=True)) == (plain, with_kinds)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sd3_medium", "24 in which image and text look at each other), 2 in the VAE"),
        ("sd35_medium", "24 in which image and text look at each other, 13 in which the image looks at itself)"),
        ("flux_dev", "57 attention layers in the transformer (57 in which image and text look at each other)"),
        ("sdxl_refiner", "88 attention layers in the U-Net (44 in which the image looks at itself, 44 in which"),
    ],
)
def test_every_family_is_told_as_what_it_is(family, words):
    asked = question(from_shapes(public_models.tensors(family)), 1000, 1024)
    assert words in layers_in_words(asked.rows(), kinds=True)
    assert all(row.cells() for row in asked.rows())


def test_sizes_go_in_the_models_own_steps():
    asked = question(from_shapes(public_models.tensors("sd3_medium")), 1000, 1024)
    assert asked.notes[-1] == "Sizes go in steps of 16 pixels: 1000 x 1024 is computed as 992 x 1024."
    as_told = question(asked.checkpoint, 992, 1024)
    assert [row.problem for row in asked.rows()] == [row.problem for row in as_told.rows()]  # the VAE's too


@pytest.mark.parametrize(
    ("family", "most"), [("sd3_medium", 3072), ("sd35_medium", 6144), ("sd35_large", 3072), ("flux_dev", None)]
)
def test_no_image_is_named_that_the_model_has_no_positions_for(family, most):
    asked = question(from_shapes(public_models.tensors(family)), 512, 1024, free=2**60)
    assert asked.largest_image() == ((most or LARGEST_SIDE) // 2, most or LARGEST_SIDE)
    assert any(f"no image with a side over {most} pixels" in note for note in asked.notes) == bool(most)


def test_a_joint_layer_is_told_as_one():
    (row,) = question(Checkpoint("x", layer("transformer", "joint", 57), ()), 1024).rows()
    cells = row.cells()
    assert cells["Where"] == "Transformer, image and text together"
    assert (cells["Tokens"], cells["Layers"], cells["Heads"]) == ("4352", "57", "24 x 64")
    assert not row.is_vae


def test_a_transformer_is_not_taken_for_a_vae():
    found = Checkpoint("x", MODELS["a transformer that joins them"][0], ())
    assert [it.part for it in question(found, vae=False).layers] == ["transformer"] * 57
    assert [it.part for it in question(found, model=False).layers] == ["vae_encoder", "vae_decoder"]


@pytest.mark.parametrize(
    "name, says",
    [
        ("sd3_medium", "77 tokens of CLIP and 77 tokens of T5"),
        ("flux_dev", "77 tokens of T5"),
        ("sdxl_base", ""),
    ],
)
def test_the_prompt_in_the_sequence_of_the_image_is_counted_and_told(name, says):
    asked = question(checkpoint(name), 1024, t5_tokens=77)
    tokens = {row.problem.queries for row in asked.rows() if row.kind == "joint"}
    assert tokens == ({4096 + 77 + 77} if "CLIP" in says else {4096 + 77} if says else set())
    assert [note for note in asked.notes if "prompt is counted" in note][:1] == (
        [f"The prompt is counted as {says}; a longer one has more."] if says else []
    )
