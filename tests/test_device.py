"""What each kind of device allows: every rule is obeyed, and a rule that is dropped is noticed."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lib_subquad
from lib_subquad import Settings, attention
from lib_subquad import device as devices
from lib_subquad.engines import fused, padded, portable
from lib_subquad.problem import Problem
from tests.personality import FORBIDDEN, Personality

CPU = torch.device("cpu")
QUERIES, KEYS, HEADS, WIDTH = 40, 300, 3, 8
HUGE_CHUNKS = {"query_chunk": 16384, "kv_chunk": 16384}


@pytest.fixture
def pretend(monkeypatch):
    """`pretend("mps 2.12", **dropped)`: the CPU passes for that device with such a torch, whose caps are the
    personality's; `dropped` replaces rules."""

    def as_device(kind: str, **dropped) -> Personality:
        personality = Personality(kind)
        caps = {"largest_elements": FORBIDDEN[kind].elements, "largest_bytes": FORBIDDEN[kind].bytes}
        kind, _, version = kind.partition(" ")
        monkeypatch.setitem(devices.RULES, kind, replace(devices.RULES[kind], **{**caps, **dropped}))
        monkeypatch.setattr(devices, "kind", lambda device: kind)
        monkeypatch.setattr(torch, "__version__", version or torch.__version__)
        lib_subquad.forget()
        return personality

    return as_device


def tensors(dtype=torch.float32, grad=False):
    """As a layer gives them: tokens before heads in memory."""
    torch.manual_seed(0)
    return [
        torch.randn(1, tokens, HEADS, WIDTH).to(dtype).transpose(1, 2).requires_grad_(grad)
        for tokens in (QUERIES, KEYS, KEYS)
    ]


def masks():
    return {
        "none": None,
        "bool": torch.rand(1, HEADS, QUERIES, KEYS) > 0.3,
        "float": torch.randn(1, 1, QUERIES, KEYS),
    }


def call(personality, dtype=torch.float32, grad=False, mask=None, **settings):
    """A call, with its gradients if wanted, watched by `personality`; checks the result."""
    query, key, value = tensors(dtype, grad)
    grad_output = torch.randn(1, QUERIES, HEADS, WIDTH).to(dtype).transpose(1, 2)
    with personality:
        output = attention(query, key, value, mask=mask, settings=Settings(**settings))
        if grad:
            torch.autograd.grad(output, (query, key, value), grad_output)
    with torch.no_grad():
        float_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=float_mask)
    assert (output.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-3)
    assert personality.operators
    return personality.complaints


@pytest.mark.parametrize("settings", [{}, {"query_chunk": 16}, {"kv_chunk": 64}, HUGE_CHUNKS], ids=str)
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_device_is_never_asked_for_what_it_forbids(kind, settings, pretend):
    settings = {"engine": "fused" if FORBIDDEN[kind].fused else "portable", **settings}
    for mask in masks().values():
        for dtype in (torch.float32, torch.float16):
            assert not call(pretend(kind), dtype, mask=mask, **settings)


@pytest.mark.parametrize("checkpointing", ["automatic", "never"])
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_nor_while_training(kind, checkpointing, pretend):
    settings = {"engine": "portable", "checkpointing": checkpointing, **HUGE_CHUNKS}
    for name, mask in masks().items():
        assert not call(pretend(kind), grad=True, mask=mask, **settings), name
    if kind.startswith("mps"):  # with no cap, a group has several heads, whose strides are another matter
        personality = pretend(kind, largest_elements=None, largest_bytes=1 << 40)
        call(personality, grad=True, **settings)
        assert not [words for words in personality.complaints if "strides" in words]


