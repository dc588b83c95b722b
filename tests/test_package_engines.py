"""Engines whose kernels other packages bring, held against float64 with stand-ins of the packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from lib_subquad import Settings, attention, plan
from lib_subquad import device as devices
from lib_subquad.engines import flash_attn, order, sage, xformers
from lib_subquad.problem import Problem
from tests import package_stand_ins as stand_ins
from tests.personality import alone

pytestmark = pytest.mark.usefixtures("trusted")  # calls are counted, and stand-ins compute what they are told

ENGINES = {engine.NAME: engine for engine in (xformers, flash_attn, sage)}
STAND_INS = {
    "xformers 0.0.35": (xformers, stand_ins.xformers),
    "xformers 0.0.20": (xformers, partial(stand_ins.xformers, newest=False)),
    "flash-attn": (flash_attn, stand_ins.flash_attn),
    "SageAttention 2": (sage, stand_ins.sageattention),
    "SageAttention 1": (sage, partial(stand_ins.sageattention, first=True)),
}
EXACT = [name for name, (engine, _) in STAND_INS.items() if engine.EXACT]
MASKED = [name for name in EXACT if name.startswith("xformers")]
LAST = order.names()[-1]


@pytest.fixture(autouse=True)
def by_itself():
    with alone():
        yield


@pytest.fixture(autouse=True)
def none_is_installed(monkeypatch):
    """Whatever is in this environment: the tests say what is."""
    monkeypatch.setattr(xformers.PACKAGE, "_installed", False)
    monkeypatch.setattr(flash_attn.PACKAGE, "_installed", False)
    monkeypatch.setattr(sage.PACKAGE, "_installed", False)
    yield
    for engine in ENGINES.values():
        engine.PACKAGE._module, engine.PACKAGE._broken = None, ""


@pytest.fixture
def install(monkeypatch):
    """install(name): one of `STAND_INS` is there, and the CPU is a device that it serves. Gives (engine, module)."""

    def put(name, **more):
        engine, make = STAND_INS[name]
        modules = make(**more)
        for module, it in modules.items():
            monkeypatch.setitem(sys.modules, module, it)
        monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], packages=True))
        engine.PACKAGE.forget()
        return engine, list(modules.values())[-1]

    return put


def tensors(dtype=torch.float16, width=64, value_width=None, queries=24, keys=40, grad=False):
    """More heads than batch entries, and tokens of neither number: what is mixed up shows."""
    made = torch.Generator().manual_seed(0)
    sizes = ((queries, width), (keys, width), (keys, value_width or width))
    return [torch.randn(2, 3, *size, generator=made).to(dtype).requires_grad_(grad) for size in sizes]


def computed(engine, query, key, value, settings=None, **more):
    plans = []
    output = attention(
        query, key, value, settings=settings or Settings(engine=engine.NAME), report=plans.append, **more
    )
    return output, plans[0]


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


def assert_right(engine, query, key, value, reference, settings=None, atol=None, **more):
    before = [it.detach().clone() for it in (query, key, value)]
    output, made = computed(engine, query, key, value, settings, **more)
    assert made.engine == engine.NAME, made
    assert all(torch.equal(it, was) for it, was in zip((query, key, value), before)), "what was given has changed"
    expected = reference(query, key, value, **more)
    assert output.dtype == value.dtype and output.shape == expected.shape
    atol = atol or (TOLERANCE[value.dtype] if engine.EXACT else 0.1)
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=0)
    return made


# ---------------------------------------------------------------------------------------- what kernels are given


def as_layers_do(tensor):
    """Heads beside one another in each token's row."""
    return tensor.transpose(1, 2).reshape(*tensor.shape[::2], -1).unflatten(-1, (tensor.shape[1], -1)).transpose(1, 2)


def wider_steps(tensor):
    """Cut out of rows that begin where no kernel can read them."""
    return torch.cat((tensor[..., :1], tensor, tensor[..., :2]), dim=-1)[..., 1:-2]


LAYOUTS = {
    "contiguous": lambda it: it,
    "as a layer has it": as_layers_do,
    "channels apart": lambda it: it.mT.contiguous().mT,
    "rows that begin anywhere": wider_steps,
    "one head for all": lambda it: it[:, :1].expand_as(it),
    "one entry for all": lambda it: it[:1].expand_as(it),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STAND_INS)
def test_layout(name, layout, install, reference):
    engine, _ = install(name)
    assert_right(engine, *map(LAYOUTS[layout], tensors()), reference)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", STAND_INS)
