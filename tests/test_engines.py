"""The contract of engines, shown by one of the test's own; and that nothing else names an engine."""

from __future__ import annotations

import ast
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from lib_subquad import Settings, attention, plan
from lib_subquad.engines import order
from lib_subquad.engines.base import Sizes
from lib_subquad.lab.explain.question import Question
from lib_subquad.lab.tune.exploration import Exploration
from lib_subquad.plan import candidates, plan_problem
from lib_subquad.problem import Problem
from lib_subquad.settings import OPTIONS

pytestmark = pytest.mark.usefixtures("trusted")  # calls are counted

LIBRARY = Path(__file__).parents[1] / "lib_subquad"
SHAPE = (1, 2, 512, 8)
CPU = torch.device("cpu")


class Plain:
    """All scores of a few queries at once, and memory that is out above `room` queries."""

    NAME = "plain"
    EXACT = True
    SPLITS_KEYS = False
    DIFFERENTIABLE = True
    WHY = "it is plain"

    def __init__(self) -> None:
        self.refuses: list[str] = []
        self.room = 1 << 30
        self.calls: list[int] = []

    def why_not(self, problem):
        return self.refuses

    def fitting(self, problem, settings, limit):
        return Sizes(min(settings.query_chunk or problem.queries, problem.queries), problem.keys, problem.heads), []

    def smaller(self, problem, sizes):
        return sizes._replace(queries=sizes.queries // 2) if sizes.queries > 64 else None

    def taking_over(self, problem, sizes):
        return Sizes(sizes.queries, problem.keys, problem.heads)

    def rows_at_once(self, problem, sizes):
        return sizes.queries

    def least_bytes(self, problem, settings):
        return 0

    def workspace_bytes(self, problem, sizes):
        return 4 * problem.batch * problem.heads * sizes.queries * problem.keys

    def kept_bytes(self, problem, sizes):
        return None

    def attend(self, problem, sizes, query, key, value, mask, scale):
        self.calls.append(query.shape[2])
        if query.shape[2] > self.room:
            raise RuntimeError("out of memory")
        return self.attend_traced(query, key, value, mask, scale), None

    def why_not_traced(self, device, mask):
        return []

    def attend_traced(self, query, key, value, mask, scale):
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return (weights.to(wide) @ value.to(wide)).to(value.dtype)


@pytest.fixture
def plain():
    engine = Plain()
    order.register(engine, before=order.names()[0])
    yield engine
    order.withdraw(engine.NAME)
    assert engine.NAME not in OPTIONS["engine"].choices


def tensors(grad: bool = False):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, requires_grad=grad) for _ in range(3)]


def exact(query, key, value):
    query, key, value = (it.detach().double() for it in (query, key, value))
    return ((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value).float()


def computed(settings=Settings(), grad=False):
    query, key, value = tensors(grad)
    plans = []
    output = attention(query, key, value, settings=settings, report=plans.append)
    torch.testing.assert_close(output, exact(query, key, value), atol=1e-5, rtol=0)
    return plans[0], output


def test_it_is_planned_and_run(plain):
    made, _ = computed()
    assert made.engine == "plain" and made.reasons == ("it is plain",) and plain.calls == [512]
    assert made.workspace_bytes == 4 * 2 * 512 * 512 and str(made).startswith("plain, 512 x 512 tokens, 2.0 MiB")


def test_its_gradients_are_pytorchs(plain):
    made, output = computed(grad=True)
    output.sum().backward()
    assert made.engine == "plain" and output.grad_fn is not None


def test_no_queries_are_no_work_for_it(plain):
    """Nobody would call it, and what nobody makes has no gradients of PyTorch's."""
    query, key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for tokens in (0, 5, 5))
    plans = []
    attention(query, key, value, report=plans.append).sum().backward()
    assert plans[0].engine != "plain" and "there are no queries" in plans[0].reasons
    assert not plain.calls and query.grad.shape == query.shape and not key.grad.any() and not value.grad.any()


