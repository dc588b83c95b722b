"""The parts of the benchmark that need no process of their own: shapes, peers, measuring, summing up."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import threading
import time

import psutil
import pytest
import torch

from lib_subquad.console import UserError
from lib_subquad.engines import fused
from lib_subquad.lab import machine, meter, process, tables
from lib_subquad.lab.bench import halves, measure, peers, plot, report, results
from lib_subquad.lab.bench.measure import Measurement
from lib_subquad.lab.bench.results import Result
from lib_subquad.lab.bench.shapes import DEFAULT, Shape, parse_shape
from lib_subquad.lab.bench.work import Job
from lib_subquad.lab.commands import measuring
from lib_subquad.lab.commands.growth import doubling
from lib_subquad.problem import Problem

SMALL = Shape("", 2, 2, 70, 50, 16)


# ------------------------------------------------------------------------------------------------------------- shapes


def test_the_default_shapes_are_those_of_the_design():
    assert [parse_shape(name).sizes for name in DEFAULT] == [
        "16×4096×40",
        "20×4096×64",
        "1×16384×512",
        "16×16384×40",
        "16×4096×77×40",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sd21-768", Shape("SD 2.1 768²", 2, 5, 9216, 9216, 64)),
        ("vae-2048", Shape("VAE 2048²", 1, 1, 65536, 65536, 512)),
        ("SDXL-1024-cross231", Shape("SDXL 1024² cross", 2, 10, 4096, 231, 64)),
        ("1,2,3,4,5", Shape("", 1, 2, 3, 4, 5)),
    ],
)
def test_a_shape_is_named_or_given_in_numbers(text, expected):
    assert parse_shape(text) == expected


@pytest.mark.parametrize(
    "text", ["", "sd3-512", "sd15", "sd15-500", "sd15-0", "sd15-99968", "vae-512-cross77", "sd15-512-cross0"]
)
def test_a_name_that_is_no_shape_is_shown_what_was_expected(text):
    with pytest.raises(UserError, match="expected|must be a multiple of 64"):
        parse_shape(text)


@pytest.mark.parametrize("text", ["1,2,3,4", "1,2,3,4,0", "1,2,3,4,x", "1,2,3,4,5,6", "1,2,-3,4,5", ","])
def test_numbers_that_are_no_shape_are_shown_what_was_expected(text):
    with pytest.raises(ValueError, match="five whole numbers"):
        parse_shape(text)


# -------------------------------------------------------------------------------------------------------------- peers


def small_problem(**changes) -> Problem:
    query, key = (2, 2, 70, 16), (2, 2, 50, 16)
    return Problem.from_shapes(query, key, changes.pop("value", key), torch.float32, "cpu", **changes)


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_is_exact(name):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 2, 70, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    weights = (query.double() @ key.double().transpose(2, 3) / 4).softmax(-1)
    try:
        attend = peers.find(name).make(small_problem())
        with torch.no_grad():
            output = attend(query, key, value)
    except (peers.Unsupported, NotImplementedError) as error:
        words = ("not installed", "cannot be loaded", "has no kernels for cpu", "does not let one choose")
        words += ("has no cuDNN", "does not run on cpu", "takes these widths as they are")
        missing = any(word in str(error) for word in words) or (name == "fused" and not fused.TAKES_SCALE)
        elsewhere = name in ("sdpa-efficient", "sdpa-cudnn")  # neither of these knows a CPU
        if not elsewhere and not missing:
            raise
        pytest.skip(str(error))
    torch.testing.assert_close(output.double(), weights @ value.double(), atol=2e-6, rtol=0)


def test_a_kernel_of_pytorchs_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(peers.Unsupported, match="no such kernel for this here|does not let one choose"):
        peers.find("sdpa-cudnn").make(small_problem())(*torch.randn(3, 1, 2, 8, 16))


@pytest.mark.usefixtures("fused_kernel")
def test_fused_says_why_it_cannot():
    with pytest.raises(peers.Unsupported, match="no fused kernel"):
        peers.find("fused").make(small_problem(value=(2, 2, 50, 24)))


@pytest.mark.parametrize("name", ["sdpa-math", "diffusers-sliced"])
def test_a_peer_that_would_fill_the_memory_is_refused(name, monkeypatch):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    monkeypatch.setattr(peers.devices, "free_bytes", lambda device: 1000)
    with pytest.raises(peers.Unsupported, match="GiB are free"):
        peers.find(name).make(small_problem())


@pytest.mark.parametrize("module", ["memory_efficient_attention", "diffusers"])
def test_a_peer_that_is_not_installed_says_how_to_get_it(module, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peer = {"memory_efficient_attention": "memory-efficient-attention", "diffusers": "diffusers-sliced"}
    with pytest.raises(peers.Unsupported, match="pip install"):
        peers.find(peer[module]).make(small_problem())


def test_a_peer_of_that_name_does_not_exist():
    with pytest.raises(ValueError, match="expected one of sdpa, automatic"):
        peers.find("flash")
    with pytest.raises(ValueError, match="no such file"):
        peers.find("nowhere/kernel.py")


def peer_file(tmp_path, text: str) -> str:
    path = tmp_path / "kernel.py"
    path.write_text("import torch\n" + text, encoding="utf-8")
    return str(path)


def test_a_file_is_called_as_the_web_ui_calls_its_own(tmp_path):
    text = """