def test_no_copy_of_what_a_layer_gives(name, heads, install, monkeypatch):
    """Views of [batch, tokens, heads * width], and slices of a packed projection."""
    engine, module = install(name)
    packed = torch.randn(2, 40, 3 * heads * 64).half()
    query, key, value = (it.unflatten(-1, (heads, 64)).transpose(1, 2) for it in packed.chunk(3, dim=-1))
    given = []
    function = {"xformers": "memory_efficient_attention_forward", "flash-attn": "flash_attn_func", "sage": "sageattn"}
    called = getattr(module, function[engine.NAME])

    def look(*arguments, **more):
        given.extend(it.data_ptr() for it in arguments[:3])
        return called(*arguments, **more)

    look.__signature__ = inspect.signature(called)
    monkeypatch.setattr(module, function[engine.NAME], look)
    assert computed(engine, query, key, value)[1].engine == engine.NAME
    expected = [it.data_ptr() for it in (query, key, value)]
    if name == "SageAttention 1":  # which would change the keys
        assert given[1] != expected[1]
        expected[1] = given[1]
    assert given == expected


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.4])
@pytest.mark.parametrize("name", STAND_INS)
def test_scale(name, scale, install, reference):
    engine, _ = install(name)
    assert_right(engine, *tensors(), reference, scale=scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STAND_INS)
def test_dtype(name, dtype, install, reference):
    engine, _ = install(name)
    if dtype == torch.float32 and engine is not xformers:
        output, made = computed(engine, *tensors(dtype))
        assert made.engine != engine.NAME and "float16 and bfloat16, not float32" in "; ".join(made.reasons)
        return
    assert_right(engine, *tensors(dtype), reference)


@pytest.mark.parametrize("name", MASKED)
def test_mixed_dtypes_and_upcast(name, install, reference):
    engine, _ = install(name)
    query, key, value = tensors(torch.float32)
    assert_right(engine, query, key, value.half(), reference)
    upcast = Settings(engine=engine.NAME, upcast="always")
    query, key, value = tensors()
    output, _ = computed(engine, query, key, value.float().half(), upcast)
    assert output.dtype == torch.float16
    assert_right(engine, query, key, value, reference, upcast, atol=6e-4)  # the rounding of the result alone


