"""`--once`: every optimizer makes the same image, one line each; the chosen one's is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from modules.shared_items import cross_attention_optimizations
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from demo.generate import MadeImage, generate
from demo.host import optimizer_in_force, use_optimizer
from lib_subquad.console import say
from lib_subquad.webui import status


def once(output: Path, prompt: str, seed: int, size: tuple[int, int], steps: int) -> None:
    """Print a line per optimizer with time, peak memory and distance from *None*; save that of the one in force."""
    chosen = optimizer_in_force()  # "Automatic" is one of the others
    width, height = size
    generate(prompt, seed, width, height, steps=1)  # the first run of a process pays for what later ones find ready
    titles = [title for title in cross_attention_optimizations() if title not in ("None", "Automatic")]
    column = max(map(len, titles)) + 2
    done: dict[str, MadeImage] = {}
    for title in ("None", *titles):
        use_optimizer(title)
        with tqdm(total=steps, desc=title, unit="step", leave=False) as bar:
            done[title] = generate(prompt, seed, width, height, steps, progress=lambda step, total: bar.update())
        say(f"{title:<{column}}{done[title].cost:>18}{_distance(done[title], done['None'])}")
    result = done[chosen]
    info = PngInfo()
    info.add_text("parameters", result.infotext)
    result.image.save(output, pnginfo=info)
    say(status.summary())
    say(f"{output}: made with {chosen}")


def _distance(image: MadeImage, reference: MadeImage) -> str:
    if image is reference:
        return ""
    apart = np.abs(np.asarray(image.image, dtype=int) - np.asarray(reference.image, dtype=int)).max()
    return f"   pixels differ from None's by at most {apart}/255"
