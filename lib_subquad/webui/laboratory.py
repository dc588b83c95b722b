"""What the tab answers and its buttons do: look, measure, apply, undo. No gradio here."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path

from modules import shared

from .. import device as devices
from ..console import UserError
from ..lab.tune.exploration import Exploration
from ..lab.tune.trials import TUNED
from ..plan import goes_by_measurements
from . import decoding, measuring, models, options, results, status, words
from .answer import Answer, answer
from .hosts import host
from .words import Said

FORGOTTEN_SECONDS = 60
TURN_SECONDS = 0.25  # between two looks whether the device is free


class Run:
    """What one page measures: it may have to be confirmed, waits for its turn, runs, and has ended; the wish that it
    stop; what was explored.

    `waiting`: until its turn has come. `taken_up`: gradio's queue has let it begin, but an image may be in the way.
    `withdrawn`: it was cancelled before its turn came, and will never run. `unconfirmed`: others wait, and whoever
    asked for it was told so.
    """

    def __init__(self, unconfirmed: bool = False) -> None:
        self.exploration: Exploration | None = None
        self.unconfirmed = unconfirmed
        self.waiting = not unconfirmed
        self.running = self.cancelled = self.withdrawn = self.taken_up = False
        self._asked = time.monotonic()
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self.waiting or self.running

    @property
    def in_the_way(self) -> bool:
        """Whether others have to wait for it. A page that was closed leaves a wish that nobody takes up."""
        forgotten = not self.taken_up and time.monotonic() - self._asked > FORGOTTEN_SECONDS
        return self.running or self.waiting and not forgotten

    def take_up(self) -> bool:
        """Whether it is to wait for the device now. Once, and not when it was withdrawn meanwhile."""
        with self._lock:
            begins = self.waiting and not self.taken_up
            self.taken_up = self.taken_up or begins
            return begins

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
    """One for all visitors, as the settings are: what the last Apply replaced, and who measures or is about to."""

    def __init__(self) -> None:
        self._replaced: dict[str, object] | None = None
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._asking = threading.Lock()

    @property
    def measuring(self) -> bool:
        """Whether some page measures at this moment."""
        return any(run.running for run in list(self._runs))

    def look(self, checkpoint: str, width, height, batch) -> tuple[Answer, str]:
        """The answer to a question, and its details as HTML. However many ask at once, one at a time: they are answered
        in the order in which they came, and take no more than one processor."""
        with self._asking:
            standing, active = host().standing(), host().active
            try:
                asked = models.question(checkpoint, width, height, batch)
            except UserError as error:
                return answer(error, standing, active), words.line(escape(str(error)))
            return answer(asked, standing, active), words.details(asked)

    def request(self, run: Run | None) -> tuple[Run, str]:
        """What a page is to measure next, and a sentence. Known from now on, so that it can be cancelled while it waits
        for its turn; a page measures one thing at a time. Where others wait it is to be asked for twice."""
        if run is not None and run.busy:
            return run, words.MEASURING_ALREADY
        others = self._others()
        if others and not (run is not None and run.unconfirmed):
            return Run(unconfirmed=True), Said(words.OTHERS_WAIT, who=others).html()
        run = Run()
        self._runs.add(run)
        return run, ""

    def is_to_be_confirmed(self, run: Run | None) -> bool:
        """Whether this page has been told that others wait, and they still do."""
        return run is not None and run.unconfirmed and bool(self._others())

    def _others(self) -> tuple[Said, ...]:
        """Who wants the device, in words."""
        measuring = sum(run.in_the_way for run in list(self._runs))
        images = host().waiting() - self.measuring  # which holds the lock as an image does
        told = ((images, words.IMAGES_WAIT), (measuring, words.PAGES_MEASURE))
        return tuple(Said(forms[min(count, 2)], count=count) for count, forms in told if count > 0)

    def measure(self, checkpoint: str, width, height, batch, run: Run | None = None) -> Iterator[tuple[str, Run]]:
        """(HTML, run) as measuring goes on; nothing when it was cancelled before its turn came.

        It waits while an image is made. Generation waits meanwhile; the device's memory is given back.
        """
        run = run or Run()
        if not run.take_up():
            return
        self._runs.add(run)
        try:
            for told in self._measure(run, checkpoint, width, height, batch):
                yield told, run
        finally:  # also when the visitor closes the page
            run.end()

    def _measure(self, run: Run, *question) -> Iterator[str]:
        try:
            asked = models.question(*question)
        except UserError as error:
            yield words.warning(str(error))
            return
        rows = asked.rows()
        if not rows:
            yield words.warning(str(Said(words.NOT_SERVED, model=asked.checkpoint.family)))
            return
        while not host().lock().acquire(blocking=False):
            yield words.line(words.WAITS_FOR_MEASURING if self.measuring else words.WAITS_FOR_IMAGE)
            time.sleep(TURN_SECONDS)
            if not run.waiting:
                return
        try:
            if not run.begin():
                return
            exploration = Exploration(rows, asked.settings, asked.device, asked.free_bytes)
            for step in exploration.run():
                if run.cancelled:
                    break
                yield results.progress(step)
        except Exception as error:  # a device that cannot even be measured says so in its own words
            yield words.warning(str(Said(words.STOPPED, error=error)))
            return
        finally:
            try:
                devices.release_cached(asked.device)
            finally:  # whatever became of the device: without the lock no image is made any more
                host().lock().release()
        if not exploration.trials:
            yield words.warning(words.CANCELLED_EARLY if run.cancelled else words.NOTHING_FITS)
            return
        run.exploration = exploration
        measuring.keep(exploration.found())
        cancelled = words.warning(words.CANCELLED) if run.cancelled else ""
        yield cancelled + results.trial_table(exploration)

    def cancel(self, run: Run | None) -> str:
        """Stop this page's own run, and no other's."""
        if run is None or not run.busy:
            return words.NOT_MEASURING
        run.cancel()
        return words.WITHDRAWN if run.withdrawn else words.STOPPING

    def offer(self, run: Run | None) -> str:
        """What Apply would change, in a few words; empty where there is nothing to apply."""
        exploration = run.exploration if run and not run.busy else None
        trial = exploration.recommended() if exploration else None
        if trial is None:
            return ""
        wanted = {name: getattr(trial.settings, name) for name in TUNED}
        return _changes(wanted, {name: getattr(host().settings(), name) for name in TUNED})

    def undoable(self) -> str:
        """What Undo would bring back, in a few words; empty where there is nothing to undo."""
        now = {name: getattr(shared.opts, options.key(name)) for name in TUNED}
        return _changes(self._replaced or {}, now)

    def apply(self, run: Run | None) -> tuple[str, dict[str, object]]:
        """Set what this page was recommended: a message, and the settings that sliders are to show."""
        exploration = run.exploration if run else None
        trial = exploration.recommended() if exploration else None
        if trial is None:
            return words.NOTHING_TO_APPLY if exploration else words.MEASURE_FIRST, {}
        wanted = {name: getattr(trial.settings, name) for name in TUNED}
        before = {name: getattr(shared.opts, options.key(name)) for name in TUNED}
        message, changed = _set(wanted)
        if changed:
            self._replaced = before
        return message, changed

    def undo(self) -> tuple[str, dict[str, object]]:
        """Take the last Apply back."""
        if self._replaced is None:
            return words.NOTHING_TO_UNDO, {}
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
        then = words.MEASURED_AGAIN if goes_by_measurements(host().settings()) else words.RULES_DECIDE
        return str(Said(words.FORGOTTEN, kinds=status.counted(count, "kind", "kinds"), then=then)), {}

    def decode(self) -> Iterator[str]:
        """Decode what was kept, which `waiting` tells of meanwhile, again and again: at last why not, as HTML."""
        with ThreadPoolExecutor(1) as worker:
            decoded = worker.submit(decoding.decode)
            while not wait([decoded], TURN_SECONDS).done:
                yield ""
            _, told = decoded.result()
        yield "" if set(told) <= set(decoding.became()) else words.lines(told)

    def dismiss(self) -> str:
        """Take it off the list of what waits: what became of it, as HTML."""
        told = decoding.dismiss()
        return words.lines(told if told == [words.NOTHING_KEPT] else [*told, words.DISMISSED_STAYS])

    def take_in(self, path: Path | None) -> str:
        """Put what a file holds on that list: a sentence, as HTML."""
        return words.lines([decoding.take_in(path)])

    def stop_decoding(self) -> str:
        """Stop that: a sentence where there is nothing to be stopped."""
        return decoding.stop()

    def waiting(self) -> tuple[str, bool, bool]:
        """(What waits to be decoded, how far that is and what became of it, as HTML, empty where there is nothing to be
        told; whether anything waits; whether it is decoded now)"""
        files, progress = decoding.waiting(), decoding.progress()
        return words.waiting(files, progress, decoding.became()), bool(files or progress), progress is not None

    def status(self) -> str:
        """Which optimization is active, and what the last generation took, as HTML."""
        standing = host().standing()
        why = escape(f": {standing.why} {standing.step}".rstrip() if standing.why else ".")
        offered = options.offered()
        line = words.line(f"<b>{escape(standing.is_so)}</b>{why} {words.last_generation(status.generation())}")
        kept = "".join(words.kept_setting(offered[name], word) for name, word in options.kept().items())
        return line + words.measured(measuring.known(), host().settings()) + kept

    def findings(self) -> str:
        """What was measured on this device, as HTML."""
        return words.findings(measuring.known())


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
    message = ". ".join([*told, *refused]) or words.IN_FORCE
    return message, {options.key(name): value for name, (_, value) in changed.items()}


def _changes(wanted: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The settings that would change, each with what it would become."""
    changed = {name: value for name, value in wanted.items() if value != now[name]}
    told = (f"{words.SETTING_NAMES[name]} {value or words.AUTOMATIC}" for name, value in changed.items())
    return ", ".join(told)


LABORATORY = Laboratory()