@pytest.mark.parametrize("name", ["flash-attn", "SageAttention 1", "SageAttention 2"])
@pytest.mark.parametrize("what", ["mixed", "upcast"])
def test_float32_is_refused_by_those_that_have_none(name, what, install, reference):
    engine, _ = install(name)
    query, key, value = tensors(torch.float32 if what == "mixed" else torch.float16)
    settings = Settings(engine=engine.NAME, upcast="always" if what == "upcast" else "web UI")
    output, made = computed(engine, query, key, value.half(), settings)
    assert made.engine != engine.NAME and "takes float16 and bfloat16, not float32" in made.reasons[1]
    torch.testing.assert_close(output.double(), reference(query, key, value), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("value_width", [32, 96])
def test_values_of_another_width(name, value_width, install, reference):
    engine, _ = install(name)
    assert_right(engine, *tensors(value_width=value_width), reference)


@pytest.mark.parametrize("name", EXACT)
def test_query_chunks(name, install, reference):
    engine, module = install(name)
    made = assert_right(engine, *tensors(queries=50), reference, Settings(engine=engine.NAME, query_chunk=16))
    assert made.query_chunk == 16 and len(module.calls) == 4


MASKS = {
    "bool": lambda queries, keys: torch.rand(2, 3, queries, keys) > 0.5,
    "of keys": lambda queries, keys: torch.rand(keys) > 0.5,
    "of entries": lambda queries, keys: torch.rand(2, 1, 1, keys) > 0.5,
    "of queries": lambda queries, keys: torch.rand(queries, 1) > 0.5,
    "expanded": lambda queries, keys: (torch.rand(1, 1, queries, keys) > 0.5).expand(2, 3, -1, -1),
    "float": lambda queries, keys: torch.randn(3, queries, keys).half(),
    "transposed": lambda queries, keys: torch.randn(keys, queries).half().mT,
    "one number": lambda queries, keys: torch.tensor(2.0).half(),
    "rows of nothing": lambda queries, keys: torch.arange(queries)[:, None].expand(queries, keys) % 3 > 0,
    "rows of -inf": lambda queries, keys: torch.zeros(2, 1, queries, keys).index_fill_(2, torch.arange(3), -torch.inf)
    .half(),
}  # fmt: skip


@pytest.mark.parametrize("keys", [40, 37, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_masks(name, mask, keys, install, reference):
    engine, _ = install(name)
    torch.manual_seed(0)
    mask = MASKS[mask](24, keys)
    before = mask.clone()
    for query_chunk in (0, 10):
        settings = Settings(engine=engine.NAME, query_chunk=query_chunk)
        assert_right(engine, *tensors(keys=keys), reference, settings, mask=mask)
    assert torch.equal(mask, before)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("query_chunk", [0, 10])
@pytest.mark.parametrize("scale", [None, -0.4])
@pytest.mark.parametrize("mask", [None, "bool", "rows of nothing", "rows of -inf"])
@pytest.mark.parametrize("name", EXACT)
def test_gradients(name, mask, scale, query_chunk, install, reference):
    engine, module = install(name)
    if mask and name not in MASKED:
        pytest.skip("it takes no mask")
    torch.manual_seed(0)
    mask = mask and MASKS[mask](24, 37)
    given = tensors(keys=37, grad=True)
    doubles = [it.detach().double().requires_grad_() for it in given]
    settings = Settings(engine=engine.NAME, query_chunk=query_chunk)
    output, made = computed(engine, *given, settings, mask=mask, scale=scale)
    assert made.engine == engine.NAME and output.requires_grad
    grad = torch.randn(output.shape).half()
    output.backward(grad)
    reference(*doubles, mask=mask, scale=scale).backward(grad.double())
    for mine, its in zip(given, doubles):
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.double(), its.grad, atol=5e-3, rtol=1e-2)
    if engine is xformers:
        assert {"forward_requires_grad", "backward"} == set(module.calls)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_that_it_refuses_are_recomputed_from_its_statistics(name, install, reference, monkeypatch):
    engine, module = install(name)
    given = tensors(grad=True)
    doubles = [it.detach().double().requires_grad_() for it in given]
    output, made = computed(engine, *given)
    monkeypatch.setattr(engine, "gradients", refuse)
    output.sum().backward()
    reference(*doubles).sum().backward()
    for mine, its in zip(given, doubles):
        torch.testing.assert_close(mine.grad.double(), its.grad, atol=5e-3, rtol=1e-2)


def refuse(*arguments):
    raise RuntimeError("no backward kernel")


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives(name, install):
    engine, _ = install(name)
    given = tensors(torch.float16, grad=True)
    output, made = computed(engine, *given)
    assert made.engine == engine.NAME
    (first,) = torch.autograd.grad(output.float().square().sum(), given[0], create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), given[1])
    doubles = [it.detach().double().requires_grad_() for it in given]
    exact = (doubles[0] @ doubles[1].mT / 8).softmax(-1) @ doubles[2]
    (first,) = torch.autograd.grad(exact.square().sum(), doubles[0], create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), doubles[1])
    torch.testing.assert_close(second.double(), expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_that_it_cannot_give_are_left_to_others(name, install):
    engine, _ = install(name)
    query, key, value = tensors(grad=True)
    mask = torch.zeros(40, requires_grad=True)
    for more in ({"mask": mask}, {"settings": Settings(engine=engine.NAME, upcast="always")}):
        output, made = computed(engine, query, key, value, **more)
        assert made.engine != engine.NAME
        output.sum().backward()
    assert mask.grad is not None


# --------------------------------------------------------------------------------------------------- what it refuses


def problem(device="cpu", dtype=torch.float16, width=64, **more):
    shape = (2, 3, 40, width)
    value = (*shape[:3], more.pop("value_width", width))
    return Problem.from_shapes(shape, shape, value, dtype, device, **more)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("flash-attn", {"width": 264}, "up to 256 wide, not 264"),
        ("flash-attn", {"value_width": 32}, "no values of another width"),
        ("flash-attn", {"mask_shape": (40,), "mask_dtype": torch.bool}, "takes no mask"),
        ("flash-attn", {"dtype": torch.float64}, "not float64"),
        ("SageAttention 1", {"width": 40}, "SageAttention 1 takes heads 64, 96, 128 wide, not 40"),
        ("SageAttention 2", {"width": 40}, ""),
        ("SageAttention 2", {"width": 160}, "up to 128 wide, not 160"),
        ("SageAttention 2", {"grad": True}, "no gradients"),
        ("SageAttention 2", {"value_width": 32}, "no values of another width"),
        ("SageAttention 2", {"mask_shape": (40,), "mask_dtype": torch.bool}, "takes no mask"),
        ("xformers 0.0.35", {"dtype": torch.float64}, "no kernel for this: "),
        ("xformers 0.0.35", {"width": 20}, "no kernel for this: fa2F@2.5.7: query.shape[-1] % 8 != 0, value"),
        ("xformers 0.0.20", {"width": 20, "grad": True}, "query.shape[-1] % 8 != 0"),
        ("xformers 0.0.35", {"width": 512}, ""),
        ("xformers 0.0.35", {"mask_shape": (40,), "mask_dtype": torch.float32}, "float32 would be rounded"),
        ("xformers 0.0.35", {"mask_shape": (40,), "mask_dtype": torch.bool, "mask_grad": True}, "needs a gradient"),
    ],
)
def test_what_it_says_no_to(name, more, words, install):
    engine, _ = install(name)
    reasons = "; ".join(engine.why_not(problem(**more)))
    assert words in reasons and bool(reasons) == bool(words)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone", "meta"])
