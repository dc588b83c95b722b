"""The words and tables of the tab, as HTML. Every technical term carries a tooltip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from ..engines.table import Class, Found
from ..lab import tables
from ..lab.explain.question import Question
from ..lab.explain.words import layers_in_words, size_in_words
from ..lab.survey import doctor
from ..plan import goes_by_measurements
from ..settings import Option, Settings, shown
from .status import Generation, again, missed, nothing

FEW_COLUMNS = 5

TERMS = {
    "Where": "The part of the model that has these layers, and what they look at. The U-Net or transformer makes the "
    "image; the VAE turns it into pixels. self: the image at itself; cross: the image at the prompt; together: image "
    "and prompt, as one, at themselves.",
    "Layers": "How many layers of the model work on this shape, each once in every sampling step, or, in the VAE, once "
    "for an image.",
    "Tokens": "The pieces that attention compares: small patches of the image, or pieces of the prompt's words.",
    "Heads": "Attention looks at the image in several independent ways at once, at all images of a batch, and, if "
    "there is a negative prompt, with either prompt. Number of all these heads x width of each.",
    "Engine": "What computes attention: fused is PyTorch's built-in fast kernel, portable runs on every device.",
    "Query chunk": "How many tokens ask at a time. Smaller needs less memory and takes longer.",
    "KV chunk": "How many tokens are looked at in one go, as keys and values. Smaller needs less memory.",
    "Workspace": "Memory that one call needs beside its input and its result.",
    "Memory limit": "The share of the device's free memory that the settings allow for one call's workspace; here the "
    "call's queries, keys, values and result count as well.",
    "Why": "Why this engine, and which of your settings had to give way.",
    "Setting": "Engine, query chunk x KV chunk. auto: the fastest size that fits the memory limit.",
    "Measured on this device": "Before the first image of a new size the exact engines are timed for a few seconds, "
    "and the fastest is taken from then on.",
    "Time": "Attention alone, in one sampling step, on this device.",
    "Measured": "How often. Times of settings that were measured equally often, in turn, can be compared; a single run "
    "tells little while other programs run.",
    "Chunks": "How many tokens ask at a time x how many they look at in one go.",
    "Calls": "How often attention was computed for that image: once for every layer in every step.",
    "Retries": "How often memory ran out and attention went on in smaller chunks instead of failing.",
    "Reruns": "How often the inexact engine that is set gave NaN or infinity, so that an exact one computed the call.",
    "Peak": "The most memory that any call needed beside its input and its result.",
}

# Where a page is too narrow for a table, each of its rows becomes a card: what it is about, then label above value.
CARDS = """ {
.subquad-table thead {display: none}
.subquad-table table, .subquad-table tbody, .subquad-table td {display: block}
.subquad-table tr {display: grid; grid-template-columns: repeat(auto-fill, minmax(6em, 1fr)); gap: .5em .8em;
                   padding: .7em 0; white-space: normal}
.subquad-table td {padding: 0 !important}
.subquad-table td:first-child, .subquad-table td:last-child {grid-column: 1 / -1}
.subquad-table td:first-child {font-weight: 600}
.subquad-table .subquad-label {display: block; font-size: .8em; font-weight: 400; opacity: .75}
}
"""

CSS = f"""
<style>
.subquad-table {{overflow-x: auto; container: subquad-few / inline-size}}
.subquad-table.subquad-many {{container-name: subquad-many}}
.subquad-table table {{width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap}}
.subquad-table :is(table, tr, th, td) {{border: none !important}}  /* gradio draws its own */
.subquad-table tr {{border-bottom: 1px solid var(--border-color-primary, #8884) !important}}
.subquad-table th, .subquad-table td {{text-align: left; padding: .35em .6em .35em 0; vertical-align: top}}
.subquad-table td:last-child {{white-space: normal; min-width: 8em}}
.subquad-label {{display: none}}
@container subquad-few (max-width: 480px) {CARDS}
@container subquad-many (max-width: 1000px) {CARDS}
.subquad-table abbr, .subquad-line abbr {{text-decoration: underline dotted; cursor: help}}
#subquad_status_row {{align-items: flex-start}}
.subquad-line {{margin: .3em 0}}
.subquad-warning {{border-left: 3px solid #d97706; padding-left: .6em}}
</style>
"""


def term(word: str, name: str | None = None) -> str:
    """A word with the tooltip of a term."""
    return f'<abbr title="{escape(TERMS[name or word], quote=True)}">{escape(word)}</abbr>'


def line(text: str) -> str:
    return f'<p class="subquad-line">{text}</p>'


def warning(text: str) -> str:
    return f'<p class="subquad-line subquad-warning">{escape(text)}</p>'


def sendable(text: str) -> str:
    """Text as JSON can carry it: names of files and of tensors may hold half characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plan_table(question: Question) -> str:
    """The answer to Explain."""
    rows, family = question.rows(), question.checkpoint.family
    notes = "".join(line(escape(note)) for note in question.notes)
    if not rows:
        return CSS + warning(f"{family}: no attention layer that subquad serves.") + notes
    summary = f"<b>{escape(family)}</b>: {layers_in_words(rows, kinds=True)}."
    table = _table(list(rows[0].cells()), ([escape(cell) for cell in row.cells().values()] for row in rows))
    size = size_in_words(question, term("memory limit", "Memory limit"), "<b>{}</b>".format)
    found = doctor.diagnosis([row.problem for row in rows], question.settings, question.free_bytes)
    advice = "".join(line(escape(sentence)) for sentence in found.sentences)
    return CSS + line(summary) + table + line(size) + advice + notes


def last_generation(seen: Generation) -> str:
    """What attention took in the last image."""
    out_of_reach = "".join(f" <b>{escape(sentence)}</b>" for sentence in missed(seen))
    if seen.largest is None:
        return f"{nothing(seen)}{out_of_reach}"
    made = seen.largest
    reruns = "".join(f", {term(words, 'Reruns')}" for words in again(seen))
    return (
        f"Last generation: {seen.calls} {term(_plural('call', seen.calls), 'Calls')}, "
        f"{seen.retries or 'no'} {term('retry' if seen.retries == 1 else 'retries', 'Retries')}{reruns}. "
        f"The largest: {term(made.engine, 'Engine')}, "
        f"{made.query_chunk} x {made.kv_chunk} {term('tokens at a time', 'Chunks')}, "
        f"{tables.memory(made.workspace_bytes)} of {term('workspace', 'Workspace')}; {escape('; '.join(made.reasons))}."
        f"{out_of_reach} {escape(seen.measuring)}".rstrip()
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
