"""The tab "Attention": how attention is computed here, and the best sizes for this device, one button away."""

from __future__ import annotations

import inspect
import json
import time
import traceback
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr
from gradio.context import Context
from modules import shared

from ..console import say
from . import browser, models, status, words
from . import plot as picture
from .answer import Answer
from .laboratory import LABORATORY, Run
from .words import LABELS, Said

ELEMENT = "subquad_tab"
USUAL = status.Images(512, 512, 1)
LOOKED = 13  # what `_look` answers
GRADIO_3 = gr.__version__.startswith("3.")
SCRIPT = "_js" if GRADIO_3 else "js"  # the parameter that takes JavaScript


@dataclass
class Visit:
    """What one page measures, was answered and shown last, and which size of which generation it was given last.

    One object as long as the page is open: an event that is on its way sees what another does meanwhile.
    """

    run: Run | None = None
    told: Answer | None = None
    shown: tuple | None = None
    adopted: tuple | None = None

    @property
    def busy(self) -> bool:
        return self.run is not None and self.run.busy


class Tab(gr.Blocks):
    """Blocks that are told when the host shows them: at each time, `on_show` is done.

    The host draws us inside a tab of its own, and only that one knows when it is opened.
    """

    on_show: tuple | None = None

    def render(self):
        super().render()
        if isinstance(Context.block, gr.TabItem) and self.on_show:
            act, inputs, outputs, how = self.on_show
            Context.block.select(act, inputs, outputs, api_name=False, **how)
        return self


def create() -> list[tuple[gr.Blocks, str, str]]:
    """The tab, as the web UI's on_ui_tabs takes it."""
    with Tab(analytics_enabled=False) as tab:
        gr.HTML(words.CSS, elem_id="subquad_style", elem_classes="subquad-hidden")
        with gr.Column(elem_id="subquad_page"):
            sentence = gr.HTML(elem_id="subquad_sentence")
            status_line = gr.HTML(elem_id="subquad_status")
            with gr.Row():
                checkpoint = gr.Dropdown(
                    models.titles(),
                    value=models.LOADED,
                    label=LABELS["checkpoint"],
                    elem_id="subquad_checkpoint",
                    scale=2,
                    min_width=320,
                )
                width, height, batch = (
                    _number(LABELS[name], value, f"subquad_{name}")
                    for name, value in zip(("width", "height", "batch"), USUAL)
                )
            with gr.Row():
                measure = _button("measure")
                cancel, apply, undo = (_button(name, visible=False) for name in ("cancel", "apply", "undo"))
            message = gr.HTML(elem_id="subquad_message")
            kept = gr.HTML(elem_id="subquad_kept")
            with gr.Row(visible=False) as rescue:
                decode = _button("decode", variant="primary", min_width=140)
                stop, dismiss = (_button(name, visible=name != "stop", min_width=140) for name in ("stop", "dismiss"))
            plot = gr.HTML(elem_id="subquad_plot")
            result = gr.HTML(elem_id="subquad_answer")
            with gr.Accordion(LABELS["details"], open=False, elem_id="subquad_details_fold"):
                details = gr.HTML(elem_id="subquad_details")
            with gr.Accordion(LABELS["about"], open=False, elem_id="subquad_about"):
                gr.HTML(words.line(words.INTRODUCTION) + words.glossary() + words.line(words.FORGETTING))
                findings = gr.HTML(elem_id="subquad_findings")
                forget = _button("forget")
                forgotten = gr.HTML(elem_id="subquad_forgotten")  # where the button is: the message is far above
                gr.HTML(words.line(words.TAKE_IN))
                take_in = gr.UploadButton(
                    LABELS["take_in"], file_types=[".safetensors"], elem_id="subquad_take_in", min_width=80
                )
                taken = gr.HTML(elem_id="subquad_taken")
            ask, look = (_button(name, elem_classes="subquad-hidden") for name in ("ask", "look"))  # for scripts
        visit = gr.State(Visit())  # gradio copies it for each page
        payload = gr.Textbox(visible=False, elem_id="subquad_payload")
        go = gr.Textbox(visible=False, elem_id="subquad_go")  # changes when a Measure is to wait for its turn
        gone = gr.Textbox(visible=False, elem_id="subquad_gone")  # changes when a Measure that waited was cancelled

    question = [checkpoint, width, height, batch]
    asked = [visit, *question]
    buttons = [measure, cancel, apply, undo]
    rescued = [kept, rescue, decode, stop, dismiss]
    looked = [sentence, status_line, details, findings, *rescued, *buttons]
    quietly = {"queue": False, "show_progress": "hidden"}
    with_queue = not getattr(shared.cmd_opts, "no_gradio_queue", False)

    def on(event, act, inputs, outputs, how=quietly):
        return event(_answering(act, len(outputs)), inputs, outputs, api_name=False, **how)

    def then_look(event):
        seen = on(event.then, _look, asked, looked)
        seen.then(None, None, None, **{SCRIPT: browser.KEEP_FOCUS})

    with tab:
        for widget in question:
            on(widget.change, _look, asked, looked)
        on(ask.click, _look, asked, looked)
        on(look.click, _look_again, asked, looked)
        # Two steps: what is to be measured is known before gradio's queue lets it begin, so that it can be cancelled.
        # An answer that was on its way when the button was pressed may come back later, and knows nothing of this.
        then_look(on(measure.click, _request, visit, [result, plot, message, go, *buttons]))
        measured = [result, plot, message, *buttons]
        if with_queue:
            measuring = on(go.change, _measure, asked, measured, {"show_progress": "hidden"})
            # One that runs is not torn off: it ends with what it has measured. Nor is one that waits in gradio 4, which
            # would answer in its turn all the same, and end the stream of answers to the page that cancelled it.
            if GRADIO_3:
                gone.change(None, cancels=measuring)
        else:  # gradio neither lets a function answer twice nor starts with anything that could be cancelled
            measuring = on(go.change, _measure_at_once, asked, measured)
        then_look(measuring)
        then_look(on(cancel.click, _cancel, visit, [message, result, gone]))
        for button, action, given, told in (
            (apply, _apply, visit, message),
            (undo, LABORATORY.undo, None, message),
            (forget, LABORATORY.forget, None, forgotten),
        ):
            done = on(button.click, _and_tell(action), given, [told, payload])
            done.then(None, payload, payload, **{SCRIPT: browser.MOVE_SLIDERS})
            then_look(done)
        then_look(on(stop.click, _stop_decoding, None, [message]))
        decoded = [message, *rescued]
        if with_queue:
            then_look(on(decode.click, _decode, None, decoded, {"show_progress": "hidden"}))
        else:
            then_look(on(decode.click, _decode_at_once, None, decoded))
        then_look(on(dismiss.click, _dismiss, None, [message]))
        then_look(on(take_in.upload, _take_in, [visit, take_in], [taken]))
        opened = [*asked, payload]
        script = {SCRIPT: browser.with_page_size(len(opened))}
        show = _answering(_open, len(looked) + len(question))
        tab.on_show = (show, opened, [*looked, *question], {**quietly, **script})
        tab.load(None, None, None, **{SCRIPT: browser.WATCH})
        tab.load(show, opened, tab.on_show[2], api_name=False, **quietly, **script)

    for widget in (*question, payload, go, gone):
        widget.do_not_save_to_config = True  # ui-config.json would freeze them
    return [(tab, words.TITLE, ELEMENT)]