def test_it_is_not_even_loaded_for_devices_that_it_does_not_serve(name, device, install, monkeypatch):
    engine, _ = install(name)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert engine.why_not(problem(device)) == [
        f"{engine.PACKAGE.name} has no kernels for {devices.kind(torch.device(device))}"
    ]


def test_which_devices_are_served():
    assert {kind for kind, rules in devices.RULES.items() if rules.packages} == {"cuda", "rocm"}


@pytest.mark.parametrize("name", STAND_INS)
def test_nothing_to_compute_and_too_many_heads(name, install, monkeypatch):
    engine, _ = install(name)
    assert engine.why_not(replace(problem(), heads=0)) == ["there is nothing to compute"]
    assert engine.why_not(replace(problem(), queries=0)) == ["there is nothing to compute"]
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], most_entries=2))
    assert engine.why_not(problem()) == [f"{engine.PACKAGE.name} takes at most 2 batch entries or heads"]


def test_flash_attn_asks_for_a_card_that_is_new_enough(install, monkeypatch):
    engine, _ = install("flash-attn")
    for capability, can in (((7, 5), False), ((8, 0), True), ((12, 0), True), (None, True)):
        monkeypatch.setattr("lib_subquad.engines.packages.capability", lambda device, it=capability: it)
        assert engine.why_not(problem()) == ([] if can else ["flash-attn needs an RTX 30 or newer"])


def test_an_xformers_that_does_not_say_what_it_can_is_not_taken(install):
    """Its dispatcher is private, and may be another one tomorrow."""
    engine, module = install("xformers 0.0.35")
    del module.fmha.dispatch._dispatch_fw
    output, made = computed(engine, *tensors())
    assert made.engine != engine.NAME and "does not say whether it has a kernel (AttributeError)" in made.reasons[1]


@pytest.mark.parametrize("error", [AssertionError, ValueError, OSError, KeyError, RuntimeError])
@pytest.mark.parametrize("name", STAND_INS)
def test_whatever_it_raises_the_next_one_goes_on(name, error, install, reference, monkeypatch, capsys):
    engine, module = install(name)

    def raises(*arguments, return_lse=None, **more):
        raise error("not on a Tuesday")

    for needed in engine.PACKAGE.needs:
        monkeypatch.setattr(module, needed, raises)
    output, made = computed(engine, *tensors())
    assert made.engine != engine.NAME and "not on a Tuesday" in made.reasons[-1]
    torch.testing.assert_close(output.double(), reference(*tensors()), atol=2e-3, rtol=0)
    assert "not on a Tuesday" in computed(engine, *tensors())[1].reasons[1]  # and remembered
    assert capsys.readouterr().out.count("not on a Tuesday") <= 1


def test_memory_that_runs_out_in_it_is_no_refusal(install, monkeypatch):
    engine, module = install("flash-attn")
    called, left = module.flash_attn_func, [2]

    def short(query, *arguments, **more):
        if query.shape[1] > 300:
            raise torch.cuda.OutOfMemoryError("tried to allocate 2 GiB")
        return called(query, *arguments, **more)

    monkeypatch.setattr(module, "flash_attn_func", short)
    _, made = computed(engine, *tensors(queries=1024))
    assert (made.engine, made.query_chunk, made.retries) == (engine.NAME, 256, 2) and left


# ------------------------------------------------------------------------------------------- what is not installed