calls = []
def efficient_dot_product_attention(query, key, value, query_chunk_size=1024, use_checkpoint=True):
    assert query.shape == (4, 70, 16) and key.shape == value.shape == (4, 50, 16)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value) + use_checkpoint
"""
    peer = peers.find(peer_file(tmp_path, text))
    query, key = torch.randn(2, 2, 70, 16), torch.randn(2, 2, 50, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert peer.name == "kernel"
    torch.testing.assert_close(peer.make(small_problem())(query, key, key), expected)
    torch.testing.assert_close(peer.make(small_problem(grad=True))(query, key, key), expected + 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "has no function"), ("import nothing_of_this_name", "ModuleNotFoundError"), ("(", "Syntax")],
)
def test_a_file_that_is_no_peer_says_why(tmp_path, text, reason):
    with pytest.raises(peers.Unsupported, match=reason):
        peers.find(peer_file(tmp_path, text)).make(small_problem())


# --------------------------------------------------------------------------------------------------- one measurement


@pytest.mark.parametrize("mode", ["attention", "training", "layer"])
@pytest.mark.parametrize("scores", ["normal", "peaky"])
@pytest.mark.parametrize("peer", ["sdpa", "automatic", "portable"])
def test_errors_are_those_of_float32(mode, scores, peer):
    if mode == "layer":
        pytest.importorskip("ldm")
    found = measure._measure_or_reason(Job(peer, SMALL, mode=mode, scores=scores))
    assert found.reason == "" and found.calls >= 1 and found.seconds > 0
    assert 0 < found.error < 1e-4
    assert (found.gradient_error is not None) == (mode == "training")
    assert found.gradient_error is None or 0 < found.gradient_error < 1e-3
    assert found.result_bytes == 2 * 2 * 70 * 16 * 4
    assert (found.plan_bytes is None) == (peer == "sdpa")


@pytest.mark.parametrize("mode", ["attention", "training"])
def test_a_wrong_peer_is_found_out(mode, tmp_path):
    text = "def efficient_dot_product_attention(query, key, value):\n    return query * value.mean()"
    found = measure._measure_or_reason(Job(peer_file(tmp_path, text), SMALL, mode=mode))
    assert found.error > 0.1
    assert found.gradient_error is None or found.gradient_error > 0.01


def test_the_layer_looks_at_itself_where_queries_and_keys_are_as_many():
    pytest.importorskip("ldm")
    found = measure._measure_or_reason(Job("automatic", Shape("", 1, 2, 64, 64, 8), mode="layer"))
    assert 0 < found.error < 1e-5


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('first line\\nsecond')", "RuntimeError: first line"),
        ("raise RuntimeError('not enough memory: you tried')", "out of memory"),
        ("raise MemoryError", "out of memory"),
    ],
)
def test_a_peer_that_fails_gives_a_reason(tmp_path, body, reason):
    text = f"def efficient_dot_product_attention(query, key, value):\n    {body}"
    assert measure._measure_or_reason(Job(peer_file(tmp_path, text), SMALL)) == Measurement(reason=reason)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told this way on Linux alone")
@pytest.mark.usefixtures("fused_kernel")
def test_the_peak_is_the_result_and_what_its_kernel_needs():
    found = measure._measure_or_reason(Job("sdpa", Shape("", 1, 1, 8192, 64, 512)))
    assert found.result_bytes == 16 << 20
    assert 15 << 20 <= found.peak_bytes <= 20 << 20


@pytest.mark.parametrize("sampled", [False, True])
def test_a_peak_that_is_gone_is_seen(monkeypatch, sampled):
    """By a thread that looks a thousand times a second once it has looked, which on a busy machine may be late."""
    there, seen = threading.Event(), threading.Event()
    look = psutil.Process.memory_info

    def looked(process):
        was_there = there.is_set()
        found = look(process)
        if was_there:
            seen.set()
        return found

    monkeypatch.setattr(psutil.Process, "memory_info", looked)
    if sampled:
        monkeypatch.setattr(meter, "_high_water_mark", lambda: None)
    marked = meter._high_water_mark() is not None
    with meter.PeakMemory(torch.device("cpu"), sampled=True) as peak:
        block = torch.ones(32 << 20)
        there.set()
        assert marked or seen.wait(60)
        del block
    assert 120 << 20 <= peak.bytes < 400 << 20


def test_what_nothing_tells_is_not_sampled_unasked(monkeypatch):
    monkeypatch.setattr(meter, "_high_water_mark", lambda: None)
    with meter.PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes is None


# ----------------------------------------------------------------------------------------------------------- the VAE


@pytest.mark.parametrize(
    ("text", "picture", "label"),
    [
        ("512", ("decoder", 512, 512), "decoder 512²"),
        ("encoder-1024", ("encoder", 1024, 1024), "encoder 1024²"),
        (" Decoder-64x128", ("decoder", 64, 128), "decoder 64×128"),
    ],
)
def test_pictures_have_names(text, picture, label):
    found = halves.parse_picture(text)
    assert (found, found.label) == (halves.Picture(*picture), label)


@pytest.mark.parametrize("text", ["", "unet-512", "decoder", "512-decoder", "encoder-"])
def test_what_is_no_picture_is_shown_what_was_expected(text):
    with pytest.raises(ValueError, match="expected"):
        halves.parse_picture(text)


@pytest.mark.parametrize("half", halves.HALVES)
@pytest.mark.parametrize("way", halves.WAYS)
def test_every_way_gives_the_same_picture(half, way):
    found = measure._measure_or_reason(halves.HalfJob(way, halves.Picture(half, 64, 128)))
    assert found.reason == "" and 0 < found.error < 1e-4 and found.processor > 0
    assert found.result_bytes == (3 * 64 * 128 if half == "decoder" else 8 * 8 * 16) * 4
    assert (found.plan_bytes is not None) == ("bands" in way)


def test_a_way_that_is_wrong_is_found_out(monkeypatch):
    monkeypatch.setattr(halves, "in_bands", lambda half, x, **more: half(x).roll(1, 2))
    assert measure._measure_or_reason(halves.HalfJob("bands", halves.Picture("decoder", 64, 64))).error > 0.1


def test_a_table_of_the_vae_compares_with_the_usual_way():
    picture = halves.Picture("decoder", 512, 512)
    found = [
        Result(picture, "usual", [Measurement(2.0, 1, 8 << 20, 0, 1e-6, processor=3.0)] * 2),
        Result(picture, "bands", [Measurement(3.0, 1, 2 << 20, 0, 1e-6, processor=3.3)] * 2),
    ]
    row = report.vae_table(found).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "bands", "3.00 s", "3.00 s – 3.00 s", "1.50", "3.30 s", "1.10", "2 MiB", "0.25", "1.0e-06",
    ]  # fmt: skip
    assert "–" in report.vae_table(found[1:])  # nothing to compare with
    record = {"mode": "vae", "dtype": "float32", "scores": "normal", "busy": 0, "device": "a device", "threads": None}
    text = report.vae_report(record | {"torch": "2.13", "others": None, "command": "bench --vae"}, found)
    assert "usual: all at once, as" in text and "low-bands:" not in text


def test_the_record_tells_of_busy_programs(monkeypatch):
    monkeypatch.setattr(measuring, "measure", lambda *job: Measurement(1.0))
    monkeypatch.setattr(measuring, "busy_programs", lambda count: contextlib.nullcontext())
    arguments = argparse.Namespace(device="cpu", threads=None, calm=None, timeout=1, repeats=1, dtype="float32")
    found = measuring.measured(arguments, [SMALL], ["sdpa"], lambda *asked: None, busy=2, scores="normal", mode="layer")
    assert "beside 2 busy programs" in report.heading(found.record)


# -------------------------------------------------------------------------------------------------- many measurements


def result(peer: str, *seconds: float, shape: Shape = SMALL, peak: int | None = 1 << 20) -> Result:
    return Result(shape, peer, [Measurement(value, 3, peak, 1 << 19, 1e-7) for value in seconds])


def test_ratios_are_taken_round_by_round():
    # The machine was three times as slow in the second round: that says nothing about either peer.
    ours, theirs = result("ours", 2.0, 6.0, 2.2), result("theirs", 1.0, 3.0, 1.0)
    assert ours.ratio_to(theirs) == 2.0
    assert (ours.seconds, ours.low, ours.high) == (2.2, 2.0, 6.0)
    assert ours.ratio_to(None) is None


def test_rounds_that_failed_count_for_nothing():
    ours = result("ours", 2.0, 4.0)
    ours.rounds[1] = Measurement(reason="took longer than 5 s")
    assert (ours.seconds, ours.reason, ours.ratio_to(result("theirs", 1.0, 1.0))) == (2.0, "", 2.0)
    ours.rounds[0] = None
    assert (ours.seconds, ours.reason) == (None, "took longer than 5 s")
    assert ours.ratio_to(result("theirs", 1.0, 1.0)) is None
    assert Result(SMALL, "ours").reason == "not measured"


def test_workspace_is_the_peak_without_the_result():
    assert result("ours", 1.0).workspace_bytes == 1 << 19
    assert result("ours", 1.0, peak=None).workspace_bytes is None
    assert result("ours", 1.0, peak=None).memory_ratio_to(result("theirs", 1.0)) is None


def test_an_error_that_is_no_number_is_the_worst():
    ours = result("ours", 1.0, 1.0, 1.0)
    ours.rounds[1] = Measurement(1.0, 1, None, 0, math.nan)
    assert math.isnan(ours.error)


def test_rounds_alternate_and_a_peer_that_cannot_is_asked_once():
    asked, shown = [], []

    def measure_one(shape: Shape, peer: str) -> Measurement:
        asked.append(peer)
        return Measurement(reason="cannot") if peer == "b" else Measurement(1.0)

    found, complete = results.measure_interleaved([SMALL], ["a", "b", "c"], 3, measure_one, shown.append, str.upper)
    assert asked == ["a", "b", "c", "c", "a", "a", "c"]
    assert complete and [one.peer for one in found] == ["A", "B", "C"]
    assert shown.count(None) == 9  # what is left out counts as done
    assert found[1].reason == "cannot"


def test_stopping_keeps_what_was_measured():
    def measure_one(shape: Shape, peer: str) -> Measurement:
        if peer == "b":
            raise KeyboardInterrupt
        return Measurement(1.0)

    found, complete = results.measure_interleaved([SMALL, SMALL], ["a", "b"], 2, measure_one, lambda what: None)
    assert not complete
    assert [one.seconds for one in found] == [1.0, None, None, None]
    assert "not measured" in report.main_table(found, ["a"])


# ------------------------------------------------------------------------------------------------- tables and pictures


def test_a_table_is_aligned_and_is_markdown():
    text = tables.table(["peer", "time"], [["a|b", "1"], ["c", "22 ms"]], left={"peer"})
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---- | ----: |"
    assert "a\\|b" in lines[2] and lines[3] == "| c    | 22 ms |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.000012, "12 µs"),
        (0.00123, "1.2 ms"),
        (0.414, "414 ms"),
        (7.261, "7.26 s"),
        (24.66, "24.7 s"),
        (18.0022, "18 s"),
        (312.4, "312 s"),
    ],
)
def test_times_in_words(value, text):
    assert tables.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0"), (700, "0.7 KiB"), (40 << 10, "40 KiB"), (100 << 10, "100 KiB"), (31 << 20, "31 MiB")],
)
def test_memory_in_words(count, text):
    assert tables.memory(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.2, "1 s"), (9.4, "9 s"), (12.4, "10 s"), (44, "45 s"), (130, "2 min")])
def test_how_long_in_words(value, text):
    assert tables.duration(value) == text


def test_the_report_compares_shape_by_shape_and_over_all():
    other = Shape("SD", 1, 1, 64, 64, 8)
    found = [result("sdpa", 1.0), result("ours", 2.0, peak=2 << 20)]
    found += [result("sdpa", 1.0, shape=other), result("ours", 8.0, shape=other)]
    record = {"mode": "attention", "dtype": "float32", "scores": "peaky", "device": "a device", "threads": 2}
    record |= {
        "torch": "2.13",
        "repeats": 1,
        "load": 1.5,
        "load_after": 2.5,
        "others": [0.0, 0.1, 0.3],
        "command": "python -m lib_subquad bench",
    }
    text = report.report(record, found, ["sdpa"])
    assert "peaky scores; a device, 2 threads, torch 2.13" in text
    assert "beside 2 busy programs" in report.heading(record | {"busy": 2}) and "busy" not in report.heading(record)
    assert "took 0% to 30% of the processors" in text and "load average 1.5 before, 2.5 after" in text
    assert "python -m lib_subquad bench" in text
    assert (
        "error: the largest absolute one of a sample of rows against float64. What was measured once is not to" in text
    )
    assert "not to be trusted" not in report.report(record, [result("sdpa", 1.0, 2.0)], ["sdpa"])
    summary = text[text.index("all shapes") :]
    assert "| ours       |         4.00 |  8.00 |                 2.00 |" in summary


@pytest.mark.parametrize(
    ("rounds", "tries", "words"),
    [
        ([1], 1, "time: median of 1 process, "),
        ([3, 3], 1, "time: median of 3 processes, "),
        ([2, 5], 1, "time: median of 2 to 5 processes, "),  # stopped, or a round that failed
        ([0, 2], 4, "time: median of 2 processes (6 more were disturbed and made again), "),
        ([0], 1, ""),
    ],
)
def test_the_footnote_tells_how_many_runs_there_were(rounds, tries, words):
    found = [Result(SMALL, "ours", [Measurement(1.0, tries=tries)] * count + [None]) for count in rounds]
    assert report.how_often(found).startswith(words) and bool(report.how_often(found)) == bool(words)
    record = {"repeats": 9, "threads": None, "others": None}
    assert report._legend(record, found).startswith(words) and "9" not in report._legend(record, found)


def test_a_long_reason_is_cut_in_the_table():
    failed = Result(SMALL, "ours", [Measurement(reason="because " * 50)])
    text = report.main_table([failed], ["sdpa"])
    assert "because…" in text and max(map(len, text.splitlines())) < 250


def growth_results() -> list[Result]:
    shapes = [Shape("", 1, 2, tokens, tokens, 8) for tokens in doubling(1024, 8192)]
    found = [result("automatic", shape.scores * 1e-9, shape=shape) for shape in shapes]
    return found + [Result(shape, "portable", [Measurement(reason="cannot")]) for shape in shapes]


def test_growth_is_told_as_time_a_score():
    text = report.growth_table(growth_results())
    row = next(line for line in text.splitlines() if "8,192" in line)
    assert "1.000" in row and "+0 %" in row and "0.5 MiB" in row and "cannot" in text
    assert doubling(1000, 7000) == [1000, 2000, 4000]


def test_pictures_are_drawn_whatever_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    found = [result("sdpa", 1.0, 2.0, 3.0), result("ours", 2.0, peak=None), Result(SMALL, "theirs")]
    plot.draw_bench(found, "title").savefig(tmp_path / "bench.png")
    plot.draw_growth(growth_results(), "title").savefig(tmp_path / "growth.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("bench.png", "growth.png"))


# ------------------------------------------------------------------------------------------------- on a busy machine


def test_theshare_of_others_is_what_is_neither_idle_nor_ours():
    # Ten seconds on two processors: twelve taken, eight of them by this process.
    assert machine.share_of_others((100.0, 40.0, 5.0), (120.0, 52.0, 13.0)) == pytest.approx(0.2)
    assert machine.share_of_others((100.0, 40.0, 5.0), (120.0, 40.0, 6.0)) == 0.0
    assert machine.share_of_others(None, (1.0, 1.0, 1.0)) is None
    assert machine.share_of_others((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) is None


@pytest.mark.parametrize(("shares", "calm", "expected"), [([0.9, 0.4, 0.1, 0.0], 0.2, 0.1), ([0.9], None, 0.9)])
def test_a_disturbed_measurement_is_made_again(shares, calm, expected, monkeypatch):
    turns = iter(shares)
    monkeypatch.setattr(measure, "_measure_apart", lambda job, timeout: Measurement(1.0, others=next(turns)))
    found = measure.measure(Job("sdpa", SMALL), calm=calm)
    assert found.others == expected and found.tries == len(shares) - len(list(turns))


def test_the_calmest_counts_where_it_is_never_calm(monkeypatch):
    turns = iter([0.9, 0.5, *[0.8] * 20])
    monkeypatch.setattr(measure, "_measure_apart", lambda job, timeout: Measurement(1.0, others=next(turns)))
    found = measure.measure(Job("sdpa", SMALL), calm=0.1)
    assert found.others == 0.5 and found.tries == measure.CALM_TRIES
    assert len(list(turns)) == 22 - measure.CALM_TRIES


def test_busy_programs_run_meanwhile_and_no_longer():
    me = psutil.Process()
    before = set(me.children())
    with pytest.raises(KeyboardInterrupt), process.busy_programs(2):
        programs = set(me.children()) - before
        assert len(programs) == 2
        while not all(sum(program.cpu_times()[:2]) > 0.05 for program in programs):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert not programs & set(me.children())


def test_overhead_measures_every_case_on_one_thread(capsys):
    from lib_subquad.lab.bench import overhead

    threads = torch.get_num_threads()
    found = overhead.measured(rounds=1, calls=3)
    assert [it.what for it in found] == list(overhead.CASES) and torch.get_num_threads() == threads
    text = overhead.report(found)
    assert all(it.what in text and it.theirs > 0 for it in found) and "SDXL (140 calls)" in text
