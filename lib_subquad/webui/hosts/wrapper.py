"""What we put in the place of a web UI's attention function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

import torch

from ...layers.heads import heads_attention, spatial_attention
from .. import options, status
from .base import UNET, VAE
from .places import Original

# Keywords of newer web UIs that say nothing about exact attention; unless the options bring attention of their own.
MEANINGLESS = ("low_precision_attention", "transformer_options")
OVERRIDE = "optimized_attention_override"


class Wrapper:
    """Attention that is ours while `serves(part)`, and else the original's, as is every call that we do not understand.

    It compares equal to the original: a web UI that estimates memory by the attention in use sees no stranger.
    """

    def __init__(self, original: Original, serves: Callable[[str], bool]) -> None:
        functools.update_wrapper(self, original.function)
        self.original = original
        self._serves = serves
        self._parameters = inspect.signature(original.function).parameters

    def __call__(self, *args, **kwargs):
        if self._serves(UNET if self.original.heads else VAE):
            try:
                return self._compute(*self._given(args, kwargs))
            except ValueError as error:
                status.pass_on(str(error))
        return self.original.function(*args, **kwargs)

    def __get__(self, instance, owner=None):
        """As a function has it that a class holds."""
        return self if instance is None else MethodType(self, instance)

    def __copy__(self) -> Wrapper:
        """Itself, as functions: a web UI copies the options of a model, in which a guest may keep what it calls."""
        return self

    def __deepcopy__(self, memo: dict) -> Wrapper:
        return self

    def __eq__(self, other: object) -> bool:
        return self.original.function is (other.original.function if isinstance(other, Wrapper) else other)

    def __hash__(self) -> int:
        return hash(self.original.function)

    def __repr__(self) -> str:
        return f"<subquad in place of {self.original.function.__qualname__}>"

    def _given(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """(query, key, value and heads, the rest by name), by the original's own signature.

        Raises:
            ValueError: arguments that are not known here.
        """
        given = {**dict(zip(self._parameters, args)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            raise ValueError("arguments that its own signature does not have")
        required = list(self._parameters)[: 4 if self.original.heads else 3]
        if missing := [name for name in required if name not in given]:
            raise ValueError(f"no argument {missing[0]}")
        return tuple(given.pop(name) for name in required), given

    def _compute(self, tensors: tuple, rest: dict) -> torch.Tensor:
        """Our result for this call.

        Raises:
            ValueError: what we do not compute; the message names it.
        """
        mask, precision = rest.pop("mask", None), rest.pop("attn_precision", None)
        shapes = {name: bool(rest.pop(name, False)) for name in ("skip_reshape", "skip_output_reshape")}
        for name, value in rest.items():
            if self._means_something(name, value):
                raise ValueError(f"the argument {name}")
        how = {
            "settings": options.current(self.original.upcasts(precision, getattr(tensors[0], "dtype", None))),
            "report": functools.partial(status.record, place=self),
        }
        if not self.original.heads:
            return spatial_attention(*tensors, **how)
        return heads_attention(*tensors, mask, **shapes, **how)

    def _means_something(self, name: str, value: object) -> bool:
        known = self._parameters.get(name)
        if value is None or known is not None and value is known.default:
            return False
        return name not in MEANINGLESS or isinstance(value, dict) and OVERRIDE in value
