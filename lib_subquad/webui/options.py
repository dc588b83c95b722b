"""The settings section: each field of Settings is the option `subquad_<field>`, read anew at every call."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

import gradio as gr
from modules import shared

from ..console import say
from ..settings import OPTIONS, Option, Settings

PREFIX = "subquad_"
SECTION = ("subquad", "Sub-quadratic attention")
CATEGORY = "sd"  # the heading "Stable Diffusion", beside Optimizations; known to the web UI from 1.7 on

# What the infotext calls a field: part of images that people keep, so these never change.
INFOTEXT = {
    "query_chunk": "Subquad query chunk",
    "kv_chunk": "Subquad KV chunk",
    "memory_limit": "Subquad memory limit",
    "engine": "Subquad engine",
    "checkpointing": "Subquad checkpointing",
    "upcast": "Subquad upcast",
    "vae": "Subquad VAE",
    "retry": "Subquad retry",
}

# The web UI's own flags for its sub-quadratic attention; given on the command line, they are our defaults.
FLAGS = {"query_chunk": "sub_quad_q_chunk_size", "kv_chunk": "sub_quad_kv_chunk_size"}

_said: set[str] = set()
_last: tuple[tuple, Settings] | None = None


def key(name: str) -> str:
    """The web UI's name for a field."""
    return PREFIX + name


def register() -> None:
    """Add the options, or bring them up to date; values that a hand-edited config broke are put right."""
    for name, option in OPTIONS.items():
        shared.opts.add_option(key(name), _info(name, option))
    put_right()


def current() -> Settings:
    """The settings as they are now, overrides of this request included; whatever was broken is in range."""
    global _last
    values = tuple(getattr(shared.opts, key(name), option.default) for name, option in OPTIONS.items())
    known = _last  # one read: the thread that draws previews may replace it
    if known is not None and _identical(known[0], values):
        settings = known[1]
    else:
        given = dict(zip(OPTIONS, values))
        settings, _ = Settings.nearest(given)
        _say(given)
        _last = (values, settings)
    if settings.upcast == "web UI":
        upcast = getattr(shared.opts, "upcast_attn", False)
        return dataclasses.replace(settings, upcast="always" if upcast else "never")
    return settings


def put_right() -> None:
    """Bring the stored values into range: one of a wrong type would block the whole "Apply settings".

    A word that is none of an option's choices stays: another version or another machine knows it.
    """
    for name in OPTIONS:
        stored = shared.opts.data.get(key(name))
        given = {} if stored is None else {name: stored}
        settings, _ = Settings.nearest(given)
        _say(given)
        if key(name) in shared.opts.data and not _unknown_word(name, stored):
            shared.opts.data[key(name)] = default(name) if stored is None else getattr(settings, name)


def kept() -> dict[str, str]:
    """Field -> the word that is stored for it and not known here; the default holds meanwhile."""
    stored = {name: shared.opts.data.get(key(name)) for name in OPTIONS}
    return {name: value for name, value in stored.items() if _unknown_word(name, value)}


def default(name: str):
    """The default of a field: the command line's, if it gives one."""
    flag = FLAGS.get(name)
    passed = flag and any(arg.split("=")[0] == "--" + flag.replace("_", "-") for arg in sys.argv)
    value = getattr(shared.cmd_opts, flag, None) if passed else None
    return OPTIONS[name].default if value is None else OPTIONS[name].nearest(value)


def changed_from_default() -> dict[str, object]:
    """Infotext name -> value for every field that differs from the library's default."""
    settings, _ = Settings.nearest({name: getattr(shared.opts, key(name), None) for name in OPTIONS})
    values = dataclasses.asdict(settings)
    return {INFOTEXT[name]: value for name, value in values.items() if value != OPTIONS[name].default}


def _info(name: str, option: Option):
    if option.choices:
        component, arguments = gr.Radio, lambda: {"choices": _choices(name)}
    elif isinstance(option.default, bool):
        component, arguments = gr.Checkbox, {}
    else:
        component = gr.Slider
        arguments = {"minimum": option.minimum, "maximum": option.maximum, "step": option.step}
    info = shared.OptionInfo(
        default(name),
        option.label,
        component,
        arguments,
        onchange=put_right,
        section=SECTION,
        infotext=INFOTEXT[name],
    )
    info.category_id = CATEGORY
    return info.info(option.help)


def _identical(one: tuple, other: tuple) -> bool:
    return all(a is b for a, b in zip(one, other))


def _choices(name: str) -> list[str]:
    """The choices, and a word that is stored and not known here, so that a page shows what it is about to save."""
    return [*OPTIONS[name].choices, *(word for field, word in kept().items() if field == name)]


def _unknown_word(name: str, value) -> bool:
    choices = [choice.casefold() for choice in OPTIONS[name].choices]
    is_word = isinstance(value, str) and value.isprintable() and value.strip() != ""  # half a character cannot be saved
    return bool(choices) and is_word and value.strip().casefold() not in choices


def _say(values: Mapping[str, object]) -> None:
    """Tell the console about values that cannot be used, once."""
    for name, value in values.items():
        for message in Settings.nearest({name: value})[1]:
            message += " meanwhile, and keeping what was saved" if _unknown_word(name, value) else ""
            if message not in _said:
                _said.add(message)
                say(f"[subquad] setting {PREFIX}{message}")