def _button(name: str, **how) -> gr.Button:
    how = {"min_width": 80, **how}
    return gr.Button(LABELS.get(name, name), elem_id=f"subquad_{name}", **how)


def _number(label: str, value: int, element: str) -> gr.Number:
    """A number as it was typed or sent: the answer says what it cannot be. A slider would put it into range without a
    word, and gradio's own number fails on what no float holds."""
    number = gr.Number(value, label=label, elem_id=element, min_width=90)
    number.preprocess = lambda payload: payload
    return number


def _look(visit: Visit, *question):
    """All that follows from the question, the settings and what was measured."""
    visit.told, details = LABORATORY.look(*question)
    sentence = words.answer(visit.told.sentences, visit.told.step, _asked(*question))
    visit.shown = (sentence, LABORATORY.status(), details, LABORATORY.findings())
    return [*visit.shown, *_rescued(), *_buttons(visit)]


def _asked(_title, *numbers) -> str:
    """As the page's script writes the numbers in its fields."""
    known = all(it is None or isinstance(it, (int, float)) for it in numbers)
    return json.dumps(numbers, separators=(",", ":")) if known else ""


def _look_again(visit: Visit, *question):
    """The same, where anything has changed. Not while something is measured, which it would disturb. In any case what
    waits, and the buttons: of two answers that were on their way at once the elder may have arrived last."""
    before = visit.shown
    if not LABORATORY.measuring:
        found = _look(visit, *question)
        if visit.shown != before:
            return found
    told = [*_rescued(), *_buttons(visit)]
    return [*[gr.update()] * (LOOKED - len(told)), *told]


def _open(visit: Visit, title, *given):
    """The same when the tab comes to the front, for the size that was used last: of the last generation, or else what
    the sliders of the web UI's page stand at."""
    *typed, sliders = given
    generation = status.generation()
    images = generation.images or _as_sliders(sliders)
    last = (generation.number if generation.images else 0, images)
    used = images if last != visit.adopted else None
    visit.adopted = last
    found = _look(visit, title, *(used or typed))
    # What was typed while this was on its way stays.
    return [*found, gr.update(choices=models.titles()), *(used or [gr.update()] * len(typed))]


def _as_sliders(sent: object) -> status.Images | None:
    try:
        return status.Images(*map(int, json.loads(sent)))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


BUSY = [{"interactive": False}, {"visible": True}, {"visible": False}, {}]  # `_buttons` while this page measures


