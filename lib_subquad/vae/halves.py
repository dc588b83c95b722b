"""A VAE's decoder or encoder in bands: the same picture, in three eighths of the memory or less.

Statistics of a group norm are taken first, band by band; then silu(norm(x)) is convolved band by band, and the result
is written where something lies that is needed no more. What runs out of memory is tried again with less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from .. import memory, retry
from ..problem import FLOAT_DTYPES
from ..settings import Settings, check_settings
from ..steps import DOWN, LAST, RESIDUAL, UP, WHOLE
from ..tracing import is_traced
from . import parts
from .bands import BandPlan, halves_channels, plan_bands, rows_at_once, smaller, way_taken, ways_of
from .maps import Activated, Added, Convolved, Downsampled, Map, Overwritten, Stored, Upsampled, layout
from .moments import Moments
from .parts import AnyModule, Stage

Progress = Callable[[float], None]
MOST_FREED = 48 * devices.MIB
BESIDE = 32 * devices.MIB  # that kernels may take for themselves, their code above all
SMALLEST = "Not even the smallest bands of the VAE fit."


class Interrupted(Exception):
    """The picture is wanted no more."""


def in_bands(
    half: AnyModule,
    x: Tensor,
    *,
    settings: Settings = Settings(),
    forward: Callable[..., Any] | None = None,
    free_bytes: int | None = None,
    interrupted: Callable[[], bool] = bool,
    progress: Progress | None = None,
    report: Callable[[BandPlan], None] | None = None,
) -> Tensor:
    """What the decoder or encoder of a VAE makes of `x`, in bands.

    Args:
        half: a `Decoder` or `Encoder` of latent diffusion, or what a web UI has in its place; see `why_not`.
        x: latents or pictures, [batch, channels, height, width].
        settings: the user's, of which the memory limit and *Retry when out of memory* count.
        forward: the class's own forward, where another stands in its place.
        free_bytes: the device's free memory, asked of the device if None.
        interrupted: asked between bands.
        progress: told after each band what share of the whole is done.
        report: told the plan that was carried out, retries and all.

    Returns:
        [batch, channels, height, width], as half(x) gives it within rounding.

    Raises:
        ValueError: what is not known how to compute so; the message says why. half(x) is the way to go then.
        Interrupted: `interrupted()` said so.
        RuntimeError: the device's own out-of-memory, when not even the smallest bands fit.
    """
    check_settings(settings)
    if reason := why_not(half, x, forward):
        raise ValueError(reason)
    with torch.no_grad():
        return _Call(half, x, settings, forward, free_bytes, interrupted, progress).result(report)


def why_not(half: AnyModule, x: Tensor, forward: Callable[..., Any] | None = None) -> str:
    """Why `in_bands` cannot compute this, in words; empty if it can."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in FLOAT_DTYPES or not x.numel():
        return "no pictures or latents of a floating-point dtype"
    if is_traced(x, x, x):
        return "a call that is traced or transformed"
    if reason := parts.why_not(half, forward):
        return reason
    wanted = torch.is_grad_enabled() and (x.requires_grad or any(it.requires_grad for it in half.parameters()))
    return "gradients are wanted" if wanted else ""


