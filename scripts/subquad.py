"""The one door: the web UI runs this file, and each callback goes on to lib_subquad.webui."""

from functools import partial

from modules import script_callbacks, scripts

from lib_subquad.webui import api, axes, decoding, infotext, measuring, options, tab
from lib_subquad.webui.hosts import host

# "Reload custom script bodies" runs this file again without unloading it first.
script_callbacks.remove_current_script_callbacks()

register_options = partial(options.register, host().has_switch)
register_options()  # here too: --nowebui never asks for the settings
measuring.start()
script_callbacks.on_ui_settings(register_options)
script_callbacks.on_script_unloaded(host().undo)
script_callbacks.on_before_ui(axes.register)
script_callbacks.on_ui_tabs(tab.create)
script_callbacks.on_app_started(api.mount)
script_callbacks.on_app_started(decoding.remind)
for name, callback in host().callbacks().items():
    getattr(script_callbacks, name)(callback)
if hasattr(script_callbacks, "on_before_process"):  # some generations leave the script below out
    script_callbacks.on_before_process(infotext.begin)
    script_callbacks.on_after_process(infotext.end)
if hasattr(script_callbacks, "on_before_image_saved"):
    script_callbacks.on_before_image_saved(infotext.before_image_saved)


class Subquad(scripts.Script):
    """Writes the infotext, and measures what is new before an image; shows nothing."""

    def title(self):
        return "subquad"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def before_process(self, p, *args):
        infotext.begin_batch(p)

    def process(self, p, *args):
        infotext.begin(p)
        measuring.before(p)

    def process_batch(self, p, *args, **kwargs):
        infotext.begin_batch(p)

    def process_before_every_sampling(self, p, *args, **kwargs):
        infotext.begin_batch(p)

    def postprocess_batch(self, p, *args, **kwargs):
        infotext.finish_batch(p)

    def postprocess(self, p, processed, *args):
        infotext.postprocess(p, processed)
