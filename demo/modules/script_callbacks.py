"""Where scripts register what the host shall call, by category."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules import errors


@dataclass
class ScriptCallback:
    """A registered function, the file that registered it, and a name that is unique in its category."""

    script: str
    callback: Callable
    name: str = "unnamed"


CATEGORIES = (
    "app_started",
    "model_loaded",
    "ui_tabs",
    "ui_settings",
    "before_ui",
    "script_unloaded",
    "list_optimizers",
)
callback_map: dict[str, list[ScriptCallback]] = {f"callbacks_{category}": [] for category in CATEGORIES}


def on_app_started(callback: Callable, *, name: str | None = None) -> None:
    """`callback(blocks, app)` once the server runs."""
    _add("app_started", callback, name)


def on_model_loaded(callback: Callable, *, name: str | None = None) -> None:
    """`callback(sd_model)` when a model has been loaded."""
    _add("model_loaded", callback, name)


def on_ui_tabs(callback: Callable, *, name: str | None = None) -> None:
    """`callback()` gives None or a list of `(blocks, title, elem_id)`."""
    _add("ui_tabs", callback, name)


def on_ui_settings(callback: Callable, *, name: str | None = None) -> None:
    """`callback()` before the settings are drawn."""
    _add("ui_settings", callback, name)


def on_before_ui(callback: Callable, *, name: str | None = None) -> None:
    """`callback()` before the page is built."""
    _add("before_ui", callback, name)


def on_script_unloaded(callback: Callable, *, name: str | None = None) -> None:
    """`callback()` before the scripts are loaded again, or for the last time."""
    _add("script_unloaded", callback, name)


def on_list_optimizers(callback: Callable, *, name: str | None = None) -> None:
    """`callback(list)` appends `SdOptimization` objects."""
    _add("list_optimizers", callback, name)


def remove_current_script_callbacks() -> None:
    """Forget whatever the calling file has registered."""
    filename = _caller()
    _remove(lambda registered: registered.script == filename)


def remove_callbacks_for_function(callback_func: Callable) -> None:
    """Forget `callback_func` in every category."""
    _remove(lambda registered: registered.callback == callback_func)


def clear_callbacks() -> None:
    _remove(lambda registered: True)


def app_started_callback(blocks, app) -> None:
    _run("app_started", blocks, app)


def model_loaded_callback(sd_model) -> None:
    _run("model_loaded", sd_model)


def ui_tabs_callback() -> list[tuple]:
    return [tab for tabs in _run("ui_tabs") for tab in tabs or []]


def ui_settings_callback() -> None:
    _run("ui_settings")


def before_ui_callback() -> None:
    _run("before_ui")


def script_unloaded_callback() -> None:
    _run("script_unloaded", latest_first=True)


def list_optimizers_callback() -> list:
    found: list = []
    _run("list_optimizers", found)
    return found


def _run(category: str, *args: Any, latest_first: bool = False) -> list:
    # one script's failure must not keep the others from running
    results = []
    registered = list(callback_map[f"callbacks_{category}"])
    for entry in reversed(registered) if latest_first else registered:
        try:
            results.append(entry.callback(*args))
        except Exception:
            errors.report(f"Error executing callback {category} for {entry.script}", exc_info=True)
    return results


def _add(category: str, callback: Callable, name: str | None) -> None:
    filename = _caller()
    callbacks = callback_map[f"callbacks_{category}"]
    base = "/".join(part for part in (os.path.basename(filename), category, name) if part)
    taken = {entry.name for entry in callbacks}
    unique = next(n for n in (base, *(f"{base}-{i}" for i in range(1, len(taken) + 2))) if n not in taken)
    callbacks.append(ScriptCallback(filename, callback, unique))


def _remove(matches: Callable[[ScriptCallback], bool]) -> None:
    for callbacks in callback_map.values():
        callbacks[:] = [entry for entry in callbacks if not matches(entry)]


def _caller() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename if frame is not None else "unknown file"