def _buttons(visit: Visit) -> list:
    """What each button looks like now, in the order of the page."""
    anyway = LABORATORY.is_to_be_confirmed(visit.run)
    offer, undoable = LABORATORY.offer(visit.run), LABORATORY.undoable()
    measure: dict[str, object] = {"value": LABELS["anyway" if anyway else "measure"]}
    if visit.told is not None:
        measure["interactive"] = visit.told.can_measure and not visit.busy
        measure["variant"] = "primary" if visit.told.may_gain and not offer else "secondary"
    states = [
        measure,
        {"visible": visit.busy},
        {"visible": bool(offer), "value": LABELS["apply"].format(changes=offer), "variant": "primary"},
        {"visible": bool(undoable), "value": LABELS["undo"].format(changes=undoable)},
    ]
    return list(map(_update, states))


def _rescued() -> list:
    """What was kept, and its buttons: on every page alike, whichever it was that said Decode."""
    told, waits, busy = LABORATORY.waiting()
    return [told, *map(_update, [{"visible": waits}, *_while_decoding(busy)])]


def _while_decoding(busy: bool) -> list[dict[str, object]]:
    """Decode, Stop and Dismiss."""
    return [{"interactive": not busy}, {"visible": busy}, {"interactive": not busy}]


def _update(state: dict[str, object]):
    return gr.update(**state)


def _request(visit: Visit):
    before = visit.run
    visit.run, message = LABORATORY.request(before)
    if visit.run is before:
        return [gr.update(), gr.update(), words.line(message), *[gr.update()] * 5]
    if visit.run.unconfirmed:
        button = gr.update(value=LABELS["anyway"])
        return [gr.update(), gr.update(), words.line(message), gr.update(), button, *[gr.update()] * 3]
    return [words.line(words.WAITS_FOR_ITS_TURN), "", "", str(time.monotonic_ns()), *map(_update, BUSY)]


def _measure(visit: Visit, *question):
    """The generator behind Measure: the answer, the plot, no message and the buttons, again and again."""
    # Of a step that gives nothing gradio would make empty answers.
    yield [gr.update()] * 7
    for answer, run in LABORATORY.measure(*question, visit.run):
        found = run.exploration
        plot = gr.update() if found is None else picture.svg(found)
        # What Cancel said is over with the answer that comes next.
        message = "" if found or run.cancelled else gr.update()
        yield [answer, plot, message, *map(_update, BUSY)]


def _measure_at_once(visit: Visit, *question):
    *_, last = _measure(visit, *question)
    return last


def _cancel(visit: Visit):
    run = visit.run
    in_queue = run is not None and run.waiting and not run.taken_up
    message = words.line(LABORATORY.cancel(run))
    if run is not None and run.withdrawn:
        return message, "", str(time.monotonic_ns()) if in_queue else gr.update()
    return message, gr.update(), gr.update()


def _apply(visit: Visit):
    return LABORATORY.apply(visit.run)


def _decode():
    """The generator behind Decode: why not, if it is not done; how far it is and at last what became of it; and its
    buttons."""
    yield ["", gr.update(), gr.update(), *map(_update, _while_decoding(True))]
    for told in LABORATORY.decode():
        yield [told, *_rescued()]


def _decode_at_once():
    *_, last = _decode()
    return last


def _stop_decoding():
    """That it stops is said where it is said how far it is."""
    told = LABORATORY.stop_decoding()
    return [told and words.line(told)]


def _dismiss():
    return [LABORATORY.dismiss()]


def _take_in(_visit: Visit, uploaded):
    path = getattr(uploaded, "name", uploaded)  # gradio 3 sends a file that it has open
    return [LABORATORY.take_in(Path(path) if path else None)]


def _and_tell(action):
    def act(*given):
        message, settings = action(*given)
        return words.line(escape(message)), json.dumps(settings)

    return act


def _answering(act, outputs: int):
    """`act`, or a sentence in the first of its outputs for whatever it raises; the console has the rest.

    A page that gets an error says no more than that there was one. Of whoever names no session gradio keeps nothing.
    """
    untouched = [gr.update()] * (outputs - 1)

    def failed(error: Exception) -> list:
        say(traceback.format_exc())
        told = Said(words.FAILED, error=f"{type(error).__name__}: {error}")
        return [words.warning(str(told)), *untouched]

    def sent(answers) -> list:
        """As JSON can carry it."""
        return [words.sendable(answer) if isinstance(answer, str) else answer for answer in answers]

    def known(given) -> list:
        return [given[0] or Visit(), *given[1:]] if given else []

    def answer(*given):
        try:
            return sent(act(*known(given)))
        except Exception as error:
            return sent(failed(error))

    def answer_again_and_again(*given):
        try:
            yield from map(sent, act(*known(given)))
        except Exception as error:
            yield sent(failed(error))

    return answer_again_and_again if inspect.isgeneratorfunction(act) else answer
