"""What every command has in common: its help, its usage, and how it ends where nobody reads on."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import __main__ as command_line
from lib_subquad.console import UserError
from lib_subquad.lab.commands import arguments, files, lab
from lib_subquad.lab.tune.exploration import Progress

ROOT = Path(__file__).parents[2]
BENCH = ["bench", "--shape", "1,1,64,64,8", "--peers", "sdpa", "--repeats", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}


# ------------------------------------------------------------------------------------------------------ where to read


def test_every_option_has_help_and_tells_its_default(documented):
    documented(command_line.main)


def test_defaults_that_are_told_are_the_ones_taken():
    _, commands = command_line.build_parser()
    for parser in commands.values():
        for action in parser._actions:
            if isinstance(action.default, (int, str)) and action.nargs != 0 and action.default != "==SUPPRESS==":
                text = (action.help % vars(action)).rstrip(".)")
                assert text.endswith((f"default: {action.default}", "default: all")), action.option_strings


@pytest.mark.parametrize("command", command_line.COMMANDS)
@pytest.mark.parametrize("unknown", [["--colour", "red"], ["extra"], ["-z"]])
def test_an_unknown_option_shows_the_usage_of_its_own_command(command, unknown, capsys):
    given = ["--checkpoint", "x"] if command in ("plan", "lab") else []
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, *given, *unknown])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith(f"usage: python -m lib_subquad {command} [-h]")
    assert errors.endswith(f"error: unrecognized arguments: {' '.join(unknown)}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--checkpoint", "x", "--query-chunk", "12.5"], "'12.5'; expected a whole number from 0 to 16384"),
        (["plan", "--checkpoint", "x", "--batch", "1.5"], "'1.5'; expected a whole number of at least 1"),
        (["plan", "--checkpoint", "x", "--batch", "-1"], "'-1'; expected a whole number of at least 1"),
        (["lab", "--checkpoint", "x", "--heads", "0"], "'0'; expected a whole number of at least 1"),
        (["bench", "--calm", "500"], "'500'; expected a whole number from 1 to 100"),
        (["growth", "--peers", ","], "expected names of peers"),
        (["order", "--forget", "everything"], "invalid choice: 'everything' (choose from"),
    ],
)
def test_a_number_that_cannot_be_is_said(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vulkan", "ipu:3", "gameboy", "cuda:99", "x" * 5000, "a\nb"], ids=lambda it: it[:7])
@pytest.mark.parametrize("command", ["plan", "lab", "order", "doctor", "report", "bench", "growth"])
def test_a_device_that_is_not_there_is_told_in_a_line_with_those_that_are(command, name, unet_header, tmp_path, capsys):
    """PyTorch's own words have up to 1,200 characters."""
    given = [command, "--device", name]
    given += ["--checkpoint", str(unet_header)] if command in ("plan", "lab") else []
    given += ["--table", str(tmp_path / "table.json")] if command in ("order", "doctor") else []
    try:
        assert command_line.main(given) == 2
    except SystemExit as ended:
        assert ended.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: device '") or "error: argument --device: device '" in line
    assert " cannot be used here" in line and line.split("Available: ")[1].split(", ")[-1] == "cpu"
    assert len(line) < 240