class Recomputing(Plain):
    """One whose gradients are recomputed, by the engine that comes last; it says no as often as it is told to."""

    DIFFERENTIABLE = False
    says = "no such kernel"
    refuses_from = refuses_backward_from = 1 << 30

    def attend(self, problem, sizes, query, key, value, mask, scale):
        self.calls.append(query.shape[2])
        if len(self.calls) > self.refuses_from:
            raise RuntimeError(self.says)
        scores = query @ key.mT * scale
        maximum = scores.amax(-1, keepdim=True)
        total = (scores - maximum).exp().sum(-1, keepdim=True)
        return scores.softmax(-1) @ value, torch.cat((maximum, total), dim=-1)

    def smaller(self, problem, sizes):
        return None

    def gradients(self, *arguments):
        if self.refuses_backward_from < 1:
            raise RuntimeError(self.says)
        *given, _, wanted = arguments
        return order.engines()[-1].gradients(*given, Sizes(128, 128, 1), wanted)


@pytest.mark.parametrize("says", ["no such kernel", "out of memory"])
@pytest.mark.parametrize(
    "refuses", [{}, {"refuses_from": 0}, {"refuses_from": 1}, {"refuses_backward_from": 0}], ids=str
)
@pytest.mark.usefixtures("fused_kernel")
def test_gradients_of_one_that_gives_way_to_one_whose_gradients_are_pytorchs(refuses, says):
    """In a chunk of the forward pass, or in the backward pass, where PyTorch's are of no use."""
    engine = Recomputing()
    engine.says = says
    vars(engine).update(refuses)
    order.register(engine, before=order.names()[0])
    try:
        query, key, value = tensors(grad=True)
        plans = []
        output = attention(query, key, value, settings=Settings(query_chunk=256), report=plans.append)
        torch.testing.assert_close(output, exact(query, key, value), atol=1e-5, rtol=0)
        output.square().sum().backward()
    finally:
        order.withdraw(engine.NAME)
    assert plans[0].engine == (order.names()[0] if "refuses_from" in refuses else engine.NAME)
    again = [it.detach().clone().requires_grad_() for it in (query, key, value)]
    ((again[0] @ again[1].mT * SHAPE[-1] ** -0.5).softmax(-1) @ again[2]).square().sum().backward()
    for one, other in zip((query, key, value), again):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_every_reason_of_every_engine_that_was_passed_over_is_told(plain, monkeypatch):
    plain.refuses = ["it is a Tuesday", "it does not feel like it"]
    _, *between, _ = candidates(Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, CPU), Settings())
    for engine in between:
        monkeypatch.setattr(engine, "why_not", lambda problem, name=engine.NAME: [f"{name} sleeps", "it is a Tuesday"])
    made, _ = computed()
    assert made.engine == order.names()[-1] and between
    told = [f"{engine.NAME} sleeps" for engine in between]
    assert made.reasons == ("it is a Tuesday", "it does not feel like it", *told)  # each once


def test_the_last_one_takes_what_none_can(monkeypatch):
    """It then says itself why not, and the device's own error tells the rest."""
    for engine in order.engines():
        monkeypatch.setattr(engine, "why_not", lambda problem, name=engine.NAME: [f"{name} is tired"])
    made = plan(SHAPE, SHAPE, SHAPE, torch.float32, CPU)
    asked = [
        engine.NAME for engine in candidates(Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, CPU), Settings())
    ]
    assert made.engine == order.names()[-1] and made.reasons == tuple(f"{name} is tired" for name in asked)


def test_what_does_not_fit_the_limit_is_passed_over(plain):
    problem = Problem.from_shapes(SHAPE, SHAPE, SHAPE, torch.float32, CPU)
    made = plan_problem(problem, Settings(memory_limit=1), free_bytes=64 << 20)
    assert made.engine != "plain" and "plain kernel does not fit the memory limit" in made.reasons[0]


def test_a_key_slider_rules_out_what_does_not_split_keys(plain):
    made, _ = computed(Settings(kv_chunk=64))
    assert order.named(made.engine).SPLITS_KEYS and "splits 512 keys" in made.reasons[0]


