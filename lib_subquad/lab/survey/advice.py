"""What would help attention on a device: every switch that is known to, where it would, with its source. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

# RDNA 3 and 4: which of them PyTorch runs its kernels on unasked differs from one version to the next (PyTorch PR
# #166397 took gfx1100 back). RDNA 2, gfx103x, has none.
ROCM_WITH_KERNELS = ("gfx11", "gfx12")
AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
OFF = ("", "0")

# Variables for those who look for faults -> what they cost.
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "with it every operator waits for the one before it",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "without its cache PyTorch asks the driver for every tensor",
}

HALF_IS_BROKEN = ("GTX 16",)  # NaN: PyTorch #58123
KINDS_WITH_HALF = ("cuda", "rocm", "mps", "xpu")


class Advice(NamedTuple):
    """Something to press, set or install, in a sentence; and where it is known from."""

    words: str
    source: str


@dataclass(frozen=True)
class Situation:
    """All that advice depends on.

    Attributes:
        kind: of device, as `device.kind` names it; `name` as its driver does; `architecture` as in a device report.
        torch: its version as numbers, such as (2, 13).
        unfused: how many of the `shapes` that were asked about no fused kernel computes.
        switched_off: PyTorch's kernels that are switched off.
        dtype: what the model computes in, such as "float32".
        variables: the environment's.
        packages: those that bring kernels, are installed and cannot be loaded -> the sentence that says why.
        settings: those of the user that keep a faster engine away, in words.
        threads, cores: how many PyTorch takes on a CPU, and how many there are.
    """

    kind: str
    name: str = ""
    architecture: str = ""
    torch: tuple[int, int] = (2, 13)
    shapes: int = 1
    unfused: int = 0
    switched_off: tuple[str, ...] = ()
    dtype: str = "float16"
    variables: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    threads: int = 1
    cores: int = 1


def advise(here: Situation) -> list[Advice]:
    """All that is known to help here, what helps most first; empty where there is nothing to gain."""
    return [advice for ask in _KNOWN if (advice := ask(here)) is not None]


def _is_on(here: Situation, variable: str) -> bool:
    return here.variables.get(variable, "").strip() not in OFF


def _aotriton(here: Situation) -> Advice | None:
    known = here.kind == "rocm" and here.architecture.startswith(ROCM_WITH_KERNELS)
    if not (known and here.unfused and here.torch >= (2, 5)) or _is_on(here, AOTRITON):
        return None
    words = (
        f"Set {AOTRITON}=1 before the program starts: PyTorch may have kernels for {here.architecture}, and runs them "
        "only then. Without it a step was seen to take 11.8 times as long, with 16 times the memory"
    )
    return Advice(words, "unsloth #8821, PyTorch PR #135869")


def _older_than_its_kernel(here: Situation) -> Advice | None:
    if not here.unfused:
        return None
    if here.torch < (2, 1):
        return Advice(
            "Update torch to 2.1 or newer: before that its attention function takes no scale, so that no fused kernel "
            "can be used",
            "PyTorch's documentation of scaled_dot_product_attention",
        )
    if here.kind == "mps" and here.torch < (2, 13):
        return Advice(
            "Update torch to 2.13 or newer: it brings a fused kernel for Apple Silicon, 1.5 to 4 times as fast as what "
            "there was",
            "PyTorch PR #181575",
        )
    if here.kind == "rocm" and here.architecture.startswith(ROCM_WITH_KERNELS) and here.torch < (2, 5):
        return Advice(
            "Update torch to 2.5 or newer: it is the first with fused kernels for cards such as this one",
            "PyTorch PR #135869",
        )
    return None


def _switched_off(here: Situation) -> Advice | None:
    if here.kind not in ("cuda", "rocm") or not here.switched_off or not here.unfused:
        return None
    calls = ", ".join(f"torch.backends.cuda.enable_{name}_sdp(True)" for name in here.switched_off)
    words = (
        f"PyTorch's fused kernels are switched off ({', '.join(here.switched_off)}): find what does it, or call {calls}"
    )
    return Advice(words, "PyTorch's documentation of torch.backends.cuda")


def _not_loadable(here: Situation) -> Advice | None:
    if not here.packages:
        return None
    return Advice(
        f"{'; '.join(here.packages.values())}. Install the one that was built for this torch",
        "what Python says when it is loaded",
    )


def _full_precision(here: Situation) -> Advice | None:
    broken = any(name in here.name for name in HALF_IS_BROKEN)
    if here.kind not in KINDS_WITH_HALF or here.dtype != "float32" or broken:
        return None
    return Advice(
        "The model computes in float32; half precision takes half the memory and usually less time. Leave out "
        "--no-half, --all-in-fp32 or --precision full, unless images are black without them",
        "the web UI's wiki, Command Line Arguments and Settings",
    )


def _settings(here: Situation) -> Advice | None:
    if not here.settings:
        return None
    return Advice(f"Your settings keep a faster engine away: {'; '.join(here.settings)}", "the plan of each shape")


def _slowing(variable: str, words: str, here: Situation) -> Advice | None:
    if here.kind not in ("cuda", "rocm") or not _is_on(here, variable):
        return None
    return Advice(f"Unset {variable}: {words}", "PyTorch's notes on CUDA semantics")


def _few_threads(here: Situation) -> Advice | None:
    named = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if _is_on(here, name)]
    # Unasked PyTorch takes one thread a core, which is half of the processors where each core counts as two.
    if here.kind != "cpu" or 2 * here.threads >= here.cores or not named:
        return None
    return Advice(
        f"PyTorch takes {here.threads} of {here.cores} processors, by {' and '.join(named)}: unset "
        f"{'them' if len(named) > 1 else 'it'}",
        "PyTorch's notes on CPU threading",
    )


_KNOWN: tuple[Callable[[Situation], Advice | None], ...] = (
    _aotriton,
    _older_than_its_kernel,
    _switched_off,
    _settings,
    _full_precision,
    _few_threads,
    _not_loadable,
    *(partial(_slowing, *of) for of in SLOWING.items()),
)
