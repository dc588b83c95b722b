"""Ways to compute attention, measured side by side.

A peer is made for a problem by `make(problem)`, which gives a function of query, key and value [batch, heads, tokens,
width] that returns [batch, heads, queries, width], or raises `Unsupported` with the reason in words.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import device as devices
from ...attention import attention
from ...console import UserError
from ...engines import order
from ...plan import plan_problem, why_not
from ...problem import Problem, item_bytes
from ...settings import Settings

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """This peer cannot do this problem here; the message is the reason, for the user."""


class Peer(NamedTuple):
    """`settings` is set for the peers that are this library itself."""

    name: str
    make: Callable[[Problem], Attention]
    settings: Settings | None = None


def _ours(engine: str) -> Peer:
    # Retrying would measure another plan than the one that is shown.
    settings = Settings(engine=engine, retry=False)

    def make(problem: Problem) -> Attention:
        if engine in order.names() and plan_problem(problem, settings).engine != engine:
            reasons = why_not(order.named(engine), problem, settings)
            raise Unsupported("; ".join(reasons) or "does not fit the memory limit")
        return lambda query, key, value: attention(query, key, value, settings=settings)

    return Peer(engine, make, settings)


def _sdpa(problem: Problem) -> Attention:
    return F.scaled_dot_product_attention


def _sdpa_math(problem: Problem) -> Attention:
    scores = problem.batch * problem.heads * problem.queries * problem.keys
    _refuse_above_free_memory(problem, 2 * scores * item_bytes(devices.compute_dtype(problem.dtype)))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with _only_the_math_kernel():
            return F.scaled_dot_product_attention(query, key, value)

    return attend


def _only_the_math_kernel() -> contextlib.AbstractContextManager[Any]:
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch before 2.3
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


def _sdpa_with(kernel: str) -> Callable[[Problem], Attention]:
    """PyTorch's function with that one of its kernels, by its name in `torch.nn.attention.SDPBackend`."""

    def make(problem: Problem) -> Attention:
        try:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            only = getattr(SDPBackend, kernel)
        except (ImportError, AttributeError):
            raise Unsupported(f"torch {torch.__version__} does not let one choose it") from None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            try:
                with sdpa_kernel(only):
                    return F.scaled_dot_product_attention(query, key, value)
            except RuntimeError as error:
                if any(words in str(error) for words in NO_KERNEL):
                    raise Unsupported("PyTorch has no such kernel for this here") from None
                raise

        return attend

    return make


def _memory_efficient_attention(problem: Problem) -> Attention:
    attend = without_its_package("memory_efficient_attention", "attention_torch").efficient_dot_product_attention

    def attend_heads_last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(query, key, value).transpose(1, 2)

    return attend_heads_last


def without_its_package(package: str, module: str) -> types.ModuleType:
    """A module of a package whose own `__init__` is not run: this one's imports JAX, which torch users lack."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unsupported(f"not installed: pip install {package.replace('_', '-')}")
    if package not in sys.modules:
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec  # find_spec() asks for it the next time
        sys.modules[package] = bare
    return importlib.import_module(f"{package}.{module}")


def _diffusers_sliced(problem: Problem) -> Attention:
    """diffusers' own SlicedAttnProcessor with projections that hand on what they are given.

    Each head is a batch entry of one head, so that splitting heads costs no copy. Slices hold half the heads, as
    `enable_attention_slicing("auto")` makes them.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from diffusers.models.attention_processor import Attention as Layer
            from diffusers.models.attention_processor import SlicedAttnProcessor
    except ImportError as error:
        raise Unsupported(f"not installed: pip install diffusers ({error})") from error
    slice_size = max(problem.heads // 2, 1)
    scores = slice_size * problem.queries * problem.keys
    # Scores, the uninitialised tensor that baddbmm starts from, and the weights.
    _refuse_above_free_memory(problem, 3 * scores * item_bytes(problem.dtype))
    layer = Layer(problem.width, heads=1, dim_head=problem.width, processor=SlicedAttnProcessor(slice_size))
    layer.to_q, layer.to_k = torch.nn.Identity(), torch.nn.Identity()
    layer.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        leading = query.shape[:2]
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        layer.to_v = _Constant(value)
        output = layer(query, encoder_hidden_states=key)
        layer.to_v = torch.nn.Identity()
        return output.unflatten(0, leading)

    return attend


class _Constant(torch.nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, ignored: Tensor) -> Tensor:
        return self.value


def _from_file(path: str) -> Callable[[Problem], Attention]:
    """The `efficient_dot_product_attention` of a file, called as the web UI calls its own."""

    def make(problem: Problem) -> Attention:
        function = _load(path)
        parameters = inspect.signature(function).parameters
        more = {"use_checkpoint": problem.grad} if "use_checkpoint" in parameters else {}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            leading = query.shape[:2]
            query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
            return function(query, key, value, **more).unflatten(0, leading)

        return attend

    return make


def _load(path: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("subquad_bench_peer", path)
    if spec is None or spec.loader is None:
        raise Unsupported("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Unsupported(f"cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, "efficient_dot_product_attention", None)
    if not callable(function):
        raise Unsupported("has no function efficient_dot_product_attention")
    return function


def _refuse_above_free_memory(problem: Problem, wanted: int) -> None:
    """A peer known to hold so much at once is better refused than left to fill the machine."""
    free = devices.free_bytes(problem.device)
    if wanted > free:
        raise Unsupported(f"needs {wanted / devices.GIB:.1f} GiB; {free / devices.GIB:.1f} GiB are free")


REFERENCE = "sdpa"  # what the others' time is compared with
NO_KERNEL = ("No available kernel", "No viable backend")  # in PyTorch's words, on a card and on the CPU
# PyTorch's function with one of its kernels: measured where asked for, since it takes the best of them by itself.
KERNELS = {
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-cudnn": "CUDNN_ATTENTION",
}
PEERS = {
    peer.name: peer
    for peer in (
        Peer(REFERENCE, _sdpa),
        _ours("automatic"),
        *map(_ours, order.names()),
        Peer("sdpa-math", _sdpa_math),
        Peer("memory-efficient-attention", _memory_efficient_attention),
        Peer("diffusers-sliced", _diffusers_sliced),
        *(Peer(name, _sdpa_with(kernel)) for name, kernel in KERNELS.items()),
    )
}


def find(name: str) -> Peer:
    """The peer of this name; a path ending in .py is a file with an `efficient_dot_product_attention`.

    Raises:
        UserError: there is none; the message says what was expected.
    """
    if name in PEERS:
        return PEERS[name]
    if not name.endswith(".py"):
        raise UserError(f"peer {name!r}; expected one of {', '.join(PEERS)}, or a file that ends in .py")
    if not Path(name).is_file():
        raise UserError(f"peer {name!r}: there is no such file")
    return Peer(Path(name).stem, _from_file(name))
