"""Checkpoints as they are in files, made without a model."""

from __future__ import annotations

import gzip
import json
import struct
from collections import Counter
from pathlib import Path

from lib_subquad.checkpoint import Checkpoint

DATA = Path(__file__).parents[1] / "data"
UNET = "model.diffusion_model."
VAE = "first_stage_model."
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I64": 8}


def real_header(name: str) -> dict[str, list]:
    """name -> [dtype, shape] of a real checkpoint's U-Net and VAE."""
    return json.loads(gzip.decompress((DATA / f"header_{name}.json.gz").read_bytes()))


def real_shapes(name: str) -> dict[str, list[int]]:
    return {key: shape for key, (_, shape) in real_header(name).items()}


def unet(
    prefix=UNET,
    channels=320,
    mult=(1, 2, 4, 4),
    depths=(1, 1, 1, 0),
    middle=1,
    up_depths=None,
    context=768,
    inputs=4,
    linear=False,
    blocks=2,
):
    """What matters of a U-Net, as UNetModel lays it out: stem, resampling, and attention.

    `depths` are the transformer depths of each level on the way down; `up_depths` those of each block on the way up in
    the order they run (default: as on the way down, in one block more a level).
    """
    shapes = {f"{prefix}input_blocks.0.0.weight": [channels, inputs, 3, 3]}

    def transformer(path, width, depth):
        if depth:
            shapes[f"{prefix}{path}.proj_in.weight"] = [width, width] + ([] if linear else [1, 1])
        for i in range(depth):
            for which, keys in (("attn1", width), ("attn2", context)):
                name = f"{prefix}{path}.transformer_blocks.{i}.{which}"
                shapes[f"{name}.to_q.weight"] = [width, width]
                shapes[f"{name}.to_k.weight"] = shapes[f"{name}.to_v.weight"] = [width, keys]

    up = iter(up_depths or [depth for depth in reversed(depths) for _ in range(blocks + 1)])
    index = 1
    for level, factor in enumerate(mult):
        width = channels * factor
        for _ in range(blocks):
            transformer(f"input_blocks.{index}.1", width, depths[level])
            index += 1
        if level + 1 < len(mult):
            shapes[f"{prefix}input_blocks.{index}.0.op.weight"] = [width, width, 3, 3]
            index += 1
    transformer("middle_block.1", channels * mult[-1], middle)
    index = 0
    for level, factor in reversed(list(enumerate(mult))):
        width = channels * factor
        for last in [False] * blocks + [True]:
            depth = next(up)
            shapes[f"{prefix}output_blocks.{index}.0.out_layers.3.weight"] = [width, width, 3, 3]
            transformer(f"output_blocks.{index}.1", width, depth)
            if last and level:
                shapes[f"{prefix}output_blocks.{index}.{2 if depth else 1}.conv.weight"] = [width, width, 3, 3]
            index += 1
    return shapes


def vae(prefix=VAE, channels=512, halvings=3):
    shapes = {}
    for half in ("encoder", "decoder"):
        for part in ("q", "k", "v", "proj_out"):
            shapes[f"{prefix}{half}.mid.attn_1.{part}.weight"] = [channels, channels, 1, 1]
    for level in range(halvings):
        shapes[f"{prefix}encoder.down.{level}.downsample.conv.weight"] = [channels, channels, 3, 3]
        shapes[f"{prefix}decoder.up.{level + 1}.upsample.conv.weight"] = [channels, channels, 3, 3]
    return shapes


def mmdit(prefix=UNET, width=1536, blocks=24, twice=0):
    """What matters of SD 3's transformer; the first `twice` blocks look at the image alone as well."""
    shapes = {
        "x_embedder.proj.weight": [width, 16, 2, 2], "x_embedder.proj.bias": [width],
        "context_embedder.weight": [width, 4096], "final_layer.linear.bias": [64],
    }  # fmt: skip
    for number in range(blocks):
        for part in ["x_block.attn", "context_block.attn"] + ["x_block.attn2"] * (number < twice):
            shapes[f"joint_blocks.{number}.{part}.qkv.weight"] = [3 * width, width]
            shapes[f"joint_blocks.{number}.{part}.qkv.bias"] = [3 * width]
    return {prefix + name: shape for name, shape in shapes.items()}


def flux(prefix="", width=3072, head_width=128, blocks=(19, 38), more=("guidance_in.in_layer.bias",)):
    """What matters of Flux; without `more` it is schnell."""
    shapes = {"img_in.weight": [width, 64], "img_in.bias": [width], "txt_in.weight": [width, 4096]}
    shapes |= {"final_layer.linear.bias": [64]} | dict.fromkeys(more, [width])
    for number in range(blocks[0]):
        for part in ("img_attn", "txt_attn"):
            shapes[f"double_blocks.{number}.{part}.norm.query_norm.scale"] = [head_width]
            shapes[f"double_blocks.{number}.{part}.qkv.bias"] = [3 * width]
    for number in range(blocks[1]):
        shapes[f"single_blocks.{number}.linear1.bias"] = [7 * width]
    return {prefix + name: shape for name, shape in shapes.items()}


XL = {"mult": (1, 2, 4), "context": 2048, "linear": True}
SD1 = {}
SD2 = {"context": 1024, "linear": True}
SDXL = {"depths": (0, 2, 10), "middle": 10, **XL}
REFINER = {"channels": 384, "depths": (0, 4, 4, 0), "middle": 4, "context": 1280, "linear": True}
SSD = {"depths": (0, 2, 4), "middle": 0, "up_depths": [4, 4, 10, 2, 1, 1, 0, 0, 0], **XL}


def entries(shapes, dtype="F16"):
    """A header as JSON has it, tensors one after the other, and the bytes of data they need."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return header, place


def write(path: Path, header, data: int = 0, length: int | None = None) -> Path:
    """A .safetensors file with this header (bytes, or anything JSON can say) and so many bytes of (sparse) data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        file.truncate(8 + len(raw) + data)
    return path


def kinds(checkpoint: Checkpoint) -> Counter:
    return Counter((layer.part, layer.kind) for layer in checkpoint.layers)


def rows(checkpoint: Checkpoint, width: int, height: int, part: str = "unet") -> Counter:
    """(kind, heads, query tokens, key tokens, head width) -> how many layers."""
    found = Counter()
    for layer in checkpoint.layers:
        if layer.part == part:
            (_, heads, queries, channels), (_, _, keys, _), _ = layer.shapes(width, height)
            found[layer.kind, heads, queries, keys, channels] += 1
    return found


def tensor(shape=(2, 2), begin=0, end=8, dtype="F16"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def config(**params) -> str:
    return json.dumps({"model": {"params": {"unet_config": {"params": params}}}})  # JSON is YAML
