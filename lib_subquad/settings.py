"""What a user can set: names, defaults, ranges and help, once, for the UI, the API and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .console import UserError

CHUNK_MAX = 16384


@dataclass(frozen=True)
class Option:
    """How one field of `Settings` is presented and what values it takes.

    `choices` is set for fields that name one of several words; `minimum` and `maximum` for whole numbers; neither for
    a switch.
    """

    default: Any
    label: str
    help: str
    choices: tuple[str, ...] = ()
    minimum: int = 0
    maximum: int = 0
    step: int = 1

    @property
    def expected(self) -> str:
        """The values this option takes, in words."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        return f"a whole number from {self.minimum} to {self.maximum}"

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        return isinstance(value, int) and not isinstance(value, bool) and self.minimum <= value <= self.maximum

    def nearest(self, value: Any) -> Any:
        """The acceptable value closest to `value`, whatever its type; the default where nothing is close."""
        try:
            if self.accepts(value):
                return value
            if self.choices:
                wanted = str(value).strip().casefold()
                return next((choice for choice in self.choices if choice.casefold() == wanted), self.default)
            if isinstance(self.default, bool):
                return _as_bool(value, self.default)
            return _as_int(value, self)
        except Exception:  # a value whose own str() or float() fails is as broken as any other
            return self.default

    def put_right(self, name: str, value: Any) -> tuple[Any, list[str]]:
        """`nearest(value)`, and a sentence if that is not what was given for `name`."""
        legal = self.nearest(value)
        if _same(value, legal):
            return legal, []
        return legal, [f"{name} is {shown(value)}, expected {self.expected}; using {legal!r}"]


def _as_bool(value: Any, default: bool) -> bool:
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    words = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
    return words.get(str(value).strip().casefold(), default)


def _as_int(value: Any, option: Option) -> int:
    if isinstance(value, bool):
        return option.default
    if not isinstance(value, int):
        number = float(value)
        if math.isnan(number):
            return option.default
        value = round(min(max(number, option.minimum), option.maximum))
    return min(max(value, option.minimum), option.maximum)


OPTIONS: dict[str, Option] = {
    "query_chunk": Option(
        0,
        "Query chunk size",
        "How many image tokens ask at a time. Smaller needs less memory and takes longer; "
        "0 picks the fastest size that fits the memory limit.",
        maximum=CHUNK_MAX,
        step=64,
    ),
    "kv_chunk": Option(
        0,
        "Key/value chunk size",
        "How many tokens are looked at in one go. Smaller needs less memory and takes longer; a size below the number "
        "of tokens rules out PyTorch's fused kernel. 0 picks the fastest size that fits the memory limit.",
        maximum=CHUNK_MAX,
        step=64,
    ),
    "memory_limit": Option(
        70,
        "Memory limit, % of free memory",
        "The share of the device's free memory that one attention call may use as working space. Lower it when other "
        "programs need the card; chunks shrink to fit, and images take longer.",
        minimum=1,
        maximum=100,
    ),
    "engine": Option(
        "automatic",
        "Engine",
        "automatic takes the first exact one that can: PyTorch's fused kernel, if need be for heads padded with zeros, "
        "cuDNN's, those of xformers and flash-attn where they are installed, and portable, which runs everywhere and "
        "never needs more memory than its chunks. Another one comes first where it was measured to be faster. sage "
        "(SageAttention, if installed) is inexact: images change, so it is taken only if you set it.",
        choices=("automatic",),  # and the engines, which register themselves
    ),
    "checkpointing": Option(
        "automatic",
        "Checkpointing while training",
        "Recompute scores in the backward pass: far less memory for a little more time. 'automatic' does so "
        "whenever gradients are needed; 'never' keeps them where they fit the memory limit. Images are not affected.",
        choices=("automatic", "always", "never"),
    ),
    "upcast": Option(
        "web UI",
        "Upcast to float32",
        "Queries and keys in float32: the cure for black images from half-precision models, at up to twice the time. "
        "'web UI' follows its own rule, such as the setting 'Upcast cross attention layer to float32'.",
        choices=("web UI", "always", "never"),
    ),
    "vae": Option(
        True,
        "Use it in the VAE too",
        "Also take over the VAE's attention, whose one wide head needs the most memory of all attention.",
    ),
    "vae_bands": Option(
        "when needed",
        "VAE in bands",
        "Decode and encode in bands of rows: exact, in less than half the memory, for a few percent more time. "
        "'when needed': only images that do not fit in one piece; if a card is too small even for bands, the "
        "processor decodes.",
        choices=("when needed", "always", "never"),
    ),
    "measure": Option(
        True,
        "Measure engines on this device",
        "Before the first image of a new size the exact engines are timed for a few seconds, and 'automatic' takes the "
        "fastest from then on. Off: it follows fixed rules, and nothing is measured.",
    ),
    "retry": Option(
        True,
        "Retry when out of memory",
        "When the device runs out of memory, go on with smaller chunks or bands instead of losing the image; where "
        "nothing fits, keep what was sampled, to be decoded later. A retried image can differ in its last bits.",
    ),
}