@pytest.mark.parametrize(
    "kind, dropped, complaint",
    [
        ("mps 2.12", {"no_fused": ""}, "materialises the scores"),
        ("mps 2.12", {"largest_elements": None, "largest_bytes": 1 << 40}, "too many elements"),
        ("mps 2.12", {"largest_bytes": None, "largest_elements": None}, "too many bytes"),
        ("mps 2.12", {"contiguous": False}, "strides"),
        ("xpu", {"largest_bytes": None}, "too many bytes"),
        ("directml", {"no_fused": ""}, "materialises the scores"),
    ],
)
def test_a_dropped_rule_is_noticed(kind, dropped, complaint, pretend, request):
    # The caps are dropped with chunks as large as the sliders go; a kernel is asked for where one is forbidden.
    settings = {"engine": "portable", **HUGE_CHUNKS} if "no_fused" not in dropped else {}
    if "no_fused" in dropped:
        request.getfixturevalue("fused_kernel")
    complaints = call(pretend(kind, **dropped), **settings)
    assert any(complaint in words for words in complaints)


# ------------------------------------------------------------------------ Apple's fused kernel, and its padded copies


def small(width, value_width=None, queries=40, grad=False):
    """Tensors that a width of 64 still leaves below the caps; tokens before heads in memory."""
    torch.manual_seed(0)
    sizes = ((queries, width), (50, width), (50, value_width or width))
    return [torch.randn(1, tokens, 2, its).transpose(1, 2).requires_grad_(grad) for tokens, its in sizes]


def small_call(personality, reference, tensors, mask=None, **settings):
    """The plan of a call whose result is right; watched by `personality`."""
    plans = []
    with personality:
        output = attention(*tensors, mask=mask, settings=Settings(**settings), report=plans.append)
    torch.testing.assert_close(output.double(), reference(*tensors, mask), atol=1e-5, rtol=0)
    return plans[0]


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"query_chunk": 16}, {"query_chunk": 6}], ids=str)
@pytest.mark.parametrize(
    "width, value_width, engine",
    [(64, 64, "fused"), (72, 72, "fused"), (40, 40, "padded"), (64, 40, "padded"), (24, 30, "padded")],
)
@pytest.mark.usefixtures("fused_kernel")
def test_apples_fused_kernel_and_heads_that_are_padded_for_it(
    pretend, reference, width, value_width, engine, settings, mask
):
    """Contiguous, in the chunks that its kernel takes, and within the caps."""
    if mask is not None and not fused.MASKS_ARE_RIGHT:
        pytest.skip("this torch's kernel, which plays Apple's, makes NaN of rows that may attend to nothing")
    tensors = small(width, value_width)
    seen = torch.rand(1, 1, 40, 50) > 0.4
    seen[..., 3, :] = False
    given = None if mask is None else seen if mask == torch.bool else torch.zeros(seen.shape, dtype=mask)
    personality = pretend("mps 2.13")
    made = small_call(personality, reference, tensors, given, **settings)
    assert made.engine == engine and not personality.complaints
    old = pretend("mps 2.12")
    assert small_call(old, reference, tensors, given, **settings).engine == "portable" and not old.complaints


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "never"}], ids=str)
@pytest.mark.parametrize("width", [32, 40])
def test_apples_fused_kernel_gives_no_gradients(pretend, reference, width, settings):
    personality = pretend("mps 2.13")
    tensors = small(width, grad=True)
    with personality:
        plans = []
        attention(*tensors, settings=Settings(**settings), report=plans.append).sum().backward()
    assert plans[0].engine == "portable" and "gives no gradients" in str(plans[0].reasons)
    assert not personality.complaints


@pytest.mark.parametrize("width", [512, 300])
def test_apples_fused_kernel_is_no_wider(pretend, width):
    pretend("mps 2.13", largest_elements=None, largest_bytes=1 << 40)
    problem = Problem.from_shapes(*[(1, 1, 64, width)] * 3, torch.float16, CPU)
    assert padded.why_not(problem) == fused.why_not(problem) != []


