"""What one layer costs in the host beside the same layer with PyTorch's function written in: its settings are read, its
status line is kept.

python -m demo.overhead
"""

from __future__ import annotations

from demo import host
from lib_subquad.console import say
from lib_subquad.lab.bench import overhead


def cases() -> dict[str, overhead.Case]:
    """The forward of ldm's CrossAttention, as the extension has put it in force."""
    host.start(optimizer="subquad")
    from ldm.modules.attention import CrossAttention

    def layer(channels: int) -> CrossAttention:
        _, heads, _, width = overhead.SMALL
        return CrossAttention(channels, channels, heads=heads, dim_head=width)

    return {"the web UI's cross_attention_forward": overhead.of_a_layer(layer, CrossAttention.forward)}


if __name__ == "__main__":
    say(overhead.report(overhead.measured(cases=cases())))
