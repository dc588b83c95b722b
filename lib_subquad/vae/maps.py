"""Feature maps of which any rows can be had: kept ones, and those that are computed from others when asked for.

Nothing between the norms of a VAE looks farther than to the next row, so a band of any map costs a band of the map
before it and a few rows more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .parts import AnyModule


class Map(Protocol):
    """A feature map [1, channels, height, width]."""

    @property
    def height(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of it, 0 <= start < stop <= height; not to be written to."""


def layout(tensor: Tensor) -> torch.memory_format:
    """Whether its channels lie side by side."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class Stored:
    """All of it, in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def height(self) -> int:
        return self.tensor.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[:, :, start:stop]


class Upsampled:
    """Every pixel twice in both directions."""

    def __init__(self, source: Map) -> None:
        self.source, self.height = source, 2 * source.height

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // 2
        rows = self.source.rows(first, (stop + 1) // 2)
        doubled = torch.nn.functional.interpolate(rows, scale_factor=2.0, mode="nearest")
        # A convolution would make this copy, and hold both.
        return doubled[:, :, start - 2 * first : stop - 2 * first].contiguous(memory_format=layout(doubled))


class Activated:
    """silu(norm(it)), where the norm's statistics are known: `affine` is what each channel is multiplied by, and what
    is added then."""

    def __init__(self, source: Map, affine: tuple[Tensor, Tensor]) -> None:
        self.source, self.height, self.affine = source, source.height, affine

    def rows(self, start: int, stop: int) -> Tensor:
        rows, (scale, shift) = self.source.rows(start, stop), self.affine
        normed = torch.addcmul(shift, rows.to(shift.dtype), scale)
        return torch.nn.functional.silu(normed, inplace=True).to(rows.dtype)


class Convolved:
    """What a convolution makes of it; it is called with the rows and their neighbours, and pads as it always does.

    What it pads at the edges of a band is not to be seen: the rows that come of it are dropped, except where the edge
    is the picture's. A circular one finds the picture's other edge there.
    """

    def __init__(self, source: Map, conv: AnyModule) -> None:
        self.source, self.height, self.conv = source, source.height, conv
        self.reach = conv.kernel_size[0] // 2
        self.wraps = conv.padding_mode == "circular"

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start - self.reach, stop + self.reach
        if not self.wraps:
            first, last = max(first, 0), min(last, self.height)
        rows = self.conv(self._around(first, last))
        return rows[:, :, start - first : rows.shape[2] - (last - stop)]

    def _around(self, first: int, last: int) -> Tensor:
        height, source = self.height, self.source
        pieces = [source.rows(max(first, 0), min(last, height))]
        if first < 0:
            pieces.insert(0, source.rows(height + first, height))
        if last > height:
            pieces.append(source.rows(0, last - height))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


class Downsampled:
    """What a convolution with a stride of two makes of it, after a column and a row of zeros at the right and below."""

    def __init__(self, source: Map, conv: AnyModule) -> None:
        self.source, self.height, self.conv = source, source.height // 2, conv

    def rows(self, start: int, stop: int) -> Tensor:
        last = 2 * stop + 1
        rows = self.source.rows(2 * start, min(last, self.source.height))
        return self.conv(torch.nn.functional.pad(rows, (0, 1, 0, last - 2 * start - rows.shape[2])))


class Added:
    """The sum of two."""

    def __init__(self, first: Map, second: Map) -> None:
        self.first, self.second, self.height = first, second, first.height

    def rows(self, start: int, stop: int) -> Tensor:
        return self.first.rows(start, stop) + self.second.rows(start, stop)


class Overwritten:
    """The map that a tensor was, while its rows are replaced from the first to the last.

    `reach` rows above those that come next are kept for their sake, and the first ones for the last where the map
    `wraps` around.
    """

    def __init__(self, tensor: Tensor, reach: int, wraps: bool) -> None:
        self.tensor, self.height, self.reach = tensor, tensor.shape[2], reach
        self.head = tensor[:, :, :reach].clone() if wraps else tensor[:, :, :0]
        self.tail = tensor[:, :, :0]
        self.written = 0

    def rows(self, start: int, stop: int) -> Tensor:
        pieces = []
        if start < self.written:
            above = self.written - self.tail.shape[2]
            old, offset = (self.tail, above) if start >= above else (self.head, 0)
            pieces.append(old[:, :, start - offset : min(stop, self.written) - offset])
        if stop > self.written:
            pieces.append(self.tensor[:, :, max(start, self.written) : stop])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def before(self, stop: int) -> Tensor:
        """The last rows above `stop`, as they are to be kept when those up to there are replaced."""
        return self.rows(max(0, stop - self.reach), stop).clone() if self.reach else self.tail

    def replace(self, stop: int, pieces: Sequence[Tensor], before: Tensor) -> None:
        """The rows that come next, up to `stop`, are these now, one piece's channels after another's."""
        channel = 0
        for rows in pieces:
            self.tensor[:, channel : channel + rows.shape[1], self.written : stop].copy_(rows)
            channel += rows.shape[1]
        self.tail, self.written = before, stop