def test_a_user_may_switch_apples_kernel_off(pretend, monkeypatch):
    pretend("mps 2.13")
    problem = Problem.from_shapes(*[(1, 1, 64, 64)] * 3, torch.float16, CPU)
    assert not fused.why_not(problem)
    monkeypatch.setenv("PYTORCH_MPS_DISABLE_PREFILL_ATTENTION", "1")
    assert "keeps all scores" in fused.why_not(problem)[0]


@pytest.mark.usefixtures("fused_kernel")
@pytest.mark.parametrize(
    "dropped, settings, complaint",
    [
        ({"fused_widths": (40,)}, {}, "materialises"),
        ({"fewest_queries": 1}, {"query_chunk": 6}, "materialises"),
        ({"contiguous": False}, {}, "strides"),
        ({"largest_elements": None, "largest_bytes": 1 << 40}, {}, "too many elements"),
    ],
)
def test_a_dropped_rule_of_apples_kernel_is_noticed(pretend, reference, dropped, settings, complaint):
    wide = "largest_elements" in dropped
    width = 40 if "fused_widths" in dropped else 128 if wide else 64
    personality = pretend("mps 2.13", **dropped)
    small_call(personality, reference, small(width, width - 1 if wide else width), **settings)
    assert any(complaint in words for words in personality.complaints)


def test_copies_that_are_larger_than_the_device_can_hold(pretend):
    """Those of the true width it could: 2^30 elements are 8 x 2^21 x 64."""
    pretend("mps 2.13", largest_elements=(1 << 30) - 1, largest_bytes=4 << 30)
    query, keys = (1, 8, 4096, 40), (1, 8, 1 << 21, 40)
    problem = Problem.from_shapes(query, keys, keys, torch.float16, CPU)
    assert padded.why_not(problem) == fused.why_not(problem) != []
    fewer = (1, 8, (1 << 21) - 1, 40)
    assert not padded.why_not(Problem.from_shapes(query, fewer, fewer, torch.float16, CPU))


@pytest.mark.parametrize("kind", ["mps 2.12", "xpu"])
def test_kept_scores_would_be_noticed(kind, pretend, monkeypatch):
    monkeypatch.setattr(devices.Rules, "keeps_scores", True)
    complaints = call(pretend(kind), grad=True, engine="portable", checkpointing="never", **HUGE_CHUNKS)
    assert any("too many bytes" in words for words in complaints)


@pytest.mark.parametrize("operator", ["baddbmm", "float64"])
def test_the_personality_sees_what_no_rule_switches(operator):
    personality = Personality("mps 2.12")
    with personality:
        if operator == "baddbmm":
            torch.baddbmm(torch.empty(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2), beta=0)
        else:
            torch.ones(3, dtype=torch.float64) + 1
    assert any(("beta" if operator == "baddbmm" else "float64") in words for words in personality.complaints)


@pytest.mark.parametrize("caps", [{"elements": 1000, "bytes": 1 << 40}, {"elements": 1 << 40, "bytes": 4000}], ids=str)
def test_keys_are_split_when_one_row_is_too_large(caps, pretend):
    plans = []
    query, key, value = (torch.randn(1, tokens, 4) for tokens in (3, 20000, 20000))
    personality = pretend("mps 2.12", largest_elements=caps["elements"], largest_bytes=caps["bytes"])
    personality.forbidden = replace(personality.forbidden, **caps)
    with personality:
        output = attention(query, key, value, settings=Settings(**HUGE_CHUNKS), report=plans.append)
    assert not personality.complaints
    assert plans[0].kv_chunk < 16384 and any("largest tensor" in reason for reason in plans[0].reasons)
    assert torch.allclose(output, F.scaled_dot_product_attention(query, key, value), atol=1e-5)


@pytest.mark.parametrize("kind", ["mps 2.12", "directml"])
def test_float64_is_refused_in_words_where_there_is_none(kind, pretend):
    problem = Problem.from_shapes((1, 4, 8), (1, 4, 8), (1, 4, 8), torch.float64, CPU)
    pretend(kind)
    assert "float64" in portable.why_not(problem)[0]
    pretend(kind, float64=True)
    assert not portable.why_not(problem)


