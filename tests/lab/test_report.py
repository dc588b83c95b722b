"""`python -m lib_subquad report`: complete, right, and silent on whose computer it is."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import io
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import __main__ as command_line
from lib_subquad import __version__, identity
from lib_subquad import device as devices
from lib_subquad.engines import order
from lib_subquad.lab import anonymous, machine
from lib_subquad.lab.bench import measure
from lib_subquad.lab.bench.shapes import Shape
from lib_subquad.lab.bench.work import Job
from lib_subquad.lab.commands import arguments
from lib_subquad.lab.survey import checks, facts, reasons
from tests.own_engines import OWN
from tests.test_engines import Plain

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Shape("small", 1, 2, 300, 300, 8)
USER, HOST = "janeqpublic", "janes-laptop"


# -------------------------------------------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What it prints in a folder, for a user, with variables whose names and values must not be told."""
    home = tmp_path_factory.mktemp(USER)
    environment = {
        **os.environ,
        "HOME": str(home),
        "USERPROFILE": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "USERNAME": USER,
        "HOSTNAME": HOST,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:True,of:{home / 'allocator.so'}",
        "CIVITAI_TOKEN": "a-secret",
    }
    command = [sys.executable, "-m", "lib_subquad", "report", "--device", "cpu"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(text=done.stdout, home=home)


def test_it_tells_what_a_device_report_needs(reported):
    for words in (
        f"| subquad             | {__version__} ",
        identity.processor(),
        f"{torch.__version__}, built for ",
        platform.python_version(),
        "flash on, mem_efficient on",
        "cpu: tile_bytes = 2097152",
        "OMP_NUM_THREADS=2",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True,of:<path>",
        " free of ",
    ):
        assert words in reported.text


def test_every_engine_is_asked_and_every_one_that_can_is_checked(reported):
    _, asked, checked = (section.splitlines() for section in re.split("^##+ ", reported.text, flags=re.M)[1:])
    for name in OWN:
        assert sum(f"| {name} " in line for line in asked) == len(reasons.SHAPES) + len(reasons.MASKED)
        rows = [line.split("|") for line in checked if f"| {name} " in line]
        assert len(rows) == len(checks.dtypes(CPU)) * len(checks.shapes(CPU))
        for row in rows:
            time, error, note = (row[column].strip() for column in (3, 6, 7))
            assert (note == "") == (time != "–") == (error != "–"), row
    assert sum("| taken" in line for line in asked) == len(reasons.SHAPES) + len(reasons.MASKED)
    assert not any("wrong" in line or "raised" in line for line in asked + checked)


def test_it_is_markdown_whose_tables_are_whole(reported):
    tables = [part for part in reported.text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_it_names_nobody(reported):
    home, host = reported.home, platform.node()
    for place in (home, home.resolve(), ROOT, sys.prefix, Path(sys.executable).parent, Path.home()):
        assert str(place) not in reported.text
    for name in {USER, HOST, host, getpass.getuser(), Path.home().name}:
        assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reported.text), name
    assert "a-secret" not in reported.text and "CIVITAI" not in reported.text


# ----------------------------------------------------------------------------------------------- what others' words say


@pytest.fixture
def jane(monkeypatch):
    monkeypatch.setattr(anonymous, "_places", lambda: [lambda: r"C:\Users\Jane Q", lambda: "/home/janeq", lambda: "/"])
    monkeypatch.setattr(anonymous, "_names", lambda: [lambda: "janeq", lambda: "janes-pc", lambda: os.environ["NONE"]])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open /home/janeq/webui/models/me.ckpt: no", "cannot open <path> no"),
        (r"cannot open C:\Users\Jane Q\my models\x.dll now", "cannot open <path> now"),
        (r"'D:\Jane Q\web ui\x.py' failed", "'<path>' failed"),
        (r"at \\janes-pc\share\x and ~/webui/x", "at <path> and <path>"),
        ("error:/opt/other/x.so", "error:<path>"),
        ("for float16/bfloat16, 16×4096×40, 1/2, and/or", "for float16/bfloat16, 16×4096×40, 1/2, and/or"),
        ("see https://pytorch.org/docs/stable/x.html", "see https://pytorch.org/docs/stable/x.html"),
        ("janeq on JANES-PC, not janeqs", "<name> on <name>, not janeqs"),
        ("", ""),
    ],
)  # fmt: skip
def test_words_without_places_and_names(text, told, jane):
    assert anonymous.anonymous(text) == told


