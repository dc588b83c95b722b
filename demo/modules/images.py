"""Files of images."""

from __future__ import annotations

import os

from PIL import Image, PngImagePlugin


def save_image(image: Image.Image, path, basename, seed=None, prompt=None, extension="png", info=None, **_):
    """Write it under the next free number of its folder: (file, None)."""
    os.makedirs(path, exist_ok=True)
    numbers = (f"{number:05}-{seed}.{extension}" for number in range(100_000))
    file = next(it for it in (os.path.join(path, name) for name in numbers) if not os.path.exists(it))
    about = PngImagePlugin.PngInfo()
    if info:
        about.add_text("parameters", info)
    image.save(file, pnginfo=about)
    return file, None
