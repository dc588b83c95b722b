"""The doctor: which engine each call gets and why, and every switch that would help, with its source."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_subquad import Settings
from lib_subquad import __main__ as command_line
from lib_subquad import device as devices
from lib_subquad.engines import fused, order
from lib_subquad.engines.table import Found, Table, class_of
from lib_subquad.lab import tables
from lib_subquad.lab.survey import doctor, facts, reasons
from lib_subquad.lab.survey.advice import AOTRITON, Situation, advise
from tests.checkpoint.making import entries, write
from tests.checkpoint.public_models import tensors as tensors_of

CPU = torch.device("cpu")

# What each family of cards tells, and a word of the one thing that helps it; "" where nothing is known to.
FAMILIES = {
    "RX 9060 XT": (Situation("rocm", architecture="gfx1200", torch=(2, 9), unfused=1), AOTRITON),
    "RX 7900 XTX": (Situation("rocm", architecture="gfx1100", torch=(2, 11), unfused=1), AOTRITON),
    "RX 7800 XT, torch 2.4": (Situation("rocm", architecture="gfx1101", torch=(2, 4), unfused=1), "torch to 2.5"),
    "RX 9060 XT, told": (
        Situation("rocm", architecture="gfx1200", torch=(2, 9), unfused=1, variables={AOTRITON: "1"}),
        "",
    ),
    "RX 9070, fused": (Situation("rocm", architecture="gfx1201", torch=(2, 11)), ""),
    "RX 6600": (Situation("rocm", architecture="gfx1032", torch=(2, 11), unfused=1), ""),
    "RX 6600, ZLUDA": (Situation("zluda", name="AMD Radeon RX 6600 [ZLUDA]", unfused=1, switched_off=("flash",)), ""),
    "RX 6600, DirectML": (Situation("directml", unfused=1), ""),
    "Apple M2, torch 2.12": (Situation("mps", torch=(2, 12), unfused=1), "torch to 2.13"),
    "Apple M2, torch 2.13": (Situation("mps", torch=(2, 13), unfused=1), ""),
    "RTX 4060": (Situation("cuda", name="NVIDIA GeForce RTX 4060", architecture="compute capability 8.9"), ""),
    "RTX 4060, torch 2.0": (Situation("cuda", torch=(2, 0), unfused=1), "torch to 2.1"),
    "RTX 4060, switched off": (
        Situation("cuda", unfused=1, switched_off=("flash", "mem_efficient")),
        "enable_flash_sdp",
    ),
    "RTX 4060, --no-half": (Situation("cuda", name="NVIDIA GeForce RTX 4060", dtype="float32"), "--no-half"),
    "GTX 1660, --no-half": (Situation("cuda", name="NVIDIA GeForce GTX 1660", dtype="float32"), ""),
    "RTX 3060, a broken xformers": (Situation("cuda", packages={"xformers": "xformers: no DLL"}), "xformers"),
    "RTX 3060, blocking": (Situation("cuda", variables={"CUDA_LAUNCH_BLOCKING": "1"}), "CUDA_LAUNCH_BLOCKING"),
    "RTX 3060, not blocking": (Situation("cuda", variables={"CUDA_LAUNCH_BLOCKING": "0"}), ""),
    "RTX 3060, no cache": (
        Situation("cuda", variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
    ),
    "Arc A750": (Situation("xpu", dtype="float16"), ""),
    "CPU": (Situation("cpu", dtype="float32", threads=8, cores=15), ""),
    "CPU, one thread": (
        Situation("cpu", dtype="float32", threads=1, cores=8, variables={"OMP_NUM_THREADS": "1"}),
        "OMP_NUM_THREADS: unset it",
    ),
    "CPU, few threads by the program": (Situation("cpu", dtype="float32", threads=1, cores=8), ""),
    "CPU, two processors a core": (
        Situation("cpu", dtype="float32", threads=8, cores=16, variables={"OMP_NUM_THREADS": "8"}),
        "",
    ),
    "CPU, torch 2.0": (Situation("cpu", dtype="float32", torch=(2, 0), unfused=1, threads=4, cores=4), "torch to 2.1"),
    "settings": (Situation("cuda", settings=("the engine is set to portable",)), "set to portable"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_one_switch_that_helps_is_named(family):
    here, word = FAMILIES[family]
    found = advise(here)
    if not word:
        assert found == []
        return
    assert len(found) == 1 and word in found[0].words and found[0].source


def test_what_helps_most_comes_first():
    here = Situation(
        "rocm",
        architecture="gfx1101:xnack-",
        torch=(2, 9),
        unfused=3,
        dtype="float32",
        packages={"xformers": "xformers: no DLL"},
    )
    first, second, third = advise(here)
    assert AOTRITON in first.words and "--no-half" in second.words and "xformers" in third.words


def problems():
    return [reasons.problem_of(reasons.SHAPES[0], CPU, torch.float32)]


@pytest.mark.usefixtures("fused_kernel")
def test_a_cpu_has_nothing_to_gain(monkeypatch):
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    found = doctor.diagnosis(problems(), Settings())
    assert found.sentences == [doctor.NOTHING] and found.plans[0].engine == order.names()[0]


@pytest.mark.usefixtures("fused_kernel")
@pytest.mark.parametrize(
    ("settings", "word"),
    [(Settings(engine="portable"), "the engine is set to portable"), (Settings(kv_chunk=512), "splits 4096 keys")],
)
def test_settings_that_keep_a_faster_engine_away(monkeypatch, settings, word):
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    so, sentence = doctor.diagnosis(problems(), settings).sentences
    assert so.startswith("1 of 1 kinds of call run without a fused kernel, because ") and word in so
    assert word in sentence and sentence.startswith("Your settings") and "(source: " in sentence


def test_kernels_that_are_switched_off_are_seen(monkeypatch):
    assert facts.switched_off() == []
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert facts.switched_off() == ["flash"]


def test_what_a_driver_does_not_tell_is_no_reason_to_fail(monkeypatch):
    def fail(*given):
        raise OSError("no driver")

    for name in ("device_name", "driver"):
        monkeypatch.setattr(doctor.identity, name, fail)
    monkeypatch.setattr(facts, "architecture", fail)
    assert doctor.diagnosis(problems(), Settings()).sentences
    assert doctor.diagnosis([], Settings()).sentences == [doctor.NOTHING]


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.13.0+cpu", (2, 13)), ("2.1.2", (2, 1)), ("2.14.0a0+gitabc", (2, 14)), ("2.0", (2, 0)), ("weird", (99, 0))],
)
def test_versions(text, version):
    assert doctor._version(text) == version


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], no_fused="there is none"))
    monkeypatch.setattr(torch, "__version__", "2.0.1")
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    assert command_line.main(["doctor", "--device", "cpu", "--table", str(tmp_path / "none.json")]) == 0
    told = capsys.readouterr().out
    assert "| SD 1.5 512² 16×4096×40" in told and "there is none" in told and "Update torch to 2.1" in told


def doctor_says(capsys, *arguments) -> str:
    assert command_line.main(["doctor", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_where_all_is_portable_it_does_not_say_that_there_is_nothing_to_gain(tmp_path, capsys):
    told = doctor_says(capsys, "--device", "meta", "--table", tmp_path / "none.json")
    assert "8 of 8 kinds of call run without a fused kernel, because PyTorch has no fused kernel on meta" in told
    assert "No switch is known that would change that." in told and "Nothing to gain" not in told


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "model.safetensors", *entries(tensors_of("sd15")))


@pytest.mark.usefixtures("fused_kernel")
def test_the_calls_of_a_checkpoint_at_a_size(checkpoint, tmp_path, capsys):
    asked = ["--checkpoint", checkpoint, "--size", "256x512", "--table", tmp_path / "none.json", "--device", "cpu"]
    told = doctor_says(capsys, *asked)
    assert told.startswith("Stable Diffusion 1.x: 32 attention layers in the U-Net, 2 in the VAE\n")
    (row,) = [line for line in told.splitlines() if line.startswith("| U-Net, self")]
    assert " 2048 to 32 | " in row and "| 8 × 40 to 160 " in row and "Flux" not in told
    assert "| VAE decoder, convolutions |" in told and "all at once, which fits the memory limit; bands would" in told
    chosen = doctor_says(capsys, *asked, "--engine", "portable")
    assert "the engine is set to portable" in chosen and "Your settings keep a faster engine away" in chosen


@pytest.mark.usefixtures("fused_kernel")
def test_settings_count_without_a_checkpoint_too(tmp_path, capsys):
    on = ["--device", "cpu", "--table", tmp_path / "none.json"]
    assert "the engine is set to portable" in doctor_says(capsys, *on, "--engine", "portable")


def test_what_has_no_meaning_without_a_checkpoint_is_said(capsys):
    assert command_line.main(["doctor", "--size", "512", "--batch", "2", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said == "doctor: --size, --batch have no meaning without --checkpoint FILE\n"


@pytest.mark.parametrize("columns", [30, 40, 80])
@pytest.mark.parametrize("command", ["plan", "doctor", "doctor of a checkpoint"])
def test_a_table_fits_the_terminal(command, columns, checkpoint, tmp_path, capsys, monkeypatch):
    given = ["--device", "cpu", "--table", str(tmp_path / "none.json")]
    given += ["--checkpoint", str(checkpoint)] * (command != "doctor")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert command_line.main([command.split()[0], *given]) == 0
    told = capsys.readouterr().out
    cells = [line for line in told.splitlines() if line.startswith("  ")]
    assert "|" not in told and len(cells) > 10 and max(map(len, cells)) <= columns
    assert sum(line.startswith("  Why: ") for line in cells) >= 3


def test_each_cell_of_a_narrow_table_is_told(monkeypatch):
    rows = [{"Call": "self 4096 x 4096", "Time": "12.5 ms", "": "recommended", "Why": "because"}] * 2
    monkeypatch.delenv("COLUMNS", raising=False)
    for columns, lines in (
        ("200", tables.of_cells(rows)),
        ("20", "self 4096 x 4096\n  Time: 12.5 ms\n  recommended\n  Why: because\n\n" * 2),
        ("7", "self 4096 x 4096\n  Time: 12.5 ms\n  recommended\n  Why: because\n\n" * 2),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        assert tables.for_reading(rows) == lines.rstrip("\n")


@pytest.mark.usefixtures("fused_kernel")
@pytest.mark.skipif(not fused.MASKS_ARE_RIGHT, reason="this torch's kernel is given no masks, which the doctor tells")
def test_what_was_measured_to_be_faster_lacks_no_kernel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    monkeypatch.setattr(torch, "__version__", "2.0.1")  # which would be advised against, were there no kernel
    order.machine.cache_clear()
    found = {class_of(problem): Found("portable", margin=2.0) for problem in problems()}
    table = Table().with_found(order.machine(CPU), found)
    path = tmp_path / "table.json"
    path.write_text(table.to_json(), encoding="utf-8")
    assert command_line.main(["doctor", "--device", "cpu", "--table", str(path)]) == 0
    told = capsys.readouterr().out
    assert "measured on this device: 2.00 times as fast" in told and doctor.NOTHING in told
