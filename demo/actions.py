"""What the page's buttons do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from demo import comparison, settings_panel
from demo.generate import MadeImage, generate
from demo.host import optimizer_in_force, use_optimizer
from lib_subquad.console import UserError
from lib_subquad.webui import status

# gradio finds it among a function's defaults and puts a live one in its place: the bar over the results
PROGRESS = gr.Progress()


class Actions:
    """One method a button. Each takes the request's fields, then the value of every setting as its widget shows it."""

    def __init__(self, setting_keys: list[str]):
        self.setting_keys = setting_keys
        self._busy = threading.Lock()  # two browsers must not switch optimizers under each other

    def generate(self, prompt, seed, width, height, steps, progress=PROGRESS, *values):
        """Make one image with the optimizer that the settings name."""
        with self._busy:
            self._apply(values)
            return _results(_one(prompt, seed, width, height, steps, progress))

    def compare(self, prompt, seed, width, height, steps, progress=PROGRESS, *values):
        """Make the same image with every optimizer in turn; show that of the one that the settings name."""
        with self._busy:
            self._apply(values)
            chosen, made = optimizer_in_force(), {}
            try:
                for title in comparison.optimizers():
                    use_optimizer(title)
                    made[title] = _one(prompt, seed, width, height, steps, progress)
            finally:
                use_optimizer()
            return _results(made[chosen])

    def _apply(self, values: tuple[Any, ...]) -> None:
        # their changes have been applied as they came, but requests can overtake each other
        try:
            settings_panel.apply(dict(zip(self.setting_keys, values, strict=True)))
        except UserError as e:
            raise gr.Error(str(e)) from e


def plan_line() -> str:
    """HTML that says how the last attention call was computed."""
    return f"<div class='plan'><b>Last plan</b> {escape(status.summary())}</div>"


def _one(prompt: str, seed: float | None, width: int, height: int, steps: int, progress: Callable) -> MadeImage:
    if seed is None:
        raise gr.Error("Seed must be a number")
    title = optimizer_in_force()
    try:
        generation = generate(
            prompt,
            int(seed),
            int(width),
            int(height),
            int(steps),
            progress=lambda done, total: progress((done, total), desc=title, unit="steps"),
        )
    except UserError as e:
        raise gr.Error(str(e)) from e
    comparison.record(generation, int(steps))
    return generation


def _results(generation: MadeImage) -> tuple:
    return generation.image, plan_line(), comparison.table(), generation.infotext
