"""What the tab's buttons do: explain, measure, apply, undo. No gradio here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from html import escape

from modules import shared

from .. import device as devices
from ..console import UserError
from ..lab.tune.exploration import Exploration
from ..lab.tune.trials import TUNED
from . import measuring, models, options, results, status, words
from .hosts import host


class Run:
    """What one page measures: it waits for its turn, runs, and has ended; the wish that it stop; what was explored.

    `withdrawn`: it was cancelled before its turn came, and will never run.
    """

    def __init__(self) -> None:
        self.exploration: Exploration | None = None
        self.waiting = True
        self.running = self.cancelled = self.withdrawn = False
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Its turn has come: whether it is to run. Once, and not when it was withdrawn meanwhile."""
        with self._lock:
            waited, self.waiting = self.waiting, False
            self.running = self.running or waited
            return waited

    def cancel(self) -> None:
        with self._lock:
            self.withdrawn = self.withdrawn or self.waiting
            self.cancelled = self.cancelled or self.waiting or self.running
            self.waiting = False

    def end(self) -> None:
        with self._lock:
            self.running = self.waiting = False


class Laboratory:
    """One for all visitors, as the settings are: what the last Apply replaced."""

    def __init__(self) -> None:
        self._replaced: dict[str, object] | None = None
        self._measuring = False

    def explain(self, checkpoint: str, width, height, batch) -> str:
        """The plan table, as HTML."""
        try:
            return words.plan_table(models.question(checkpoint, width, height, batch))
        except UserError as error:
            return words.CSS + words.warning(str(error))

    def request(self, run: Run | None) -> tuple[Run, str]:
        """What a page is to measure next, and a sentence. Known from now on, so that it can be cancelled while it waits
        for its turn; a page measures one thing at a time."""
        if run is not None and (run.waiting or run.running):
            return run, "This page is measuring already."
        return Run(), ""

    def measure(self, checkpoint: str, width, height, batch, run: Run | None = None) -> Iterator[tuple[str, Run]]:
        """(HTML, run) as measuring goes on; nothing when it was cancelled before its turn came.

        Generation waits meanwhile; the device's memory is given back.
        """
        run = run or Run()
        if not run.begin():
            return
        try:
            for answer in self._measure(run, checkpoint, width, height, batch):
                yield answer, run
        finally:  # also when the visitor closes the page
            run.end()

    def _measure(self, run: Run, *question) -> Iterator[str]:
        try:
            asked = models.question(*question)
        except UserError as error:
            yield words.CSS + words.warning(str(error))
            return
        rows = asked.rows()
        if not rows:
            yield words.CSS + words.warning("This checkpoint has no attention layer that subquad serves.")
            return
        if not host().lock().acquire(blocking=False):
            busy = "Another page is measuring" if self._measuring else "An image is being made"
            yield words.CSS + words.warning(f"{busy}: measure when it is done.")
            return
        self._measuring = True
        try:
            exploration = Exploration(rows, asked.settings, asked.device, asked.free_bytes)
            for step in exploration.run():
                if run.cancelled:
                    break
                yield words.CSS + results.progress(step)
        except Exception as error:  # a device that cannot even be measured says so in its own words
            yield words.CSS + words.warning(f"Measuring stopped: {error}")
            return
        finally:
            try:
                devices.release_cached(asked.device)
            finally:  # whatever became of the device: without the lock no image is made any more
                self._measuring = False
                host().lock().release()
        if not exploration.trials:
            why = "Cancelled before a first setting was measured." if run.cancelled else "Nothing fits here."
            yield words.CSS + words.warning(why)
            return
        run.exploration = exploration
        measuring.keep(exploration.found())
        cancelled = words.warning("Cancelled: this is what had been measured.") if run.cancelled else ""
        yield cancelled + results.trial_table(exploration)

    def cancel(self, run: Run | None) -> str:
        """Stop this page's own run, and no other's."""
        if run is None or not (run.waiting or run.running):
            return "Nothing is being measured on this page."
        run.cancel()
        if run.withdrawn:
            return "Cancelled before its turn came: nothing was measured."
        return "Measuring stops when the call under way has ended."

    def apply(self, run: Run | None) -> tuple[str, dict[str, object]]:
        """Set what this page was recommended: a message, and the settings that sliders are to show."""
        exploration = run.exploration if run else None
        trial = exploration.recommended() if exploration else None
        if trial is None:
            if exploration:
                return "There is nothing to apply: it ended before settings were compared.", {}
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

    def forget(self) -> tuple[str, dict[str, object]]:
        """Forget what was measured on this device: a message. Not under an image: all its steps are to be alike."""
        if not host().lock().acquire(blocking=False):
            return "An image is being made: forget when it is done.", {}
        try:
            count = measuring.forget()
        finally:
            host().lock().release()
        if not count:
            return "Nothing has been measured on this device.", {}
        return f"Forgotten: {status.counted(count, 'kind', 'kinds')} of calls. From now on rules decide again.", {}

    def status(self) -> str:
        """Which optimization is active, and what the last generation took, as HTML."""
        standing = host().standing()
        why = f": {escape(standing.why)}" if standing.why else "."
        offered = options.offered()
        line = words.line(f"<b>{standing.is_so}</b>{why} {words.last_generation(status.generation())}")
        kept = "".join(words.kept_setting(offered[name], word) for name, word in options.kept().items())
        return words.CSS + line + words.measured(measuring.known(), host().settings()) + kept


def _set(wanted: dict[str, object]) -> tuple[str, dict[str, object]]:
    """Write settings as the web UI's own page does: what happened, and the values that were set."""
    changed, refused, in_force = {}, [], host().settings()
    for name, value in wanted.items():
        before = getattr(shared.opts, options.key(name))
        if value in (before, getattr(in_force, name)):  # a word that is kept although it is not known here stays
            continue
        try:
            if host().set(options.key(name), value):
                changed[name] = (before, value)
            else:
                refused.append(f"{options.key(name)} cannot be changed here")
        except AssertionError as error:  # --freeze-settings and its kin
            refused.append(str(error))
    told = [f"{options.OPTIONS[name].label}: {before} → {value}" for name, (before, value) in changed.items()]
    if changed:
        try:
            host().save()
        except (AssertionError, OSError) as error:
            refused.append(f"not saved to the config file: {error}")
    message = ". ".join([*told, *refused]) or "Nothing to change: these settings are in force already."
    return message, {options.key(name): value for name, (_, value) in changed.items()}


LABORATORY = Laboratory()
