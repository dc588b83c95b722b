"""`python -m lib_subquad bench` and `growth`, run for real on shapes that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib_subquad import __main__ as command_line
from lib_subquad.engines import fused
from lib_subquad.lab import process
from lib_subquad.lab.bench import capture, measure
from lib_subquad.lab.bench.shapes import Shape
from lib_subquad.lab.bench.work import Job

ROOT = Path(__file__).parents[2]
TINY = ROOT.parent / "shared" / "checkpoints" / "tiny-sd1" / "tiny-sd1.safetensors"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is told this way on Linux alone")
SMALL = Shape("", 1, 2, 64, 64, 8)
SMALL_TEXT = "1,2,64,64,8"


def peer_file(tmp_path, body: str, name: str = "kernel.py") -> str:
    path = tmp_path / name
    text = "import os, signal, time, torch\ndef efficient_dot_product_attention(query, key, value):\n    "
    path.write_text(text + body + "\n    return torch.softmax(query @ key.mT / 8**0.5, -1) @ value\n", encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------- the command line


def test_bench_measures_prints_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["bench", "--shape", SMALL_TEXT, "--shape", "1,1,70,9,8", "--peers", "sdpa,automatic", "--repeats", "1"]
    arguments += ["--peer", peer_file(tmp_path, "pass"), "--against", "sdpa", "--against", "kernel"]
    arguments += ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("2×64×8", "1×70×9×8", "automatic", "kernel", "× sdpa", "× kernel", "all shapes"):
        assert words in printed
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [(one["peer"], one["shape"]["queries"], one["reason"]) for one in record["results"]] == [
        (peer, queries, "") for queries in (64, 70) for peer in ("sdpa", "automatic", "kernel")
    ]
    assert all(0 < one["seconds"] and one["error"] < 1e-5 for one in record["results"])
    best = "fused" if fused.TAKES_SCALE else "portable"
    assert record["torch"] == torch.__version__ and record["results"][1]["rounds"][0]["plan"].startswith(best)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_measures_the_vae(tmp_path, capsys):
    arguments = ["bench", "--vae", "64", "--ways", "usual,bands", "--repeats", "1"]
    assert command_line.main([*arguments, "--json", str(tmp_path / "vae.json")]) == 0
    printed = capsys.readouterr().out
    assert "Stable Diffusion's VAE, float32" in printed and "decoder 64²" in printed and "processor" in printed
    record = json.loads((tmp_path / "vae.json").read_text(encoding="utf-8"))
    usual, bands = record["results"]
    assert [usual["peer"], bands["peer"]] == ["usual", "bands"]
    assert usual["shape"] == {"half": "decoder", "width": 64, "height": 64} and usual["reason"] == bands["reason"] == ""
    assert bands["error"] <= 1.3 * usual["error"] < 1e-4
    assert bands["rounds"][0]["plan"].startswith("bands of ") and bands["rounds"][0]["plan_bytes"]
    assert all(it["seconds"] > 0 and it["processor"] > 0 for it in record["results"])


def test_growth_doubles_prints_and_writes(tmp_path, capsys):
    arguments = ["growth", "--heads", "1", "--width", "8", "--smallest", "32", "--largest", "64", "--repeats", "1"]
    assert command_line.main([*arguments, "--peers", "automatic", "--json", str(tmp_path / "growth.json")]) == 0
    printed = capsys.readouterr().out
    assert "ns a score" in printed and "workspace" in printed
    record = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert [one["shape"]["queries"] for one in record["results"]] == [32, 64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "flash"], "expected one of sdpa"),
        (["--peers", ","], "expected names of peers"),
        (["--peer", "sdpa"], "name it in --peers"),
        (["--peer", "nowhere.py"], "no such file"),
        (["--shape", "sd15"], "MODEL-SIDE"),
        (["--device", "abacus"], "device 'abacus' cannot be used here. Available: "),
        (["--repeats", "0"], "at least 1"),
        (["--json", os.path.join("no", "such", "folder.json")], "there is no folder"),
        (["--json", os.curdir], "is a folder"),
        (["--training", "--layer"], "not allowed with"),
        (["--vae", "512", "--layer"], "not allowed with"),
        (["--vae", "100"], "multiple of 64"),
        (["--vae", "unet-512"], "decoder, encoder"),
        (["--vae", "512", "--ways", "tiles"], "expected some of usual"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_measured(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(["bench", *arguments])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--peers", "automatic", "--against", "sdpa"], "not measured"),
        (["bench", "--capture", "x.safetensors", "--shape", SMALL_TEXT], "no meaning"),
        (["bench", "--capture", "x.safetensors", "--size", "100"], "multiple of 64"),
        (["bench", "--vae", "--shape", SMALL_TEXT], "no meaning"),
        (["growth", "--smallest", "64", "--largest", "32"], "more than"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, words, capsys):
    assert command_line.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    files = [peer_file(tmp_path, "pass"), peer_file(tmp_path / "other", "pass")]
    assert command_line.main(["bench", *(word for file in files for word in ("--peer", file))]) == 2
    assert "same name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["bench", "--shape", SMALL_TEXT], ["growth", "--smallest", "64", "--largest", "64"]]
)
def test_nothing_measured_is_an_error(command, tmp_path, capsys):
    kernel = peer_file(tmp_path, "raise RuntimeError('no such luck')")
    arguments = [*command, "--peers", kernel, "--repeats", "3", "--json", str(tmp_path / "found.json")]
    assert command_line.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(f"{command[0]}: nothing was measured: RuntimeError: no such luck\n")
    assert "RuntimeError: no such luck" in printed.out and "median of" not in printed.out
    (found,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["results"]
    assert found["reason"] == "RuntimeError: no such luck" and len(found["rounds"]) == 1


def test_what_some_peers_can_is_no_error(tmp_path, capsys):
    broken = peer_file(tmp_path, "raise RuntimeError('no such luck')")
    arguments = ["bench", "--shape", SMALL_TEXT, "--peers", f"sdpa,{broken}", "--repeats", "2"]
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr()
    assert "time: median of 2 processes, spread" in printed.out and "nothing was measured" not in printed.err


def test_a_missing_matplotlib_is_said_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line.main(["bench", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_command_needs_torch_alone():
    wall = "tqdm matplotlib safetensors diffusers xformers memory_efficient_attention ldm psutil numpy".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({wall})); import torch; import lib_subquad.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------ a measurement's own


def test_a_peer_that_dies_gives_a_reason(tmp_path):
    found = measure.measure(Job(peer_file(tmp_path, "os._exit(3)"), SMALL))
    assert found.reason == "ended with status 3" and found.seconds == 0


@pytest.mark.skipif(not hasattr(os, "kill") or sys.platform == "win32", reason="Windows has no signals")
def test_a_peer_that_is_killed_gives_a_reason(tmp_path):
    found = measure.measure(Job(peer_file(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), SMALL))
    assert found.reason == "ended by SIGKILL, as for want of memory"


def test_a_peer_that_prints_is_measured_all_the_same(tmp_path):
    found = measure.measure(Job(peer_file(tmp_path, "print('hello')"), SMALL))
    assert found.reason == "" and found.error < 1e-5


def test_a_peer_that_hangs_is_stopped(tmp_path):
    found = measure.measure(Job(peer_file(tmp_path, "time.sleep(600)"), SMALL), timeout=1)
    assert found.reason == "took longer than 1 s"


@LINUX
def test_a_peer_that_wants_more_than_there_is_fails_alone(tmp_path):
    found = measure.measure(Job(peer_file(tmp_path, "torch.ones(1 << 44)"), SMALL))
    assert found.reason == "out of memory"


@LINUX
@pytest.mark.parametrize("mebibytes", [48, 400])
def test_the_peak_is_what_a_peer_held(tmp_path, mebibytes):
    body = f"block = torch.ones({mebibytes} << 18); del block"
    found = measure.measure(Job(peer_file(tmp_path, body), SMALL))
    # Linux counts resident pages in batches: a little may be missing.
    assert mebibytes - 1 <= found.peak_bytes / (1 << 20) <= mebibytes + 8


def test_a_lora_is_no_checkpoint_to_capture_from(tmp_path, capsys):
    torch_files = pytest.importorskip("safetensors.torch")
    path = tmp_path / "lora.safetensors"
    torch_files.save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 4)}, path)
    assert command_line.main(["bench", "--capture", str(path), "--size", "64"]) == 2
    assert "--capture: LoRA (names such as 'lora_unet_mid_block_attentions_0" in capsys.readouterr().err


def test_what_goes_wrong_in_a_process_is_told_in_its_last_line():
    with pytest.raises(process.Failed, match="No module named"):
        process.ask("lib_subquad.lab.of_no_such_name", {})


# ---------------------------------------------------------------------------------------------- out of a real model


def save_unet(path: Path, **changes) -> dict:
    """A small U-Net in the manner of SD 2: heads 64 wide, transformers entered by a linear layer."""
    openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    from safetensors.torch import save_file

    arguments = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (1, 2),
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 32,
        "legacy": False,
    } | changes
    unet = openaimodel.UNetModel(**arguments)
    save_file({capture.PREFIX + name: tensor for name, tensor in unet.state_dict().items()}, path)
    return arguments


def test_captured_tensors_are_those_that_the_layers_work_on(tmp_path):
    pytest.importorskip("safetensors")
    save_unet(tmp_path / "small.safetensors")
    captured = capture._captured(str(tmp_path / "small.safetensors"), (64, 64))
    # Latents of 8 x 8, and half of that one level down, where a layer has two heads of 64; cross-attention beside each.
    assert [(shape.sizes, shape.name) for shape, _ in captured] == [
        ("2×64×77×64", "small 64² cross"),
        ("2×64×64", "small 64²"),
        ("4×16×77×64", "small 64² cross"),
        ("4×16×64", "small 64²"),
    ]
    for shape, (query, key, value) in captured:
        assert query.shape == (shape.batch, shape.heads, shape.queries, shape.width)
        assert key.shape == value.shape == (shape.batch, shape.heads, shape.keys, shape.width)
        assert all(tensor.isfinite().all() and tensor.std() > 0.01 for tensor in (query, key, value))


def test_bench_measures_captured_tensors(tmp_path, capsys):
    pytest.importorskip("ldm")
    pytest.importorskip("safetensors")
    if not TINY.exists():
        save_unet(tmp_path / "tiny-sd1.safetensors")
    checkpoint = TINY if TINY.exists() else tmp_path / "tiny-sd1.safetensors"
    arguments = ["bench", "--capture", str(checkpoint), "--size", "64", "--peers", "automatic", "--repeats", "1"]
    assert command_line.main([*arguments, "--json", str(tmp_path / "captured.json")]) == 0
    assert "tiny-sd1 64² cross" in capsys.readouterr().out
    record = json.loads((tmp_path / "captured.json").read_text(encoding="utf-8"))
    assert len(record["results"]) == 4 and all(one["error"] < 1e-4 and not one["reason"] for one in record["results"])


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file|cannot be read|does not exist|No such file"), (b"not a checkpoint", "")]
)
def test_a_checkpoint_that_cannot_be_used_is_said(tmp_path, content, words, capsys):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert command_line.main(["bench", "--capture", str(path)]) == 2
    assert capsys.readouterr().err.startswith("bench: --capture: ")
