"""The tab "Attention": what attention costs here, and the best sizes for this device, one button away."""

from __future__ import annotations

import inspect
import json
import time
import traceback
from html import escape

import gradio as gr
from gradio.context import Context
from modules import shared

from ..console import say
from . import models, words
from . import plot as picture
from .laboratory import LABORATORY

TITLE = "Attention"
ELEMENT = "subquad_tab"
# The parameter that takes JavaScript changed its name in gradio 4.
SCRIPT = "_js" if gr.__version__.startswith("3.") else "js"

INTRODUCTION = """\
Attention is the part of the model in which every piece of the image looks at every other one; it is what takes the most
memory in large images. *Explain* shows at once how it will be computed for an image of your size. *Measure* tries
engines and chunk sizes on this device, which takes a minute or so, longer for large images, and *Apply* sets the best
one.
"""

FORGETTING = """\
Before the first image of a new size the exact engines are timed on this device for a few seconds, and *automatic* takes
the fastest from then on. They are timed again when the device, its driver or torch changes. If other programs were busy
meanwhile, forget what was measured: it is measured anew before the next image.
"""

# Settings pages that are open show a value until they are told another; the web UI's own widgets carry these ids, in
# Quicksettings too.
MOVE_SLIDERS = """
(payload) => {
    const setter = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
    const root = typeof gradioApp === "function" ? gradioApp() : document;
    for (const [key, value] of Object.entries(JSON.parse(payload || "{}"))) {
        // not the range: it would round the value to its step
        for (const input of root.querySelectorAll(`[id="setting_${key}"] input:not([type=range])`)) {
            if (input.type === "radio") {
                if (input.value === String(value) && !input.checked) input.click();
                continue;
            }
            setter.call(input, value);
            input.dispatchEvent(new Event("input", {bubbles: true}));
        }
    }
    return payload;
}
"""


class Tab(gr.Blocks):
    """Blocks that are told when the host shows them: at each time, `on_show` runs.

    The host draws us inside a tab of its own, and only that one knows when it is opened.
    """

    on_show: tuple | None = None

    def render(self):
        super().render()
        if isinstance(Context.block, gr.TabItem) and self.on_show:
            act, outputs = self.on_show
            Context.block.select(act, None, outputs, queue=False, show_progress="hidden", api_name=False)
        return self


def create() -> list[tuple[gr.Blocks, str, str]]:
    """The tab, as the web UI's on_ui_tabs takes it."""
    state_now = _answering(_refresh, 2)
    with Tab(analytics_enabled=False) as tab:
        with gr.Row(elem_id="subquad_status_row"):
            status = gr.HTML(lambda: state_now()[0], elem_id="subquad_status")  # a function: asked anew by every page
            refresh = gr.Button("Refresh", elem_id="subquad_refresh", scale=0, min_width=100)
        gr.Markdown(INTRODUCTION.replace("\n", " "))  # gradio 3 would break lines there
        with gr.Row():
            checkpoint = gr.Dropdown(
                models.titles(), value=models.LOADED, label="Checkpoint", elem_id="subquad_checkpoint", scale=2
            )
            width, height = _number("Width", 512, "subquad_width"), _number("Height", 512, "subquad_height")
            batch = _number("Batch size", 1, "subquad_batch")
        with gr.Row():
            explain = gr.Button("Explain", elem_id="subquad_explain", min_width=80)
            measure = gr.Button("Measure", variant="primary", elem_id="subquad_measure", min_width=80)
            cancel = gr.Button("Cancel", elem_id="subquad_cancel", min_width=80)
            apply = gr.Button("Apply", elem_id="subquad_apply", min_width=80)
            undo = gr.Button("Undo", elem_id="subquad_undo", min_width=80)
        message = gr.HTML(elem_id="subquad_message")
        plot = gr.HTML(elem_id="subquad_plot", visible=False)
        answer = gr.HTML(elem_id="subquad_answer")
        with gr.Accordion("What was measured", open=False, elem_id="subquad_measured_details"):
            gr.Markdown(FORGETTING.replace("\n", " "))
            forget = gr.Button("Forget what was measured", elem_id="subquad_forget")
        run = gr.State(None)  # this page's own
        payload = gr.Textbox(visible=False, elem_id="subquad_payload")
        gone = gr.Textbox(visible=False, elem_id="subquad_gone")  # changes when a Measure that waited was cancelled

    def on(event, act, inputs, outputs, **how):
        return event(_answering(act, len(outputs)), inputs, outputs, api_name=False, **how)

    unqueued = {"queue": False}
    with_queue = not getattr(shared.cmd_opts, "no_gradio_queue", False)
    with tab:
        question = [checkpoint, width, height, batch]
        on(refresh.click, _refresh, None, [status, checkpoint], **unqueued)
        on(explain.click, _explain, question, [answer, message, plot], **unqueued)
        # Two steps: what is to be measured is known before gradio's queue lets it begin, so that it can be cancelled.
        asked = on(measure.click, _request, run, [answer, plot, message, run], **unqueued)
        measured, shown = [*question, run], [answer, plot, message]
        if with_queue:
            measuring = on(asked.then, _measure, measured, shown)
            gone.change(None, cancels=measuring)  # one that runs is not torn off: it ends with what it has measured
        else:  # gradio neither lets a function answer twice nor starts with anything that could be cancelled
            on(asked.then, _measure_at_once, measured, shown, **unqueued)
        on(cancel.click, _cancel, run, [message, answer, gone], **unqueued)
        for button, action, given in (
            (apply, LABORATORY.apply, run),
            (undo, LABORATORY.undo, None),
            (forget, LABORATORY.forget, None),
        ):
            done = on(button.click, _and_tell(action), given, [message, payload, status], **unqueued)
            done.then(None, payload, payload, **{SCRIPT: MOVE_SLIDERS})
        tab.on_show = (state_now, [status, checkpoint])

    for widget in (checkpoint, width, height, batch, payload, gone):
        widget.do_not_save_to_config = True  # ui-config.json would freeze them
    return [(tab, TITLE, ELEMENT)]