def test_the_devices_that_are_there_have_pytorchs_names(monkeypatch):
    def cards(count):
        return SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count)

    directml = SimpleNamespace(device=lambda number: f"privateuseone:{number}", device_count=lambda: 1)
    monkeypatch.setitem(sys.modules, "torch_directml", directml)
    monkeypatch.setattr(torch, "cuda", cards(2))
    monkeypatch.setattr(torch, "xpu", cards(1), raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert arguments.available() == ["cuda:0", "cuda:1", "xpu", "mps", "privateuseone:0", "cpu"]
    monkeypatch.setattr(torch, "cuda", None)  # a driver that fails
    monkeypatch.setattr(torch, "xpu", cards(0), raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_directml", None)
    assert arguments.available() == ["cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_what_pytorch_says_of_a_driver_is_told():
    with pytest.raises(UserError, match=r"device 'cuda' cannot be used here \(.{10,72}\)\. Available: "):
        arguments.usable("cuda")


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_an_engine_that_is_set_in_vain_is_told(command, unet_header, tmp_path, capsys):
    given = ["--checkpoint", str(unet_header), "--device", "cpu", "--table", str(tmp_path / "table.json")]
    assert command_line.main([command, *given, "--engine", "xformers"]) == 0
    assert "The engine is set to xformers, which computes nothing here: xformers " in capsys.readouterr().out
    assert command_line.main([command, *given, "--engine", "portable"]) == 0
    assert "The engine is set" not in capsys.readouterr().out


def test_a_size_that_is_computed_smaller_is_told(unet_header, capsys):
    plan = ["plan", "--checkpoint", str(unet_header), "--device", "cpu", "--size"]
    assert command_line.main([*plan, "500x520"]) == 0
    assert "Sizes go in steps of 8 pixels: 500 x 520 is computed as 496 x 520." in capsys.readouterr().out
    assert command_line.main([*plan, "504"]) == 0
    assert "computed as" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "lab"])
@pytest.mark.parametrize(
    ("shapes", "more", "words"),
    [
        ({"decoder.mid.attn_1.q.weight": [64, 64]}, ["--vae", "off"], "a VAE and no U-Net, and with --vae off"),
        ({"lora_unet_x.lora_up.weight": [4, 4]}, [], "no attention layer that subquad serves. LoRA (names such as"),
    ],
)
def test_a_file_without_layers_is_said(command, shapes, more, words, tmp_path, capsys):
    path = header_file(tmp_path / "file.safetensors", shapes)
    assert command_line.main([command, "--checkpoint", str(path), "--device", "cpu", *more]) == 2
    assert words in capsys.readouterr().err


def test_what_an_option_is_without_being_given_may_be_given():
    _, commands = command_line.build_parser()
    numbers = [
        (command, action.option_strings[0], action.default)
        for command, parser in commands.items()
        for action in parser._actions
        if type(action.default) is int
    ]
    assert ("bench", "--busy", 0) in numbers and len(numbers) > 10
    for command, option, default in numbers:
        parser = commands[command]
        required = [it for action in parser._actions if action.required for it in (action.option_strings[0], "x")]
        given = parser.parse_args([*required, option, str(default)])
        assert getattr(given, option.removeprefix("--").replace("-", "_")) == default


@pytest.fixture
def unet_header(tmp_path):
    """A U-Net of one layer to whoever reads the header only."""
    unet = "model.diffusion_model."
    shapes = {f"{unet}input_blocks.0.1.transformer_blocks.0.attn1.to_{part}.weight": [320, 320] for part in "qkv"}
    shapes |= {f"{unet}input_blocks.0.0.weight": [320, 4, 3, 3], f"{unet}output_blocks.0.0.weight": [320, 320, 1]}
    return header_file(tmp_path / "unet.safetensors", shapes)


def header_file(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A .safetensors file of these tensors, all zeros."""
    pytest.importorskip("safetensors")
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


# ---------------------------------------------------------------------------------------------------- without PyTorch


@pytest.mark.parametrize("arguments", [[], ["plan", "--help"]], ids=" ".join)
def test_without_pytorch_it_says_so(arguments):
    done = without_packages("-m", "lib_subquad", *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("lib_subquad needs PyTorch (torch), which ") and done.stderr.count("\n") == 1


def test_a_program_without_pytorch_gets_its_exception():
    done = without_packages("-c", "try: import lib_subquad\nexcept ModuleNotFoundError as error: print(error.name)")
    assert done.returncode == 0 and done.stdout == "torch\n"


def without_packages(*arguments) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", *arguments]  # whatever is installed is not found
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60
    )


def test_without_docstrings_too():
    command = [sys.executable, "-OO", "-m", "lib_subquad", "plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "--checkpoint" in done.stdout


# -------------------------------------------------------------------------------------------------- where nobody reads


def ended_without_reader(*arguments, python=(), errors_too=False) -> subprocess.CompletedProcess:
    """The command, its output a pipe that is closed at the other end before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if errors_too else subprocess.PIPE
    command = [sys.executable, *python, "-m", "lib_subquad", *map(str, arguments)]
    try:
        return subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=writer, stderr=errors, text=True, encoding="utf-8", timeout=300
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("python", [[], ["-u"]], ids=["at the end", "at once"])
@pytest.mark.parametrize("command", ["--help", "plan --help", "plan", "bench"])
def test_it_ends_without_a_word_where_nobody_reads(command, python, unet_header):
    arguments = command.split()
    arguments += ["--checkpoint", unet_header, "--device", "cpu"] if arguments == ["plan"] else []
    arguments += BENCH[1:] if arguments == ["bench"] else []
    done = ended_without_reader(*arguments, python=python)
    said = [part for part in done.stderr.split("\r") if part.strip() and "|" not in part]  # beside the progress bar
    assert said == []
    allowed = {command_line.READER_GONE, 0 if command.endswith("--help") else command_line.READER_GONE}
    assert done.returncode in allowed  # argparse itself passes over a help that nobody reads, since Python 3.11


def test_it_ends_without_a_word_where_nobody_reads_errors_either(tmp_path):
    done = ended_without_reader("plan", "--checkpoint", tmp_path / "nowhere", errors_too=True)
    assert done.returncode == command_line.READER_GONE


def test_what_was_measured_is_saved_though_nobody_reads_the_table(tmp_path):
    done = ended_without_reader(*BENCH, "--json", tmp_path / "bench.json", python=["-u"])
    assert done.returncode == command_line.READER_GONE
    (measured,) = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["results"]
    assert measured["seconds"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of its own")
def test_the_first_line_alone(unet_header):
    words = f"'{sys.executable}' -u -m lib_subquad plan --checkpoint '{unet_header}' --device cpu | head -1"
    done = subprocess.run(
        words, shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout.count("\n") == 1 and "attention layers in the U-Net" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "system", "quiet"),
    [
        (OSError(errno.EINVAL, "Invalid argument"), "win32", True),  # how Windows tells of a closed pipe
        (OSError(errno.EINVAL, "Invalid argument"), "linux", False),
        (OSError(errno.EINVAL, "Invalid argument", "a:b"), "win32", False),
        (BrokenPipeError(), "win32", True),
        (OSError(errno.ENOSPC, "No space left on device"), "win32", False),
    ],
)
def test_only_a_closed_pipe_is_passed_over(error, system, quiet, monkeypatch, capsys):
    def run(arguments):
        raise error

    command = SimpleNamespace(__doc__="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(command_line, "COMMANDS", {"x": (command, "x")})
    monkeypatch.setattr(command_line, "_discard_output", lambda: None)
    monkeypatch.setattr(sys, "platform", system)
    if quiet:
        assert command_line.main(["x"]) == command_line.READER_GONE
        assert capsys.readouterr() == ("", "")
    else:
        with pytest.raises(OSError, match="Invalid argument|No space"):
            command_line.main(["x"])


@pytest.mark.parametrize(("error", "told"), [(UserError("a sentence"), True), (ValueError("a fault of ours"), False)])
def test_a_fault_of_ours_does_not_pass_for_the_users(error, told, monkeypatch, capsys):
    def run(arguments):
        raise error

    command = SimpleNamespace(__doc__="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(command_line, "COMMANDS", {"x": (command, "x")})
    if told:
        assert command_line.main(["x"]) == 2 and capsys.readouterr().err == "x: a sentence\n"
    else:
        with pytest.raises(ValueError, match="a fault of ours"):
            command_line.main(["x"])


# ----------------------------------------------------------------------------------------------------- where to write


@pytest.mark.parametrize("command", ["lab", "bench", "growth"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("x" * 300 + ".png", "cannot be written"),  # longer than a name may be
        (os.curdir, "is a folder"),
        (os.path.join("no", "such", "folder.png"), "there is no folder"),
        (os.path.join(__file__, "x.png"), "there is no folder"),
    ],
)
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(command, option, file, words, tmp_path, capsys):
    if option == "--plot" and file == os.curdir:
        file, words = str(tmp_path / "folder.png"), "is a folder"
        os.mkdir(file)
    given = ["--checkpoint", "x"] if command == "lab" else []
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, *given, option, file])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and words in errors and f"argument {option}: " in errors


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can make a file")
def test_a_folder_in_which_no_file_can_be_made(capsys):
    with pytest.raises(SystemExit):
        command_line.main([*BENCH, "--json", "/proc/bench.json"])
    assert "'/proc/bench.json' cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lab", "lab.xyz", "png"])
