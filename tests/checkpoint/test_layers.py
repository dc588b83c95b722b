"""What a layer says of its sizes."""

from __future__ import annotations

import pytest

from lib_subquad.checkpoint import AttentionLayer


def test_shapes_of_a_layer():
    cross = AttentionLayer("x", "unet", "cross", 8, 40, 16, context_tokens=77, context_width=768, guidance_copies=2)
    assert cross.shapes(512, 768, batch=3) == ((6, 8, 1536, 40), (6, 8, 77, 40), (6, 8, 77, 40))
    assert cross.shapes(512, 768, batch=3, guidance=False)[0] == (3, 8, 1536, 40)
    assert cross.shapes(512, 768, prompt_tokens=231)[1] == (2, 8, 231, 40)


def test_odd_sizes():
    layer = AttentionLayer("x", "unet", "self", 8, 160, 64, fills_up=True)
    assert layer.tokens(520, 512) == 9 * 8  # 65 latent pixels -> 33 -> 17 -> 9
    assert layer.tokens(8, 8) == 1
    assert layer.tokens(519, 512) == 8 * 8  # the web UI drops what does not fill a latent pixel


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"width": 0}, "image side"),
        ({"height": -512}, "image side"),
        ({"width": 7}, "image side"),
        ({"width": 512.0}, "image side"),
        ({"width": "512"}, "image side"),
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prompt_tokens": 78}, "multiple of 77"),
    ],
)
def test_sizes_out_of_range(arguments, says):
    layer = AttentionLayer("x", "unet", "self", 8, 40, 8)
    with pytest.raises(ValueError, match=says):
        layer.shapes(**({"width": 512, "height": 512} | arguments))
