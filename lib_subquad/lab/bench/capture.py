"""Queries, keys and values out of a real model: its U-Net runs once, and its attention layers are listened to.

The U-Net is `ldm`'s own, built from the shapes in the checkpoint. There is no text encoder: the latent is noise, half
way through the sampling steps, and the prompt is random tokens of the spread that an encoder's have about their mean.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import Checkpoint, read_attention_layers
from ...console import UserError
from ..process import Failed, ask, serve
from .shapes import Shape

PREFIX = "model.diffusion_model."
TIMESTEP = 500
TOKEN_SPREAD = 0.3


def capture(checkpoint: str, size: tuple[int, int], folder: Path) -> dict[Shape, str]:
    """The distinct shapes of a U-Net's attention for an image of (width, height) pixels, the costliest first, each with
    a file in `folder` that holds [query, key, value] of the layer whose scores may be the largest.

    Raises:
        UserError: the checkpoint cannot be used, or what is needed for it is not installed.
    """
    question = {"checkpoint": str(Path(checkpoint).resolve()), "size": size, "folder": str(folder)}
    try:
        answer = ask(__name__, question)  # its own process: the model's memory is given back
    except Failed as error:
        raise UserError(f"--capture: {error}") from error
    if "error" in answer:
        raise UserError(f"--capture: {answer['error']}")
    return {Shape(*found["shape"]): found["file"] for found in answer["captured"]}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        captured = _captured(question["checkpoint"], question["size"])
    except UserError as error:
        return {"error": str(error)}
    answer = []
    for number, (shape, tensors) in enumerate(captured):
        file = str(Path(question["folder"]) / f"{number}.pt")
        torch.save(tensors, file)
        sizes = [shape.name, shape.batch, shape.heads, shape.queries, shape.keys, shape.width]
        answer.append({"shape": sizes, "file": file})
    return {"captured": answer}


def _captured(path: str, size: tuple[int, int]) -> list[tuple[Shape, list[Tensor]]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError("needs safetensors: pip install safetensors") from error
    found = read_attention_layers(path)
    if not found.layers:
        raise UserError(" ".join(found.notes))
    with safe_open(path, framework="pt") as file:
        shapes = {
            name.removeprefix(PREFIX): tuple(file.get_slice(name).get_shape())
            for name in file.keys()
            if name.startswith(PREFIX)
        }
        unet = build_unet(shapes, found)
        state = {name: file.get_tensor(PREFIX + name).float() for name in unet.state_dict() if name in shapes}
    missing = unet.state_dict().keys() - state.keys()
    if missing:
        raise UserError(f"this U-Net cannot be built: the checkpoint has no {min(missing)}")
    unet.load_state_dict(state)
    del state
    return listen(unet, _inputs(unet, shapes, found, size), _name_of(path, size))


def _name_of(path: str, size: tuple[int, int]) -> str:
    width, height = size
    return f"{Path(path).stem} " + (f"{width}²" if width == height else f"{width}×{height}")


def build_unet(shapes: Mapping[str, tuple[int, ...]], found: Checkpoint) -> nn.Module:
    """ldm's U-Net of these shapes, with the heads that the checkpoint's reader found.

    Raises:
        UserError: ldm is not installed or has no such U-Net.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from ldm.modules.diffusionmodules.openaimodel import UNetModel
    except ImportError as error:
        raise UserError(f"needs ldm: pip install stable-diffusion-sdkit --no-deps, and einops ({error})") from error
    layers = [layer for layer in found.layers if layer.part == "unet"]
    if not layers or "input_blocks.0.0.weight" not in shapes:
        raise UserError("the checkpoint has no U-Net with attention that is known here")
    if any(name.startswith("label_emb.") for name in shapes):
        raise UserError("this U-Net (SDXL, say) is not ldm's; only those of SD 1 and SD 2 can be built")
    arguments = unet_architecture(shapes)
    widths = {layer.head_width for layer in layers}
    if len(widths) == 1 and len({layer.heads for layer in layers}) > 1:
        arguments["num_head_channels"] = widths.pop()
    else:
        arguments["num_heads"] = layers[0].heads
    try:
        return UNetModel(**arguments).eval().requires_grad_(False)
    except Exception as error:
        raise UserError(f"this U-Net cannot be built: {type(error).__name__}: {error}") from error


