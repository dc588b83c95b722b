"""SD 3 as the web UI 1.10 has it: its modules, names and who calls what; what they compute is written anew, and small.

`other_impls.attention` is called by text encoders under that name, and by the blocks of the transformer under a name of
their own module; the VAE has a class of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType

OTHER_IMPLS = """
import torch

def attention(q, k, v, heads, mask=None):
    q, k, v = (it.reshape(len(q), -1, heads, q.shape[-1] // heads).transpose(1, 2) for it in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

class CLIPAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.projections = heads, torch.nn.Linear(width, 3 * width)

    def forward(self, x, mask=None):
        return attention(*self.projections(x).chunk(3, -1), self.heads, mask)
"""
MMDIT = """
import torch
from modules.models.sd3.other_impls import attention

class JointBlock(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.of_text, self.of_image = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, 3 * width)

    def project(self, projection, tokens):
        q, k, v = projection(tokens).chunk(3, -1)
        return q, k, v.unflatten(-1, (self.heads, -1))  # the heads of values are apart already

    def forward(self, text, image):
        parts = zip(self.project(self.of_text, text), self.project(self.of_image, image))
        made = attention(*(torch.cat(part, 1) for part in parts), self.heads)
        return text + made[:, : text.shape[1]], image + made[:, text.shape[1] :]

class MMDiT(torch.nn.Module):
    def __init__(self, width=64, heads=4, blocks=3):
        super().__init__()
        self.joint_blocks = torch.nn.ModuleList(JointBlock(width, heads) for _ in range(blocks))

    def forward(self, text, image):
        for block in self.joint_blocks:
            text, image = block(text, image)
        return image
"""
SD3_IMPLS = """
import torch
from modules.models.sd3.mmdit import MMDiT

class AttnBlock(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = torch.nn.GroupNorm(8, channels)
        self.q, self.k, self.v, self.proj_out = (torch.nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (it(normed).flatten(2).transpose(1, 2)[:, None] for it in (self.q, self.k, self.v))
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(made[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))
"""
PACKAGE = "modules.models.sd3"
MODULES = {"other_impls": OTHER_IMPLS, "mmdit": MMDIT, "sd3_impls": SD3_IMPLS}


def load() -> None:
    """The modules, as the web UI loads them with the first model that is SD 3."""
    for name in ("modules.models", PACKAGE):
        sys.modules[name] = ModuleType(name)
    for name, source in MODULES.items():
        module = sys.modules[f"{PACKAGE}.{name}"] = ModuleType(f"{PACKAGE}.{name}")
        exec(compile(source, f"/web ui/modules/models/sd3/{name}.py", "exec"), vars(module))


def module(name: str) -> ModuleType:
    return sys.modules[f"{PACKAGE}.{name}"]


def held() -> dict[str, object]:
    """What stands at each name that attention goes through."""
    return {
        "other_impls.attention": module("other_impls").attention,
        "mmdit.attention": module("mmdit").attention,
        "AttnBlock.forward": vars(module("sd3_impls").AttnBlock)["forward"],
    }