def test_the_real_caps_are_what_was_reported():
    assert devices.RULES["mps"].largest_elements == 2**30 - 1 and devices.RULES["mps"].largest_bytes == 4 * 2**30
    assert devices.RULES["xpu"].largest_bytes == 4 * 2**30
    assert devices.RULES["mps"].tile_bytes <= 128 * 2**20  # fixed and modest, whatever is free


@pytest.mark.usefixtures("fused_kernel")
def test_fused_is_off_where_pytorch_would_run_its_math_kernel(monkeypatch):
    problem = Problem.from_shapes((1, 64, 8), (1, 64, 8), (1, 64, 8), torch.float32, CPU)
    for choice, reasons in ((fused.MATH_KERNEL, 1), (1, 0)):
        fused._kernel_reasons.cache_clear()
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, choice=choice, **kwargs: choice)
        assert len(fused.why_not(problem)) == reasons
    fused._kernel_reasons.cache_clear()


def test_mixed_dtypes_and_autocast():
    query, key, value = (torch.randn(2, tokens, 8) for tokens in (20, 70, 70))
    for engine in ("fused", "portable"):
        settings = Settings(engine=engine, query_chunk=8)
        plain = attention(query, key, value, settings=settings)
        with torch.autocast("cpu", torch.bfloat16):
            inside = attention(query, key, value, settings=settings)
            assert torch.mm(query[0], query[0].T).dtype == torch.bfloat16  # still on
            mixed = attention(query, key, value.bfloat16(), settings=settings)
        assert torch.equal(inside, plain) and mixed.dtype == torch.bfloat16
        assert (mixed.float() - plain).abs().max() < 2e-2


def test_every_rule_cites_its_source():
    source = inspect.getsource(devices)
    table = next(
        node for node in ast.parse(source).body if isinstance(node, ast.Assign) and node.targets[0].id == "RULES"
    )
    text = "\n".join(source.splitlines()[table.lineno - 1 : table.end_lineno])
    for cited in (
        "ComfyUI #14837",
        "PyTorch #149261",
        "PR #10201",
        "PR #181575",
        "PR #184585",
        "PR #12526",
        "PR #190791",
        "PR #14353",
        "#414",
    ):
        assert cited in text


# ------------------------------------------------------------------------------------------- kinds and free memory


@pytest.mark.parametrize(
    "hip, name, kind",
    [
        (None, "NVIDIA GeForce RTX 3060", "cuda"),
        (None, "AMD Radeon RX 6600 [ZLUDA]", "zluda"),
        ("5.7", "AMD Radeon", "rocm"),
        (None, None, "cuda"),
    ],
)
def test_kinds_behind_cuda(hip, name, kind, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name + "")  # None: the driver does not answer
    devices._cuda_kind.cache_clear()
    assert devices.kind(torch.device("cuda", 0)) == kind
    devices._cuda_kind.cache_clear()


def test_kinds_by_type():
    types = {"cpu": "cpu", "mps": "mps", "xpu": "xpu", "privateuseone": "directml", "meta": "other"}
    assert {name: devices.kind(torch.device(name)) for name in types} == types


def test_free_memory_of_cuda_counts_what_pytorch_holds_unused(monkeypatch):
    answers = {"mem_get_info": (1000, 4000), "memory_reserved": 500, "memory_allocated": 200}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert devices.free_bytes(torch.device("cuda")) == 1300


def test_free_memory_of_apple_silicon_counts_what_pytorch_caches(monkeypatch):
    for name, answer in {"recommended_max": 5300, "current_allocated": 2500, "driver_allocated": 5400}.items():
        monkeypatch.setattr(torch.mps, f"{name}_memory", lambda answer=answer: answer, raising=False)
    assert devices.free_bytes(torch.device("mps")) == 2800


