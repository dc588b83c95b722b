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


class Measurement:
    """What one page measures: the wish that it stop, and when it has ended what was explored."""

    def __init__(self) -> None:
        self.running = True
        self.exploration: Exploration | None = None
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()


class Laboratory:
    """One for all visitors, as the settings are: what the last Apply replaced."""

    def __init__(self) -> None:
        self._replaced: dict[str, object] | None = None

    def explain(self, checkpoint: str, width, height, batch) -> str:
        """The plan table, as HTML."""
        settings = options.current()
        try:
            found, rows = models.rows_for(checkpoint, width, height, batch, settings)
            largest = models.largest(found, width, height, batch, settings) if rows else None
            return words.plan_table(found, rows, largest, (int(width), int(height)))
        except Refused as error:
            return words.CSS + words.warning(str(error))

    def measure(self, checkpoint: str, width, height, batch) -> Iterator[tuple[str, Measurement]]:
        """(HTML, measurement) as measuring goes on. Generation waits meanwhile; the device's memory is given back."""
        measurement = Measurement()
        try:
            for answer in self._measure(measurement, checkpoint, width, height, batch):
                yield answer, measurement
        finally:  # also when the visitor closes the page
            measurement.running = False

    def _measure(self, measurement: Measurement, *question) -> Iterator[str]:
        settings = options.current()
        try:
            _, rows = models.rows_for(*question, settings)
        except Refused as error:
            yield words.CSS + words.warning(str(error))
            return
        if not rows:
            yield words.CSS + words.warning("This checkpoint has no attention layer that subquad serves.")
            return
        if not call_queue.queue_lock.acquire(blocking=False):
            yield words.CSS + words.warning("An image is being made: measure when it is done.")
            return
        exploration = Exploration(rows, settings, models.device())
        try:
            for step in exploration.run():
                if measurement.cancelled:
                    break
                yield words.CSS + words.progress(step.done, step.total, step.seconds_left, step.what)
        except Exception as error:  # a device that cannot even be measured says so in its own words
            yield words.CSS + words.warning(f"Measuring stopped: {error}")
            return
        finally:
            devices.release_cached(exploration.device)
            call_queue.queue_lock.release()
        if not exploration.trials:
            why = "Cancelled before a first setting was measured." if measurement.cancelled else "Nothing fits here."
            yield words.CSS + words.warning(why)
            return
        measurement.exploration = exploration
        cancelled = words.warning("Cancelled: this is what had been measured.") if measurement.cancelled else ""
        yield cancelled + words.trial_table(exploration)

    def cancel(self, measurement: Measurement | None) -> str:
        """Stop this page's own measurement, and no other's."""
        if measurement is None or not measurement.running:
            return "Nothing is being measured on this page."
        measurement.cancel()
        return "Measuring stops when the call under way has ended."

    def apply(self, measurement: Measurement | None) -> tuple[str, dict[str, object]]:
        """Set what this page was recommended: a message, and the settings that sliders are to show."""
        exploration = measurement.exploration if measurement else None
        trial = exploration.recommended() if exploration else None
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
        elif sd_hijack.current_optimizer is ENTRY:
            active = (
                "<b>subquad is selected, but not active</b>: the web UI has switched it off for now, as it does while "
                "it trains or has no model loaded."
            )
        else:
            current = sd_hijack.current_optimizer
            name = current.title() if current is not None else "None"
            active = (
                f"<b>subquad is not active</b>: the web UI uses {escape(name)}. Select <i>{escape(ENTRY.title())}</i> "
                "in Settings, Optimizations, Cross attention optimization."
            )
        line = words.line(f"{active} {words.last_generation(status.generation())}")
        return words.CSS + line + "".join(words.kept_setting(name, word) for name, word in options.kept().items())


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
