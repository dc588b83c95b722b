"""What everyone shares: flags, settings, the device, the model, the progress."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
from modules import devices, sd_models, shared_items
from modules.options import OptionHTML, OptionInfo, Options, options_section  # noqa: F401 - scripts take them from here
from modules.shared_cmd_options import cmd_opts  # noqa: F401

device = devices.device
loaded_hypernetworks: list = []


@dataclass
class State:
    """How far the running generation has come."""

    job: str = ""
    sampling_step: int = 0
    sampling_steps: int = 0
    interrupted: bool = False
    skipped: bool = False


state = State()


def _attention_choices() -> dict:
    return {"choices": shared_items.cross_attention_optimizations()}


opts = Options(
    options_section(
        ("optimizations", "Optimizations", "sd"),
        {
            "cross_attention_optimization": OptionInfo(
                "Automatic", "Cross attention optimization", gr.Dropdown, _attention_choices
            ),
            "upcast_attn": OptionInfo(False, "Upcast cross attention layer to float32"),
            "training_xattention_optimizations": OptionInfo(False, "Use cross attention optimizations while training"),
        },
    )
)


def __getattr__(name: str):
    # the model changes; a plain attribute would keep the first one
    if name == "sd_model":
        return sd_models.model_data.get_sd_model()
    raise AttributeError(f"module 'modules.shared' has no attribute {name!r}")
