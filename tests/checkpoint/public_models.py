"""What public model code holds and runs: tensors of every family, and its attention calls in the order they run.

The files in `data/families` were written from models that were built and run on PyTorch's meta device, with a hook on
their attention; `sources` in each names the code and its commit. Names and calls are folded: "{0-2,5}" stands for 0, 1,
2 and 5, "{weight,bias}" for either. `sha256` is of the tables as they were before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(file.stem for file in DATA.glob("*.json"))


@dataclass(frozen=True)
class Call:
    """One attention call: the innermost module that ran, and the shapes [batch, heads, tokens, head width].

    `kind` is "self" (the image alone), "cross" (image to prompt) or "joint" (prompt and image in one sequence).
    """

    module: str
    kind: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One image through the model, without a negative prompt, then through its VAE's encoder and decoder."""

    width: int
    height: int
    text_tokens: int | None  # None for a VAE, which is shown no prompt
    calls: tuple[Call, ...]
    sha256: str


@cache
def recorded(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def tensors(name: str) -> dict[str, list[int]]:
    """name -> shape of every tensor that the family's file holds."""
    table = {}
    for part in recorded(name)["parts"]:
        inner = tensors(part["as"]) if "as" in part else _unfolded(part["tensors"])
        table.update((part["prefix"] + key, shape) for key, shape in inner.items())
    return table


def runs(name: str) -> list[Run]:
    return [
        Run(run["width"], run["height"], run["text_tokens"], tuple(_calls(run["calls"])), run["sha256"])
        for run in recorded(name)["runs"]
    ]


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def expand(pattern: str) -> list[str]:
    """All names that a folded one stands for, the last number growing fastest."""
    words = re.split(r"\{([^}]*)\}", pattern)
    choices = [_choices(word) if odd else [word] for odd, word in zip(itertools.cycle((False, True)), words)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    found = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        found += [str(number) for number in range(int(first), int(last) + 1)] if dash else [item]
    return found


def _unfolded(folded: dict[str, list[int]]) -> dict[str, list[int]]:
    table = {}
    for pattern, shape in folded.items():
        for name in expand(pattern):
            assert name not in table, f"{name} is recorded twice"
            table[name] = shape
    return table


def _calls(blocks: list) -> Iterator[Call]:
    """A block is a few calls that repeat: all of them for the first number, then all for the next."""
    for block in blocks:
        for names in zip(*(expand(module) for module, _, _ in block), strict=True):
            for name, (_, kind, shapes) in zip(names, block):
                query, key, value = (tuple(shape) for shape in (shapes + shapes[-1:] * 2)[:3])
                yield Call(name, kind, query, key, value)
