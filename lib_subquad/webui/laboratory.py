"""What the tab's buttons do: explain, measure, apply, undo. No gradio here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from html import escape

from modules import call_queue, sd_hijack, shared

from .. import device as devices
from ..lab.explore import TUNED, Exploration
from . import models, options, status, words
from .models import Refused
from .optimizer import ENTRY


class Laboratory:
    """One for all visitors, as the settings are: the last exploration, and what the last Apply replaced."""

    def __init__(self) -> None:
        self.exploration: Exploration | None = None
        self._replaced: dict[str, object] | None = None
        self._cancelled = threading.Event()

    def explain(self, checkpoint: str, width, height, batch) -> str:
        """The plan table, as HTML."""
        settings = options.current()
        try:
            found, rows = models.rows_for(checkpoint, width, height, batch, settings)
            return words.plan_table(
                found, rows, models.largest(found, width, height, batch, settings) if rows else None
            )
        except Refused as error:
            return words.CSS + words.warning(str(error))

    def measure(self, checkpoint: str, width, height, batch) -> Iterator[tuple[str, Exploration | None]]:
        """(HTML, exploration) as measuring goes on. Generation waits meanwhile; the device's memory is given back."""
        settings = options.current()
        try:
            _, rows = models.rows_for(checkpoint, width, height, batch, settings)
        except Refused as error:
            yield words.CSS + words.warning(str(error)), None
            return
        if not rows:
            yield words.CSS + words.warning("This checkpoint has no attention layer that subquad serves."), None
            return
        if not call_queue.queue_lock.acquire(blocking=False):
            yield words.CSS + words.warning("An image is being made: measure when it is done."), None
            return
        self._cancelled.clear()
        exploration = Exploration(rows, settings, models.device())
        try:
            for step in exploration.run():
                if self._cancelled.is_set():
                    break
                yield words.CSS + words.progress(step.done, step.total, step.seconds_left, step.what), None
        except Exception as error:  # a device that cannot even be measured says so in its own words
            yield words.CSS + words.warning(f"Measuring stopped: {error}"), None
            return
        finally:  # also when the visitor closes the page
            if exploration.trials:
                self.exploration = exploration
            devices.release_cached(exploration.device)
            call_queue.queue_lock.release()
        if not exploration.trials:
            yield words.CSS + words.warning("Cancelled before a first setting was measured."), None
            return
        cancelled = words.warning("Cancelled: this is what had been measured.") if self._cancelled.is_set() else ""
        yield cancelled + words.trial_table(exploration), exploration

    def cancel(self) -> None:
        self._cancelled.set()

    def apply(self) -> tuple[str, dict[str, object]]:
        """Set what is recommended: a message, and the settings that sliders are to show."""
        trial = self.exploration.recommended() if self.exploration else None
        if trial is None:
            return "Measure first: there is nothing to apply yet.", {}
        wanted = {name: getattr(trial.settings, name) for name in TUNED}
        before = {name: getattr(shared.opts, options.key(name)) for name in TUNED}
        message, changed = _set(wanted)
        if changed:
            self._replaced = before
        return message, changed

    def undo(self) -> tuple[str, dict[str, object]]:
        """Take the last Apply back."""
        if self._replaced is None:
            return "There is nothing to undo.", {}
        message, changed = _set(self._replaced)
        if changed:
            self._replaced = None
        return message, changed

    def status(self) -> str:
        """Which optimization is active, and what the last generation took, as HTML."""
        if ENTRY.active:
            active = "<b>subquad is active.</b>"
        else:
            current = sd_hijack.current_optimizer
            name = current.title() if current is not None else "None"
            active = (
                f"<b>subquad is not active</b>: the web UI uses {escape(name)}. Select <i>{escape(ENTRY.title())}</i> "
                "in Settings, Optimizations, Cross attention optimization."
            )
        return words.CSS + words.line(f"{active} {words.last_generation(status.generation())}")


def _set(wanted: dict[str, object]) -> tuple[str, dict[str, object]]:
    """Write settings as the web UI's own page does: what happened, and the values that were set."""
    changed, refused = {}, []
    for name, value in wanted.items():
        before = getattr(shared.opts, options.key(name))
        if before == value:
            continue
        try:
            if shared.opts.set(options.key(name), value):
                changed[name] = (before, value)
            else:
                refused.append(f"{options.key(name)} cannot be changed here")
        except AssertionError as error:  # --freeze-settings and its kin
            refused.append(str(error))
    told = [f"{options.OPTIONS[name].label}: {before} → {value}" for name, (before, value) in changed.items()]
    config = getattr(shared, "config_filename", None)  # the demo keeps none
    if changed and config:
        try:
            shared.opts.save(config)
        except (AssertionError, OSError) as error:
            refused.append(f"not saved to the config file: {error}")
    message = ". ".join([*told, *refused]) or "Nothing to change: these settings are in force already."
    return message, {options.key(name): value for name, (_, value) in changed.items()}


LABORATORY = Laboratory()