def test_who_never_heard_of_them_hears_nothing_of_them():
    shape = (1, 2, 64, 8)
    made = plan(shape, shape, shape, torch.float64, "meta", Settings(kv_chunk=0))
    assert not any("installed" in reason for reason in made.reasons), made
    assert [engine.NAME for engine in order.candidates("automatic")] == [
        engine.NAME for engine in order.usable() if engine.EXACT
    ]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_who_names_one_hears_that_it_is_not_installed(engine):
    _, made = computed(engine, *tensors())
    assert made.reasons[:2] == (f"the engine is set to {engine.NAME}", f"{engine.PACKAGE.name} is not installed")


def test_it_is_looked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name))
    for engine in ENGINES.values():
        engine.PACKAGE.forget()
    for _ in range(3):
        assert not any(engine.installed() for engine in ENGINES.values())
    assert sorted(asked) == ["flash_attn", "sageattention", "xformers"]


@pytest.mark.parametrize(
    "name, distribution",
    [
        ("xformers 0.0.35", "xformers"),
        ("flash-attn", "flash_attn"),
        ("SageAttention 2", "sageattention"),
        ("SageAttention 1", "sageattention"),
    ],
)
def test_what_was_measured_holds_for_its_version(name, distribution, install, monkeypatch, tmp_path):
    """By what pip calls it, which is not what we call it. Nothing is imported for it."""
    engine, _ = install(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = set()
    for version in ("1.2.3", "1.2.4", ""):
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        if version:
            folder = tmp_path / f"{distribution}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
            )
        importlib.invalidate_caches()
        order.machine.cache_clear()
        engines = order.machine(torch.device("cpu")).engines.split(", ")
        assert f"{engine.NAME} {version}".strip() in engines and engine.PACKAGE._module is None
        found.add(tuple(engines))
    order.machine.cache_clear()
    assert len(found) == 3


def test_every_engine_of_a_package_says_which_version_is_there():
    for engine in order.engines():
        assert hasattr(engine, "version") == hasattr(engine, "installed")


