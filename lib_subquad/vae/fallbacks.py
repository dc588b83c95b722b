"""One way after another until a VAE's half is computed: its own, where that fits; in bands; on the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import console, memory, retry
from .. import device as devices
from ..settings import Settings
from .bands import BandPlan, usual_bytes
from .halves import Progress, in_bands, why_not
from .parts import AnyModule, steps_of

NEVER, ALWAYS = "never", "always"
ENOUGH = 0.05  # of the work, to tell by how long all of it takes

Report = Callable[[BandPlan], None]


def as_it_fits(
    half: AnyModule,
    x: Tensor,
    own: Callable[[Tensor], Tensor],
    *,
    settings: Settings = Settings(),
    forward: Callable[..., Any] | None = None,
    free_bytes: int | None = None,
    processor: bool = True,
    interrupted: Callable[[], bool] = bool,
    progress: Progress | None = None,
    report: Report | None = None,
    short: Callable[[], None] = lambda: None,
) -> Tensor:
    """What the decoder or encoder of a VAE makes of `x`, if there is any way to.

    Its own way is taken where that fits the memory limit by estimate, unless `settings.vae_bands` is "always". Where it
    runs out of memory, or would, bands are next; where not even the smallest fit on a card, the processor, in float32.
    A half that `in_bands` does not know goes its own way, and so does every one if `settings.vae_bands` is "never".

    Args:
        half, x, settings, forward, free_bytes, interrupted, progress: as `in_bands` takes them.
        own: the half's own way, from `x` to its result.
        processor: whether it may go there for a card. The half's parameters are others meanwhile, and whoever calls it
            from another thread finds them.
        report: told the plan of bands that was carried out, with `ON_PROCESSOR` among its reasons if it was there;
            nothing of the half's own way.
        short: called before anything for which memory may not suffice: where its own way does not seem to fit, and each
            time that memory ran out. A system that has none left may end the process without a word.

    Returns:
        [batch, channels, height, width], in the dtype and on the device that half(x) would give.

    Raises:
        Interrupted: `interrupted()` said so, between two bands.
        RuntimeError: the device's own out-of-memory, of the last way that there was; or of the first if
            `settings.retry` is off.
    """
    if settings.vae_bands == NEVER or why_not(half, x, forward):
        return own(x)
    how: dict[str, Any] = {"settings": settings, "forward": forward, "interrupted": interrupted, "progress": progress}

    def banded() -> Tensor:
        return in_bands(half, x, free_bytes=free_bytes, report=report, **how)

    ways = [banded]
    if not _seems_to_fit(half, x, settings, forward, free_bytes):
        short()
    elif settings.vae_bands != ALWAYS:
        ways.insert(0, lambda: own(x))
    if processor and x.device.type != "cpu":
        ways.append(lambda: _on_processor(half, x, report, **how))
    while True:
        way = ways.pop(0)
        try:
            return way()
        except Exception as error:
            if not (ways and settings.retry and devices.is_out_of_memory(error)):
                raise
        # Out of the except block the traceback is gone, and with it the tensors that its frames held.
        devices.release_cached(x.device)
        memory.forget()
        short()
        going_on = "in bands" if way is not banded else ON_PROCESSOR
        retry.warn_once(f"[subquad] out of memory in the VAE: going on {going_on}")


ON_PROCESSOR = "on the processor in float32, for not even the smallest bands fit on the device"


def _seems_to_fit(
    half: AnyModule, x: Tensor, settings: Settings, forward: Callable[..., Any] | None, free_bytes: int | None
) -> bool:
    free = memory.reading(x.device).bytes if free_bytes is None else free_bytes
    try:
        steps = steps_of(half, forward)
    except Exception as error:  # it looks at a few numbers
        if not devices.is_out_of_memory(error):
            raise
        return False
    return len(x) * usual_bytes(steps, x.shape[2], x.shape[3], x.dtype) <= free * settings.memory_limit // 100


class _Held(nn.Module):
    """Calls a function while `held` has other parameters."""

    def __init__(self, held: AnyModule) -> None:
        super().__init__()
        self.held = held

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


def _on_processor(
    half: AnyModule, x: Tensor, report: Report | None, *, progress: Progress | None, **how: Any
) -> Tensor:
    """In bands there, with copies of the half's parameters, which stay where they are."""
    processor = torch.device("cpu")
    tensors = [*half.named_parameters(), *half.named_buffers()]
    copies = {f"held.{name}": _copied(tensor, processor) for name, tensor in tensors}

    def told(plan: BandPlan) -> None:
        if report is not None:
            report(replace(plan, reasons=(*plan.reasons, ON_PROCESSOR)))

    how |= {"progress": _Estimate(progress), "report": told}
    made = torch.func.functional_call(
        _Held(half), copies, (lambda: in_bands(half, _copied(x, processor), **how),), strict=True
    )
    return made.to(x.device, x.dtype)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


class _Estimate:
    """Says on the console how long the whole takes, as soon as that can be told; and passes on how far it is."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._begun, self._told = progress, time.monotonic(), False

    def __call__(self, share: float) -> None:
        if share >= ENOUGH and not self._told:
            self._told = True
            left = (time.monotonic() - self._begun) * (1 / share - 1)
            console.say(f"[subquad] the VAE on the processor: about {left:.0f} seconds more")
        if self._progress is not None:
            self._progress(share)
