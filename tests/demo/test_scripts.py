"""Scripts are loaded, unloaded and called as the web UI does it."""

import os
import sys

REGISTERS = """
from modules import script_callbacks, scripts
import sys
seen = (scripts.basedir(), sys.path[0])
def one(found): pass
def two(): pass
script_callbacks.on_list_optimizers(one)
script_callbacks.on_script_unloaded(two, name="mine")
script_callbacks.on_script_unloaded(two, name="mine")
class Mine(scripts.Script):
    def title(self): return "mine"
    def show(self, is_img2img): return scripts.AlwaysVisible
class Menu(scripts.Script):
    def title(self): return "menu"
"""


def test_load(extension, tmp_path):
    from modules import script_callbacks, scripts

    path, before = extension(REGISTERS), list(sys.path)
    scripts.load_scripts()
    module = scripts.scripts_data[0].module
    assert module.seen == (str(tmp_path), str(tmp_path))
    assert sys.path == before and scripts.basedir() != str(tmp_path)
    assert module.__name__ not in sys.modules
    registered = script_callbacks.callback_map["callbacks_script_unloaded"]
    assert [(r.script, r.callback, r.name) for r in registered] == [
        (path, module.two, "door.py/script_unloaded/mine"),
        (path, module.two, "door.py/script_unloaded/mine-1"),
    ]
    assert [type(script).__name__ for script in scripts.scripts_txt2img.alwayson_scripts] == ["Mine"]


def test_loading_again_registers_nothing_twice(extension):
    from modules import script_callbacks, scripts

    extension(REGISTERS)
    scripts.load_scripts()
    scripts.load_scripts()
    assert len(script_callbacks.callback_map["callbacks_list_optimizers"]) == 1
    assert len(scripts.scripts_data) == 2


def test_a_broken_script_is_told_and_survived(extension, capsys):
    from modules import scripts

    extension("1 / 0")
    scripts.load_scripts()
    assert "Error loading script: door.py" in capsys.readouterr().err


def test_removal(host):
    from modules import script_callbacks

    calls = []

    def callback():
        calls.append(1)

    script_callbacks.on_before_ui(callback)
    script_callbacks.before_ui_callback()
    script_callbacks.remove_callbacks_for_function(callback)
    script_callbacks.before_ui_callback()
    script_callbacks.on_before_ui(callback)
    assert script_callbacks.callback_map["callbacks_before_ui"][0].script == os.path.abspath(__file__)
    script_callbacks.remove_current_script_callbacks()
    script_callbacks.before_ui_callback()
    assert calls == [1]


def test_one_failing_callback_does_not_stop_the_next(host, capsys):
    from modules import script_callbacks

    def fails(found):
        raise RuntimeError("broken entry")

    script_callbacks.on_list_optimizers(fails)
    script_callbacks.on_list_optimizers(lambda found: found.append("x"))
    assert script_callbacks.list_optimizers_callback() == ["x"]
    assert "broken entry" in capsys.readouterr().err


def test_reload_runs_the_unload_callbacks_and_applies_only_if_none_is_left(extension):
    from modules import sd_hijack, shared

    extension("""
from modules import script_callbacks, shared
script_callbacks.on_script_unloaded(lambda: shared.loaded_hypernetworks.append("unloaded"))
""")
    from demo import host

    host.load_extension()
    host.reload_extension()
    assert shared.loaded_hypernetworks == ["unloaded"]
    assert sd_hijack.current_optimizer.name == "sdp"
    kept = sd_hijack.current_optimizer
    host.reload_extension()
    assert sd_hijack.current_optimizer is kept
