"""Loading of scripts/*.py, and the scripts that see every generation."""

from __future__ import annotations

import inspect
import os
import sys
from collections import namedtuple

from modules import errors, script_callbacks, script_loading
from modules.paths_internal import extension_path, script_path

AlwaysVisible = object()

ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data: list[ScriptClassData] = []
current_basedir = script_path


class Script:
    """The base of what a script may do around a generation; every method may be left out."""

    filename = None
    alwayson = False
    is_txt2img = True
    is_img2img = False

    def title(self):
        raise NotImplementedError

    def ui(self, is_img2img):
        """Components to draw; this host draws none and passes none."""

    def show(self, is_img2img):
        return True

    def before_process(self, p, *args):
        """Before the request's override_settings take effect."""

    def process(self, p, *args):
        """After they have taken effect, before anything is computed."""

    def process_batch(self, p, *args, **kwargs):
        """The same, for one batch; this host makes one image a batch, and one batch a request."""

    def postprocess_batch(self, p, *args, **kwargs):
        """When a batch has been computed, before its infotexts are made."""

    def postprocess(self, p, processed, *args):
        """When the images are there."""


def basedir() -> str:
    """The folder of the extension whose script is being loaded."""
    return current_basedir


def load_scripts() -> None:
    """Run the extension's scripts, its folder first on `sys.path` meanwhile; earlier callbacks are forgotten."""
    global current_basedir
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    folder = os.path.join(extension_path, "scripts")
    path_before = sys.path
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".py"):
            continue
        try:
            sys.path = [extension_path, *path_before]
            current_basedir = extension_path
            _register(script_loading.load_module(os.path.join(folder, name)), os.path.join(folder, name))
        except Exception:
            errors.report(f"Error loading script: {name}", exc_info=True)
        finally:
            sys.path = path_before
            current_basedir = script_path
    scripts_txt2img.initialize_scripts(is_img2img=False)


def _register(module, path: str) -> None:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Script):
            scripts_data.append(ScriptClassData(value, path, extension_path, module))


class ScriptRunner:
    """Calls the always-visible scripts at each stage of a generation."""

    def __init__(self):
        self.alwayson_scripts: list[Script] = []

    def initialize_scripts(self, is_img2img: bool) -> None:
        self.alwayson_scripts = []
        for data in scripts_data:
            script = data.script_class()
            script.filename = data.path
            script.is_txt2img, script.is_img2img = not is_img2img, is_img2img
            if script.show(is_img2img) is AlwaysVisible:
                script.alwayson = True
                self.alwayson_scripts.append(script)

    def before_process(self, p) -> None:
        self._call("before_process", p)

    def process(self, p) -> None:
        self._call("process", p)

    def process_batch(self, p) -> None:
        self._call("process_batch", p)

    def postprocess_batch(self, p) -> None:
        self._call("postprocess_batch", p)

    def postprocess(self, p, processed) -> None:
        self._call("postprocess", p, processed)

    def _call(self, stage: str, *args) -> None:
        for script in self.alwayson_scripts:
            try:
                getattr(script, stage)(*args)
            except Exception:
                errors.report(f"Error running {stage}: {script.filename}", exc_info=True)


scripts_txt2img = ScriptRunner()