def unet_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """What `UNetModel` is built with, but for the heads."""
    channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    multipliers, blocks, attention, downsampling = [], [0], [], 1
    for number in range(1, 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))):
        block = f"input_blocks.{number}."
        if block + "0.op.weight" in shapes:  # half the resolution from here on
            downsampling *= 2
            blocks.append(0)
            continue
        if blocks[-1] == 0:
            multipliers.append(shapes[block + "0.out_layers.3.weight"][0] // channels)
            if block + "1.norm.weight" in shapes:
                attention.append(downsampling)
        blocks[-1] += 1
    transformers = [re.fullmatch(r"middle_block\.1\.transformer_blocks\.(\d+)\.norm1\.weight", name) for name in shapes]
    return {
        "image_size": 32,
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": channels,
        "channel_mult": tuple(multipliers),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(attention),
        "use_spatial_transformer": True,
        "transformer_depth": sum(match is not None for match in transformers),
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_in_transformer": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        "legacy": False,
    }


def _inputs(
    unet: nn.Module, shapes: Mapping[str, tuple[int, ...]], found: Checkpoint, size: tuple[int, int]
) -> tuple[Tensor, ...]:
    cross, tokens, width = next(
        (layer, layer.context_tokens, layer.context_width)
        for layer in found.layers
        if layer.part == "unet" and layer.context_tokens is not None and layer.context_width is not None
    )
    generator = torch.Generator().manual_seed(0)
    batch = cross.guidance_copies
    in_channels = shapes["input_blocks.0.0.weight"][1]
    columns, lines = (side // cross.latent_factor for side in size)
    latent = torch.randn(1, in_channels, lines, columns, generator=generator).expand(batch, -1, -1, -1)
    context = torch.randn(batch, tokens, width, generator=generator) * TOKEN_SPREAD
    return latent, torch.full((batch,), TIMESTEP), context


def listen(unet: nn.Module, inputs: tuple[Tensor, ...], name: str) -> list[tuple[Shape, list[Tensor]]]:
    """Run the U-Net; [query, key, value] of one layer of each distinct shape, the costliest first."""
    kept: dict[Shape, tuple[float, list[Tensor]]] = {}

    def heard(layer: Any, projected: dict[str, Tensor]) -> None:
        tensors = [
            projected[which].unflatten(-1, (layer.heads, -1)).transpose(1, 2).contiguous()
            for which in ("to_q", "to_k", "to_v")
        ]
        query, key, _ = tensors
        words = name if query.shape[2] == key.shape[2] else f"{name} cross"
        batch, heads, queries, width = query.shape
        shape = Shape(words, batch, heads, queries, key.shape[2], width)
        # No score is larger than this; layers with large ones are the hard cases.
        bound = (query.norm(dim=-1).max() * key.norm(dim=-1).max()).item()
        if shape not in kept or bound > kept[shape][0]:
            kept[shape] = bound, tensors

    hooks = [
        hook
        for module in unet.modules()
        if all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "heads"))
        for hook in _hooks(module, heard)
    ]
    with torch.no_grad():
        latent, timesteps, context = inputs
        unet(latent, timesteps, context=context)
    for hook in hooks:
        hook.remove()
    found = [(shape, tensors) for shape, (_, tensors) in kept.items()]
    return sorted(found, key=lambda pair: pair[0].scores, reverse=True)


def _hooks(layer: nn.Module, heard: Callable[[nn.Module, dict[str, Tensor]], None]) -> list[Any]:
    projected: dict[str, Tensor] = {}

    def take(which: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, given: object, output: Tensor) -> None:
            projected[which] = output

        return hook

    def finish(module: nn.Module, given: object, output: Tensor) -> None:
        heard(module, projected)
        projected.clear()

    hooks = [getattr(layer, which).register_forward_hook(take(which)) for which in ("to_q", "to_k", "to_v")]
    return [*hooks, layer.register_forward_hook(finish)]


if __name__ == "__main__":
    serve(_answer)