def test_memory_that_runs_out_in_it(plain):
    plain.room = 128
    made, _ = computed()
    assert made.engine == "plain" and made.query_chunk == 128 and made.retries == 2 and sum(plain.calls) > 512


@pytest.mark.usefixtures("fused_kernel")
def test_memory_that_runs_out_whatever_it_tries(plain):
    plain.room = 0
    made, _ = computed()
    assert made.engine == order.names()[1] and made.retries > 0 and "out-of-memory" in made.reasons[-1]


def test_the_user_may_choose_it_and_leave_it(plain):
    assert OPTIONS["engine"].choices == ("automatic", "plain", *order.names()[1:])
    assert computed(Settings(engine="plain"))[0].reasons == ("it is plain",)
    other = order.names()[-1]
    made, _ = computed(Settings(engine=other))
    assert made.engine == other and made.reasons[0] == f"the engine is set to {other}"
    with pytest.raises(ValueError, match="engine is 'fancy'; expected one of 'automatic', 'plain'"):
        Settings(engine="fancy")


@pytest.mark.parametrize("says", ["no such kernel", "out of memory"])
@pytest.mark.parametrize("before", [None, 0], ids=["last", "first"])
@pytest.mark.usefixtures("fused_kernel")
def test_one_that_the_user_chose_gives_way_when_it_runs_as_when_it_is_planned(says, before):
    """Wherever it is registered, and with a reason that is said."""
    engine = Plain()
    engine.attend = lambda *arguments: (_ for _ in ()).throw(RuntimeError(says))
    order.register(engine, before=None if before is None else order.names()[before])
    try:
        made, _ = computed(Settings(engine="plain"))
        again, _ = computed(Settings(engine="plain"))
    finally:
        order.withdraw(engine.NAME)
    assert made.engine == again.engine == order.names()[0]
    assert (
        says.replace("out of memory", "out-of-memory") in made.reasons[-1] and "out-of-memory" not in again.reasons[0]
    )


@pytest.mark.usefixtures("fused_kernel")
def test_an_inexact_one_is_taken_only_when_it_is_asked_for(plain, monkeypatch):
    monkeypatch.setattr(Plain, "EXACT", False)
    assert computed()[0].engine == order.names()[1]
    assert computed(Settings(engine="plain"))[0].engine == "plain"


def test_explain_and_the_lab_know_it(plain):
    from lib_subquad.checkpoint import AttentionLayer, Checkpoint

    layer = AttentionLayer("a layer", "unet", "self", 2, 8, 8, None, None)
    rows = Question(Checkpoint("a model", (layer,), ()), 128, 128, 1, torch.float32, CPU, Settings()).rows()
    assert {row.plan.engine for row in rows} == {"plain"}
    explored = Exploration(rows, Settings(), CPU)
    assert {plan.engine for settings in explored._candidates() for _, plan in explored._calls(settings)} >= {
        "plain",
        order.names()[-1],
    }


@pytest.mark.usefixtures("fused_kernel")
def test_one_that_is_reserved_is_taken_only_when_it_is_asked_for(plain):
    """And not spoken of."""
    plain.unasked = lambda problem: problem.queries < 512
    made, _ = computed()
    assert made.engine == order.names()[1] and "plain" not in str(made)
    assert computed(Settings(engine="plain"))[0].engine == "plain"
    assert plan(*[(1, 2, 100, 8)] * 3, torch.float32, CPU).engine == "plain"


@pytest.mark.usefixtures("fused_kernel")
def test_an_engine_need_not_be_hashable(plain, monkeypatch):
    """A dataclass is none."""
    monkeypatch.setattr(Plain, "__hash__", None)
    assert computed()[0].engine == computed()[0].engine == "plain"
    order.withdraw("plain")
    assert computed()[0].engine == order.names()[0]
    order.register(plain)


def test_an_engine_has_a_name_of_its_own(plain):
    with pytest.raises(ValueError, match="an engine called plain already"):
        order.register(plain)
    plain.NAME = "automatic"  # which the setting has for none of them
    with pytest.raises(ValueError, match="an engine called automatic already"):
        order.register(plain)
    plain.NAME = "plain"