def test_a_picture_of_a_kind_that_cannot_be_drawn_is_refused(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.main([*BENCH, "--plot", str(tmp_path / name)])
    assert "expected a file that ends in .png, .svg, .pdf" in capsys.readouterr().err


def test_to_try_a_file_leaves_it_as_it_was(tmp_path):
    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    kept.write_text("what was there", encoding="utf-8")
    assert files.writable_file(str(kept)) == kept and kept.read_text(encoding="utf-8") == "what was there"
    assert files.writable_file(str(new)) == new and not new.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own")
def test_a_link_and_a_pipe_are_left_as_they_were(tmp_path):
    link, pipe = tmp_path / "link.json", tmp_path / "pipe.json"
    link.symlink_to(tmp_path / "to.json")
    os.mkfifo(pipe)
    for path in (link, pipe):
        assert files.writable_file(str(path)) == path
    assert link.is_symlink() and not link.exists() and pipe.is_fifo()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("command", [BENCH, ["growth", "--heads", "1", "--width", "8", "--smallest", "32",
                                             "--largest", "32", "--peers", "sdpa", "--repeats", "1"]])  # fmt: skip
def test_a_disk_that_is_full_when_all_is_measured_costs_no_table(command, capsys):
    assert command_line.main([*command, "--json", "/dev/full"]) == 2
    printed = capsys.readouterr()
    assert "| sdpa" in printed.out and "'/dev/full' cannot be written: No space left on device" in printed.err


# ---------------------------------------------------------------------------------------------------- how long it takes


def test_how_long_it_takes_is_told_once(capsys):
    pytest.importorskip("tqdm")
    steps = [Progress(0, 4, None, "first"), Progress(1, 4, 12.4, "second"), Progress(2, 4, None, "again")]
    assert lab._measure(SimpleNamespace(run=lambda: iter(steps))) is False
    shown = [line for line in capsys.readouterr().err.split("\r") if "|" in line]
    (told,) = {line.strip() for line in shown if "10 s left" in line}
    assert "second" in told and "25%" in told
    assert not any("<" in line for line in shown)  # the bar's own estimate


def test_how_long_it_takes_is_told_without_a_bar(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    steps = [Progress(0, 4, None, "first"), Progress(1, 4, 12.4, "second")]
    lab._measure(SimpleNamespace(run=lambda: iter(steps)))
    assert capsys.readouterr().out == "0%: first\n25%: second, 10 s left\n"
