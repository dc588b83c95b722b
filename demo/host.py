"""Brings the host up in the web UI's order: scripts, list of optimizers, model, optimizer."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lib_subquad.console import UserError
from lib_subquad.lab.commands import kept


def install_modules() -> None:
    """Make `import modules` find this host's package.

    Under its own name alone: with the whole demo folder on `sys.path`, `import model` would find the demo's as well.
    """
    if "modules" in sys.modules:
        return
    folder = Path(__file__).parent / "modules"
    spec = importlib.util.spec_from_file_location(
        "modules", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["modules"] = module
    spec.loader.exec_module(module)


def cache_folder() -> Path | None:
    """Where `python -m lib_subquad` keeps what was measured; None where nobody knows that folder."""
    path = kept.path(argparse.Namespace(table=None))
    return None if path is None else path.parent


def keep_data_in(folder: str | Path | None) -> None:
    """The web UI's data folder, before `start`; without one nothing is kept."""
    from modules import paths_internal

    if folder is not None:
        paths_internal.data_path = str(Path(folder).absolute())


def start(checkpoint: str | None = None, optimizer: str = "Automatic") -> None:
    """Load the extension and a model, and put an optimizer in force.

    Raises:
        UserError: the checkpoint cannot be used, or no optimizer is called so.
    """
    install_modules()
    from demo.model import load_checkpoint, random_model  # before anything else imports ldm, which talks on import

    # isort: split
    from modules import script_callbacks, sd_hijack, sd_models, shared

    load_extension()
    # like a value from a saved config: flags that freeze settings come after it
    shared.opts.data["cross_attention_optimization"] = title_of(optimizer)
    model = load_checkpoint(checkpoint) if checkpoint else random_model()
    sd_models.model_data.set_sd_model(model.to(shared.device))
    script_callbacks.model_loaded_callback(shared.sd_model)
    sd_hijack.model_hijack.apply_optimizations()
    shared.opts.onchange("cross_attention_optimization", use_optimizer, call=False)


def load_extension() -> None:
    """Run the extension's scripts, then collect its settings and optimizers."""
    from modules import script_callbacks, scripts, sd_hijack, sd_hijack_optimizations

    scripts.load_scripts()
    script_callbacks.on_list_optimizers(sd_hijack_optimizations.list_optimizers)
    sd_hijack.list_optimizers()
    script_callbacks.before_ui_callback()
    script_callbacks.ui_settings_callback()


def reload_extension() -> None:
    """What the web UI's *Reload UI* does: unload, run the scripts again, apply an optimizer only if none is left."""
    from modules import script_callbacks, sd_hijack

    script_callbacks.script_unloaded_callback()
    load_extension()
    if sd_hijack.current_optimizer is None:
        sd_hijack.apply_optimizations()


def title_of(wanted: str) -> str:
    """The title of the attention entry that is called `wanted`, by its title or the first word of it.

    Raises:
        UserError: no entry is called so.
    """
    from modules.shared_items import cross_attention_optimizations

    titles = {}
    for title in cross_attention_optimizations():
        titles |= {title.casefold(): title, title.split(" - ")[0].casefold(): title}
    if wanted.casefold() not in titles:
        raise UserError(f"optimizer {wanted!r}: expected one of {', '.join(cross_attention_optimizations())}")
    return titles[wanted.casefold()]


def change_setting(key: str, value: Any) -> None:
    """Set an option as the page does.

    Raises:
        UserError: a --freeze flag forbids it.
    """
    from modules import shared

    try:
        shared.opts.set(key, value)
    except AssertionError as e:
        raise UserError(str(e)) from e


def optimizer_in_force() -> str:
    """The title of the entry that computes attention now; "None" for ldm's own forward."""
    from modules import sd_hijack

    return "None" if sd_hijack.current_optimizer is None else sd_hijack.current_optimizer.title()


def use_optimizer(title: str | None = None) -> None:
    """Put an entry in force and leave the settings as they are; without a title, the one that the settings name."""
    from modules import sd_hijack
    from modules.call_queue import queue_lock

    with queue_lock:  # not under a running generation
        sd_hijack.apply_optimizations(title)