# ------------------------------------------------------------------------------------------- whatever an engine may do


@pytest.fixture
def plain(monkeypatch, trusted):
    monkeypatch.setattr(checks, "shapes", lambda device: ((SMALL, False), (SMALL, True)))
    monkeypatch.setattr(checks, "dtypes", lambda device: (torch.float32,))
    monkeypatch.setattr(checks, "TIMED_SECONDS", 0)
    monkeypatch.setattr(Plain, "why_not", lambda self, problem: ["no masks"] * (problem.mask is not None))
    engine = Plain()
    order.register(engine, before=order.names()[0])
    yield engine
    order.withdraw(engine.NAME)


def checked(name: str) -> list[dict[str, str]]:
    return [row for row in checks.rows(CPU, lambda what: None) if row["engine"] == name]


def test_an_engine_that_is_right(plain):
    without, masked = checked("plain")
    assert float(without["error"]) < 1e-5 and without["note"] == "" and float(without["× PyTorch"]) > 0
    assert masked["note"] == "no masks" and masked["time"] == "–"
    called = len(plain.calls)
    assert called >= 2 + checks.FEWEST_ROUNDS


@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
def test_an_engine_that_is_wrong(plain, wrong, monkeypatch):
    right = plain.attend
    monkeypatch.setattr(plain, "attend", lambda *given: (right(*given)[0] + wrong, None), raising=False)
    assert checked("plain")[0]["note"] == "wrong: more than rounding explains"
    assert {row["note"] for row in checked("portable")} == {""}


