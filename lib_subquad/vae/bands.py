"""From steps, the size of the picture and the memory limit to the maps that are kept and the height of bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import device as devices
from ..settings import Settings
from ..steps import DOWN, LAST, RESIDUAL, UP, WHOLE, VaeStep

# A band is a twentieth of its map, and no less than 16 rows if only memory is short by count: two rows of each are
# computed for their neighbours' sake.
PARTS, LEAST_ROWS = 20, 16
FEWER_ROWS = (4, 1)  # when memory really runs out
LESS = 0.75  # of the bytes that did not suffice
OF_ATTENTION = 6  # maps that a layer holds which is called whole: its input, norm, q, k, v and output


@dataclass(frozen=True)
class BandPlan:
    """How a half of a VAE is computed in bands.

    `bytes` is the most that maps and bands take at a time, by estimate; `usual_bytes` the same of the half's own
    forward. `rows` is the height of a band of the largest map. `again` names the steps whose result is computed again
    each time that it is needed, instead of being kept; `least_rows` is the height that no band goes below before memory
    runs out again. `retries` counts how often it did, and `reasons` says in words why so.
    """

    bytes: int
    usual_bytes: int
    rows: int
    least_rows: int = LEAST_ROWS
    again: tuple[int, ...] = ()
    retries: int = 0
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        again = f", {len(self.again)} layers computed again" if self.again else ""
        retries = f", {self.retries} retries" if self.retries else ""
        reasons = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return (
            f"bands of {self.rows} rows{again}, {self.bytes / devices.MIB:.1f} MiB instead of "
            f"{self.usual_bytes / devices.MIB:.1f}{retries}{reasons}"
        )


@dataclass(frozen=True)
class Way:
    """One way to compute a step: bytes of the maps that it holds, those of one of the `height` rows of its bands, how
    many rows a band has for its neighbours' sake, whether something is computed `again` instead of being kept, and
    whether it `reuses` the place of a map that the step before it needed. For any other that place is free memory."""

    held: int
    row: int
    height: int
    around: int = 2
    again: bool = False
    reuses: bool = False

    def bytes(self, rows: int) -> int:
        return self.held + min(rows + self.around, self.height) * self.row

    @property
    def comfortable_bytes(self) -> int:
        return self.bytes(max(LEAST_ROWS, self.height // PARTS))


def plan_bands(
    steps: Sequence[VaeStep],
    height: int,
    width: int,
    dtype: torch.dtype,
    settings: Settings = Settings(),
    *,
    free_bytes: int,
) -> BandPlan:
    """The plan for one picture.

    Args:
        steps: of the decoder or encoder.
        height: of what it is given, in pixels of latent or picture; `width` alike.
        dtype: of what it is given.
        settings: the user's, of which the memory limit counts.
        free_bytes: the device's free memory.
    """
    ways = ways_of(steps, height, width, dtype)
    limit = free_bytes * settings.memory_limit // 100
    usual = usual_bytes(steps, height, width, dtype)
    made = _chosen(ways, None, LEAST_ROWS, usual)
    if made.bytes > limit:
        made = replace(_chosen(ways, limit, LEAST_ROWS, usual), reasons=(LIMIT_REASON,))
        if made.again:
            made = replace(made, reasons=(*made.reasons, AGAIN_REASON))
        if made.bytes > limit:
            made = replace(made, reasons=(*made.reasons, FLOOR_REASON))
    return made


def smaller(made: BandPlan, steps: Sequence[VaeStep], height: int, width: int, dtype: torch.dtype) -> BandPlan | None:
    """The plan to go on with when that one ran out of memory; None when there is none that takes less."""
    ways, target = ways_of(steps, height, width, dtype), int(made.bytes * LESS)
    for rows in (LEAST_ROWS, *FEWER_ROWS):
        if rows > made.least_rows:
            continue
        found = _chosen(ways, target, rows, made.usual_bytes)
        if found.bytes < made.bytes and (found.bytes <= target or rows < made.least_rows or found.again != made.again):
            reasons = (RETRY_REASON, AGAIN_REASON) if found.again else (RETRY_REASON,)
            return replace(found, retries=made.retries + 1, reasons=reasons)
    return None


def lowest(made: BandPlan, steps: Sequence[VaeStep], height: int, width: int, dtype: torch.dtype) -> BandPlan:
    """The last plan that there is after that one, should memory run out again and again."""
    while following := smaller(made, steps, height, width, dtype):
        made = following
    return made


LIMIT_REASON = "taller bands do not fit the memory limit"
RETRY_REASON = "smaller bands after an out-of-memory"
AGAIN_REASON = "some layers are computed again, for keeping them takes more memory"
FLOOR_REASON = "even so it takes more than the memory limit; lower bands are for when memory really runs out"


def rows_at_once(way: Way, made: BandPlan, surplus: int = 0) -> int:
    """How many rows of this step are computed at a time: as many as fit beside the maps that it holds, and a `surplus`
    of bytes."""
    fitting = (made.bytes - way.held - surplus) // max(way.row, 1) - way.around
    return max(1, min(way.height, max(made.least_rows, fitting)))


def way_taken(ways: Sequence[Way], again: bool) -> Way:
    return next((way for way in ways if way.again == again), ways[0])


def _chosen(ways: Sequence[Sequence[Way]], target: int | None, rows: int, usual: int) -> BandPlan:
    """The fastest way of each step that takes no more than `target` bytes, or no more than another step must."""

    def taken(way: Way) -> int:
        return way.comfortable_bytes if target is None else way.bytes(rows)

    if target is None:
        chosen = [options[0] for options in ways]
    else:
        bound = max(target, max(min(map(taken, options)) for options in ways))
        chosen = [next(way for way in options if taken(way) <= bound) for options in ways]
    needed = max(map(taken, chosen))
    if target is not None:  # what the limit leaves makes bands taller
        needed = max(needed, min(target, max(way.comfortable_bytes for way in chosen)))
    again = tuple(index for index, way in enumerate(chosen) if way.again)
    made = BandPlan(needed, usual, 0, rows, again)
    largest = max(chosen, key=lambda way: way.held)
    return replace(made, rows=rows_at_once(largest, made))


def ways_of(steps: Sequence[VaeStep], height: int, width: int, dtype: torch.dtype) -> list[tuple[Way, ...]]:
    """For each step the ways to compute it, the fastest first.

    An upsampling and the residual block after it have the same: what is not kept is computed in the block.
    """
    made: list[tuple[Way, ...]] = []
    for index, step in enumerate(steps):
        source = height * width * _item(dtype)
        height, width = _size_after(step, height, width)
        row = width * _item(dtype)
        if step.kind == WHOLE:
            made.append((Way(OF_ATTENTION * max(step.into * source, step.out * height * row), 0, height),))
        elif step.kind == RESIDUAL and index and steps[index - 1].kind == UP:
            made.append(made[-1])
        elif step.kind == RESIDUAL:
            made.append(_ways_of_residual(step, height, row))
        elif step.kind == UP:
            after = steps[index + 1] if index + 1 < len(steps) and steps[index + 1].kind == RESIDUAL else None
            made.append(_ways_of_upsampling(step, after, height, row))
        elif step.kind == DOWN:  # of what goes in, four times as much as comes out, the padding makes a copy as well
            taken = (2 * 4 * step.into + 2 * step.out) * row
            made.append((Way(step.into * source + step.out * height * row, taken, height, 1),))
        else:
            made.append((Way(step.into * source + step.out * height * row, _row(step.into, step.out) * row, height),))
    return made


def _ways_of_residual(step: VaeStep, height: int, row: int) -> tuple[Way, ...]:
    into, out = step.into, step.out
    kept = Way((into + out) * height * row, _row(into, out) * row, height)
    if into != out:  # what goes past the block is computed first, and waits
        kept = replace(kept, row=(out + max(_row(into, out), _row(out, out))) * row)
        return (replace(kept, held=into * height * row) if halves_channels(step) else kept,)
    return replace(kept, reuses=True), Way(into * height * row, 2 * _row(into, out) * row, height, 4, True)


def halves_channels(step: VaeStep) -> bool:
    """Whether both of what a residual block makes of its input have room in the place of that."""
    return 2 * step.out <= step.into


def _ways_of_upsampling(step: VaeStep, after: VaeStep | None, height: int, row: int) -> tuple[Way, ...]:
    channels, map_bytes = step.into, step.into * height * row
    kept = Way(map_bytes // 4 + map_bytes, _row(channels, channels) * row, height)
    if after is None:
        return (kept,)
    of_block, *_ = _ways_of_residual(after, height, row)
    kept = Way(max(kept.held, of_block.held), max(kept.row, of_block.row), height)
    return kept, Way(map_bytes // 4 + after.out * height * row, kept.row + of_block.row, height, 6, True)


def usual_bytes(steps: Sequence[VaeStep], height: int, width: int, dtype: torch.dtype) -> int:
    """What the half's own forward holds at its peak, by estimate.

    In a residual block that is all three of x * sigmoid(x) beside what comes in; where SiLU overwrites what it is
    given, what a convolution takes, of which its kernel makes a copy.
    """
    most = 0
    for step in steps:
        source = height * width * _item(dtype)
        height, width = _size_after(step, height, width)
        area = height * width * _item(dtype)
        if step.kind == RESIDUAL:
            first = 3 * step.into + (step.out if step.in_place else step.into)
            held = max(first, step.into + 3 * step.out) * area
        elif step.kind == LAST:
            held = (2 if step.in_place else 3) * step.into * area
        elif step.kind == UP:
            held = step.into * (source + 2 * area)
        elif step.kind == WHOLE:
            held = OF_ATTENTION * max(step.into * source, step.out * area)
        else:
            held = step.into * source * (2 if step.kind == DOWN else 1) + step.out * area
        most = max(most, held)
    return most


def _row(into: int, out: int) -> int:
    """The channels that a convolution takes: what goes in, what comes out, and a copy of each as its kernel has them,
    which fills them up to 16."""
    return into + out + sum(-(-channels // 16) * 16 for channels in (into, out))


def _size_after(step: VaeStep, height: int, width: int) -> tuple[int, int]:
    if step.resizes == UP:
        return 2 * height, 2 * width
    return (height // 2, width // 2) if step.resizes == DOWN else (height, width)


def _item(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