@pytest.mark.parametrize("answers", [True, False])
def test_free_memory_of_an_arc_whose_driver_may_not_answer(answers, monkeypatch):
    def mem_get_info(device):
        if not answers:
            raise RuntimeError("The device doesn't support querying the available free memory.")
        return 1000, 4000

    xpu = SimpleNamespace(
        mem_get_info=mem_get_info,
        memory_reserved=lambda device: 500,
        memory_allocated=lambda device: 200,
        get_device_properties=lambda device: SimpleNamespace(total_memory=4000),
    )
    monkeypatch.setattr(torch, "xpu", xpu, raising=False)
    assert devices.free_bytes(torch.device("xpu")) == (1300 if answers else 3800)


def test_free_memory_of_directml(monkeypatch):
    device = torch.device("privateuseone")
    assert devices.free_bytes(device) == devices.UNKNOWN_FREE_BYTES
    monkeypatch.setattr(torch, "dml", SimpleNamespace(mem_get_info=lambda device: (77, 99)), raising=False)
    assert devices.free_bytes(device) == 77


@pytest.mark.parametrize("broken", [RuntimeError("driver"), OSError(), ValueError(), AttributeError()])
def test_free_memory_never_raises(broken, monkeypatch):
    def fail(device):
        raise broken

    for device in ("cpu", "cuda", "mps", "xpu"):
        monkeypatch.setitem(devices._FREE, device, fail)
        assert devices.free_bytes(torch.device(device)) == devices.UNKNOWN_FREE_BYTES


@pytest.mark.parametrize(
    "limit, used, stat, free",
    [
        ("1000", "400", "anon 5\ninactive_file 100\n", 700),
        ("1000", "1000", "anon 100\nfile 900\nshmem 20\ninactive_file 80\nactive_file 800\n", 880),
        ("1000", "400", "slab_reclaimable 30\nslab_unreclaimable 40\n", 630),
        ("1000", "400", "inactive_file 1\nactive_file 1\ntotal_inactive_file 50\ntotal_active_file 20\n", 670),
        ("1000", "400", "inactive_file a lot\n", None),
        ("1000", "1200", "", 0),
        ("1000", "400", None, 600),
        ("max", "400", "", None),
        ("nonsense", "400", "", None),
        ("1000", None, "", None),
    ],
)
def test_free_memory_of_a_container(limit, used, stat, free, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("limit", "used", "stat")]
    for path, text in zip(paths, (limit, used, stat)):
        if text is not None:
            path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(devices, "_container_files", lambda: (tuple(map(str, paths)),))
    monkeypatch.setattr(devices, "_free_host", lambda: 5000)
    assert devices.free_bytes(CPU) == (5000 if free is None else free)


@pytest.mark.parametrize(
    "line, files",
    [
        ("0::/a/b", ["memory.max", "a/memory.max", "a/b/memory.max"]),
        ("7:cpu,memory:/a", ["memory/memory.limit_in_bytes", "memory/a/memory.limit_in_bytes"]),
        ("3:cpuset:/a", []),
    ],
)
def test_control_groups_of_both_versions(line, files, monkeypatch, tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(devices, "open", lambda path: groups.open(), raising=False)
    monkeypatch.setattr(devices.os.path, "exists", lambda path: True)
    devices._container_files.cache_clear()
    found = [limit for limit, _, _ in devices._container_files()]
    devices._container_files.cache_clear()
    assert found == [f"/sys/fs/cgroup/{name}" for name in files]


def test_room_that_cannot_be_had():
    devices.check_room(64 * devices.MIB, torch.device("cpu"))
    devices.check_room(1 << 60, torch.device("meta"))
    with pytest.raises(MemoryError) as raised:
        devices.check_room(1 << 60, torch.device("cpu"))
    assert devices.is_out_of_memory(raised.value)
