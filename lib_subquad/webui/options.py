"""The settings section: each field of Settings is the option `subquad_<field>`, read anew at every call.

Where the web UI offers no choice of attention, there is one more: `subquad_use`, the switch.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Mapping

import gradio as gr
from modules import shared

from ..console import say
from ..settings import OPTIONS, Option, Settings

PREFIX = "subquad_"
SECTION = ("subquad", "Sub-quadratic attention")
HIDDEN = (None, "Hidden options")  # the web UI's own, for options that have no place on its page
CATEGORY = "sd"  # the heading "Stable Diffusion", beside Optimizations; known to the web UI from 1.7 on

# What the switch makes ours, by part of the model.
USES = {
    "off": (),
    "everything": ("unet", "vae"),
    "U-Net or transformer only": ("unet",),
    "VAE only": ("vae",),
}
USE = Option(
    "off",
    "Use subquad",
    "For which part of the model subquad computes attention instead of the web UI. Takes effect on the next image.",
    choices=tuple(USES),
)

# What the infotext calls a field: part of images that people keep, so these never change.
INFOTEXT = {
    "use": "Subquad use",
    "query_chunk": "Subquad query chunk",
    "kv_chunk": "Subquad KV chunk",
    "memory_limit": "Subquad memory limit",
    "engine": "Subquad engine",
    "checkpointing": "Subquad checkpointing",
    "upcast": "Subquad upcast",
    "vae": "Subquad VAE",
    "vae_bands": "Subquad VAE bands",
    "measure": "Subquad measure",
    "retry": "Subquad retry",
}

# The web UI's own flags for its sub-quadratic attention; given on the command line, they are our defaults.
FLAGS = {"query_chunk": "sub_quad_q_chunk_size", "kv_chunk": "sub_quad_kv_chunk_size"}

_switch: dict[str, Option] = {}  # whether there is one
_said: set[str] = set()
# What was stored when settings were last read, and what that comes to: where the web UI does not upcast, where it does;
# and what engines there were to choose from.
_last: tuple[tuple, tuple[Settings, Settings], Option] | None = None


def key(name: str) -> str:
    """The web UI's name for a field."""
    return PREFIX + name


def register(switch: bool = False) -> None:
    """Add the options, or bring them up to date; values that a hand-edited config broke are put right.

    `switch`: the user chooses here whether subquad is used, because the web UI has no list to choose it from.
    """
    _switch.update({"use": USE} if switch else {})
    for name, option in offered().items():
        shared.opts.add_option(key(name), _info(name, option))
    put_right()


def offered() -> dict[str, Option]:
    """Every option that is registered, in the page's order: the switch where there is one, the fields of Settings."""
    return {**_switch, **OPTIONS}


def use() -> tuple[str, ...]:
    """The parts of the model that the switch makes ours now, overrides of this request included."""
    given = getattr(shared.opts, key("use"), USE.default)
    if not USE.accepts(given):
        _say({"use": given})
    return USES[USE.nearest(given)]


def current(upcasts: bool | None = None) -> Settings:
    """The settings as they are now, overrides of this request included; whatever was broken is in range.

    `upcasts`: what the web UI's own rule says of this call, where the setting follows it; where it has no rule but its
    setting *Upcast cross attention layer to float32*, that.
    """
    global _last
    stored, known = _stored(), _last  # one read: the thread that draws previews may replace it
    engines = OPTIONS["engine"]
    if known is None or known[2] is not engines or not all(map(operator.is_, known[0], stored)):
        given = dict(zip(OPTIONS, stored))
        settings, _ = Settings.nearest(given)
        _say(given)
        known = _last = (stored, tuple(_resolved(settings, upcast) for upcast in ("never", "always")), engines)
    if upcasts is None:
        upcasts = getattr(shared.opts, "upcast_attn", False)
    return known[1][bool(upcasts)]


def _stored() -> tuple:
    """The value of each field as the web UI has it; a look into its dictionary takes a twentieth of asking by name."""
    data = getattr(shared.opts, "data", {})
    try:
        return _FIELDS(data)
    except (KeyError, TypeError):  # not registered yet
        return tuple(getattr(shared.opts, key(name), option.default) for name, option in OPTIONS.items())


_FIELDS = operator.itemgetter(*map(key, OPTIONS))


def _resolved(settings: Settings, upcast: str) -> Settings:
    return dataclasses.replace(settings, upcast=upcast) if settings.upcast == "web UI" else settings


def put_right() -> None:
    """Bring the stored values into range: one of a wrong type would block the whole "Apply settings".

    A word that is none of an option's choices stays: another version or another machine knows it.
    """
    for name, option in offered().items():
        stored = shared.opts.data.get(key(name))
        if stored is not None:
            _say({name: stored})
        if key(name) in shared.opts.data and not _unknown_word(name, stored):
            shared.opts.data[key(name)] = default(name) if stored is None else option.nearest(stored)


def kept() -> dict[str, str]:
    """Field -> the word that is stored for it and not known here; the default holds meanwhile."""
    stored = {name: shared.opts.data.get(key(name)) for name in offered()}
    return {name: value for name, value in stored.items() if _unknown_word(name, value)}


def default(name: str):
    """The default of a field: the command line's, if it gives one."""
    flag = FLAGS.get(name)
    passed = flag and any(arg.split("=")[0] == "--" + flag.replace("_", "-") for arg in sys.argv)
    value = getattr(shared.cmd_opts, flag, None) if passed else None
    return offered()[name].default if value is None else offered()[name].nearest(value)


def changed_from_default() -> dict[str, object]:
    """Infotext name -> value for every option that differs from the library's default."""
    values = {name: option.nearest(getattr(shared.opts, key(name), None)) for name, option in offered().items()}
    changed = {name: value for name, value in values.items() if value != offered()[name].default and _has_a_say(name)}
    return {INFOTEXT[name]: value for name, value in changed.items()}


def _has_a_say(name: str) -> bool:
    """Whether the option decides anything here: where there is a switch, that says what becomes of the VAE."""
    return name != "vae" or not _switch


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
        section=SECTION if _has_a_say(name) else HIDDEN,
        infotext=INFOTEXT[name] if _has_a_say(name) else None,
    )
    info.category_id = CATEGORY
    return info.info(option.help)


def _choices(name: str) -> list[str]:
    """The choices, and a word that is stored and not known here, so that a page shows what it is about to save."""
    return [*offered()[name].choices, *(word for field, word in kept().items() if field == name)]


def _unknown_word(name: str, value) -> bool:
    choices = [choice.casefold() for choice in offered()[name].choices]
    is_word = isinstance(value, str) and value.isprintable() and value.strip() != ""  # half a character cannot be saved
    return bool(choices) and is_word and value.strip().casefold() not in choices


def _say(values: Mapping[str, object]) -> None:
    """Tell the console about values that cannot be used, once."""
    for name, value in values.items():
        for message in offered()[name].put_right(name, value)[1]:
            message += " meanwhile, and keeping what was saved" if _unknown_word(name, value) else ""
            if message not in _said:
                _said.add(message)
                say(f"[subquad] setting {PREFIX}{message}")