def _number(label: str, value: int, element: str) -> gr.Number:
    """A number as it was typed or sent: the answer says what it cannot be. A slider would put it into range without a
    word, and gradio's own number fails on what no float holds."""
    number = gr.Number(value, label=label, elem_id=element, min_width=90)
    number.preprocess = lambda payload: payload
    return number


def _refresh():
    return LABORATORY.status(), gr.update(choices=models.titles())


def _explain(*question):
    return LABORATORY.explain(*question), "", gr.update(visible=False)  # the plot is of another answer


def _request(before):
    run, message = LABORATORY.request(before)
    if run is before:
        return gr.update(), gr.update(), words.line(message), run
    waiting = words.CSS + words.line("Measuring begins as soon as it is its turn.")
    return waiting, gr.update(visible=False), "", run


def _measure(*question):
    """The generator behind Measure: the answer, the plot, and no message, again and again."""
    yield gr.update(), gr.update(), gr.update()  # of a step that gives nothing gradio would make empty answers
    for answer, run in LABORATORY.measure(*question):
        found = run.exploration
        plot = gr.update() if found is None else gr.update(value=picture.svg(found), visible=True)
        # What Cancel said is over with the answer that comes next.
        message = "" if found or run.cancelled else gr.update()
        yield answer, plot, message


def _measure_at_once(*question):
    *_, last = _measure(*question)
    return last


def _cancel(run):
    waited = run is not None and run.waiting
    message = words.line(LABORATORY.cancel(run))
    if waited and run.withdrawn:
        return message, "", str(time.monotonic_ns())
    return message, gr.update(), gr.update()


def _and_tell(action):
    def act(*given):
        message, settings = action(*given)
        return words.line(escape(message)), json.dumps(settings), LABORATORY.status()

    return act


def _answering(act, outputs: int):
    """`act`, or a sentence in the first of its outputs for whatever it raises; the console has the rest.

    A page that gets an error says no more than that there was one.
    """
    untouched = [gr.update()] * (outputs - 1)

    def failed(error: Exception) -> list:
        say(traceback.format_exc())
        return [words.CSS + words.warning(f"That did not work: {type(error).__name__}: {error}"), *untouched]

    def sent(answers) -> list:
        """As JSON can carry it."""
        return [words.sendable(answer) if isinstance(answer, str) else answer for answer in answers]

    def answer(*given):
        try:
            return sent(act(*given))
        except Exception as error:
            return sent(failed(error))

    def answer_again_and_again(*given):
        try:
            yield from map(sent, act(*given))
        except Exception as error:
            yield sent(failed(error))

    return answer_again_and_again if inspect.isgeneratorfunction(act) else answer
