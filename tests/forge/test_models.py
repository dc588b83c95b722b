"""Models beyond U-Nets: the web UI's own classes with random weights, run within a generation that counts calls."""

from __future__ import annotations

import pytest

PYTORCH = "--attention-pytorch"
SIZE = {"width": 64, "height": 64}
# How far apart two results of a dtype may be, and the engine that ours is computed by.
ROUNDING = {"float32": (2e-5, "portable"), "bfloat16": (2e-2, "automatic"), "float16": (3e-3, "portable")}
KINDS = (
    "flux", "flux2", "chroma", "chroma by patches", "sd3", "sd3.5", "aura", "cosmos", "cosmos predict2", "anima", "wan",
    "wan of one frame", "hunyuan video", "lumina", "omnigen", "ltx video", "krea2", "vae", "vae by a config",
    "wan vae",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(forge):
    """With PyTorch's attention, which takes every mask."""
    flags = ["--nowebui", *([PYTORCH] if forge.knows(PYTORCH) else [])]
    with forge.running(*flags) as running:
        yield running
    forge.check_log(running, *flags)


@pytest.fixture(scope="module")
def known(server) -> dict[str, dict]:
    """The kinds that this web UI has: whether they are loaded when it starts, and cannot be made small."""
    return server.call("/probe/models")


def check(server, known, kind: str, dtype: str, **how) -> None:
    """As its own attention computes it, and every call is ours; then nothing of ours is left."""
    if kind not in known:
        pytest.skip(f"there is no {kind} here")
    if known[kind]["large"] and dtype != "float32":
        pytest.skip("it cannot be made small, and takes minutes")
    farthest, engine = ROUNDING[dtype]
    server.options(subquad_engine=engine)
    made = server.check_ours(model={"kind": kind, "dtype": dtype, **how}, **SIZE).calls
    found = server.call("/probe/models/results")
    print(f"{kind} in {dtype}: {found}, {made} calls with the image's")
    assert found["size"] > 0.01 and found["apart"] <= farthest
    server.use("off")
    server.generate(**SIZE)
    assert server.holders() == []


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(server, known, kind, dtype):
    held = server.call("/probe/held")
    check(server, known, kind, dtype)
    assert held.items() <= server.call("/probe/held").items()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_is_loaded_while_ours_is_in_place(server, known, kind):
    """It takes what the web UI's home holds by then, which is ours."""
    if kind in known and known[kind]["early"]:
        pytest.skip("it is loaded when the web UI starts")
    check(server, known, kind, "float32", late=True)
