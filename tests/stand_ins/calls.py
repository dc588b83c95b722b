"""Calls drawn at random, and how far off what comes of them is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_subquad import Settings, attention
from lib_subquad.plan import Plan
from tests.devices import on_device

# Few sizes, so that the same ones come again: with other strides, another mask, or once they are trusted.
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
LAYOUTS = {
    "heads before tokens": (0, 1, 2, 3),
    "tokens before heads": (0, 2, 1, 3),
    "width before tokens": (0, 1, 3, 2),
}


@dataclass(frozen=True)
class Drawn:
    """One call: sizes, and what else an engine may trip over."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    dtype: torch.dtype
    layout: str
    mask: str
    grad: bool
    query_chunk: int
    seed: int

    def tensors(self) -> tuple[list[Tensor], Tensor | None]:
        """query, key and value, and the mask if there is one, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        order = LAYOUTS[self.layout]
        made = []
        for tokens in (self.queries, self.keys, self.keys):
            sizes = self.batch, self.heads, tokens, self.width
            laid = torch.randn([sizes[dim] for dim in order], generator=generator).to(self.dtype)
            made.append(laid.permute([order.index(dim) for dim in range(4)]).requires_grad_(self.grad))
        sizes = (self.batch, 1, self.queries, self.keys) if self.seed % 2 else (1, 1, 1, self.keys)
        if self.mask == "bool":
            return made, torch.rand(sizes, generator=generator) < 0.8
        return made, torch.randn(sizes, generator=generator).to(self.dtype) if self.mask == "float" else None


PLAIN = Drawn(1, 2, 64, 64, 40, torch.float32, "heads before tokens", "none", grad=False, query_chunk=0, seed=0)
SPOILED = {  # by what each kernel is wrong for
    "wrong": PLAIN,
    "wrong above 256 tokens": replace(PLAIN, keys=300),
    "wrong for batches above one": replace(PLAIN, batch=2),
    "wrong for tokens before heads": replace(PLAIN, layout="tokens before heads"),
    "wrong in the last tile": replace(PLAIN, queries=77),
    "not a number": PLAIN,
}


def drawn(chance: random.Random) -> Drawn:
    return Drawn(
        batch=chance.choice((1, 1, 2, 3)),
        heads=chance.choice((1, 2, 4)),
        queries=chance.choice((64, 77, 200, 300)),
        keys=chance.choice((64, 77, 300)),
        width=chance.choice((8, 40)),
        dtype=chance.choice(list(ALLOWED)),
        layout=chance.choice(list(LAYOUTS)),
        mask=chance.choice(("none", "none", "bool", "float")),
        grad=chance.random() < 0.2,
        query_chunk=chance.choice((0, 0, 0, 64)),
        seed=chance.randrange(10**6),
    )


def what_is_wrong(call: Drawn, reference: Callable[..., Tensor], plans: list[Plan] | None = None) -> str:
    """What of a call is not as in float64, in words; empty where all is."""
    tensors, mask = call.tensors()
    settings = Settings(query_chunk=call.query_chunk)
    report = None if plans is None else plans.append
    try:
        output = on_device(attention)(*tensors, mask=mask, settings=settings, report=report)
        found = [output.detach()]
        expected = reference(*tensors, mask)
        wanted = [expected.detach()]
        if call.grad:
            grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
            found += torch.autograd.grad(output, tensors, grad_output)
            wanted += torch.autograd.grad(expected, tensors, grad_output.double())
    except Exception as error:
        return f"it is lost: {type(error).__name__}: {error}"
    for name, mine, right in zip(("the result", "query's gradient", "key's", "value's"), found, wanted):
        error = (mine.double() - right).abs().max().item() / max(1.0, right.abs().max().item())
        if not error <= ALLOWED[call.dtype]:  # NaN is not either
            return f"{name} is off by {error:.2g}"
    return ""