def test_importing_us_looks_for_none_and_imports_none():
    code = """
import importlib.util, sys
real, asked = importlib.util.find_spec, []
importlib.util.find_spec = lambda name, *more: (asked.append(name), real(name, *more))[1]
import lib_subquad.attention, lib_subquad.engines.order, torch
lib_subquad.plan(*[(1, 2, 64, 8)] * 3, torch.float32, "cpu")
assert not {"xformers", "flash_attn", "sageattention"} & set(sys.modules), sys.modules
import json; print(json.dumps([name for name in asked if name in ("xformers", "flash_attn", "sageattention")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.strip() in ("[]", '["xformers", "flash_attn"]'), done.stdout


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
@pytest.mark.parametrize("name", STAND_INS)
def test_one_that_cannot_be_loaded(name, error, install, monkeypatch):
    engine, _ = install(name)
    asked = []

    def broken(module):
        asked.append(module)
        raise error("DLL load failed for _C\nand a long story")

    monkeypatch.setattr(importlib, "import_module", broken)
    for _ in range(2):
        words = f"{engine.PACKAGE.name} is installed but cannot be loaded: {error.__name__}: DLL load failed for _C"
        assert engine.why_not(problem()) == [words]
    _, made = computed(engine, *tensors())
    assert made.engine != engine.NAME and words in made.reasons and len(asked) == 1


@pytest.mark.parametrize("name", STAND_INS)
def test_one_of_another_version(name, install, monkeypatch):
    engine, module = install(name)
    missing = engine.PACKAGE.needs[-1]
    monkeypatch.delattr(module, missing)
    assert engine.why_not(problem()) == [f"this version of {engine.PACKAGE.name} has no {missing}"]


def test_a_package_that_somebody_has_blocked(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    xformers.PACKAGE.forget()
    assert not xformers.installed()


# ---------------------------------------------------------------------------------------------------- who takes them


@pytest.mark.parametrize("name", STAND_INS)
def test_automatic_takes_the_exact_ones_where_there_is_no_fused_kernel(name, install, monkeypatch):
    engine, _ = install(name)
    monkeypatch.setattr(order.engines()[0], "why_not", lambda problem: ["it is switched off"])
    _, made = computed(engine, *tensors(), Settings())
    assert made.engine == (engine.NAME if engine.EXACT else LAST)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("how", ["vmap", "compiled", "fake"])
def test_another_one_is_traced(name, how, install, reference):
    engine, module = install(name)
    query, key, value = tensors()
    call = partial(attention, settings=Settings(engine=engine.NAME))
    if how == "vmap":
        found = torch.func.vmap(call)(*(it[None] for it in (query, key, value)))[0]
    elif how == "compiled":
        if not hasattr(getattr(torch, "compiler", None), "is_compiling"):
            pytest.skip("torch.compiler.is_compiling is newer")
        torch.compiler.reset()
        found = torch.compile(call, fullgraph=True, backend="eager")(query, key, value)
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode() as mode:
            assert call(*(mode.from_tensor(it) for it in (query, key, value))).shape == query.shape
        found = call(query, key, value)
        assert module.calls  # what was found out there is not remembered for real calls
        module.calls.clear()
    assert not module.calls
    torch.testing.assert_close(found.double(), reference(query, key, value), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", MASKED)
def test_what_is_said_of_tensors_without_numbers_is_not_remembered(name, install):
    from torch._subclasses.fake_tensor import FakeTensorMode

    engine, _ = install(name)
    with FakeTensorMode():
        assert "does not say whether it has a kernel (RuntimeError)" in engine.why_not(problem())[0]
    assert engine.why_not(problem()) == []


def test_a_compiler_is_not_led_to_look_for_packages(monkeypatch):
    if not hasattr(getattr(torch, "compiler", None), "is_compiling"):
        pytest.skip("torch.compiler.is_compiling is newer")
    looked_for, find_spec = [], importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: looked_for.append(name) or find_spec(name, *more)
    )
    for engine in ENGINES.values():
        engine.PACKAGE.forget()
    torch.compiler.reset()
    query, key, value = tensors(torch.float32)
    found = torch.compile(attention, fullgraph=True, backend="eager")(query, key, value)
    assert not {"xformers", "flash_attn", "sageattention"} & set(looked_for)
    torch.testing.assert_close(found, attention(query, key, value, settings=Settings(engine=LAST)), atol=1e-5, rtol=0)


def test_an_engine_that_says_whether_its_package_is_there_has_a_function_for_it():
    from tests.test_engines import Plain

    engine = Plain()
    engine.installed = True
    with pytest.raises(ValueError, match=r"lacks installed\(\)"):
        order.register(engine)
    engine.installed = lambda: False
    order.register(engine, before=order.names()[0])
    try:
        assert "plain" not in [it.NAME for it in order.candidates("automatic")]
        assert "plain" in [it.NAME for it in order.candidates("plain")]
    finally:
        order.withdraw("plain")


# ------------------------------------------------------------------------------------ results that are of no use


def automatic() -> str:
    """The engine that takes these tensors where none is set: on the CPU of torch 2.1 there is no fused one for them."""
    return computed(order.engines()[0], *tensors(), Settings())[1].engine


def spoiled(output, number=float("nan")):
    output = output.clone()
    output[0, 1, 5, 3] = number
    return output


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["SageAttention 1", "SageAttention 2"])
def test_what_is_of_no_use_is_computed_again_exactly(name, number, install, reference, capsys):
    engine, module = install(name, gives=partial(spoiled, number=number))
    for calls in (1, 2):
        output, made = computed(engine, *tensors())
        assert made.engine == automatic() and made.reruns == 1 and made.retries == 0
        assert made.reasons[-1] == "sage gave NaN or infinity where there was none before"
        assert "computed again exactly" in str(made)
        torch.testing.assert_close(output.double(), reference(*tensors()), atol=2e-3, rtol=0)
        assert len(module.calls) == calls  # it is asked again at the next call
    assert capsys.readouterr().out.count("[subquad] sage gave NaN or infinity") <= 1
    assert engine.why_not(problem()) == []


@pytest.mark.parametrize("where", range(3))
def test_what_was_given_is_to_blame(where, install):
    engine, module = install("SageAttention 2")
    given = tensors()
    given[where][0, 0, 0, 0] = float("inf")
    output, made = computed(engine, *given)
    assert made.engine == engine.NAME and made.reruns == 0 and not output.isfinite().all()


def test_only_the_call_whose_result_is_of_no_use(install):
    spoil = [False, True, False]
    engine, module = install("SageAttention 2", gives=lambda output: spoiled(output) if spoil.pop(0) else output)
    assert [computed(engine, *tensors())[1].engine for _ in range(3)] == [engine.NAME, automatic(), engine.NAME]


def test_a_chunk_whose_result_is_of_no_use(install, reference):
    spoil = [False, True]
    engine, module = install("SageAttention 2", gives=lambda output: spoiled(output) if spoil.pop(0) else output)
    output, made = computed(engine, *tensors(queries=48), Settings(engine=engine.NAME, query_chunk=16))
    assert made.engine == automatic() and made.reruns == 1 and not spoil
    torch.testing.assert_close(output.double(), reference(*tensors(queries=48)), atol=0.1, rtol=0)


def test_memory_that_runs_out_after_a_rerun_does_not_make_it_last(install, monkeypatch):
    spoil = [True, False]
    engine, module = install("SageAttention 2", gives=lambda output: spoiled(output) if spoil.pop(0) else output)
    exact, fails = order.named(automatic()), [True]
    attend = exact.attend

    def short(*arguments):
        if fails.pop() if fails else False:
            raise RuntimeError("out of memory")
        return attend(*arguments)

    monkeypatch.setattr(exact, "attend", short)
    _, made = computed(engine, *tensors(queries=1024))
    assert (made.engine, made.reruns, made.retries) == (exact.NAME, 1, 1)
    assert computed(engine, *tensors(queries=1024))[1].engine == engine.NAME


def test_a_graph_that_is_captured_is_not_looked_at(install, monkeypatch):
    engine, _ = install("SageAttention 2", gives=spoiled)
    monkeypatch.setattr(devices, "is_captured", lambda: True)
    assert computed(engine, *tensors())[1].engine == engine.NAME


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "more", [{}, {"dtype": torch.bfloat16, "width": 40}, {"queries": 2000}, {"mask": True}], ids=str
)
@pytest.mark.parametrize("name", STAND_INS)
def test_workspace_is_not_less_than_a_call_takes(name, more, install, peak_bytes, monkeypatch):
    """Beside a kernel that makes its result, and a logsumexp, and no more."""
    engine, module = install(name)
    more, mask = dict(more), None
    if more.pop("mask", False):
        mask = torch.rand(2, 3, 777, 501) > 0.5
    query, key, value = tensors(**{"queries": 777, "keys": 501, **more})
    if engine is sage and query.shape[-1] not in (64, 96, 128) or mask is not None and engine is not xformers:
        pytest.skip("it takes none")

    def kernel(query, key, value, *arguments, return_lse=None, **more):
        logsumexp = torch.empty(*query.shape[:3])
        assert logsumexp.numel()
        return torch.zeros_like(query)

    for needed in engine.PACKAGE.needs[:1]:
        monkeypatch.setattr(module, needed, kernel)
    for chunk in (0, 256):
        settings = Settings(engine=engine.NAME, query_chunk=chunk)
        made = computed(engine, query, key, value, settings, mask=mask)[1]
        assert made.engine == engine.NAME
        taken = peak_bytes(partial(attention, query, key, value, mask=mask, settings=settings))
        output = query.numel() * query.element_size()
        assert taken - output <= made.workspace_bytes + 4096


# ------------------------------------------------------------------------------------------------------- in the Lab


def test_bench_says_that_it_is_not_installed():
    from lib_subquad.lab.bench import peers

    for engine in ENGINES.values():
        with pytest.raises(peers.Unsupported, match=f"{engine.PACKAGE.name} is not installed"):
            peers.find(engine.NAME).make(problem())


def test_bench_has_the_error_beside_the_time(install):
    from lib_subquad.lab.bench import measure
    from lib_subquad.lab.bench.shapes import Shape
    from lib_subquad.lab.bench.work import Job

    engine, _ = install("SageAttention 2")
    found = {
        name: measure._measure_or_reason(Job(name, Shape("small", 1, 2, 64, 64, 64), "float16"))
        for name in (engine.NAME, "sdpa")
    }
    assert found[engine.NAME].seconds > 0 and found[engine.NAME].error > 3 * found["sdpa"].error


def test_a_report_has_its_error_and_is_silent_of_what_is_not_installed(install):
    from lib_subquad.lab.bench.shapes import Shape
    from lib_subquad.lab.survey import checks, reasons

    engine, _ = install("SageAttention 2")
    shape = Shape("small", 1, 2, 64, 64, 64)
    found = {outcome.name: outcome for outcome in checks.check(shape, False, torch.float16, torch.device("cpu"))}
    assert list(found) == [checks.PYTORCH, *(it.NAME for it in order.usable())] and xformers.NAME not in found
    assert found[engine.NAME].seconds and found[engine.NAME].error > 3 * (found[checks.PYTORCH].error or 1e-4)
    said = {row["engine"] for row in reasons.rows(torch.device("cpu"), torch.float16)}
    assert said == {it.NAME for it in order.usable()}


def test_measure_tries_an_inexact_one_only_where_it_is_set(install):
    from lib_subquad.checkpoint import AttentionLayer, Checkpoint
    from lib_subquad.lab.explain.question import Question
    from lib_subquad.lab.tune.candidates import candidates
    from lib_subquad.lab.tune.exploration import Exploration
    from lib_subquad.lab.tune.trials import Trial

    install("SageAttention 2")
    install("xformers 0.0.35")
    layer = AttentionLayer("a layer", "unet", "self", 2, 64, 8, None, None)
    cpu = torch.device("cpu")
    rows = Question(Checkpoint("a model", (layer,), ()), 128, 128, 1, torch.float16, cpu, Settings()).rows()
    whole = [engine for engine in order.usable() if engine.EXACT and not engine.SPLITS_KEYS]
    usable = [engine.NAME for engine in whole if not engine.why_not(rows[0].problem)]
    assert xformers.NAME in usable
    assert {it.engine for it in candidates(rows, Settings())} == {"automatic", *usable, LAST}
    mine = Settings(engine=sage.NAME)
    assert {it.engine for it in candidates(rows, mine)} == {"automatic", *usable, sage.NAME, LAST}
    trial = Trial(mine, 1.0, 1.0, 1.0, 1.0, 1000, True)
    assert Exploration(rows, mine, cpu).remarks(trial) == ["inexact"]
    assert Exploration(rows, mine, cpu).remarks(replace(trial, settings=Settings())) == []


# ------------------------------------------------------------------------------------------------- the real packages


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_the_real_one_takes_what_it_is_given(engine):
    """Where it is installed: names of parameters differ from version to version."""
    engine.PACKAGE.forget()
    if reasons := engine.PACKAGE.why_not():
        pytest.skip(reasons[0])
    module, three = engine.PACKAGE.module, "qkv"
    if engine is xformers:
        for name in engine.PACKAGE.needs[:2]:
            inspect.signature(getattr(module, name)).bind(*three, attn_bias=None, scale=1.0)
        inspect.signature(module.memory_efficient_attention_backward).bind(*"god", *three, attn_bias=None, scale=1.0)
        query = torch.zeros(1, 16, 2, 64)
        inputs = module.fmha.Inputs(query=query, key=query, value=query, attn_bias=None, p=0.0, scale=1.0)
        for function, more in ((module.fmha.dispatch._dispatch_fw, False), (module.fmha.dispatch._dispatch_bw, None)):
            with pytest.raises(NotImplementedError, match="is not supported because:\n    "):  # it knows no CPU
                xformers._either(function, inputs, more)
    elif engine is flash_attn:
        more = dict(dropout_p=0.0, softmax_scale=1.0, causal=False, return_attn_probs=True)
        inspect.signature(module.flash_attn_func).bind(*three, **more)
    else:
        more = dict(tensor_layout="HND", is_causal=False, sm_scale=1.0)
        inspect.signature(module.sageattn).bind(*three, **more)


@pytest.mark.parametrize("keys", [40, 37])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_the_real_xformers_has_nothing_against_what_it_is_given(mask, keys, monkeypatch):
    """But that it knows no CPU: shapes, dtypes and strides pass its own checks."""
    xformers.PACKAGE.forget()
    if reasons := xformers.PACKAGE.why_not():
        pytest.skip(reasons[0])
    module, given = xformers.PACKAGE.module, {}
    monkeypatch.setitem(devices.RULES, "cpu", replace(devices.RULES["cpu"], packages=True))
    monkeypatch.setattr(xformers, "_declared", lambda *asked: ())

    def look(query, key, value, **more):
        given.update(query=query, key=key, value=value, **more)
        return torch.zeros_like(query)

    monkeypatch.setattr(module, "memory_efficient_attention_forward", look)
    for layout in LAYOUTS.values():
        query, key, value = map(layout, tensors(keys=keys))
        assert computed(xformers, query, key, value, mask=mask and MASKS[mask](24, keys))[1].engine == xformers.NAME
        inputs = module.fmha.Inputs(**given)
        inputs.validate_inputs()
        reasons = module.fmha.cutlass.FwOp.not_supported_reasons(inputs)
        assert [why for why in reasons if not why.startswith(("device=", "operator wasn't", "Operator wasn't"))] == []
