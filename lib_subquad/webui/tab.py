"""The tab "Attention": what attention costs here, and the best sizes for this device, one button away."""

from __future__ import annotations

import io
import json

import gradio as gr

from . import models, words
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


def create() -> list[tuple[gr.Blocks, str, str]]:
    """The tab, as the web UI's on_ui_tabs takes it."""
    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row(elem_id="subquad_status_row"):
            status = gr.HTML(LABORATORY.status, elem_id="subquad_status")  # a function: asked anew by every page
            refresh = gr.Button("Refresh", elem_id="subquad_refresh", scale=0, min_width=100)
        gr.Markdown(INTRODUCTION.replace("\n", " "))  # gradio 3 would break lines there
        with gr.Row():
            checkpoint = gr.Dropdown(
                models.titles(), value=models.LOADED, label="Checkpoint", elem_id="subquad_checkpoint", scale=2
            )
            width = _slider("Width", 64, models.LARGEST_SIDE, 512, 64, "subquad_width")
            height = _slider("Height", 64, models.LARGEST_SIDE, 512, 64, "subquad_height")
            batch = _slider("Batch size", 1, models.LARGEST_BATCH, 1, 1, "subquad_batch")
        with gr.Row():
            explain = gr.Button("Explain", elem_id="subquad_explain", min_width=80)
            measure = gr.Button("Measure", variant="primary", elem_id="subquad_measure", min_width=80)
            cancel = gr.Button("Cancel", elem_id="subquad_cancel", min_width=80)
            apply = gr.Button("Apply", elem_id="subquad_apply", min_width=80)
            undo = gr.Button("Undo", elem_id="subquad_undo", min_width=80)
        message = gr.HTML(elem_id="subquad_message")
        plot = gr.Image(
            label="Time against memory",
            show_label=False,  # it would lie over the legend
            elem_id="subquad_plot",
            visible=False,
            type="pil",
            interactive=False,
        )
        answer = gr.HTML(elem_id="subquad_answer")
        measurement = gr.State(None)  # this page's own
        payload = gr.Textbox(visible=False, elem_id="subquad_payload")

    with tab:
        question = [checkpoint, width, height, batch]
        refresh.click(_refresh, None, [status, checkpoint], queue=False, api_name=False)
        explain.click(_explain, question, [answer, message], queue=False, api_name=False)
        measure.click(_measure, question, [answer, plot, message, measurement], api_name=False)
        cancel.click(_cancel, measurement, message, queue=False, api_name=False)
        for button, action, given in ((apply, LABORATORY.apply, measurement), (undo, LABORATORY.undo, None)):
            done = button.click(_and_tell(action), given, [message, payload, status], queue=False, api_name=False)
            done.then(None, payload, payload, **{SCRIPT: MOVE_SLIDERS})

    for widget in (checkpoint, width, height, batch, payload):
        widget.do_not_save_to_config = True  # ui-config.json would freeze them
    return [(tab, TITLE, ELEMENT)]


def _slider(label: str, least: int, most: int, value: int, step: int, element: str) -> gr.Slider:
    return gr.Slider(least, most, value=value, step=step, label=label, elem_id=element)


def _refresh():
    return LABORATORY.status(), gr.update(choices=models.titles())


def _explain(*question):
    return LABORATORY.explain(*question), ""


def _measure(*question):
    """The generator behind Measure: the answer, the plot, no message, and the measurement, again and again."""
    yield "", gr.update(visible=False), "", None
    for answer, measurement in LABORATORY.measure(*question):
        found = measurement.exploration
        plot = gr.update() if found is None else gr.update(value=_picture(found), visible=True)
        # What Cancel said is over with the answer that comes next.
        message = "" if found or measurement.cancelled else gr.update()
        yield answer, plot, message, measurement


def _cancel(measurement):
    return words.line(LABORATORY.cancel(measurement))


def _picture(exploration):
    from PIL import Image

    from ..lab.picture import draw

    data = io.BytesIO()
    draw(exploration).savefig(data, format="png")
    return Image.open(data)


def _and_tell(action):
    def act(*given):
        message, settings = action(*given)
        return words.line(message), json.dumps(settings), LABORATORY.status()

    return act
