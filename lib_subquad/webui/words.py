"""The words of the tab, and what makes HTML of them. What Measure found has its own in `results`.

A value stands in a sentence as an element of its own: the words around it are the same whatever it is, so that the web
UI's localization, which goes by the text of elements, finds them; a page that is written from right to left leaves it
as it is; and markup in it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..engines.table import Class, Found
from ..lab import tables
from ..lab.explain.question import Question
from ..lab.explain.rows import grouped
from ..lab.explain.words import GOES_ON as GOES_ON_IN_WORDS
from ..lab.explain.words import SET_FOR_SOME as SET_FOR_SOME
from ..lab.explain.words import SET_IN_VAIN as SET_IN_VAIN
from ..lab.explain.words import layers_in_words, size_in_words
from ..lab.measured.words import calls_in_words, found_in_words
from ..lab.survey import doctor
from ..plan import goes_by_measurements
from ..settings import Option, Settings, shown
from .status import Generation, again, in_bands, missed, nothing

FEW_COLUMNS = 5

TITLE = "Attention"
LABELS = {
    "checkpoint": "Checkpoint",
    "width": "Width",
    "height": "Height",
    "batch": "Batch size",
    "measure": "Measure",
    "anyway": "Measure all the same",
    "cancel": "Cancel",
    "apply": "Apply: {changes}",
    "undo": "Undo: {changes}",
    "details": "Details: how each layer is computed, and why",
    "about": "About: what these words mean, and what was measured before",
    "forget": "Forget what was measured",
    "decode": "Decode what was kept",
    "stop": "Stop decoding",
    "dismiss": "Dismiss",
    "take_in": "Take in a kept file",
}
# As short as a button wants them.
SETTING_NAMES = {"engine": "engine", "query_chunk": "query chunk", "kv_chunk": "KV chunk"}
AUTOMATIC = "automatic"

INTRODUCTION = (
    "Attention is the part of the model in which every piece of the image looks at every other one; it is what takes "
    "the most memory in large images. The sentence above tells how it is computed for your model and size, and changes "
    "with them. Measure tries engines and chunk sizes on this device, which takes a minute or so, longer for large "
    "images. Apply then sets the best one, if it is another than yours."
)
FORGETTING = (
    "Before the first image of a new size the exact engines are timed on this device for a few seconds, and automatic "
    "takes the fastest from then on. They are timed again when the device, its driver or torch changes, and "
    "after the next start where nothing was clearly faster while other programs were busy. Forget what was measured to "
    "have all of it measured anew before the next image."
)

FINDINGS = "What was measured on this device:"
NOTHING_MEASURED = "Nothing has been measured on this device yet."

# ------------------------------------------------------------------------------------------------- the first sentence

SUBJECT = "{model} at {size} on {device}:"
SIZES = "{count} images of {size}"
LIKE = "A model {family}"
KERNELS = {
    "fused": "PyTorch's fused kernel",
    "padded": "PyTorch's fused kernel, with padded heads,",
    "cudnn": "cuDNN's kernel",
    "xformers": "xformers' kernel",
    "flash-attn": "flash-attn's kernel",
    "sage": "SageAttention, which is not exact,",
}
IN_ALL = "{kernel} in all {layers} layers, at most {memory} at a time."
IN_ONE = "{kernel} in its one layer, at most {memory} at a time."
IN_SOME = "{kernels}, at most {memory} at a time."
IN = "{kernel} in {layers} layers"
NOTHING_TO_GAIN = "Nothing to gain."
NOT_MEASURED_YET = "Not measured yet: the engines are timed before the first image of this size, for up to {seconds} s."
NOT_MEASURED = "By rules there is nothing to gain; with your settings nothing is measured."
NOT_TOLD = "By rules there is nothing to gain; measuring could not tell."
BESIDE_OTHERS = (
    "Nothing was clearly faster, but other programs disturbed the measurement: it is made again after the next start."
)
NO_KERNEL = "no layer has a fused kernel, because {why}."
FEW_KERNELS = "{count} of {shapes} shapes run without a fused kernel, because {why}."
DECODER_TOO_LARGE = "this does not fit. Decoding it takes {needed} {way}, and the memory limit leaves {limit}."
BEYOND = "decoding it takes {needed} in bands, more than the {limit} that the memory limit leaves."
GOES_ON = {how: f"{BEYOND} {sentence}" for how, sentence in GOES_ON_IN_WORDS.items()}
WAYS = {False: "all at once", True: "even in bands"}
TOO_LARGE = "this does not fit. A call of attention takes {needed}, and the memory limit leaves {limit}."
NOT_SERVED = "{model}: no attention layer that subquad serves."
NOT_ACTIVE = "{is_so}: {why}"
AS_TOLD = "{sentence}"

CHOOSE_ENGINE = "Set the engine to automatic, or to one that can."
MEASURE_OWN = "Your own engine or chunk sizes are not what automatic takes: Measure tells which is faster."
MEASURE_TILES = "Measure finds the chunk sizes that are fastest on this device."
SMALLER = "Make images of {size} at most."
INSIDE = "Images of {size} at most stay inside the memory limit."
RAISE_LIMIT = "Set the memory limit to {percent} %, or make images of {size} at most."
IN_BANDS = "Set VAE in bands to when needed: then it takes {needed}."
FREE_MEMORY = "Close other programs that use this device's memory."
ADVICE = "{advice}."

# ------------------------------------------------------------------------------------------------- what buttons answer

WAITS_FOR_ITS_TURN = "Measuring begins as soon as it is its turn."
WAITS_FOR_MEASURING = "Another page is measuring: this one begins when that is done."
WAITS_FOR_IMAGE = "An image is being made: measuring begins when it is done."
MEASURING_ALREADY = "This page is measuring already."
OTHERS_WAIT = (
    "Others use this web UI now: {who}. Measuring takes a minute or so, begins when they are done, and images wait "
    "meanwhile. Press Measure all the same if you want that."
)
IMAGES_WAIT = {1: "an image is being made", 2: "{count} images are being made or wait"}
PAGES_MEASURE = {1: "another page measures or is about to", 2: "{count} other pages measure or are about to"}
NOT_MEASURING = "Nothing is being measured on this page."
WITHDRAWN = "Cancelled before its turn came: nothing was measured."
STOPPING = "Measuring stops when the call under way has ended."
CANCELLED = "Cancelled: this is what had been measured."
CANCELLED_EARLY = "Cancelled before a first setting was measured."
NOTHING_FITS = "Nothing fits here."
STOPPED = "Measuring stopped: {error}"
NOTHING_TO_APPLY = "There is nothing to apply: it ended before settings were compared."
MEASURE_FIRST = "Measure first: there is nothing to apply yet."
NOTHING_TO_UNDO = "There is nothing to undo."
FORGOTTEN = "Forgotten: {kinds} of calls. {then}"
MEASURED_AGAIN = "They are measured again before the next image."
RULES_DECIDE = "Rules decide again, as your settings have it."
IN_FORCE = "Nothing to change: these settings are in force already."
FAILED = "That did not work: {error}"

# ------------------------------------------------------------------------------------ images that wait to be decoded

WAITS_TO_BE_DECODED = "Sampled, but not decoded yet:"
REMINDER = "What was sampled and not decoded waits in {count}: the tab Attention decodes it."
DECODING = "Decoding {how_far}."
FILE_OF = "file {number} of {count}"
IMAGE_OF = "image {number} of {count}"
DECODING_STOPS = "Decoding stops as soon as what is under way is done."
NOT_DECODING = "Nothing is being decoded."
NO_DECODER = "This web UI shows no way to decode it."
NOTHING_KEPT = "Nothing waits to be decoded."
DECODE_LATER = "The device was busy with an image or a measurement just then: decode when that is done."
DECODED = "Decoded {file}: {images}."
DECODED_PART = f"{DECODED} That is the inpainted part alone, which is not put into its picture."
SOME_LEFT = "Not decoded: {count} of {file}, in a separate file that waits: {why}"
ALL_STAY = "Not decoded: {count} of {file}, which waits on with all of its images: {why}"
FILES_STAY = "The file of what is decoded stays where it is: delete that when you like."
NOT_DECODED = "{file} is not decoded, and stays where it is until you delete it: {why}"
DECODING_INTERRUPTED = "Decoding {file} was interrupted. It stays where it is."
NO_SUCH_FILE = "{file} does not wait to be decoded."
DISMISSED = "Taken off the list: {file}."
DISMISSED_STAYS = "What was taken off the list stays where it is: delete that when you like."
WAS_INTERRUPTED = "Decoding was interrupted."
TAKE_IN = (
    "A file subquad-latent-….safetensors that does not wait to be decoded any more, as it was dismissed, or that comes "
    "from elsewhere: take it in, and it waits again."
)
TAKEN_IN = "Taken in: it waits to be decoded as {file}"
WAITS_ALREADY = "It waits to be decoded already: {file}"
NOT_TAKEN_IN = "It is not taken in: {why}."
NO_FILE = "No file was chosen."
STILL_TOO_LITTLE = "There is still too little memory. Close other programs that use it, then decode."

TERMS = {
    "Where": "The part of the model that has these layers, and what they look at. The U-Net or transformer makes the "
    "image; the VAE turns it into pixels. self: the image at itself; cross: the image at the prompt; together: image "
    "and prompt, as one, at themselves. convolutions: what else the VAE is made of; the encoder is for img2img.",
    "Layers": "How many layers of the model work on this shape, each once in every sampling step, or, in the VAE, once "
    "for an image.",
    "Tokens": "The pieces that attention compares: small patches of the image, or pieces of the prompt's words.",
    "Heads": "Attention looks at the image in several independent ways at once. Number of these heads × width of each; "
    "those of all images of a batch are computed together, and, if there is a negative prompt, with either prompt.",
    "Engine": "What computes attention: fused is PyTorch's built-in fast kernel, portable runs on every device.",
    "Query chunk": "How many tokens ask at a time. Smaller needs less memory and takes longer.",
    "KV chunk": "How many tokens are looked at in one go, as keys and values. Smaller needs less memory.",
    "At a time": "How many tokens ask at a time × how many they look at in one go. Fewer need less memory and take "
    "longer.",
    "Memory": "What one call needs beside its input and its result.",
    "Workspace": "Memory that one call needs beside its input and its result.",
    "Memory limit": "The share of the device's free memory that the settings allow for one call's workspace; here the "
    "call's queries, keys, values and result count as well.",
    "Why": "Why this engine, and which of your settings had to give way.",
    "Setting": "Engine, query chunk × KV chunk. auto: the fastest size that fits the memory limit.",
    "Measured on this device": "Before the first image of a new size the exact engines are timed for a few seconds, "
    "and the fastest is taken from then on.",
    "Time": "Attention alone, in one sampling step, on this device.",
    "Measured": "How often. Times of settings that were measured equally often, in turn, can be compared; a single run "
    "tells little while other programs run.",
    "Chunks": "How many tokens ask at a time × how many they look at in one go.",
    "Calls": "How often attention was computed for that image: once for every layer in every step.",
    "Retries": "How often memory ran out and attention went on in smaller chunks instead of failing.",
    "Reruns": "How often the inexact engine that is set gave NaN or infinity, so that an exact one computed the call.",
    "Peak": "The most memory that any call needed beside its input and its result.",
}

# Where a page is too narrow for a table, each of its rows becomes a card: what it is about, then label above value.
CARDS = """ {
.subquad-table thead {position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)}
.subquad-table table, .subquad-table tbody, .subquad-table td {display: block}
.subquad-table tr {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(7em, 100%), 1fr)); gap: .5em .8em;
                   padding: .7em 0}
