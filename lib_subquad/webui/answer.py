"""Am I fine, and if not, what do I press? The first sentence of the tab, from a question and how things stand.

Knows neither gradio nor a web UI.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..console import UserError
from ..engines import order
from ..lab import tables
from ..lab.explain.question import Question
from ..lab.explain.rows import Row, not_by
from ..lab.explain.words import size
from ..lab.measured import rounds
from ..lab.survey import doctor
from ..plan import goes_by_measurements, plan_problem
from . import words
from .status import Standing
from .words import Said

ROOM = 0.95  # of the free memory: a limit that leaves nothing for anything else helps nobody


@dataclass(frozen=True)
class Answer:
    """What is so, in sentences, and the one thing to do about it, if there is one.

    `can_measure`: there is something to measure. `may_gain`: measuring may find something faster than what is in force.
    """

    sentences: tuple[Said, ...]
    step: Said | None = None
    can_measure: bool = False
    may_gain: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, (*self.sentences, *([self.step] if self.step else []))))


def answer(asked: Question | UserError, standing: Standing, active: bool) -> Answer:
    """The answer to a question, or to one that cannot be asked.

    `active`: whether attention of the next image is ours. What the user can do something about comes first: a size that
    is none, then a subquad that is not active, then a model that is not there.
    """
    # Whoever finds nothing to press for being active lacks a model, say.
    is_told = not active and (standing.step or isinstance(asked, Question))
    if isinstance(asked, UserError) and not (is_told and asked.step):
        return Answer((Said(words.AS_TOLD, sentence=asked.message),), _step(asked.step))
    rows = asked.rows() if isinstance(asked, Question) else []
    if is_told:
        told = Said(words.NOT_ACTIVE, is_so=standing.is_so, why=standing.why)
        return Answer((told,), _step(standing.step), can_measure=bool(rows))
    assert isinstance(asked, Question)
    if not rows:
        return Answer((Said(words.NOT_SERVED, model=asked.checkpoint.family),))
    found = _not_fitting(asked, rows) or _computed(asked, rows)
    return replace(found, sentences=(*_set_in_vain(asked, rows), *found.sentences))


def _step(told: str) -> Said | None:
    return Said(words.AS_TOLD, sentence=told) if told else None


def _subject(asked: Question) -> Said:
    images: object = size(asked.width, asked.height)
    if asked.batch > 1:
        images = Said(words.SIZES, count=asked.batch, size=images)
    device = doctor.device_name(asked.device)
    family = asked.checkpoint.family
    model = words.LIKE.format(family=family) if family.startswith("like ") else family
    return Said(words.SUBJECT, model=model, size=images, device=device)


def _set_in_vain(asked: Question, rows: list[Row]) -> list[Said]:
    """Where the engine that is set does not compute all of it."""
    engine, layers = asked.settings.engine, sum(row.layers for row in rows)
    others, why = not_by(engine, rows)
    if not others:
        return []
    if others == layers:
        return [Said(words.SET_IN_VAIN, engine=engine, why=why)]
    return [Said(words.SET_FOR_SOME, engine=engine, count=layers - others, layers=layers, why=why)]


def _not_fitting(asked: Question, rows: list[Row]) -> Answer | None:
    halves = asked.halves()
    calls = max(row.call_bytes for row in rows)
    decoding = max((half.bytes for half in halves), default=0)
    needed = max(calls, decoding)
    if needed <= asked.limit_bytes:
        return None
    limit = tables.memory(asked.limit_bytes)
    told = Said(words.TOO_LARGE, needed=tables.memory(calls), limit=limit)
    if decoding > calls:
        half = max(halves, key=lambda half: half.bytes)
        told = Said(words.DECODER_TOO_LARGE, needed=tables.memory(decoding), way=words.WAYS[half.in_bands], limit=limit)
        if resort := asked.last_resort():
            told = Said(words.GOES_ON[resort], needed=tables.memory(decoding), limit=limit)
            return Answer((_subject(asked), told), _what_fits(asked, needed, words.INSIDE), can_measure=True)
        if not half.in_bands and max(calls, half.plan.bytes) <= asked.limit_bytes:
            return Answer((_subject(asked), told), Said(words.IN_BANDS, needed=tables.memory(half.plan.bytes)))
    return Answer((_subject(asked), told), _what_fits(asked, needed))


def _what_fits(asked: Question, needed: int, otherwise: str = words.SMALLER) -> Said:
    largest = asked.largest_image()
    if largest is None:
        return Said(words.FREE_MEMORY)
    if needed <= ROOM * asked.free_bytes:
        percent = -(-100 * needed // max(asked.free_bytes, 1))
        return Said(words.RAISE_LIMIT, percent=percent, size=size(*largest))
    return Said(otherwise, size=size(*largest))


def _computed(asked: Question, rows: list[Row]) -> Answer:
    found = doctor.diagnosis([row.problem for row in rows], asked.settings, asked.free_bytes)
    unfused = [row for row in rows if doctor.lacks_kernel(row.plan)]
    others, _ = not_by(asked.settings.engine, rows)
    if others == sum(row.layers for row in rows):
        step = Said(words.CHOOSE_ENGINE)
    elif _is_own_choice(asked, rows):
        step = Said(words.MEASURE_OWN)
    elif found.advice:
        step = Said(words.ADVICE, advice=found.advice[0].words)
    else:
        step = Said(words.MEASURE_TILES) if unfused else None
    told = [_subject(asked), _without_kernel(unfused, rows) if unfused else _by_kernels(rows)]
    if step is None:
        told.append(_nothing_to_gain(asked, rows))
    may_gain = bool(unfused) or _is_own_choice(asked, rows)
    return Answer(tuple(told), step, can_measure=True, may_gain=may_gain)


def _nothing_to_gain(asked: Question, rows: list[Row]) -> Said:
    """As far as that is known."""
    calls = [(row.problem, row.layers) for row in rows]
    worth = rounds.worth_measuring(calls, asked.settings)
    if worth and not goes_by_measurements(asked.settings):
        return Said(words.NOT_MEASURED)
    if rounds.unknown(calls, asked.settings):
        return Said(words.NOT_MEASURED_YET, seconds=round(rounds.seconds_for(asked.device)))
    found = list(map(order.found, worth))
    if None in found:
        return Said(words.NOT_TOLD)
    return Said(words.BESIDE_OTHERS if any(it.disturbed for it in found) else words.NOTHING_TO_GAIN)


def _is_own_choice(asked: Question, rows: list[Row]) -> bool:
    """Whether the user's engine or chunk sizes lead to another plan than automatic ones would."""
    automatic = replace(asked.settings, engine="automatic", query_chunk=0, kv_chunk=0)
    if automatic == asked.settings:
        return False
    plans = ((row.plan, plan_problem(row.problem, automatic, asked.free_bytes)) for row in rows)
    return any((own.engine, own.sizes) != (made.engine, made.sizes) for own, made in plans)


def _without_kernel(unfused: list[Row], rows: list[Row]) -> Said:
    why = unfused[0].plan.reasons[0]
    if len(unfused) == len(rows):
        return Said(words.NO_KERNEL, why=why)
    return Said(words.FEW_KERNELS, count=len(unfused), shapes=len(rows), why=why)


def _by_kernels(rows: list[Row]) -> Said:
    layers: Counter[str] = Counter()
    for row in rows:
        layers[words.KERNELS.get(row.plan.engine, row.plan.engine)] += row.layers
    memory = tables.memory(max(row.plan.workspace_bytes for row in rows))
    if len(layers) > 1:
        kernels = tuple(Said(words.IN, kernel=kernel, layers=count) for kernel, count in layers.most_common())
        return Said(words.IN_SOME, kernels=kernels, memory=memory)
    ((kernel, count),) = layers.items()
    form = words.IN_ALL if count > 1 else words.IN_ONE
    return Said(form, kernel=kernel, layers=count, memory=memory)
