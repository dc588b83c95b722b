"""Settings: what each one is, and the values they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modules import errors
from modules.shared_cmd_options import cmd_opts


@dataclass(eq=False)
class OptionInfo:
    """One setting: its default, how to draw it, and what to call when it changes."""

    default: Any = None
    label: str = ""
    component: Callable | None = None
    component_args: dict | Callable | None = None
    onchange: Callable | None = None
    section: tuple | None = None
    refresh: Callable | None = None
    comment_before: str = ""
    comment_after: str = ""
    infotext: str | None = None
    restrict_api: bool = False
    category_id: str | None = None
    do_not_save: bool = field(default=False, init=False)

    def info(self, info: str) -> OptionInfo:
        return self.html(f"<span class='info'>({info})</span>")

    def html(self, html: str) -> OptionInfo:
        self.comment_after += html
        return self

    def link(self, label: str, url: str) -> OptionInfo:
        self.comment_before += f"[<a href='{url}' target='_blank'>{label}</a>]"
        return self

    def needs_restart(self) -> OptionInfo:
        return self.html(" <span class='info'>(requires restart)</span>")

    def needs_reload_ui(self) -> OptionInfo:
        return self.html(" <span class='info'>(requires Reload UI)</span>")


class OptionHTML(OptionInfo):
    """A paragraph among the settings; it has no value."""

    def __init__(self, text: str):
        super().__init__(str(text).strip(), component=_html)
        self.do_not_save = True


def _html(**kwargs):
    import gradio as gr

    return gr.HTML(elem_classes="settings-info", **kwargs)


def options_section(section_identifier: tuple, options_dict: dict[str, OptionInfo]) -> dict[str, OptionInfo]:
    """Put every option of the dict in one section: `(id, title)` or `(id, title, category)`."""
    for info in options_dict.values():
        info.section = tuple(section_identifier[:2])
        if len(section_identifier) == 3:
            info.category_id = section_identifier[2]
    return options_dict


class Options:
    """The settings' values, as attributes; assigning one obeys the --freeze flags."""

    typemap = {int: float}

    def __init__(self, data_labels: dict[str, OptionInfo], restricted_opts: set[str] = frozenset()):
        # the instance dict, because __setattr__ below already speaks of settings
        self.__dict__["data_labels"] = data_labels
        self.__dict__["data"] = {key: info.default for key, info in data_labels.items() if not info.do_not_save}
        self.__dict__["restricted_opts"] = restricted_opts

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ or (key not in self.data and key not in self.data_labels):
            super().__setattr__(key, value)
            return
        info = self.data_labels.get(key)
        if info is not None and info.do_not_save:
            return
        _refuse_if_frozen(key, info)
        self.data[key] = value

    def __getattr__(self, key: str) -> Any:
        # reached only for names that are not ordinary attributes
        if key in self.__dict__.get("data", {}):
            return self.data[key]
        if key in self.__dict__.get("data_labels", {}):
            return self.data_labels[key].default
        raise AttributeError(f"there is no setting {key!r}")

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        """Change a setting and call its onchange; True if it changed. A failing onchange takes the change back."""
        before = self.data.get(key)
        info = self.data_labels[key]
        if before == value or info.do_not_save or (is_api and info.restrict_api):
            return False
        try:
            setattr(self, key, value)
        except RuntimeError:
            return False
        if run_callbacks and info.onchange is not None:
            try:
                info.onchange()
            except Exception as e:
                errors.display(e, f"changing setting {key} to {value}")
                setattr(self, key, before)
                return False
        return True

    def onchange(self, key: str, func: Callable, call: bool = True) -> None:
        """Have `func` called whenever the setting changes."""
        self.data_labels[key].onchange = func
        if call:
            func()

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Register a setting; a value that was loaded earlier stays."""
        self.data_labels[key] = info
        if key not in self.data and not info.do_not_save:
            self.data[key] = info.default

    def get_default(self, key: str) -> Any:
        info = self.data_labels.get(key)
        return None if info is None else info.default

    def same_type(self, x: Any, y: Any) -> bool:
        """Whether the page may hand over `x` for `y`; whole numbers and fractions count as one type."""
        if x is None or y is None:
            return True
        return self.typemap.get(type(x), type(x)) is self.typemap.get(type(y), type(y))

    def cast_value(self, key: str, value: Any) -> Any:
        """`value`, usually text from an infotext, in the type of the setting's default."""
        default = self.data_labels[key].default
        if value is None or default is None:
            return None
        if isinstance(default, bool) and value == "False":
            return False
        return type(default)(value)

    def save(self, filename: str) -> None:
        assert not cmd_opts.freeze_settings, "saving settings is disabled"
        with open(filename, "w", encoding="utf8") as file:
            json.dump(self.data, file, indent=4, ensure_ascii=False)

    def load(self, filename: str) -> None:
        """Read values; wrong types are reported and kept, as the web UI keeps them."""
        try:
            with open(filename, encoding="utf8") as file:
                self.__dict__["data"] = json.load(file)
        except FileNotFoundError:
            self.__dict__["data"] = {}
        for key, value in self.data.items():
            info = self.data_labels.get(key)
            if info is not None and not self.same_type(info.default, value):
                errors.report(f"bad setting value: {key}: {value} (expected {type(info.default).__name__})")


def _refuse_if_frozen(key: str, info: OptionInfo | None) -> None:
    assert not cmd_opts.freeze_settings, "changing settings is disabled"
    if info is not None and isinstance(info.component_args, dict) and info.component_args.get("visible", True) is False:
        raise RuntimeError(f"not possible to set '{key}' because it is restricted")
    if info is not None and info.section is not None:
        assert info.section[0] not in _listed(cmd_opts.freeze_settings_in_sections), f"the section of '{key}' is frozen"
    assert key not in _listed(cmd_opts.freeze_specific_settings), f"setting '{key}' is frozen"


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",")]
