"""python -m lib_subquad plan: how attention will be computed for a checkpoint and an image size."""

from __future__ import annotations

import argparse

from . import question
from .explain import LARGEST_SIDE, largest_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    question.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    asked = question.read(arguments)
    checkpoint, rows = asked.checkpoint, asked.rows()
    unet = sum(layer.part == "unet" for layer in checkpoint.layers)
    print(f"{checkpoint.family}: {unet} attention layers in the U-Net, {len(checkpoint.layers) - unet} in the VAE\n")
    print(table([row.cells() for row in rows]))
    size = (asked.layers, asked.width, asked.height, asked.batch, asked.dtype, asked.device, asked.settings)
    largest = largest_image(*size)
    if largest is None or max(largest) < max(asked.width, asked.height):
        print(f"\nAn image of {asked.width} x {asked.height} does not fit the memory limit.")
    if largest is None:
        print("\nNot even the smallest image keeps its attention inside the memory limit.")
    else:
        width, height = largest
        more = " or larger" if max(largest) >= LARGEST_SIDE else ""
        size = f"{width} x {height}{more}"
        print(f"\nLargest image in these proportions whose attention stays inside the memory limit: {size}")
    for note in checkpoint.notes:
        print(note)
    return 0


def table(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table, its columns aligned."""
    names = list(rows[0]) if rows else []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}

    def line(cells) -> str:
        return "| " + " | ".join(cell.ljust(widths[name]) for name, cell in cells) + " |"

    head = [line((name, name) for name in names), "|" + "|".join("-" * (widths[name] + 2) for name in names) + "|"]
    return "\n".join(head + [line(row.items()) for row in rows])