@pytest.mark.parametrize("name", [name for name in dir(Plain) if not name.startswith("_")])
def test_what_an_engine_lacks_is_said_when_it_is_registered(name):
    engine = Plain()
    for other in (None, 5):
        setattr(engine, name, other)
        with pytest.raises(ValueError, match=rf"^the engine .* lacks {name} ?\(.*\); engines/base.py says"):
            order.register(engine)
    assert engine.NAME not in order.names()


def test_only_one_that_pytorch_does_not_differentiate_needs_gradients():
    engine = Recomputing()
    engine.gradients = None
    with pytest.raises(ValueError, match=r"^the engine 'plain' lacks gradients\(\); engines/base.py says"):
        order.register(engine)
    with pytest.raises(ValueError, match=r"lacks NAME \(str\), EXACT \(bool\), .*, attend\(\), .*, gradients\(\)"):
        order.register("plain")


def test_an_engine_that_is_not_there_is_said(plain):
    others = ", ".join(order.names())
    with pytest.raises(ValueError, match=f"^there is no engine called nothing; expected one of {others}$"):
        order.withdraw("nothing")
    engine = Plain()
    engine.NAME = "plainer"
    with pytest.raises(ValueError, match=f"^there is no engine called nothing; expected one of {others}$"):
        order.register(engine, before="nothing")


def test_one_engine_stays():
    before = order.engines()
    try:
        for name in order.names()[:-1]:
            order.withdraw(name)
        with pytest.raises(ValueError, match=f"^{before[-1].NAME} is the only engine; expected another"):
            order.withdraw(before[-1].NAME)
    finally:
        for engine in reversed(before[:-1]):
            order.register(engine, before=order.names()[0])
    assert order.engines() == before


