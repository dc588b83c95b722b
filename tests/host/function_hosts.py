"""Small packages that hold attention as a function, the ways that real web UIs do.

Module names, function names, signatures and who holds what were recorded from the web UIs that each is named after, at
the commit in its name; what the functions do is written anew, and only as much as a test needs.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import torch

SPATIAL = "(q, k, v)"
SPATIAL_NAMES = (
    "slice_attention_single_head_spatial",
    "normal_attention_single_head_spatial",
    "xformers_attention_single_head_spatial",
    "pytorch_attention_single_head_spatial",
)
WRAP_ATTN = """
import functools

def wrap_attn(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" in kwargs:
            return func(*args, **kwargs)
        kwargs["_inside_attn_wrapper"] = True
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        return override(func, *args, **kwargs) if override else func(*args, **kwargs)
    return wrapper
"""
PRECISION_OF_ONE = """
import torch

FORCED = None

def get_attn_precision(attn_precision=torch.float32):
    return attn_precision if FORCED is None else FORCED
"""
PRECISION_OF_TWO = """
FORCED = None

def get_attn_precision(attn_precision, current_dtype):
    return attn_precision if FORCED is None else FORCED.get(current_dtype, attn_precision)
"""


def implementations(names: tuple[str, ...], signature: str, decorator: str = "") -> str:
    return "\n".join(
        f"{decorator}\ndef {name}{signature}:\n    return host_computes({name!r}, locals())\n" for name in names
    )


def keeper(name: str, kept: str, base: str = "torch.nn.Module") -> str:
    """A class of a VAE, each of whose instances keeps a function."""
    return f"""
import torch

class {name}({base}):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Identity()
        self.optimized_attention = {kept}

    def forward(self, x):
        return self.optimized_attention(x, x, x)
"""


def imports(name: str, home: str, held: str | None = None) -> str:
    held = held or name
    return f"from {home} import {name} as {held}\n\ndef attend(*args, **kwargs):\n    return {held}(*args, **kwargs)\n"


@dataclass(frozen=True)
class Family:
    """The modules of a web UI: those that are there when it has started, and one that it loads with a model.

    `served`: the names, as "module:name", under which something of ours is to be held, `alone` those under which never.
    `keeper` is a class as "module:name". `by`: what computes, in words, the VAE's beside it.
    """

    modules: dict[str, str]
    late: dict[str, str]
    served: tuple[str, ...]
    late_served: tuple[str, ...]
    alone: tuple[str, ...]
    keeper: str = ""
    spatial: str = ""
    by: str = "PyTorch's attention"

    @property
    def main(self) -> str:
        """The home's name that models hold."""
        return self.served[0]


_FORGE_HEADS = "(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False)"
_FORGE = (
    PRECISION_OF_ONE
    + implementations(("attention_basic", "attention_split", "attention_xformers", "attention_pytorch"), _FORGE_HEADS)
    + implementations(("attention_sub_quad",), _FORGE_HEADS.replace("q, k, v", "query, key, value"))
    + implementations(SPATIAL_NAMES, SPATIAL)
    + """
attention_function = attention_pytorch
attention_function_single_head_spatial = pytorch_attention_single_head_spatial
"""
)
FORGE = Family(
    {
        "backend.attention": _FORGE,
        "backend.nn.unet": imports("attention_function", "backend.attention"),
        "backend.nn.vae": imports("attention_function_single_head_spatial", "backend.attention"),
        "backend.nn.t5": imports("attention_pytorch", "backend.attention", "attention_function"),
        "lib_ipadapter.IPAdapterPlus": "from backend import attention",
    },
    {
        "backend.nn.flux": imports("attention_function", "backend.attention"),
        "backend.nn.mmditx": implementations(("attention",), "(q, k, v, heads, mask=None)"),
    },
    (
        "backend.attention:attention_function",
        "backend.attention:attention_function_single_head_spatial",
        "backend.nn.unet:attention_function",
        "backend.nn.vae:attention_function_single_head_spatial",
    ),
    ("backend.nn.flux:attention_function", "backend.nn.mmditx:attention"),
    (
        "backend.attention:attention_pytorch",
        "backend.attention:pytorch_attention_single_head_spatial",
        "backend.nn.t5:attention_function",
    ),
    spatial="backend.nn.vae:attention_function_single_head_spatial",
)

_REFORGE_HEADS = _FORGE_HEADS.replace(")", ", skip_output_reshape=False)")
_REFORGE_HOME = "ldm_patched.ldm.modules.attention"
_REFORGE_VAE = "ldm_patched.ldm.modules.diffusionmodules.model"
REFORGE = Family(
    {
        _REFORGE_HOME: PRECISION_OF_TWO
        + implementations(
            ("attention_basic", "attention_split", "attention_xformers", "attention_pytorch", "attention_sage"),
            _REFORGE_HEADS,
        )
        + implementations(("attention_sub_quad",), _REFORGE_HEADS.replace("q, k, v", "query, key, value"))
        + """
optimized_attention = attention_basic
optimized_attention = attention_sub_quad
optimized_attention_masked = optimized_attention

def optimized_attention_for_device(device, mask=False, small_input=False):
    return attention_pytorch if small_input else optimized_attention_masked if mask else optimized_attention

def attend(*args, **kwargs):
    return optimized_attention(*args, **kwargs)
""",
        _REFORGE_VAE: implementations(
            ("slice_attention", "normal_attention", "xformers_attention", "pytorch_attention"), SPATIAL
        )
        + "\ndef vae_attention():\n    return pytorch_attention\n"
        + keeper("AttnBlock", "vae_attention()"),
        "ldm_patched.modules.clip_model": imports("optimized_attention_for_device", _REFORGE_HOME),
        "ldm_patched.ldm.modules.diffusionmodules.mmdit": imports("optimized_attention", _REFORGE_HOME),
        "ldm_patched.ldm.lumina.model": imports("optimized_attention_masked", _REFORGE_HOME),
        "modules.models.sd3.mmdit": "def optimized_attention(qkv, num_heads):\n    return qkv",
    },
    {"ldm_patched.ldm.wan.model": imports("optimized_attention", _REFORGE_HOME)},
    (
        f"{_REFORGE_HOME}:optimized_attention",
        f"{_REFORGE_HOME}:optimized_attention_masked",
        "ldm_patched.ldm.modules.diffusionmodules.mmdit:optimized_attention",
        "ldm_patched.ldm.lumina.model:optimized_attention_masked",
    ),
    ("ldm_patched.ldm.wan.model:optimized_attention",),
    (
        f"{_REFORGE_HOME}:attention_sub_quad",
        f"{_REFORGE_HOME}:attention_pytorch",
        f"{_REFORGE_HOME}:optimized_attention_for_device",
        f"{_REFORGE_VAE}:pytorch_attention",
        "ldm_patched.modules.clip_model:optimized_attention_for_device",
        "modules.models.sd3.mmdit:optimized_attention",
    ),
    keeper=f"{_REFORGE_VAE}:AttnBlock",
    by="its own sub-quadratic attention, and in the VAE attention of its own",
)

ERSATZ = Family(
    {
        "backend.attention": PRECISION_OF_ONE
        + implementations(("attention_xformers", "attention_pytorch"), _FORGE_HEADS)
        + implementations(("attention_sage", "attention_flash"), _REFORGE_HEADS)
        + implementations(SPATIAL_NAMES, SPATIAL)
        + """
attention_function = attention_sage
attention_function_single_head_spatial = normal_attention_single_head_spatial
""",
        "backend.nn.unet": imports("attention_function", "backend.attention"),
        "backend.nn.wan": imports("attention_function", "backend.attention", "optimized_attention"),
        "backend.nn.vae_wan": imports("attention_function_single_head_spatial", "backend.attention")
        + keeper("AttentionBlock", "attention_function_single_head_spatial"),
        "backend.nn.llm.llama": imports("attention_pytorch", "backend.attention", "attention_function"),
        "backend.nn.llm.qwen_vl": imports("attention_sage", "backend.attention", "attention_function"),
        "PuLID": imports("attention_function", "backend.attention"),
    },
    {"backend.nn.chroma": imports("attention_function", "backend.attention")},
    (
        "backend.attention:attention_function",
        "backend.attention:attention_function_single_head_spatial",
        "backend.nn.unet:attention_function",
        "backend.nn.wan:optimized_attention",
        "backend.nn.vae_wan:attention_function_single_head_spatial",
        "PuLID:attention_function",
    ),
    ("backend.nn.chroma:attention_function",),
    (
        "backend.attention:attention_sage",
        "backend.attention:attention_pytorch",
        "backend.nn.llm.llama:attention_function",
        "backend.nn.llm.qwen_vl:attention_function",
    ),
    keeper="backend.nn.vae_wan:AttentionBlock",
    spatial="backend.nn.vae_wan:attention_function_single_head_spatial",
    by="SageAttention, and in the VAE split attention",
)

_NEO_HEADS = _REFORGE_HEADS.replace(")", ", **kwargs)")
_NEO_HOME = "comfy.ldm.modules.attention"
NEO = Family(
    {
        "backend.attention": PRECISION_OF_TWO
        + implementations(
            ("attention_basic", "attention_split", "attention_xformers", "attention_pytorch", "attention_flash"),
            _NEO_HEADS,
        )
        + implementations(SPATIAL_NAMES, SPATIAL)
        + """
attention_function = attention_flash
attention_function_single_head_spatial = pytorch_attention_single_head_spatial
""",
        _NEO_HOME: PRECISION_OF_TWO
        + WRAP_ATTN
        + implementations(("attention_basic", "attention_pytorch", "attention3_sage"), _NEO_HEADS, "@wrap_attn")
        + """
REGISTERED_ATTENTION_FUNCTIONS = {"pytorch": attention_pytorch}
optimized_attention = attention_pytorch
optimized_attention_masked = optimized_attention

def get_attention_function(name, default=...):
    return optimized_attention if name == "optimized" else REGISTERED_ATTENTION_FUNCTIONS[name]
""",
        "backend.nn.unet": imports("attention_function", "backend.attention"),
        "backend.nn.qwen": imports("attention_function", "backend.attention"),
        "backend.nn.wan_vae": imports("attention_function_single_head_spatial", "backend.attention", "vae_attention")
        + keeper("AttentionBlock", "vae_attention"),
        "backend.nn.llm.llama": imports("attention_pytorch", "backend.attention", "attention_function"),
        "comfy.ldm.flux.math": imports("optimized_attention", _NEO_HOME),
        "comfy.ldm.qwen_image.model": imports("optimized_attention_masked", _NEO_HOME),
        "comfy.text_encoders.qwen_vl": imports("attention_pytorch", _NEO_HOME, "optimized_attention"),
        "comfy.audio_encoders.whisper": imports("optimized_attention_masked", _NEO_HOME),
    },
    {
        "backend.nn.qwen_vae": imports("attention_function_single_head_spatial", "backend.attention", "vae_attention")
        + keeper("QwenBlock", "vae_attention"),
        "comfy.ldm.wan.model": imports("optimized_attention", _NEO_HOME),
    },
    (
        "backend.attention:attention_function",
        "backend.attention:attention_function_single_head_spatial",
        f"{_NEO_HOME}:optimized_attention",
        f"{_NEO_HOME}:optimized_attention_masked",
        "backend.nn.unet:attention_function",
        "backend.nn.qwen:attention_function",
        "backend.nn.wan_vae:vae_attention",
        "comfy.ldm.flux.math:optimized_attention",
        "comfy.ldm.qwen_image.model:optimized_attention_masked",
    ),
    ("backend.nn.qwen_vae:vae_attention", "comfy.ldm.wan.model:optimized_attention"),
    (
        "backend.attention:attention_flash",
        "backend.attention:attention_pytorch",
        f"{_NEO_HOME}:attention_pytorch",
        "backend.nn.llm.llama:attention_function",
        "comfy.text_encoders.qwen_vl:optimized_attention",
        "comfy.audio_encoders.whisper:optimized_attention_masked",
    ),
    keeper="backend.nn.wan_vae:AttentionBlock",
    spatial="backend.nn.wan_vae:vae_attention",
    by="FlashAttention or PyTorch's attention, and in the VAE PyTorch's attention",
)

FAMILIES = {
    "Forge dfdcbab6": FORGE,
    "reForge 3b56b268": REFORGE,
    "ersatzForge fca12a28": ERSATZ,
    "Forge Nunchaku e1d9103b": NEO,
}


class FunctionHost:
    """A web UI of a family, in `sys.modules` until `close()`; `calls` has the name and arguments of every call that its
    own functions computed."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.calls: list[tuple[str, dict]] = []
        self._added: list[str] = []
        for name, source in family.modules.items():
            self.add(name, source)

    def add(self, name: str, source: str) -> ModuleType:
        """Load a module, as `import` does: it is there under its name before its code runs."""
        module = ModuleType(name)
        module.host_computes = self._compute
        if "." in name and name.split(".")[0] != "modules":
            package = name.split(".")[0]
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                self._added.append(package)
            if name.count(".") == 1:
                setattr(sys.modules[package], name.split(".")[1], module)
        sys.modules[name] = module
        self._added.append(name)
        exec(compile(source, f"<{name}>", "exec"), vars(module))
        return module

    def load_late(self) -> None:
        for name, source in self.family.late.items():
            self.add(name, source)

    def held(self, place: str) -> object:
        name, _, attribute = place.partition(":")
        return vars(sys.modules[name])[attribute]

    def hold(self, place: str, value: object) -> None:
        name, _, attribute = place.partition(":")
        setattr(sys.modules[name], attribute, value)

    def everything(self) -> dict[str, object]:
        """What every name of its modules is bound to, and what every class holds."""
        found = {}
        for module in self._added:
            for name, value in vars(sys.modules[module]).items():
                found[f"{module}:{name}"] = value
                if isinstance(value, type):
                    found |= {
                        f"{module}:{name}.{own}": it for own, it in vars(value).items() if not own.startswith("_")
                    }
        return found

    def close(self) -> None:
        for name in self._added:
            sys.modules.pop(name, None)

    def _compute(self, name: str, given: dict) -> torch.Tensor:
        self.calls.append((name, dict(given)))
        query, key, value, *_ = given.values()
        if "heads" not in given:
            query, key, value = (it.flatten(2).transpose(1, 2) for it in (query, key, value))
            return _attend(query, key, value).transpose(1, 2).reshape(given["q"].shape)
        if not given.get("skip_reshape"):
            query, key, value = (it.unflatten(-1, (given["heads"], -1)).transpose(1, 2) for it in (query, key, value))
        if key.shape[1] != query.shape[1]:
            key, value = (it.repeat_interleave(query.shape[1] // key.shape[1], 1) for it in (key, value))
        mask = given.get("mask")
        while mask is not None and mask.dim() < 4:
            mask = mask[None] if mask.dim() == 2 else mask[:, None]
        output = _attend(query, key, value, mask)
        return output if given.get("skip_output_reshape") else output.transpose(1, 2).flatten(2)


def _attend(query, key, value, mask=None):
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


# --------------------------------------------------------------------------------------------- the web UI around them


def without_a_list(monkeypatch) -> None:
    """The demo's `modules`, without anything of a list of optimizations: it is not there, or commented out."""
    for name in ("sd_hijack", "sd_hijack_optimizations"):
        monkeypatch.setitem(sys.modules, f"modules.{name}", ModuleType(f"modules.{name}"))
    monkeypatch.delattr(importlib.import_module("modules.script_callbacks"), "on_list_optimizers")


def load_extension() -> None:
    """Run the extension's scripts, then collect its settings, as such a web UI does."""
    from modules import script_callbacks, scripts

    scripts.load_scripts()
    script_callbacks.before_ui_callback()
    script_callbacks.ui_settings_callback()


def reload_extension() -> None:
    """*Reload UI*."""
    from modules import script_callbacks

    script_callbacks.script_unloaded_callback()
    load_extension()
