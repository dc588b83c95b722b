"""python -m lib_subquad plan: how attention will be computed for a checkpoint and an image size."""

from __future__ import annotations

import argparse

from .. import tables
from ..explain.words import engine_in_words, layers_in_words, size_in_words
from . import kept, question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    question.add_arguments(parser)
    kept.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    kept.load(arguments)
    asked = question.read(arguments)
    rows = asked.rows()
    print(f"{asked.checkpoint.family}: {layers_in_words(rows)}\n")
    told = [*(row.cells() for row in rows), *(half.cells() for half in asked.halves())]
    print(tables.for_reading(told, left={"Where", "Engine", "Why"}))
    print(f"\n{size_in_words(asked)}")
    for note in (*engine_in_words(asked.settings.engine, rows), *asked.notes):
        print(note)
    return 0
