"""AUTOMATIC1111's web UI and those that have its list of optimizations: ours is an entry of it.

Settings -> Optimizations -> Cross attention optimization.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from modules import sd_hijack, sd_hijack_optimizations, sd_models, shared
from modules.sd_hijack import list_optimizers  # noqa: F401 - where it is absent, this is no such web UI
from modules.sd_hijack_optimizations import SdOptimization
from torch import Tensor, nn

from ...checkpoint import PROMPT_TOKENS, Checkpoint
from ...layers import ldm, projections
from ...layers.heads import heads_attention
from .. import status
from ..status import Reach, Standing
from . import pins
from .base import Host, Loaded, readable
from .hooks import Hook
from .vae import Vae


def cross_attention_forward(layer, x, context=None, mask=None, *args, **kwargs):
    def split_context(context):  # given the layer, it would register the hypernetwork as a part of the model
        from modules.hypernetworks import hypernetwork

        return hypernetwork.apply_hypernetworks(shared.loaded_hypernetworks, context)

    return ldm.cross_attention(
        layer,
        x,
        context,
        mask,
        *args,
        settings=HOST.settings(),
        split_context=split_context if shared.loaded_hypernetworks else None,
        report=functools.partial(status.record, place=layer),
        **kwargs,
    )


def attn_block_forward(layer, x, *args, **kwargs):
    settings = HOST.settings()
    if settings.vae and ENTRY.active:
        return ldm.attn_block(layer, x, settings=settings, report=status.record, **kwargs)
    return ENTRY.hook_of(type(layer)).step_aside(layer, x, *args, **kwargs)


def sub_quadratic_attention(query, key, value, *args, **kwargs):
    """What extensions call that have a forward for the built-in *sub-quadratic*: Tiled VAE, for one.

    The sizes they give are the web UI's defaults; the user's own settings hold here as everywhere.
    """
    if ENTRY.active:
        return projections.attend(query, key, value, None, None, HOST.settings(), status.record)
    return ENTRY.functions[sub_quadratic_attention].step_aside(query, key, value, *args, **kwargs)


def joint_attention(q, k, v, heads, mask=None):
    """SD 3's, between the tokens of prompt and image in one sequence; by the names of the web UI's own function.

    Its text encoders hold that function under another name, which stays theirs: attention of other models' text
    encoders is none of ours either.
    """
    hook = ENTRY.functions[joint_attention]
    if ENTRY.active:
        try:
            report = functools.partial(status.record, place=hook)
            return heads_attention(q, k, v, heads, _as_broadcast(mask), settings=HOST.settings(), report=report)
        except ValueError as error:
            status.pass_on(str(error))
    return hook.step_aside(q, k, v, heads, mask)


def _as_broadcast(mask: object) -> object:
    """A mask of three dimensions as PyTorch reads it, by heads."""
    return mask[None] if isinstance(mask, Tensor) and mask.dim() == 3 else mask


SD3 = "modules.models.sd3."  # loaded with the first such model
NOT_RUN = ("Stable Diffusion 3.5", "Flux", "Chroma")  # families of which it has no classes
JOINT_BLOCK = "JointBlock"  # the class of the layers that call its attention, each once
# (module, class, our forward) and (module, function, ours).
LAYERS = (
    ("ldm.modules.attention", "CrossAttention", cross_attention_forward),
    ("sgm.modules.attention", "CrossAttention", cross_attention_forward),  # SDXL
    ("ldm.modules.diffusionmodules.model", "AttnBlock", attn_block_forward),
    ("sgm.modules.diffusionmodules.model", "AttnBlock", attn_block_forward),
    (f"{SD3}sd3_impls", "AttnBlock", attn_block_forward),
)
FUNCTIONS = (
    ("modules.sub_quadratic_attention", "efficient_dot_product_attention", sub_quadratic_attention),
    (f"{SD3}mmdit", "attention", joint_attention),
)


class Name(str):
    """A name to whoever compares it; wherever it is shown, as in "Applying attention optimization: ...", with ours."""

    def __str__(self) -> str:
        return f"{super().__str__()} (subquad)"

    def __repr__(self) -> str:
        return repr(str(self))


class Subquad(SdOptimization):
    """What the web UI lists, applies and undoes."""

    # Extensions that bring attention of their own choose by this name, and know only those of the built-in ones: Tiled
    # VAE, StableSR, FABRIC, AnimateDiff, EasyPhoto. To them we are what we replace.
    name = Name("sub-quadratic")
    cmd_opt = "opt_sub_quad_attention"

    def __init__(self) -> None:
        self._layers: dict[type, Hook] = {}
        self.functions: dict[Callable, Hook] = {}  # by ours
        self._find()

    def title(self) -> str:
        """What the web UI lists and saves: it never changes, or users silently get another optimization."""
        return "subquad - fast attention within a memory limit"

    @property
    def priority(self) -> int:
        """Just above the built-in *sub-quadratic*, so that "Automatic" takes this wherever it would have taken that."""
        try:
            return sd_hijack_optimizations.SdOptimizationSubQuad().priority + 1
        except Exception:  # the web UI does not start if this raises; a host may have no such built-in
            return 11

    def is_available(self) -> bool:
        return True

    def apply(self) -> None:
        self._find()
        self.take_back_pins()
        for hook in self._hooks:
            hook.apply()
        HOST.vae.apply()

    def catch_up(self) -> None:
        """While in force: what was loaded since comes to us as well, and what an extension left pinned."""
        for hook in self._find():
            hook.apply()
        HOST.vae.catch_up()
        self.take_back_pins()

    def undo(self) -> None:
        for hook in self._hooks:
            hook.undo()
        HOST.vae.undo()

    @property
    def active(self) -> bool:
        """Whether the web UI has it in force. Without a word to us it may put back all forwards but those of SD 3."""
        return any(hook.in_force for owner, hook in self._layers.items() if not owner.__module__.startswith(SD3))

    def hook_of(self, owner: type) -> Hook:
        """The hook of `owner`, or of its ancestor."""
        return next(self._layers[base] for base in owner.__mro__ if base in self._layers)

    def take_back_pins(self) -> None:
        """Layers that an extension left pinned to some optimization follow the one in force again."""
        pins.take_back((*self._layers, *HOST.vae.classes))

    def out_of_reach(self, served: set[int]) -> tuple[int, dict[str, int]]:
        """How many layers of the loaded U-Net or transformer attend, and whose are those not among `served`."""
        hooks = {owner: hook for owner, hook in self._layers.items() if hook.function is cross_attention_forward}
        joint = self.functions.get(joint_attention)
        if joint is not None and hasattr(joint.owner, JOINT_BLOCK):
            hooks[getattr(joint.owner, JOINT_BLOCK)] = joint
        return pins.out_of_reach(hooks, served)

    def _find(self) -> list[Hook]:
        """The classes of layers as they are now, for an extension may have put its own in the place of one, and the
        functions; as far as the web UI has loaded them. What is new among them is returned."""
        new = []
        for module, name, forward in LAYERS:
            owner = getattr(sys.modules.get(module), name, None)
            if owner is not None and owner not in self._layers:
                self._layers[owner] = Hook(owner, "forward", forward)
                new.append(self._layers[owner])
        for module, name, function in FUNCTIONS:
            owner = sys.modules.get(module)
            if hasattr(owner, name) and function not in self.functions:
                self.functions[function] = Hook(owner, name, function)
                new.append(self.functions[function])
        return new

    @property
    def _hooks(self) -> list[Hook]:
        return [*self._layers.values(), *self.functions.values()]


class A1111(Host):
    """A web UI with a list of optimizations, of which the user selects one."""

    t5_tokens = PROMPT_TOKENS  # its SD 3 fills T5's tokens up to as many as CLIP's

    def __init__(self) -> None:
        self.vae = Vae(self, lambda: ENTRY.active)

    @property
    def active(self) -> bool:
        return ENTRY.active

    def does_not_run(self, checkpoint: Checkpoint) -> bool:
        """It knows one transformer, SD 3 medium's: of SD 3.5 it leaves weights out, and the image is noise."""
        image_alone = any((layer.part, layer.kind) == ("transformer", "self") for layer in checkpoint.layers)
        return image_alone or checkpoint.family.startswith(NOT_RUN)

    def callbacks(self) -> dict[str, Callable]:
        return {"on_list_optimizers": list_entry}

    def prepare(self) -> None:
        if ENTRY.active:
            ENTRY.catch_up()

    def undo(self) -> None:
        """The web UI applies its setting anew when it has loaded its scripts again."""
        ENTRY.undo()
        if sd_hijack.current_optimizer is ENTRY:
            sd_hijack.current_optimizer = None

    def standing(self) -> Standing:
        if ENTRY.active:
            return Standing("subquad is active")
        if sd_hijack.current_optimizer is ENTRY:
            return Standing(
                "subquad is selected, but not active",
                "the web UI has switched it off for now, as it does while it trains or has no model loaded.",
            )
        current = sd_hijack.current_optimizer
        name = current.title() if current is not None else "None"
        # Without a model it takes no selection: it puts the setting back.
        select = "Select" if _model() is not None else "Load a checkpoint, then select"
        return Standing(
            "subquad is not active",
            f"the web UI uses {name}.",
            f"{select} \u201c{ENTRY.title()}\u201d in Settings, Optimizations, Cross attention optimization.",
        )

    def reach(self, served: set[int]) -> Reach:
        places, owners = ENTRY.out_of_reach(served)
        return Reach(places, "layers", owners)

    def loaded(self) -> Loaded:
        model = _model()
        if model is None:
            raise self.nothing_loaded()
        filename = readable(getattr(getattr(model, "sd_checkpoint_info", None), "filename", ""))
        return Loaded(filename, lambda: {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _model() -> nn.Module | None:
    return sd_models.model_data.sd_model  # shared.sd_model would load one


ENTRY = Subquad()
HOST = A1111()


def find() -> A1111:
    return HOST


def list_entry(optimizers: list) -> None:
    optimizers.append(ENTRY)
