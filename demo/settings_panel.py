"""The settings, drawn from the same `OptionInfo` objects that the web UI draws them from."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import gradio as gr
from modules import shared
from modules.options import OptionInfo

from demo.host import change_setting
from lib_subquad.console import UserError

WIDGETS = {str: gr.Textbox, int: gr.Number, bool: gr.Checkbox}


def draw(result: gr.HTML) -> dict[str, Any]:
    """Draw every section; a change takes effect at once and is told in `result`. Returns the widget of each setting."""
    widgets = {}
    for section, options in groupby(_drawn(), key=lambda option: option[1].section):
        with gr.Column(elem_id=f"settings_{section[0]}", elem_classes="settings-section"):
            gr.HTML(f"<h3>{section[1]}</h3>")
            for key, info in options:
                widgets[key] = _draw_one(key, info)
    for key, widget in widgets.items():
        # past the queue: a setting can be changed while an image is being made
        widget.change(_changed(key), inputs=widget, outputs=result, queue=False, api_name=False)
    return widgets


def apply(values: dict[str, Any]) -> None:
    """Set every option to what its widget shows."""
    for key, value in values.items():
        info = shared.opts.data_labels[key]
        if value is not None and shared.opts.same_type(value, info.default):
            change_setting(key, value)


def _drawn() -> list[tuple[str, OptionInfo]]:
    drawable = [(key, info) for key, info in shared.opts.data_labels.items() if info.section and info.section[0]]
    order = {section: i for i, section in enumerate(dict.fromkeys(info.section for _, info in drawable))}
    return sorted(drawable, key=lambda option: order[option[1].section])


def _draw_one(key: str, info: OptionInfo):
    component = info.component or WIDGETS[type(info.default)]
    args = info.component_args() if callable(info.component_args) else info.component_args
    value = info.default if info.do_not_save else getattr(shared.opts, key)
    widget = component(label=info.label, value=value, elem_id=f"setting_{key}", **(args or {}))
    if info.comment_before or info.comment_after:
        gr.HTML(f"{info.comment_before} {info.comment_after}", elem_id=f"setting_{key}_help", elem_classes="help")
    return widget


def _changed(key: str):
    def change(value: Any) -> str:
        try:
            apply({key: value})
        except UserError as e:
            return str(e)
        return f"{shared.opts.data_labels[key].label}: {getattr(shared.opts, key)}"

    return change
