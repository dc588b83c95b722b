"""`python -m lib_subquad order`: what automatic goes by is shown, measured and forgotten."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import __main__ as command_line
from lib_subquad.engines import order
from lib_subquad.engines.table import Class, Found, Table, class_of
from lib_subquad.lab.commands import kept
from lib_subquad.lab.disturbance import Disturbance
from lib_subquad.lab.measured import file, rounds
from lib_subquad.lab.measured.words import calls_in_words, found_in_words
from tests.checkpoint.making import entries, write
from tests.checkpoint.public_models import tensors

CPU = torch.device("cpu")
CALLS = Class("float16", "float16", 40, 40, "none", 4, 12, 12)
LAST = order.names()[-1]


@pytest.fixture(autouse=True)
def by_the_rules():
    before = order.table()
    order.go_by(Table())
    rounds.forget()
    file._warn_once.cache_clear()
    yield
    order.go_by(before)
    rounds.forget()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "table.json"


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "model.safetensors", *entries(tensors("sd15")))


@pytest.fixture
def main(path, capsys):
    """main(arguments): (its status, what it printed), with that table on the CPU."""

    def run(*arguments, name="order"):
        status = command_line.main([name, "--device", "cpu", "--table", str(path), *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


def fill(path: Path, machine=None, **found) -> None:
    its = {CALLS._replace(width=int(width[1:]), value_width=int(width[1:])): it for width, it in found.items()}
    path.write_text(file.read(path).with_found(machine or order.machine(CPU), its).to_json(), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (CALLS, "about 16 heads and 4096 x 4096 tokens, 40 wide, float16"),
        (
            Class("float32", "float16", 512, 256, "bool", 0, 14, 6),
            "about 1 head and 16384 x 64 tokens, 512 wide with values 256 wide, float32 with values in float16, "
            "with a mask in bool",
        ),
    ],
)
def test_calls_in_words(calls, words):
    assert calls_in_words(calls) == words


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found("one", 512, 1024, 1.3), "one in tiles of 512 x 1024, 1.30 times as fast as the rules' choice"),
        (Found("one", 512, 0, 1.3), "one in chunks of 512 queries, 1.30 times as fast as the rules' choice"),
        (Found("one", 0, 256, 1.3), "one in chunks of 256 keys, 1.30 times as fast as the rules' choice"),
        (Found("one", margin=2), "one, 2.00 times as fast as the rules' choice"),
        (Found("one"), "nothing was clearly faster than the rules' choice"),
        (
            Found("one", disturbed=True),
            "nothing was clearly faster than the rules' choice while other programs ran: it is measured again",
        ),
    ],
)
def test_a_finding_in_words(found, words):
    assert found_in_words(found) == words


# ----------------------------------------------------------------------------------------------------- it is shown


def test_what_was_measured_is_shown(main, path):
    fill(path, w40=Found(LAST, 512, 1024, 1.3), w80=Found(order.names()[0]), w8=Found("another", margin=2.0))
    fill(path, order.machine(CPU)._replace(torch="1.9.9"), w40=Found(LAST), w64=Found(LAST))
    status, told = main()
    lines = told.splitlines()
    assert status == 0 and f"torch {torch.__version__}" in lines[0] and lines[0].endswith(f"by {path}:")
    assert lines[1:3] == [
        f"  about 16 heads and 4096 x 4096 tokens, 40 wide, float16: {LAST} in tiles of 512 x 1024, 1.30 times as fast "
        "as the rules' choice",
        "  about 16 heads and 4096 x 4096 tokens, 80 wide, float16: nothing was clearly faster than the rules' choice",
    ]
    assert lines[3].startswith("Not used here: 2 kinds of call, measured on ") and "torch 1.9.9" in lines[3]
    assert len(lines) == 4  # of an engine that is not there nothing is gone by


def test_where_nothing_was_measured_it_says_so(main, path):
    status, told = main()
    assert status == 0 and told.splitlines()[1] == "  nothing has been measured: automatic follows fixed rules"
    assert not path.exists()


def test_a_broken_table_costs_a_line(main, path, caplog):
    path.write_text("{", encoding="utf-8")
    status, told = main()
    assert (
        status == 0
        and "nothing has been measured" in told
        and "it is damaged, or something else wrote it" in caplog.messages[0]
    )


def test_plan_goes_by_it(main, path, checkpoint):
    fill(path, **{"w40": Found(LAST, 128, 128, 1.3)})
    calls = CALLS._replace(dtype="float32", value_dtype="float32", queries=10, keys=10)
    path.write_text(
        file.read(path).with_found(order.machine(CPU), {calls: Found(LAST, 128, 128, 1.3)}).to_json(), encoding="utf-8"
    )
    status, told = main("--checkpoint", checkpoint, "--size", "256", name="plan")
    (row,) = [line for line in told.splitlines() if "U-Net, self" in line and "8 x 40" in line]
    assert status == 0 and "measured on this device: 1.30 times as fast" in row and " 128 " in row
    path.unlink()
    assert "measured on" not in main("--checkpoint", checkpoint, "--size", "256", name="plan")[1]
    assert not path.exists()


# ------------------------------------------------------------------------------------------------- it is forgotten


def test_what_was_measured_here_is_forgotten(main, path):
    there = order.machine(CPU)._replace(torch="1.9.9")
    fill(path, w40=Found(LAST), w80=Found(LAST))
    fill(path, there, w40=Found(LAST))
    status, told = main("--forget")
    assert (status, told) == (
        0,
        "Forgotten: 2 kinds of call. Automatic follows fixed rules on this device.\n",
    )
    assert list(file.read(path).machines) == [there] == list(order.table().machines)
    assert main("--forget", "all") == (0, "Forgotten: 1 kind of call. Automatic follows fixed rules.\n")
    assert file.read(path) == Table()


def test_what_cannot_be_forgotten_is_no_success(main, path, monkeypatch, caplog):
    fill(path, w40=Found(LAST))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file, "write_whole", refuse)
    assert main("--forget") == (1, "") and "cannot be written (Permission denied)" in caplog.messages[0]


# -------------------------------------------------------------------------------------------------- it is measured


@pytest.fixture
def made_up(monkeypatch):
    """What measuring finds for the first, second … problem, what disturbed it, and what it was asked for."""
    asked = []
    made = SimpleNamespace(asked=asked, disturbance=Disturbance(), finds=lambda number: Found(LAST, 128, 128, 1.3))

    def measured(problems, settings, seconds, watch):
        asked.append((problems, settings, seconds))
        found = made.finds(len(asked))
        return {} if found is None else {class_of(problems[0]): found}

    monkeypatch.setattr(rounds, "measured", measured)
    monkeypatch.setattr(rounds, "Watch", lambda: SimpleNamespace(disturbance=lambda: made.disturbance))
    return made


@pytest.mark.usefixtures("fused_kernel")
def test_it_measures_and_keeps_it(main, path, checkpoint, made_up):
    made_up.finds = lambda number: None if number == 1 else Found(LAST, 128, 128, 1.3)
    status, told = main("--measure", checkpoint, "--size", "256", "--memory-limit", "30")
    count, lines = len(made_up.asked), told.splitlines()
    assert all(settings.memory_limit == 30 for _, settings, _ in made_up.asked)
    assert status == 0
    assert lines[0] == f"Measuring {count} kinds of call, for at most 5 s each, {5 * count} s in all:"
    assert lines[-1] == f"Kept in {path}" and lines[-2].startswith("Measured in 0.") and lines[-2].endswith(" s.")
    assert len(lines) == count + 3
    assert lines[1] == "  2 x 8 heads and 1024 x 1024 tokens, 40 wide, float32: too little time or memory to tell"
    assert len(main()[1].splitlines()[1:]) == count - 1
    main("--measure", checkpoint, "--size", "256")
    assert [it[0] for it in made_up.asked[count:]] == [it[0] for it in made_up.asked[:count]]  # asked for, done again


@pytest.mark.usefixtures("fused_kernel")
def test_what_is_measured_is_told_once_and_as_it_is(main, checkpoint, made_up):
    """77 tokens of a prompt are not 64, nor 8 heads about 8; layers of one size but other heads are others."""
    lines = main("--measure", checkpoint, "--size", "256")[1].splitlines()[1:-2]
    calls = [line.partition(":")[0] for line in lines]
    assert len(set(calls)) == len(calls) and not any("about" in line for line in calls)
    assert "  2 x 8 heads and 1024 x 77 tokens, 40 wide, float32" in calls
    assert {
        "  2 x 8 heads and 1024 x 1024 tokens, 40 wide, float32",
        "  1 head and 1024 x 1024 tokens, 512 wide, float32",
    } < {*calls}


@pytest.mark.usefixtures("fused_kernel")
def test_what_other_programs_did_is_told_and_no_tie_is_believed(main, path, checkpoint, made_up):
    made_up.disturbance = Disturbance(0.4, 1.5, 1.12)
    made_up.finds = lambda number: Found("fused").beside_others() if number < 3 else Found(LAST, margin=1.3)
    status, told = main("--measure", checkpoint, "--size", "256")
    assert status == 0 and told.count("nothing was clearly faster than the rules' choice while other programs ran") == 2
    assert (
        "Other programs took 40 % of the processor: times were about 1.5 times as long, and what differs by less than "
        "12 % cannot be told apart. 2 kinds of call were disturbed by other programs: before an image they are "
        "measured again."
    ) in told
    (found,) = file.read(path).machines.values()
    assert sum(it.disturbed for it in found.values()) == 2


@pytest.mark.usefixtures("fused_kernel")
def test_a_table_that_cannot_be_written_is_refused_before_measuring(main, path, checkpoint, made_up, capsys):
    path.mkdir()
    assert main("--measure", checkpoint, "--size", "256")[0] == 2 and made_up.asked == []


@pytest.mark.parametrize("command", ["order", "lab"])
@pytest.mark.parametrize(
    ("place", "why"),
    [("a folder", "it is no file"), ("of another program", "it is no file of measurements"), ("in a file", "")],
)
def test_why_a_table_cannot_be_written_is_told_with_its_whole_path(command, place, why, path, checkpoint, capsys):
    table = path
    if place == "a folder":
        path.mkdir()
    else:
        path.write_text("what somebody wrote", encoding="utf-8")
        table = path / "table.json" if place == "in a file" else path
    given = ["--measure" if command == "order" else "--checkpoint", str(checkpoint), "--size", "64", "--device", "cpu"]
    assert command_line.main([command, *given, "--table", os.path.relpath(table)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: {Path(os.path.relpath(table)).absolute()} cannot be written: {why}")


def test_to_try_a_table_leaves_nothing_behind(path):
    file.try_to_write(path)
    assert [it.name for it in path.parent.iterdir()] in ([], [f"{path.name}.lock"])
    fill(path, w40=Found(LAST))
    before = path.read_bytes()
    file.try_to_write(path)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("fused_kernel")
def test_what_is_measured_and_not_kept_is_no_success(main, path, checkpoint, made_up, caplog, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "write_whole", full)
    status, told = main("--measure", checkpoint, "--size", "256")
    assert status == 1 and "Measured in" in told and "Kept" not in told and "cannot be written" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--size", "512"], "--size has no meaning without --measure CHECKPOINT"),
        (["--engine", "fused", "--batch", "1"], "--engine, --batch have no meaning without --measure CHECKPOINT"),
        (["--forget", "--dtype", "float16"], "--dtype has no meaning without --measure CHECKPOINT"),
        (
            ["--measure", "CHECKPOINT", "--engine", "portable"],
            "--engine has no meaning with --measure, which tries every exact engine and its chunk sizes",
        ),
    ],
)
def test_an_option_without_a_meaning_is_refused(given, words, path, checkpoint, capsys):
    given = [str(checkpoint) if it == "CHECKPOINT" else it for it in given]
    assert command_line.main(["order", "--table", str(path), "--device", "cpu", *given]) == 2
    assert capsys.readouterr().err == f"order: {words}\n" and not path.exists()


def test_where_there_is_one_way_nothing_is_measured(main, checkpoint, monkeypatch):
    monkeypatch.setattr(rounds, "candidates", lambda problem, settings: {None: settings})
    status, told = main("--measure", checkpoint, "--size", "256")
    assert status == 0 and "nothing to measure" in told


# ------------------------------------------------------------------------------------------------ where it is kept


def test_without_platformdirs_it_asks_for_a_file(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert command_line.main(["order"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "order: platformdirs, which knows where your cache folder is, is not installed: add --table FILE (the web UI's "
        "own is subquad_measured.json in its data folder), or: pip install platformdirs\n"
    )


def test_without_platformdirs_plan_and_lab_work_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    kept.load(SimpleNamespace(table=None))
    told = kept.add(SimpleNamespace(table=None), order.machine(CPU), {CALLS: Found(LAST)})
    assert told.startswith("What was measured is not kept: platformdirs") and told.endswith("pip install platformdirs.")


def test_the_cache_folder_is_the_users(tmp_path, monkeypatch):
    cache = SimpleNamespace(user_cache_dir=lambda name, appauthor: str(tmp_path / "cache" / name))
    monkeypatch.setitem(sys.modules, "platformdirs", cache)
    arguments = SimpleNamespace(table=None)
    its = tmp_path / "cache" / "subquad" / file.NAME
    assert kept.path(arguments) == its and kept.path(SimpleNamespace(table=Path("x"))) == Path("x")
    assert str(its) in kept.add(arguments, order.machine(CPU), {CALLS: Found(LAST)})
    order.go_by(Table())
    kept.load(arguments)
    assert order.table().found(order.machine(CPU), CALLS) == Found(LAST)