def offer_engines(names: Sequence[str]) -> None:
    """These are the engines that `Settings.engine` may name from now on, beside *automatic*."""
    OPTIONS["engine"] = dataclasses.replace(OPTIONS["engine"], choices=("automatic", *names))


@dataclass(frozen=True)
class Settings:
    """What a user can set; every field is described by `OPTIONS[name]`.

    Raises:
        UserError: a value outside its option's range; the message names the field, the value and what was expected.

    Example:
        >>> from lib_subquad import Settings
        >>> Settings(memory_limit=30).query_chunk  # 0 = automatic
        0
        >>> Settings(memory_limit=0)
        Traceback (most recent call last):
            ...
        lib_subquad.console.UserError: memory_limit is 0; expected a whole number from 1 to 100
    """

    query_chunk: int = OPTIONS["query_chunk"].default
    kv_chunk: int = OPTIONS["kv_chunk"].default
    memory_limit: int = OPTIONS["memory_limit"].default
    engine: str = OPTIONS["engine"].default
    checkpointing: str = OPTIONS["checkpointing"].default
    upcast: str = OPTIONS["upcast"].default
    vae: bool = OPTIONS["vae"].default
    vae_bands: str = OPTIONS["vae_bands"].default
    measure: bool = OPTIONS["measure"].default
    retry: bool = OPTIONS["retry"].default

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not OPTIONS[field.name].accepts(value):
                raise UserError(f"{field.name} is {shown(value)}; expected {OPTIONS[field.name].expected}")

    @classmethod
    def nearest(cls, values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
        """Settings from values that may be broken, and a sentence for each one that had to be changed.

        Fields that `values` lacks keep their default; names that are not fields are ignored. Never raises.
        """
        legal, changed = {}, []
        for name, option in OPTIONS.items():
            if name not in values:
                continue
            legal[name], told = option.put_right(name, values[name])
            changed += told
        return cls(**legal), changed


def check_settings(settings: Any) -> None:
    """Say it in words where something else was given for settings.

    Raises:
        ValueError: they are no `Settings`.
    """
    if not isinstance(settings, Settings):
        how = "; Settings(**settings) makes one of a dictionary" if isinstance(settings, Mapping) else ""
        raise ValueError(f"settings is {shown(settings)}; expected a Settings such as Settings(query_chunk=512){how}")


def _same(value: Any, legal: Any) -> bool:
    """Whether nothing was changed but a number's type: gradio and JSON give 512.0 for 512."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not isinstance(legal, str)
    try:
        return (number or type(value) is type(legal)) and bool(value == legal)
    except Exception:  # a value that cannot even be compared
        return False


def shown(value: Any, longest: int = 60) -> str:
    """`repr(value)`, cut to `longest` characters, whatever the value."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."