MASKS = {
    "bool": (torch.rand(1, 2, 512, 512) > 0.5).index_fill(2, torch.arange(5), False),
    "of keys": torch.rand(512) > 0.5,
    "of queries": torch.rand(512, 1) > 0.5,
    "float": torch.randn(512, 512).index_fill(0, torch.arange(5), -torch.inf),
    "float64": torch.randn(512, 512, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("how", ["whole", "chunks", "vmap", "compiled"])
def test_a_whole_engine_applies_masks_and_is_traced(how, mask, dtype):
    """As those of ours do, whichever way a call comes to it."""
    query, key, value = (it.to(dtype) for it in tensors())
    mask, engine = MASKS[mask], Plain()
    expected = attention(query, key, value, mask=mask, settings=Settings(engine=order.names()[-1]))
    settings = Settings(query_chunk=100) if how == "chunks" else Settings()
    order.register(engine, before=order.names()[0])
    try:
        call = partial(attention, mask=mask, settings=settings)
        if how == "vmap":
            found = torch.func.vmap(call)(*(it[None] for it in (query, key, value)))[0]
        elif how == "compiled":
            if not hasattr(getattr(torch, "compiler", None), "is_compiling"):
                pytest.skip("torch.compiler.is_compiling is newer")
            torch.compiler.reset()  # which counts how often one function is compiled
            found = torch.compile(call, fullgraph=True, backend="eager")(query, key, value)
        else:
            found = call(query, key, value)
            assert len(engine.calls) == (6 if how == "chunks" else 1)
    finally:
        order.withdraw(engine.NAME)
    torch.testing.assert_close(found, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


GIVES = {
    "no pair": (lambda output: output, "a Tensor; expected (result, statistics or None)"),
    "nothing": (lambda output: (None, None), "a tuple; expected (result, statistics or None)"),
    "too few rows": (
        lambda output: (output[:, :, :-1], None),
        "[1, 2, 511, 8] in torch.float32 as its result; expected",
    ),
    "three dimensions": (lambda output: (output[0], None), "[2, 512, 8] in torch.float32 as its result; expected"),
    "another dtype": (
        lambda output: (output.double(), None),
        "[1, 2, 512, 8] in torch.float64 as its result; expected [1, 2, 512, 8]",
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("gives", GIVES)
def test_a_result_that_is_none_is_said(gives, grad, plain):
    attend, (given, words) = plain.attend, GIVES[gives]
    plain.attend = lambda *arguments: given(attend(*arguments)[0])
    for watched in (False, True):
        with pytest.raises(TypeError, match=re.escape(f"the engine plain gave {words}")):
            with torch.autograd.graph.saved_tensors_hooks(*2 * [lambda it: it]) if watched else nullcontext():
                computed(grad=grad)


@pytest.mark.parametrize("statistics", [None, torch.zeros(1, 2, 512), torch.zeros(1, 2, 512, 2).half()], ids=str)
def test_statistics_that_are_none_are_said(statistics):
    engine = Recomputing()
    attend = engine.attend
    engine.attend = lambda *arguments: (attend(*arguments)[0], statistics)
    order.register(engine, before=order.names()[0])
    try:
        with pytest.raises(TypeError, match=r"^the engine plain gave .* as its statistics; expected \[1, 2, 512, 2\]"):
            computed(grad=True)
        computed()  # where nobody needs them
    finally:
        order.withdraw(engine.NAME)


# ------------------------------------------------------------------------------------------- who may name an engine


def names_of_engines(code: str) -> list[str]:
    """Names of engines that code uses: as any name of its own, in an import, or in a text that is no sentence."""
    found = []
    for node in ast.walk(ast.parse(code)):
        for field in ("id", "attr", "arg", "module", "name", "asname", "names", "kwd_attrs"):
            value = getattr(node, field, None)
            for name in value if isinstance(value, list) else [value]:
                found += name.split(".") if isinstance(name, str) else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = re.split(r"[\s,;|/]+", node.value)
            if len(words) == 1 or set(words) <= {*order.names(), "automatic", ""}:
                found += [part for word in words for part in word.split(".")]
    return [name for name in found if name in {*order.names(), *map(in_code, order.names())}]


def in_code(name: str) -> str:
    """As a module or a variable would be called."""
    return name.replace("-", "_")


PLANTED = [
    "plan.engine == 'NAME'",
    "f'{x}' + f'NAME'",
    "engines = 'automatic, NAME'.split(', ')",
    "from .engines import NAME",
    "from .engines.NAME import attend",
    "from .engines.NAME.attend import scaled as other",
    "import lib_subquad.engines.NAME.sizes",
    "engines.NAME.attend()",
    "NAME = 1",
    "def NAME(): pass",
    "class A:\n    def NAME(self): pass",
    "call(NAME=1)",
    "lambda NAME: 1",
    "{'NAME': 1}",
    "match x:\n    case 'NAME': pass",
    "getattr(engines, 'NAME')",
    "import_module('lib_subquad.engines.NAME')",
]


@pytest.mark.parametrize("code", PLANTED)
def test_a_name_that_is_planted_is_found(code):
    for name in order.names():
        assert names_of_engines(code.replace("NAME", name if "'" in code else in_code(name)))
    assert not names_of_engines(code.replace("NAME", "another"))


def test_words_for_the_user_may_name_engines():
    assert not names_of_engines(f"'''{order.names()[0]} is fastest; {order.names()[-1]} runs everywhere'''")


# The web UIs' own optimizations of these names; what a report says is installed and switched on, and a device has; what
# the tab's first sentence calls kernels that everybody knows.
OTHERS = {
    "webui/words.py": {"fused", "padded", "cudnn", "xformers", "flash-attn", "sage"},
    "webui/hosts/base.py": {"xformers", "sage"},
    "lab/survey/facts.py": {"xformers", "flash-attn", "cudnn"},
    "device.py": {"cudnn"},
}


def test_no_engine_is_named_outside():
    files = [file for file in LIBRARY.rglob("*.py") if (LIBRARY / "engines") not in file.parents]
    found = {
        file.relative_to(LIBRARY).as_posix(): set(names_of_engines(file.read_text(encoding="utf-8"))) for file in files
    }
    assert len(found) > 30 and {name: names for name, names in found.items() if names} == OTHERS
