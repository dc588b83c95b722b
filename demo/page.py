"""The demo's page: settings on the left, the image and what it took on the right."""

from __future__ import annotations

import sys

import gradio as gr
from modules import script_callbacks

from demo import comparison, settings_panel
from demo.actions import Actions, plan_line
from demo.inputs import SIDE_MAX, SIDE_STEP, STEPS_MAX
from lib_subquad.console import UserError, say

CSS = """
.settings-section {gap: 0 !important; border: 1px solid var(--border-color-primary); border-radius: 8px;
                   padding: .3em .2em .6em !important}
.settings-section .block, .settings-section .form {border: none !important; box-shadow: none !important;
                                                   background: none !important}
.settings-section h3 {margin: .4em 0 0; padding: 0 .8em; font-weight: 600}
.help .info {display: block; font-size: .85em; line-height: 1.35; color: var(--body-text-color-subdued);
             padding: 0 1em .6em; margin-top: -.4em}
.comparison {width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums}
.comparison th, .comparison td {text-align: left; padding: .35em .6em; border: none !important}
.comparison tr {border-bottom: 1px solid var(--border-color-primary) !important}
.comparison th:nth-child(n+3), .comparison td:nth-child(n+3) {text-align: right}
.plan {padding: .3em .8em; border-left: 3px solid var(--color-accent)}
#demo_plan .wrap, #demo_table .wrap, #demo_infotext .wrap {display: none !important}  /* one bar, over the image */
#demo_settings_result {min-height: 1.6em; padding: 0 1em; color: var(--body-text-color-subdued)}
"""


def build(prompt: str, seed: int, size: tuple[int, int], steps: int) -> gr.Blocks:
    """The page, its fields filled in as given, with the tabs that the extension adds."""
    # the system's fonts: the theme's own would be fetched from the internet
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    tabs = script_callbacks.ui_tabs_callback()  # before there is a page: what is made inside one belongs to it at once
    with gr.Blocks(title="subquad demo", theme=theme, css=CSS, analytics_enabled=False) as blocks:
        with gr.Tabs(elem_id="tabs"):
            with gr.TabItem("Generate", id="generate", elem_id="tab_generate"):
                _generate_tab(prompt, seed, size, steps)
            for tab, title, elem_id in tabs:
                with gr.TabItem(title, id=elem_id, elem_id=f"tab_{elem_id}"):
                    tab.render()
    return blocks


def serve(port: int, prompt: str, seed: int, size: tuple[int, int], steps: int) -> None:
    """Serve the page on this machine until interrupted.

    Raises:
        UserError: the port is taken, or there is none of that number.
    """
    blocks = build(prompt, seed, size, steps).queue()
    try:
        app, url, _ = blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    except (OSError, OverflowError) as e:
        raise UserError(f"port {port} cannot be used: {e}") from e
    script_callbacks.app_started_callback(blocks, app)
    say(f"The demo is at {url} - press Ctrl+C to end it.", sys.stderr)
    blocks.block_thread()


def _generate_tab(prompt: str, seed: int, size: tuple[int, int], steps: int) -> None:
    with gr.Row():
        with gr.Column(scale=5):
            prompt_box = gr.Textbox(prompt, label="Prompt", lines=2, elem_id="demo_prompt")
            with gr.Row():
                width = gr.Slider(SIDE_STEP, SIDE_MAX, size[0], step=SIDE_STEP, label="Width", elem_id="demo_width")
                height = gr.Slider(SIDE_STEP, SIDE_MAX, size[1], step=SIDE_STEP, label="Height", elem_id="demo_height")
            with gr.Row():
                step_slider = gr.Slider(1, STEPS_MAX, steps, step=1, label="Sampling steps", elem_id="demo_steps")
                seed_box = gr.Number(seed, label="Seed", precision=0, elem_id="demo_seed")
            with gr.Row():
                generate_button = gr.Button("Generate", variant="primary", elem_id="demo_generate")
                compare_button = gr.Button("Compare all optimizers", elem_id="demo_compare")
            result = gr.HTML(elem_id="demo_settings_result")
            widgets = settings_panel.draw(result)
        with gr.Column(scale=6):
            image = gr.Image(type="pil", label="Image", interactive=False, elem_id="demo_image")
            plan = gr.HTML(plan_line(), elem_id="demo_plan")
            table = gr.HTML(comparison.table(), elem_id="demo_table")
            infotext = gr.Textbox(label="Infotext", lines=3, interactive=False, elem_id="demo_infotext")
    actions = Actions(list(widgets))
    inputs = [prompt_box, seed_box, width, height, step_slider, *widgets.values()]
    outputs = [image, plan, table, infotext]
    generate_button.click(actions.generate, inputs=inputs, outputs=outputs, api_name=False)
    compare_button.click(actions.compare, inputs=inputs, outputs=outputs, api_name=False)
