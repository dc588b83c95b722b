"""What is shown to programmers runs: an example of every public name, and the README's own."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lib_subquad
from lib_subquad import checkpoint
from lib_subquad.engines import order

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLIC = [
    *(getattr(lib_subquad, name) for name in lib_subquad.__all__),
    *(it for name in checkpoint.__all__ if inspect.isfunction(it := getattr(checkpoint, name))),
    order.register,
    order.withdraw,
]


def modules() -> list[str]:
    """Those of the library, but for the web UI's, with an example in them."""
    files = [path for path in (ROOT / "lib_subquad").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(files)]
    return [name for name in names if not name.startswith("lib_subquad.webui")]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """Examples write files, and put functions in the place of others."""
    monkeypatch.chdir(tmp_path)
    function = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", function)
    engines = order.engines()
    yield
    assert order.engines() == engines


@pytest.mark.parametrize("public", PUBLIC, ids=lambda it: f"{it.__module__}.{it.__qualname__}")
def test_a_public_name_shows_an_example(public):
    (found,) = doctest.DocTestFinder(recurse=False).find(public, public.__qualname__)
    assert any(public.__name__ in example.source for example in found.examples)


@pytest.mark.parametrize("name", modules())
def test_examples_give_what_they_show(name):
    if name == checkpoint.__name__:
        pytest.importorskip("safetensors")
    told = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(example, out=told.append)
    assert runner.tries and not runner.failures, "".join(told)


def test_what_the_readme_shows_runs(capsys):
    query, key, value = torch.randn(3, 1, 8, 64, 40)
    names = {"torch": torch, "query": query, "key": key, "value": value}  # what the reader has already
    processed = []
    model = SimpleNamespace(set_attn_processor=processed.append)
    names["pipe"] = SimpleNamespace(unet=model, vae=model)  # one of diffusers: docs/examples has its own test
    names["processors"] = lambda model, settings: settings
    for snippet in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "README.md", "exec"), names)
    assert processed == [lib_subquad.Settings(memory_limit=50)] * 2
    assert torch.nn.functional.scaled_dot_product_attention is lib_subquad.sdpa
    torch.testing.assert_close(names["output"], (query @ key.mT * 40**-0.5).softmax(-1) @ value)
    assert str(lib_subquad.plan(query.shape, key.shape, value.shape, query.dtype, "cpu")) in capsys.readouterr().out