.subquad-table td {padding: 0 !important}
.subquad-table td:first-child, .subquad-table td:last-child {grid-column: 1 / -1}
.subquad-table td:first-child {font-weight: 600}
.subquad-table .subquad-label {display: block; font-size: .85em; font-weight: 400}
}
"""

CSS = f"""
<style>
.subquad-hidden {{display: none !important}}
.subquad-sentence {{font-size: 1.35em; line-height: 1.4; margin: .3em 0}}
.subquad-sentence em {{font-style: italic}}
.subquad-line {{margin: .3em 0}}
.subquad-line, .subquad-sentence, .subquad-table td, .subquad-words {{overflow-wrap: anywhere}}
.subquad-warning {{border-inline-start: 3px solid #d97706; padding-inline-start: .6em}}
.subquad-table {{container: subquad-few / inline-size; max-width: 100%}}
.subquad-table.subquad-many {{container-name: subquad-many}}
.subquad-table table {{width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums}}
.subquad-table :is(table, tr, th, td) {{border: none !important}}  /* gradio draws its own */
.subquad-table tr {{border-bottom: 1px solid var(--border-color-primary, #8884) !important}}
.subquad-table th, .subquad-table td {{text-align: start !important; padding: .35em 0; padding-inline-end: .8em;
                                      vertical-align: top}}
.subquad-table th {{white-space: nowrap}}
.subquad-label {{display: none}}
@container subquad-few (max-width: 480px) {CARDS}
@container subquad-many (max-width: 860px) {CARDS}
.subquad-table abbr, .subquad-line abbr {{text-decoration: underline dotted; cursor: help}}
.subquad-words dt {{font-weight: 600; margin-top: .4em}}
ul.subquad-words {{padding-inline-start: 1.2em; list-style: disc}}
.subquad-words dd {{margin-inline-start: 1em}}
#subquad_page :is(button, input, [role=button]):focus-visible {{outline: 3px solid #2563eb !important;
                                                                    outline-offset: 1px}}
.dark #subquad_page :is(button, input, [role=button]):focus-visible {{outline-color: #93c5fd !important}}
#subquad_page .label-wrap {{text-align: start; gap: .5em; cursor: pointer}}
#subquad_page .label-wrap .icon {{flex: none; width: 1.5em; height: 1.5em; line-height: 1.5em;
                                  text-align: center}}  /* a square, which takes no more room when it is turned */
/* What gradio shows of progress itself, and keeps room for: there is a bar of ours. */
#subquad_page .wrap.generating {{display: none !important}}
#subquad_page .min {{min-height: 0 !important}}
#subquad_page .pending {{opacity: 1}}  /* it would flicker at each look, every few seconds */
#subquad_page button {{overflow-wrap: anywhere; white-space: normal}}
</style>
"""


class Said:
    """A sentence and the values in it. As text with `str`, as HTML with `html`."""

    def __init__(self, sentence: str, /, **values: object) -> None:
        self._sentence, self._values = sentence, values

    def __str__(self) -> str:
        return self._sentence.format(**{name: _text(value) for name, value in self._values.items()})

    def __repr__(self) -> str:
        return f"Said({str(self)!r})"

    def html(self) -> str:
        parts = re.split(r"\{(\w+)\}", self._sentence)  # words, a value's name, words, and so on
        told = (
            _html(self._values[part]) if number % 2 else escape(part, quote=False) for number, part in enumerate(parts)
        )
        return "".join(told)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _html(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_html, value))
    return value.html() if isinstance(value, Said) else f"<bdi>{escape(str(value))}</bdi>"


def answer(sentences: Iterable[Said], step: Said | None, asked: str = "") -> str:
    """The first thing on the tab: how it stands, and what to press. `asked`: the question that it answers."""
    told = " ".join(sentence.html() for sentence in sentences)
    told += f" <em>{step.html()}</em>" if step else ""
    return f'<p class="subquad-sentence" dir="auto" data-asked="{escape(asked)}">{told}</p>'


def term(word: str, name: str | None = None) -> str:
    """A word with the tooltip of a term."""
    return f'<abbr title="{escape(TERMS[name or word], quote=True)}">{escape(word)}</abbr>'


def glossary() -> str:
    """What the tooltips say, for everybody who cannot point at a word."""
    told = "".join(f'<dt>{escape(word)}</dt><dd dir="auto">{escape(meaning)}</dd>' for word, meaning in TERMS.items())
    return f'<dl class="subquad-words">{told}</dl>'


def line(text: str) -> str:
    return f'<p class="subquad-line" dir="auto">{text}</p>'


def lines(sentences: Iterable[str]) -> str:
    return "".join(line(escape(sentence)) for sentence in sentences)


def warning(text: str) -> str:
    return f'<p class="subquad-line subquad-warning" role="alert" dir="auto">{escape(text)}</p>'


def sendable(text: str) -> str:
    """Text as JSON can carry it: names of files and of tensors may hold half characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def details(question: Question) -> str:
    """How each layer is computed, and why; the largest image; what would help; what there is to know of the file."""
    rows, family = question.rows(), question.checkpoint.family
    notes = "".join(line(escape(note)) for note in question.notes)
    if not rows:
        return warning(str(Said(NOT_SERVED, model=family))) + notes
    summary = f"<b>{escape(family)}</b>: {layers_in_words(rows, kinds=True)}."
    groups = [*(group.cells() for group in grouped(rows)), *(half.group_cells() for half in question.halves())]
    table = _table(list(groups[0]), ([f"<bdi>{escape(cell)}</bdi>" for cell in cells.values()] for cells in groups))
    size = size_in_words(question, term("memory limit", "Memory limit"), "<b><bdi>{}</bdi></b>".format)
    found = doctor.diagnosis([row.problem for row in rows], question.settings, question.free_bytes)
    advice = "".join(line(escape(sentence)) for sentence in found.sentences)
    return line(summary) + table + line(size) + advice + notes


def last_generation(seen: Generation) -> str:
    """What attention took in the last image."""
    out_of_reach = "".join(f" <b>{escape(sentence)}</b>" for sentence in missed(seen))
    of_vae = "".join(f" {escape(sentence)}" for sentence in (*in_bands(seen), seen.kept) if sentence)
    if seen.largest is None:
        return f"{escape(nothing(seen))}{of_vae}{out_of_reach}"
    made = seen.largest
    reruns = "".join(f", {term(words, 'Reruns')}" for words in again(seen))
    return (
        f"Last generation: {seen.calls} {term(_plural('call', seen.calls), 'Calls')}, "
        f"{seen.retries or 'no'} {term('retry' if seen.retries == 1 else 'retries', 'Retries')}{reruns}. "
        f"The largest: {term(made.engine, 'Engine')}, "
        f"<bdi>{made.query_chunk} × {made.kv_chunk}</bdi> {term('tokens at a time', 'Chunks')}, "
        f"{tables.memory(made.workspace_bytes)} of {term('workspace', 'Workspace')}; {escape('; '.join(made.reasons))}."
        f"{of_vae}{out_of_reach} {escape(seen.measuring)}".rstrip()
    )


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def measured(found: Mapping[Class, Found], settings: Settings) -> str:
    """What the fixed order is changed by on this device; empty where nothing was measured."""
    if not found:
        return ""
    faster = sum(it.margin > 1 for it in found.values())
    kinds = f"{len(found)} {_plural('kind', len(found))} of calls, {faster or 'none'} of them faster than by rules."
    unused = "" if goes_by_measurements(settings) else " It is not used: your settings choose otherwise."
    return line(f"{term('Measured on this device')}: {kinds}{unused}")


def waiting(files: Sequence[Path], progress: Said | None, became: Iterable[str]) -> str:
    """What is kept and waits to be decoded, how far that is, and what became of what was; empty where there is none."""
    listed = "".join(f"<li><bdi>{escape(str(path))}</bdi></li>" for path in files)
    listed = f'{line(WAITS_TO_BE_DECODED)}<ul class="subquad-words" dir="auto">{listed}</ul>' if files else ""
    return listed + (lines(became) if progress is None else line(progress.html()))


def findings(found: Mapping[Class, Found]) -> str:
    """What Forget would forget, a line for each kind of call, as the command `order` tells it."""
    if not found:
        return line(NOTHING_MEASURED)
    told = "".join(
        f"<li><bdi>{escape(calls_in_words(calls))}: {escape(found_in_words(it))}</bdi></li>"
        for calls, it in found.items()
    )
    return f'{line(FINDINGS)}<ul class="subquad-words" dir="auto">{told}</ul>'


def kept_setting(option: Option, word: str) -> str:
    """A saved setting that cannot be used here."""
    return warning(
        f"{option.label} is set to {shown(word)}, which is not known here. Meanwhile it is {option.default}; "
        "the setting stays as it was saved."
    )


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """HTML. Every cell says what it is as well, for pages that are too narrow for a line of headings."""
    terms = [term(heading) if heading else "" for heading in headings]
    labels = [f'<span class="subquad-label">{it}</span>' if it else "" for it in terms]
    head = "".join(f"<th>{it}</th>" for it in terms)
    cells = ("".join(f"<td>{label}{cell}</td>" for label, cell in zip(labels, row)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    kind = "subquad-table" if len(headings) <= FEW_COLUMNS else "subquad-table subquad-many"
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
