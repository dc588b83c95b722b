"""How a layer's channels divide into heads: the one thing that leaves no trace in a U-Net's tensors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layers import CheckpointError, check_whole
from .tensors import named

YAML_LIMIT = 64 * 2**10  # bytes; the longest that comes with the web UI has 6 KiB


@dataclass(frozen=True)
class Heads:
    """Heads of a layer: so many (`count`), or as many as have so many channels (`width`) each; the other is 0."""

    count: int = 0
    width: int = 0
    source: str = ""

    def __str__(self) -> str:
        return f"{f'{self.width} channels wide' if self.width else f'{self.count} in each layer'}, {self.source}"

    def divide(self, channels: int, name: str) -> tuple[int, int]:
        """(heads, head width) of a layer with so many channels.

        Raises:
            CheckpointError: they do not divide.
        """
        unit = self.width or self.count
        if channels % unit:
            raise CheckpointError(f"the {channels} channels of {name} do not divide into heads: {self}")
        return (channels // unit, unit) if self.width else (unit, channels // unit)


def asked_for(heads: int | None) -> Heads | None:
    if heads is None:
        return None
    check_whole("heads", heads, 1)
    return Heads(count=heads, source="as asked for")


def from_yaml(path: Path) -> tuple[Heads | None, tuple[str, ...]]:
    """(heads as the model's configuration has them or None, notes). A broken configuration is a note, not an error.

    Only the syntax tree is built: values are never constructed, so that no tag, merge key or alias can cost anything.
    """
    if not os.path.isfile(path):
        return None, ()
    ignored = f"{named(path.name)} beside the file was not used: "
    try:
        import yaml
    except ImportError:
        return None, (f"{ignored}PyYAML is not installed.",)
    try:
        with open(path, "rb") as file:
            text = file.read(YAML_LIMIT + 1)
        if len(text) > YAML_LIMIT:
            return None, (f"{ignored}it is longer than {YAML_LIMIT // 1024} KiB.",)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        return None, (f"{ignored}it could not be read ({type(error).__name__}).",)

    def value(node: Any, *keys: str) -> Any:
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((inner for name, inner in pairs if name.value == key), None)
        return node

    def number(name: str) -> int | None:
        for config in ("unet_config", "network_config"):  # ldm's name and sgm's
            node = value(tree, "model", "params", config, "params", name)
            if isinstance(node, yaml.ScalarNode) and re.fullmatch("[1-9][0-9]{0,4}", node.value):
                return int(node.value)
        return None

    source = f"from {named(path.name)} beside the file"
    if width := number("num_head_channels"):  # wins over num_heads, as in UNetModel; -1 stands for "not given"
        return Heads(width=width, source=source), ()
    if count := number("num_heads"):
        return Heads(count=count, source=source), ()
    return None, (f"{ignored}it does not give the number of heads.",)
