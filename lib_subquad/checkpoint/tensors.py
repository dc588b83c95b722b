"""The names and shapes in a checkpoint, looked up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..settings import shown
from .layers import CheckpointError

LONGEST_NAME = 200  # characters; the longest of a real tensor has about 130


class Tensors(dict[str, tuple[int, ...]]):
    """name -> shape. `prefix` is what comes before these names in the file."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], prefix: str = "") -> None:
        super().__init__((str(name), tuple(shape)) for name, shape in shapes.items())
        self.prefix = prefix

    def under(self, prefix: str) -> Tensors:
        """Those whose names begin with the prefix, under the rest of their names."""
        if not prefix:
            return self
        rest = {name[len(prefix) :]: shape for name, shape in self.items() if name.startswith(prefix)}
        return Tensors(rest, self.prefix + prefix)

    def prefixes(self, needed: Iterable[str]) -> list[str]:
        """What stands before all of these names, wherever it does."""
        first, *others = needed
        found = [name[: -len(first)] for name in self if name.endswith(first)]
        return [prefix for prefix in found if all(prefix + name in self for name in others)]

    def matches(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """The names that are all of what the pattern describes."""
        return filter(None, map(pattern.fullmatch, self))

    def count(self, blocks: str) -> int:
        """How many modules of a list, such as "joint_blocks", the names tell of: numbers from 0 without a gap.

        Raises:
            CheckpointError: one is missing.
        """
        numbers = {int(match[1]) for match in self.matches(re.compile(re.escape(blocks) + r"\.([0-9]{1,4})\..*"))}
        missing = min(set(range(len(numbers))) - numbers, default=None)
        if missing is not None:
            raise CheckpointError(f"{self.prefix}{blocks}.{missing} is missing")
        return len(numbers)

    def shape(self, name: str, dimensions: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with one of these numbers of dimensions and nothing empty.

        Raises:
            CheckpointError: it is not so.
        """
        shape = self.get(name)
        if shape is None:
            raise CheckpointError(f"{self.prefix}{name} is missing")
        if len(shape) not in dimensions or not all(isinstance(size, int) and 1 <= size <= 2**20 for size in shape):
            raise CheckpointError(f"{self.prefix}{name} has the impossible shape {shown(list(shape))}")
        return shape

    def inputs(self, module: str) -> int | None:
        """Channels that a linear layer takes; None where its weight is not there or packed, as by bitsandbytes."""
        shape = self.get(f"{module}.weight", ())
        return shape[1] if len(shape) == 2 and shape[1] > 1 else None

    def beginnings(self, most: int = 8) -> str:
        """What comes before the first number or the last part of every name, with how often it occurs, in words."""

        def beginning(name: str) -> str:
            parts = name.split(".")
            numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
            return ".".join(parts[: max(numbered, 1)])

        counts = Counter(map(beginning, self))
        listed = [f"{named(beginning)} ({count})" for beginning, count in counts.most_common(most)]
        if len(counts) > most:
            listed.append(f"{len(counts) - most} others")
        return ", ".join(listed) or "nothing: it holds no tensors"


def named(name: str) -> str:
    """A tensor's, type's or file's name, whole: the part that matters is often its last."""
    return shown(name, LONGEST_NAME)
