"""Axes for the X/Y/Z plot script."""

from __future__ import annotations

from collections.abc import Callable

from modules import scripts

from . import options

AXES = {
    "[Subquad] Use": "use",  # only where there is a switch
    "[Subquad] Query chunk": "query_chunk",
    "[Subquad] KV chunk": "kv_chunk",
    "[Subquad] Engine": "engine",
    "[Subquad] Memory limit": "memory_limit",
    "[Subquad] VAE in bands": "vae_bands",
}


def register() -> None:
    """Add the axes to the loaded X/Y/Z plot script, once."""
    for data in scripts.scripts_data:
        module = getattr(data, "module", None)
        if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid") and hasattr(module, "axis_options"):
            known, offered = {axis.label for axis in module.axis_options}, options.offered()
            wanted = {label: name for label, name in AXES.items() if label not in known and name in offered}
            module.axis_options += [_axis(module, label, name) for label, name in wanted.items()]
            return


def _axis(module, label: str, name: str):
    option = options.offered()[name]
    return module.AxisOption(
        label,
        str if option.choices else int,
        _override(name),
        confirm=_confirm(label, name),
        choices=(lambda: list(option.choices)) if option.choices else None,
    )


def _override(name: str) -> Callable:
    def apply(p, value, values):
        p.override_settings[options.key(name)] = value

    return apply


def _confirm(label: str, name: str) -> Callable:
    option = options.offered()[name]

    def confirm(p, values):
        for value in values:
            if not option.accepts(value):
                raise RuntimeError(f"{label}: {value!r} is not {option.expected}")

    return confirm