class _Call:
    """A call that begins again with a smaller plan when memory runs out where no band can be made smaller."""

    def __init__(
        self,
        half: AnyModule,
        x: Tensor,
        settings: Settings,
        forward: Callable[..., Any] | None,
        free_bytes: int | None,
        interrupted: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        self.half, self.x, self.settings, self.forward = half, x, settings, forward
        self.free_bytes, self.interrupted, self.progress = free_bytes, interrupted, progress
        self.steps: tuple[Stage, ...] = ()
        self.plan: BandPlan | None = None
        self.repeats = 1  # of the smallest plan: memory may have been short for a moment only

    def result(self, report: Callable[[BandPlan], None] | None) -> Tensor:
        self._until_done(self._prepare)
        done: list[Tensor] = []
        while len(done) < len(self.x):
            done.append(self._until_done(lambda: self._entry(len(done))))
        whole = done[0] if len(done) == 1 else self._until_done(lambda: torch.cat(done))
        if report is not None and self.plan is not None:
            report(self.plan)
        return whole

    def _prepare(self) -> None:
        if not self.steps:
            self.steps = parts.steps_of(self.half, self.forward)
        free = memory.reading(self.x.device).bytes if self.free_bytes is None else self.free_bytes
        self.plan = plan_bands(self.steps, *_size(self.x), self.x.dtype, self.settings, free_bytes=free)

    def _entry(self, number: int) -> Tensor:
        assert self.plan is not None
        walk = _Walk(self.steps, self.x[number : number + 1], self.plan, self.settings.retry, self.interrupted)
        if self.progress is not None:
            tell, entries = self.progress, len(self.x)
            walk.tell = lambda share: tell((number + share) / entries)
        try:
            return parts.finish(self.half, walk.result())
        finally:
            self.plan = walk.plan

    def _until_done(self, function: Callable[[], Any]) -> Any:
        while True:
            try:
                return function()
            except Exception as error:
                following = self._after(error)
            # Out of the except block the traceback is gone, and with it the tensors that its frames held.
            _make_room(self.x.device)
            self.plan = following

    def _after(self, error: Exception) -> BandPlan | None:
        if not (self.settings.retry and devices.is_out_of_memory(error)):
            raise error
        if self.plan is not None:
            following = smaller(self.plan, self.steps, *_size(self.x), self.x.dtype)
            if following is not None:
                return following
        if not self.repeats:
            retry.add_line(error, SMALLEST)
            raise error
        self.repeats -= 1
        return None if self.plan is None else replace(self.plan, retries=self.plan.retries + 1)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _make_room(device: torch.device) -> None:
    devices.release_cached(device)
    memory.forget()
    retry.warn_once("[subquad] out of memory in the VAE: going on with smaller bands")


class _Walk:
    """The steps of one picture, one after another. `plan` counts what had to be tried again."""

    def __init__(
        self, steps: tuple[Stage, ...], x: Tensor, plan: BandPlan, retry: bool, interrupted: Callable[[], bool]
    ) -> None:
        self.steps, self.plan, self.retry, self.interrupted, self.device = steps, plan, retry, interrupted, x.device
        self.ways = ways_of(steps, *_size(x), x.dtype)
        self.tell: Progress = lambda share: None
        self.halvings = 0
        self.freed = 0  # bytes of bands since such memory was last given back
        self.map: Map = Stored(x)  # what the steps have come to; nobody above them holds it
        self.spare: Tensor | None = None  # the place of a map that is needed no more
        self.total = sum(_passes(step, index in plan.again) for index, step in enumerate(steps))
        self.done = 0.0

    def result(self) -> Tensor:
        for index, step in enumerate(self.steps):
            self.way = way_taken(self.ways[index], index in self.plan.again)
            if not self.way.reuses:
                self.spare = None
            self.map = getattr(self, f"_{step.kind}")(step)
        assert isinstance(self.map, Stored)
        return self.map.tensor

    # ------------------------------------------------------------------------------------------------------- the steps

    def _convolution(self, step: Stage) -> Map:
        return self._kept(Convolved(self.map, step.layer))

    def _whole(self, step: Stage) -> Map:
        assert isinstance(self.map, Stored)
        self._look()
        return Stored(step.call(self.map.tensor))

    def _up(self, step: Stage) -> Map:
        if isinstance(self.map, Stored) and self._surplus():
            self.map = Stored(self.map.tensor.clone())
        made = Convolved(Upsampled(self.map), step.layer.conv)
        return made if self.way.again else self._kept(made)

    def _down(self, step: Stage) -> Map:
        return self._kept(Downsampled(self.map, step.layer.conv))

    def _last(self, step: Stage) -> Map:
        norm = self._affine(self.map, step.layer.norm_out)
        return self._kept(Convolved(Activated(self.map, norm), step.layer.conv_out))

    def _residual(self, step: Stage) -> Map:
        """x + conv2(silu(norm2(conv1(silu(norm1(x))))))"""
        x, block, beside = self.map, step.layer, parts.shortcut(step.layer)
        first = self._affine(x, block.norm1)
        between = Convolved(Activated(x, first), block.conv1)
        if isinstance(x, Stored) and beside is None:
            return self._in_place(x, block, first) if self.way.again else self._added_to(x, self._kept(between), block)
        if isinstance(x, Stored) and beside is not None and halves_channels(step) and self._is_of(between, x.tensor):
            return self._added_to(*self._split(x, between, beside), block)
        kept = self._kept(between)
        second = self._affine(kept, block.norm2)
        old = Overwritten(kept.tensor, 1, _wraps(block.conv2))
        added = Convolved(Activated(old, second), block.conv2)
        return self._replaced(old, Added(x if beside is None else Convolved(x, beside), added))

    def _added_to(self, x: Stored, between: Stored, block: AnyModule) -> Stored:
        """x + conv2(silu(norm2(between))), in the place of x. The other's place is free then."""
        second = self._affine(between, block.norm2)
        old = Overwritten(x.tensor, 0, False)
        made = self._replaced(old, Added(old, Convolved(Activated(between, second), block.conv2)))
        self.spare = between.tensor
        return made

    def _in_place(self, x: Stored, block: AnyModule, first: tuple[Tensor, Tensor]) -> Stored:
        """The block's result in the place of x, and nothing beside it: what is between the convolutions is computed
        twice, and of x the two rows above a band are kept for the neighbours' sake."""
        second = self._affine(Convolved(Activated(x, first), block.conv1), block.norm2)
        old = Overwritten(x.tensor, 2, _wraps(block.conv1) or _wraps(block.conv2))
        between = Convolved(Activated(old, first), block.conv1)
        return self._replaced(old, Added(old, Convolved(Activated(between, second), block.conv2)))

    def _split(self, x: Stored, between: Convolved, beside: AnyModule) -> tuple[Stored, Stored]:
        """(x as it goes past the block, what is between its convolutions): both have room in the place of x."""
        old = Overwritten(x.tensor, 1, between.wraps or _wraps(beside))
        assert isinstance(between.source, Activated)
        past, between = Convolved(old, beside), Convolved(Activated(old, between.source.affine), between.conv)

        def compute(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
            return past.rows(start, stop), between.rows(start, stop), old.before(stop)

        def take(start: int, stop: int, made: tuple[Tensor, Tensor, Tensor]) -> None:
            old.replace(stop, made[:2], made[2])

        self._each(x.height, compute, take)
        channels = beside.out_channels
        return Stored(x.tensor[:, :channels]), Stored(x.tensor[:, channels : 2 * channels])

    # ----------------------------------------------------------------------------------------------------- their bands

    def _affine(self, x: Map, norm: AnyModule) -> tuple[Tensor, Tensor]:
        found: list[tuple[Moments, torch.dtype]] = []

        def compute(start: int, stop: int) -> tuple[Moments, torch.dtype]:
            rows = x.rows(start, stop)
            moments = Moments.of(rows, norm.num_groups)
            return found[-1][0].merged(moments) if found else moments, rows.dtype

        self._each(x.height, compute, lambda start, stop, made: found.append(made))
        moments, dtype = found[-1]
        return moments.affine(norm, dtype)

    def _kept(self, x: Map) -> Stored:
        kept: list[Tensor] = []

        def keep(start: int, stop: int, rows: Tensor) -> None:
            if not kept:
                kept.append(self._room(rows, x.height))
            kept[0][:, :, start:stop].copy_(rows)

        self._each(x.height, x.rows, keep)
        return Stored(kept[0])

    def _replaced(self, old: Overwritten, x: Map) -> Stored:
        """`x` in the place of what it is made of, unless autocast has made it of another dtype."""
        if not self._is_of(x, old.tensor):
            return self._kept(x)

        def compute(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return x.rows(start, stop), old.before(stop)

        def take(start: int, stop: int, made: tuple[Tensor, Tensor]) -> None:
            old.replace(stop, made[:1], made[1])

        self._each(x.height, compute, take)
        return Stored(old.tensor)

    def _is_of(self, x: Map, tensor: Tensor) -> bool:
        """Whether it comes in this tensor's dtype."""
        return not devices.autocast_enabled(tensor.device.type) or x.rows(0, 1).dtype == tensor.dtype

    def _surplus(self) -> int:
        """Bytes beside the map that cannot be given back before it: it lies in the place of a larger one."""
        tensor = self.map.tensor if isinstance(self.map, Stored) else None
        return 0 if tensor is None else max(0, tensor.untyped_storage().nbytes() - tensor.nbytes)

    def _room(self, rows: Tensor, height: int) -> Tensor:
        """For a map of such rows: what is free already, or else new."""
        spare, self.spare = self.spare, None
        shape = (*rows.shape[:2], height, rows.shape[3])
        if spare is not None and spare.shape == shape and spare.dtype == rows.dtype:
            return spare
        del spare
        return torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=layout(rows))

    def _each(self, height: int, compute: Callable[[int, int], Any], take: Callable[[int, int, Any], None]) -> None:
        """Compute rows band by band. Where memory runs out a lower band of the same rows is tried. What is taken is
        taken: an error in that is nobody's to mend, and the picture begins again."""
        start = 0
        while start < height:
            self._look()
            stop = min(start + self._rows(height), height)
            made = self._attempt(compute, start, stop)
            if made is not None:
                take(start, stop, made)
                del made  # before the next band is computed
                self._give_back(stop - start)
                self._tell((stop - start) / height)
                start = stop

    def _rows(self, height: int) -> int:
        rows = max(1, rows_at_once(self.way, self.plan, self._surplus()) >> self.halvings)
        return -(-height // -(-height // rows))  # bands of one height, if that can be

    def _attempt(self, compute: Callable[[int, int], Any], start: int, stop: int) -> Any:
        try:
            devices.check_room(self.way.row * (stop - start + self.way.around) + BESIDE, self.device)
            return compute(start, stop)
        except Exception as error:
            if stop - start < 2 or not (self.retry and devices.is_out_of_memory(error)):
                raise
        self.halvings += 1
        self.plan = replace(self.plan, retries=self.plan.retries + 1)
        _make_room(self.device)
        return None

    def _give_back(self, rows: int) -> None:
        """What the C library keeps of bands that were freed is too small for the next map, and lies between two."""
        self.freed += rows * self.way.row
        if self.device.type == "cpu" and self.freed > MOST_FREED:
            devices.give_back_freed_memory()
            self.freed = 0

    def _look(self) -> None:
        if self.interrupted():
            raise Interrupted

    def _tell(self, share: float) -> None:
        self.done += share
        self.tell(min(1.0, self.done / self.total))


def _passes(step: Stage, again: bool) -> int:
    """How often all rows of a step's result are computed or looked at."""
    if step.kind == UP:
        return 0 if again else 1
    return {WHOLE: 0, LAST: 2, RESIDUAL: 3 if again else 4, DOWN: 1}.get(step.kind, 1)


def _wraps(conv: AnyModule) -> bool:
    return bool(conv.padding_mode == "circular")
