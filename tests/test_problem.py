"""What attention() refuses, in words that name the argument, its shape and what was expected."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from lib_subquad import Settings, attention, plan, sdpa
from lib_subquad.engines import order
from lib_subquad.problem import Problem
from lib_subquad.settings import shown
from lib_subquad.tensors import mask_with_four_dimensions
from tests.own_engines import OWN

QUERY, KEY, VALUE = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)
FLOATS = "expected float16, bfloat16, float32 or float64"
OR_HALF = "the dtype of query, or half beside float32 queries"


def tensors(query=QUERY, key=KEY, value=VALUE, mask=None):
    made = {"query": torch.ones(query), "key": torch.ones(key), "value": torch.ones(value)}
    return made if mask is None else made | {"mask": torch.ones(mask)}


def with_dtypes(**dtypes):
    return {name: tensor.to(dtypes.get(name)) for name, tensor in tensors(mask=(5, 7)).items()}


SHAPES = {
    "key has shape []; expected [..., tokens, width]": tensors(key=()),
    "query has shape [8]; expected [..., tokens, width]": tensors(query=(8,)),
    "key has shape [2, 4, 7, 8]; expected leading dimensions [2, 3], those of query": tensors(key=(2, 4, 7, 8)),
    "value has shape [1, 3, 7, 4]; expected leading dimensions [2, 3], those of query": tensors(value=(1, 3, 7, 4)),
    "value has shape [3, 7, 4]; expected leading dimensions [2, 3], those of query": tensors(value=(3, 7, 4)),
    "key has shape [2, 3, 7, 9]; expected width 8, that of query": tensors(key=(2, 3, 7, 9)),
    "query has shape [1, 5, 0]; expected a width of at least 1": tensors((1, 5, 0), (1, 7, 0), (1, 7, 4)),
    "key has shape [2, 3, 0, 8]; expected at least one key": tensors(key=(2, 3, 0, 8), value=(2, 3, 0, 4)),
    "value has shape [2, 3, 6, 4]; expected 7 tokens, one for each key": tensors(value=(2, 3, 6, 4)),
    "mask has shape [5, 6]; expected one that broadcasts to [2, 3, 5, 7]": tensors(mask=(5, 6)),
    "mask has shape [7, 5]; expected one that broadcasts to [2, 3, 5, 7]": tensors(mask=(7, 5)),
    "mask has shape [2, 5, 7]; expected one that broadcasts to [2, 3, 5, 7]": tensors(mask=(2, 5, 7)),
    "mask has shape [1, 2, 3, 5, 7]; expected one that broadcasts to [2, 3, 5, 7]": tensors(mask=(1, *QUERY[:3], 7)),
    "mask has shape [0, 7]; expected one that broadcasts to [2, 3, 5, 7]": tensors(mask=(0, 7)),
}
DTYPES = {
    f"query [2, 3, 5, 8] is torch.int64; {FLOATS}": with_dtypes(query=torch.int64, key=torch.int64),
    f"query [2, 3, 5, 8] is torch.bool; {FLOATS}": with_dtypes(query=torch.bool, key=torch.bool),
    f"query [2, 3, 5, 8] is torch.complex64; {FLOATS}": with_dtypes(query=torch.complex64, key=torch.complex64),
    f"value [2, 3, 7, 4] is torch.int32; {FLOATS}": with_dtypes(value=torch.int32),
    "key [2, 3, 7, 8] is torch.float16; expected torch.float32, the dtype of query": with_dtypes(key=torch.float16),
    "key [2, 3, 7, 8] is torch.int64; expected torch.float32, the dtype of query": with_dtypes(key=torch.int64),
    f"value [2, 3, 7, 4] is torch.float64; expected torch.float32, {OR_HALF}": (with_dtypes(value=torch.float64)),
    f"value [2, 3, 7, 4] is torch.float16; expected torch.bfloat16, {OR_HALF}": (
        with_dtypes(query=torch.bfloat16, key=torch.bfloat16, value=torch.float16)
    ),
    "mask [5, 7] is torch.uint8; expected bool or a floating-point dtype": with_dtypes(mask=torch.uint8),
}
PLACES = {
    f"{name} {list(shape)} is on meta; expected cpu, where query is": tensors(mask=(5, 7)) | {name: torch.ones(shape)}
    for name, shape in (("key", KEY), ("value", VALUE), ("mask", (5, 7)))
}
for message, arguments in PLACES.items():
    arguments[message.split()[0]] = arguments[message.split()[0]].to("meta")
NO_TENSORS = {
    "query is a NoneType; expected a tensor": tensors() | {"query": None},
    "value is a list; expected a tensor": tensors() | {"value": [[1.0]]},
    "mask is a bool; expected a tensor": tensors() | {"mask": True},
}
WRONG = SHAPES | DTYPES | PLACES | NO_TENSORS


@pytest.mark.parametrize("message, arguments", WRONG.items(), ids=WRONG)
def test_what_makes_no_attention_is_refused_in_words(message, arguments):
    with pytest.raises(ValueError) as refused:
        attention(**arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("message, arguments", SHAPES.items(), ids=SHAPES)
def test_plan_refuses_shapes_in_the_same_words(message, arguments):
    mask = arguments.get("mask")
    more = {} if mask is None else {"mask_shape": mask.shape, "mask_dtype": mask.dtype}
    with pytest.raises(ValueError) as refused:
        plan(*(arguments[name].shape for name in ("query", "key", "value")), torch.float32, "cpu", **more)
    assert str(refused.value) == message


@pytest.mark.parametrize("size", [-1, 2.5, 4.0, True, "4", None, float("nan")])
@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
def test_plan_refuses_what_is_no_count(name, size):
    shapes = {"query": QUERY, "key": KEY, "value": VALUE, "mask": (5, 7)}
    shapes[name] = (*shapes[name][:-2], size, shapes[name][-1])
    mask = {"mask_shape": shapes.pop("mask"), "mask_dtype": torch.bool}
    with pytest.raises(ValueError, match=rf"^{name} has shape \[.*\]; expected whole numbers of at least 0$"):
        plan(*shapes.values(), torch.float32, "cpu", **mask)


@pytest.mark.parametrize("shape", [5, None])
def test_plan_refuses_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=rf"^key has shape {shape}; expected \[\.\.\., tokens, width\]$"):
        plan(QUERY, shape, VALUE, torch.float32, "cpu")


@pytest.mark.parametrize("free", [-1, 2.5, True, "many", float("inf")])
def test_plan_refuses_free_bytes_that_are_no_count(free):
    with pytest.raises(ValueError, match="^free_bytes is .*; expected a whole number of at least 0$"):
        plan(QUERY, KEY, VALUE, torch.float32, "cpu", free_bytes=free)


def test_plan_takes_whole_numbers_of_any_type():
    numpy = pytest.importorskip("numpy")
    made = plan(numpy.array(QUERY), torch.Size(KEY), list(VALUE), torch.float32, "cpu", free_bytes=numpy.int64(1 << 40))
    assert made == plan(QUERY, KEY, VALUE, torch.float32, "cpu", free_bytes=1 << 40)


@pytest.mark.parametrize("settings", [{}, {"query_chunk": 64}, None, "portable", 512, Settings])
def test_what_are_no_settings_is_said(settings):
    for ask in (
        lambda: attention(**tensors(), settings=settings),
        lambda: plan(QUERY, KEY, VALUE, torch.float32, "cpu", settings),
    ):
        with pytest.raises(ValueError, match="^settings is .*; expected a Settings such as") as refused:
            ask()
        assert ("makes one of a dictionary" in str(refused.value)) == isinstance(settings, dict)


NO_SCALES = [
    "0.3", 1j, [1.0, 2.0], torch.ones(2), torch.tensor(True), float("nan"), -float("inf"), True, 10**400,
    torch.tensor(float("nan")), Fraction(10**400),
]  # fmt: skip


@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize("scale", NO_SCALES, ids=lambda scale: shown(scale, 20))
def test_what_is_no_scale_is_said(scale, engine):
    """Also by a call that is like one before."""
    attention(**tensors(), settings=Settings(engine=engine))
    with pytest.raises(ValueError, match="^scale is .*; expected a finite number$"):
        attention(**tensors(), scale=scale, settings=Settings(engine=engine))


def test_a_scale_that_would_get_no_gradient():
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(ValueError, match="^scale is a tensor that needs a gradient, which attention does not give"):
        attention(**tensors(), scale=scale)
    given = tensors()
    with torch.no_grad():
        assert torch.equal(attention(**given, scale=scale), attention(**given, scale=scale.item()))


@pytest.mark.parametrize("scale", [2, Fraction(1, 4), torch.tensor([0.3]), torch.tensor(2)], ids=repr)
def test_a_scale_of_whatever_type_of_number(scale):
    given = tensors()
    assert torch.equal(attention(**given, scale=scale), attention(**given, scale=float(scale)))


@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_mkldnn", "nested"])
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_a_tensor_that_is_not_dense_is_said(name, kind):
    """After a dense one of its sizes, too."""
    given = tensors(mask=(2, 3, 5, 7))
    attention(**given)
    dense = given[name]
    given[name] = torch.nested.nested_tensor(list(dense)) if kind == "nested" else getattr(dense, kind)()
    with pytest.raises(ValueError, match=f"^{name} is (torch.(sparse_|_mkldnn)|a nested tensor).*; expected "):
        attention(**given)


@pytest.mark.parametrize("report", ["print", [], 5, False])
def test_a_report_that_cannot_be_called_is_said_before_anything_is_computed(report, monkeypatch):
    monkeypatch.setattr(order.engines()[0], "attend", lambda *given: pytest.fail("this was for nothing"))
    for call in (attention, sdpa):
        with pytest.raises(ValueError, match="^report is .*; expected a function that takes a Plan$"):
            call(*torch.randn(3, *QUERY), report=report)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "", None, 3.5, ["cpu"]], ids=repr)
def test_plan_refuses_what_is_no_device(device):
    with pytest.raises(ValueError, match="^device is .*; expected one such as 'cpu' or 'cuda:0'$"):
        plan(QUERY, KEY, VALUE, torch.float32, device)


def test_a_mask_without_a_dtype_is_refused():
    with pytest.raises(ValueError, match=r"mask \[5, 7\] is None; expected bool or a floating-point dtype"):
        plan(QUERY, KEY, VALUE, torch.float32, "cpu", mask_shape=(5, 7))


@pytest.mark.parametrize(
    "leading, sizes",
    [((), (1, 1)), ((6,), (1, 6)), ((2, 3), (2, 3)), ((4, 2, 3), (8, 3)), ((5, 4, 2, 3), (40, 3)), ((0, 3), (0, 3))],
)
def test_leading_dimensions_become_batch_and_heads(leading, sizes):
    shapes = [(*leading, *shape[-2:]) for shape in (QUERY, KEY, VALUE)]
    problem = Problem.from_shapes(*shapes, torch.float16, "cpu")
    assert (problem.batch, problem.heads) == sizes
    assert (problem.queries, problem.keys, problem.width, problem.value_width) == (5, 7, 8, 4)
    assert problem.output_bytes == sizes[0] * sizes[1] * 5 * 4 * 2


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (4, 2, 3), (5, 4, 2, 3)])
def test_a_mask_has_the_sizes_that_the_problem_says(leading):
    """What plans reckon with is what engines get."""
    scores = (*leading, 5, 7)
    for dimensions in range(len(scores) + 1):
        for mask in itertools.product(*((1, size) for size in scores[len(scores) - dimensions :])):
            shapes = [(*leading, *shape[-2:]) for shape in (QUERY, KEY, VALUE)]
            problem = Problem.from_shapes(*shapes, torch.float32, "cpu", mask_shape=mask, mask_dtype=torch.float32)
            assert mask_with_four_dimensions(torch.ones(mask), leading).shape == problem.mask
            torch.broadcast_shapes(problem.mask, (problem.batch, problem.heads, 5, 7))


def test_gradients_are_asked_for_where_they_are_recorded():
    query, key, value, mask = with_dtypes().values()
    assert not Problem.of(query, key, value, mask).grad
    for tensor in (query, key, value, mask):
        tensor.requires_grad_()
        problem = Problem.of(query, key, value, mask)
        assert problem.grad and problem.mask_grad == (tensor is mask)
        with torch.no_grad():
            problem = Problem.of(query, key, value, mask)
            assert not problem.grad and not problem.mask_grad
        tensor.requires_grad_(False)
