"""The answer in sentences, as the tab and the command line say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from . import sizes
from .halves import LOWER_BANDS, PROCESSOR
from .question import Question
from .rows import Row, not_by

MODELS = {"unet": "the U-Net", "transformer": "the transformer"}
LOOKS = {
    "joint": "in which image and text look at each other",
    "self": "in which the image looks at itself",
    "cross": "in which the image looks at the prompt",
}
SET_IN_VAIN = "The engine is set to {engine}, which computes nothing here: {why}."
SET_FOR_SOME = "The engine is set to {engine}, which computes {count} of {layers} layers. For the others: {why}."
LIMIT = "memory limit"
GOES_ON = {
    LOWER_BANDS: "Should memory run out, the VAE goes on in lower bands, for which there is enough.",
    PROCESSOR: "Should memory run out, the VAE goes on in lower bands, and then on the processor, which takes longer.",
}
REST = "The rest of the model needs memory as well."
ONLY_ATTENTION = "The rest of the model needs memory as well, and so does the VAE, of which this file tells nothing."


def size(width: int, height: int) -> str:
    return f"{width} × {height}"


def layers_in_words(rows: Sequence[Row], kinds: bool = False) -> str:
    """How many attention layers there are and where, such as "32 attention layers in the U-Net, 2 in the VAE"; with
    `kinds` also what looks at what in those of the U-Net or transformer."""
    vae: Counter[str] = Counter()
    model: Counter[str] = Counter()
    for row in rows:
        (vae if row.is_vae else model)[row.kind] += row.layers
    told = []
    if model:
        where = next(MODELS[row.part] for row in rows if not row.is_vae)
        looks = ", ".join(f"{model[kind]} {words}" for kind, words in LOOKS.items() if model[kind])
        told.append(f"{model.total()} attention layers in {where}" + (f" ({looks})" if kinds else ""))
    if vae:
        told.append(f"{vae.total()} {'' if model else 'attention layers '}in the VAE")
    return ", ".join(told)


def engine_in_words(engine: str, rows: Sequence[Row]) -> list[str]:
    """A sentence where the engine that is set does not compute all of it."""
    others, why = not_by(engine, rows)
    layers = sum(row.layers for row in rows)
    form = SET_IN_VAIN if others == layers else SET_FOR_SOME
    return [form.format(engine=engine, count=layers - others, layers=layers, why=why)] if others else []


def size_in_words(question: Question, limit: str = LIMIT, strong: Callable[[str], str] = str) -> str:
    """Whether attention and the VAE's decoder fit for an image of this size, and the largest image for which they do,
    in sentences; of attention alone where the file tells of no decoder."""
    largest = question.largest_image()
    what, stay = ("attention and decoding", "stay") if question.halves() else ("attention", "stays")
    rest = REST if question.halves() else ONLY_ATTENTION
    if largest is None:
        told = f"Not even the smallest image keeps its {what} inside the {limit}."
    elif max(largest) >= sizes.LARGEST_SIDE:
        most = strong(size(*largest))
        told = f"Up to {most}, the largest in these proportions, images keep their {what} inside the {limit}. {rest}"
    else:
        told = (
            f"Largest image in these proportions whose {what} {stay} inside the {limit}: "
            f"{strong(size(*largest))}. {rest}"
        )
    if question.fits():
        return told
    image = f"An image of {size(question.width, question.height)}"
    if resort := question.last_resort():
        return f"{strong(f'{image} takes more than the {LIMIT}.')} {GOES_ON[resort]} {told}"
    return f"{strong(f'{image} does not fit.')} {told}"