@pytest.mark.parametrize("error", [ValueError("bad /home/someone/x"), KeyError("x"), AssertionError()], ids=repr)
@pytest.mark.parametrize("where", ["why_not", "fitting", "attend"])
def test_an_engine_that_raises_costs_its_own_rows_only(plain, where, error, monkeypatch, capsys):
    def fail(*given):
        raise error

    # torch 2.0 has no fused kernel for the CPU, 2.1.2 none with masks
    found = checks.rows(CPU, lambda what: None)
    computing = {row["engine"] for row in found if row["time"] != "–"} & set(order.names())
    assert {"plain", "portable"} <= computing
    monkeypatch.setattr(plain, where, fail, raising=False)
    assert command_line.main(["report", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert type(error).__name__ in printed and "someone" not in printed
    lines = printed.splitlines()
    for name in computing - {"plain"}:
        assert any(f"| {name} " in line and re.search(" [mµ]s ", line) for line in lines)
    raised = {"why_not": len(reasons.SHAPES) + len(reasons.MASKED), "fitting": len(reasons.SHAPES), "attend": 0}
    assert printed.count("| raised") == raised[where]


def test_an_engine_whose_kernel_refuses_in_the_call_is_not_measured_as_another(plain, monkeypatch):
    def refuse(*given):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(plain, "attend", refuse, raising=False)
    row = checked("plain")[0]
    assert row["time"] == "–" and "the plain kernel refused these sizes: no kernel image" in row["note"]


def test_memory_that_runs_out(plain):
    plain.room = 0
    assert checked("plain")[0]["note"] == "out of memory"


def test_a_call_that_takes_long_is_not_repeated(plain, monkeypatch):
    monkeypatch.setattr(checks, "LONG_SECONDS", 0.0)
    assert checked("plain")[0]["time"] != "–"
    assert len(plain.calls) == 2


def test_a_device_that_has_not_every_dtype(plain, monkeypatch):
    def no_bfloat16(problem, own=checks.tensors):
        if problem.dtype == torch.bfloat16:
            raise RuntimeError("no such dtype")
        return own(problem)

    monkeypatch.setattr(checks, "dtypes", lambda device: (torch.bfloat16, torch.float32))
    monkeypatch.setattr(checks, "tensors", no_bfloat16)
    rows = list(checks.rows(CPU, lambda what: None))
    assert [row["note"] for row in rows if "bfloat16" in row["call"]] == ["RuntimeError: no such dtype"] * 2
    assert sum(row["time"] != "–" for row in rows) >= 4


# ------------------------------------------------------------------------------------------------ whatever a device is


def test_facts_that_are_not_told(monkeypatch):
    def fail(*given):
        raise OSError("/home/someone")

    for name in ("architecture", "_pytorch", "_switches"):
        monkeypatch.setattr(facts, name, fail)
    for name in ("device_name", "driver"):
        monkeypatch.setattr(identity, name, fail)
    monkeypatch.setattr(devices, "free_bytes", lambda device: devices.UNKNOWN_FREE_BYTES)
    told = dict(facts.facts(CPU))
    assert told["Driver"] == told["Device"] == "not told (OSError)"
    assert told["Memory"] == "not told; 1024 MiB are taken to be free"
    assert "someone" not in str(told)


def test_only_variables_that_matter_are_told(monkeypatch):
    for name in facts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert facts._variables() == "none of those that matter is set"
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert facts._variables() == "HSA_OVERRIDE_GFX_VERSION=10.3.0"


def test_rules_that_are_others_than_the_usual_ones():
    told = facts._rules(torch.device("mps"))
    assert told.startswith('mps: no_fused = "on Apple Silicon') and "contiguous = True" in told
    assert "kv_tile" not in told and facts._rules(torch.device("meta")) == "other: tile_bytes = 67108864"


def test_the_driver_of_a_cuda_device(monkeypatch):
    asked = []
    done = SimpleNamespace(stdout="580.95.05\n580.95.05\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **more: asked.append(command) or done)
    monkeypatch.setattr(torch.version, "hip", None)
    identity._nvidia.cache_clear()
    assert identity.driver(torch.device("cuda")) == "NVIDIA 580.95.05" and asked[0][0] == "nvidia-smi"


def test_a_directml_device_is_found_and_named(monkeypatch):
    card = SimpleNamespace(device=lambda: torch.device("privateuseone", 0), device_name=lambda index: f"RX {index}\0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(arguments, "_has_xpu", lambda: False)
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", None)
    monkeypatch.setitem(sys.modules, "torch_directml", None)
    assert arguments.best_device() == CPU
    monkeypatch.setitem(sys.modules, "torch_directml", card)
    assert arguments.best_device() == torch.device("privateuseone", 0)
    assert identity.device_name(torch.device("privateuseone:0")) == "RX 0"


def test_directmls_package_is_imported_where_its_device_is_named(monkeypatch):
    """By the command, and by the process of its own in which `bench` measures."""
    asked = []
    monkeypatch.setattr(machine.importlib, "import_module", asked.append)
    with pytest.raises(argparse.ArgumentTypeError):  # the package is not here
        arguments.device("privateuseone:0")
    job = Job("sdpa", Shape("", 1, 1, 8, 8, 8), device="privateuseone:0")
    measure._answer({"kind": "attention", "job": dataclasses.asdict(job)})
    assert asked == ["torch_directml"] * 3  # once more to tell the devices that there are
    arguments.device("cpu")
    assert len(asked) == 3


def test_intels_own_package_brings_xpu_to_older_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    there = []
    monkeypatch.setattr(arguments, "_has_xpu", lambda: bool(there))
    monkeypatch.setattr(arguments.importlib, "import_module", there.append)
    assert arguments.best_device() == torch.device("xpu") and there == ["intel_extension_for_pytorch"]


def test_an_apple_chip_has_its_name(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *given, **more: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(subprocess, "run", lambda command, **more: SimpleNamespace(stdout="Apple M2\n"))
    identity.processor.cache_clear()
    try:
        assert {identity.device_name(torch.device(name)) for name in ("mps", "cpu")} == {"Apple M2"}
    finally:
        identity.processor.cache_clear()


def test_a_console_that_shows_ascii_only(plain, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert command_line.main(["report", "--device", "cpu"]) == 0
    text = console.buffer.getvalue().decode("ascii")
    assert text.startswith("## Device report") and text.count("\n| ") > 30


# ------------------------------------------------------------------------------------------------- who asks for it


@pytest.mark.parametrize("name", ["bug", "device_report"])
def test_the_forms_ask_for_it(name):
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and len(form["body"]) == len({str(part) for part in form["body"]})
    fields = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    assert {part["type"] for part in fields.values()} <= {"input", "textarea"}
    assert {"report", "webui", "model", "settings", "console"} <= set(fields)
    assert fields["report"]["validations"]["required"] is True
    assert "python -m lib_subquad report" in fields["report"]["attributes"]["description"]
    (title,) = re.findall(r'under "(.+?)"', fields["report"]["attributes"]["description"])
    assert f"\n## {title}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
