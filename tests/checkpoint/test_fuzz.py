"""Random files and shapes: an answer or a sentence, whatever they hold."""

from __future__ import annotations

import json
import os
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_subquad.checkpoint import Checkpoint, CheckpointError, from_shapes, read_attention_layers
from tests.checkpoint.making import BYTES, UNET, config, entries, flux, mmdit, unet, vae, write

FUZZ_EXAMPLES = int(os.environ.get("SUBQUAD_FUZZ_EXAMPLES", "300"))  # for each of the five fuzz tests

pytest.importorskip("safetensors")


fuzzed = Counter()
fuzz = settings(
    max_examples=FUZZ_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip

SEEDS = {
    "unet": unet(channels=16, mult=(1, 2), depths=(1, 1), context=24, blocks=1) | vae(channels=8, halvings=1),
    "sd3": mmdit(width=64, blocks=3, twice=1) | vae(channels=8, halvings=1),
    "flux": flux(width=16, head_width=8, blocks=(2, 2)),
    "chroma": flux(UNET, width=16, head_width=8, blocks=(2, 1), more=("distilled_guidance_layer.in_proj.bias",)),
}
HEADERS = {name: entries(shapes) for name, shapes in SEEDS.items()}
seeds = st.sampled_from(sorted(SEEDS))


def whole(seed: str) -> bytes:
    header, data = HEADERS[seed]
    return struct.pack("<Q", len(json.dumps(header))) + json.dumps(header).encode() + bytes(data)


numbers = st.one_of(st.integers(), st.integers(0, 64), st.sampled_from([2**31, 2**32, 2**63 - 1, 2**64, 10**19]))
names = st.one_of(
    st.sampled_from(sorted({name for shapes in SEEDS.values() for name in shapes})),
    st.sampled_from(["__metadata__", "", "\ud800"]),
    st.text(),
)
garbage = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(names, inner, max_size=5)),
    max_leaves=20,
)
tensors = st.fixed_dictionaries({
    "dtype": st.one_of(st.sampled_from(sorted(BYTES)), garbage),
    "shape": st.one_of(st.lists(numbers, max_size=5), garbage),
    "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), garbage),
})  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


def answers(kind: str, call, *arguments) -> None:
    """The only two outcomes allowed: a Checkpoint whose layers can say their shapes, or a CheckpointError."""
    fuzzed[kind] += 1
    try:
        checkpoint = call(*arguments)
    except CheckpointError as error:
        fuzzed["refused"] += 1
        assert str(error)
        return
    assert isinstance(checkpoint, Checkpoint) and isinstance(checkpoint.family, str)
    for note in checkpoint.notes:
        note.encode()
    for layer in checkpoint.layers:
        assert all(all(n >= 1 for n in shape) for shape in layer.shapes(520, 776, batch=2))


@fuzz
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda raw: prefixed(raw))))
def test_fuzz_random_bytes(scratch, content):
    scratch.write_bytes(content)
    answers("random bytes", read_attention_layers, scratch)


def prefixed(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


@fuzz
@given(seed=seeds, number=st.integers(0, 2**32), edits=st.integers(1, 8))
def test_fuzz_mutated_bytes(scratch, seed, number, edits):
    rng, content = random.Random(number), bytearray(whole(seed))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(edits):
        place = rng.randrange(min(len(content), header_end))
        what = rng.choice(["flip", "digit", "cut", "insert", "copy", "length", "end"])
        if what == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif what == "digit":  # keeps the JSON whole and changes what it says
            digits = [i for i in range(8, min(len(content), header_end)) if 48 <= content[i] <= 57]
            content[rng.choice(digits or [place])] = rng.randrange(48, 58)
        elif what == "cut":
            del content[place : place + rng.randrange(1, 40)]
        elif what == "insert":
            content[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif what == "copy":
            start = rng.randrange(len(content))
            content[place:place] = content[start : start + rng.randrange(1, 200)]
        elif what == "length":
            content[:8] = struct.pack("<Q", rng.choice([0, 1, len(content) - 8, len(content), rng.getrandbits(64)]))
        else:
            del content[rng.randrange(len(content)) :]
        if len(content) < 16:
            break
    scratch.write_bytes(content)
    answers("mutated bytes", read_attention_layers, scratch)


@fuzz
@given(
    seed=seeds,
    header=st.one_of(garbage, st.dictionaries(names, st.one_of(tensors, garbage), max_size=6)),
    data=st.integers(0, 64),
    kept=st.integers(0, 60),
)
def test_fuzz_structured_json(scratch, seed, header, data, kept):
    if isinstance(header, dict):
        header = dict(list(HEADERS[seed][0].items())[:kept]) | header
    answers("structured JSON", read_attention_layers, write(scratch, header, data))


@fuzz
@given(seed=seeds, changes=st.dictionaries(names, st.one_of(st.none(), st.lists(numbers, max_size=5)), max_size=6))
def test_fuzz_shapes(scratch, seed, changes):
    """Well-formed sets of shapes that make no sense; those that a file can have also go through one."""
    shapes = SEEDS[seed] | changes
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    answers("shapes", from_shapes, shapes)
    if all(0 <= n <= 64 for shape in shapes.values() for n in shape):
        answers("shapes in a file", read_attention_layers, write(scratch, *entries(shapes)))


@fuzz
@given(
    seed=seeds,
    content=st.one_of(
        st.binary(max_size=100),
        st.text(alphabet="model:params_hd{}[]&*!<>|-? \n\"'\\U0123456789%,#", max_size=100).map(str.encode),
        st.builds(lambda heads: config(num_heads=heads).encode(), garbage),
    ),
)
def test_fuzz_yaml(scratch, seed, content):
    pytest.importorskip("yaml")
    scratch.write_bytes(whole(seed))
    beside = scratch.with_suffix(".yaml")
    beside.write_bytes(content)
    try:
        answers("yaml", read_attention_layers, scratch)
    finally:
        beside.unlink()


def test_how_much_was_fuzzed(capsys, record_property):
    refused = fuzzed["refused"]
    inputs = Counter({kind: count for kind, count in fuzzed.items() if kind != "refused"})
    record_property("fuzzed_inputs", inputs.total())
    with capsys.disabled():
        listed = ", ".join(f"{count} {kind}" for kind, count in inputs.items())
        print(f"\nheader reader: {inputs.total()} inputs tried, {refused} refused ({listed})")
