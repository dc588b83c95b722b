"""What tests ask a web UI of the Forge family from inside. They put this folder among its extensions."""

import collections
import functools
import gc
import os
import sys
import sysconfig
import types

import torch
from modules import script_callbacks, scripts, sd_models, shared

OURS = "lib_subquad"
QUERY_KEY_VALUE = (("q", "k", "v"), ("query", "key", "value"))
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
# Where a copy is kept that no search of modules' names finds; it outlives "Reload UI".
KEPT = sys.modules.setdefault("subquad_probe_kept", types.ModuleType("subquad_probe_kept"))


class Calls:
    """Who called attention since an image began, on its own thread, and got it from the web UI's own functions or from
    ours; caller -> how many.

    What one of the web UI's own calls of another is no call; what ours leaves to it is one of its own.
    """

    def __init__(self):
        self.own, self.ours = collections.Counter(), collections.Counter()
        self._depth = 0
        self._wrapper = _code_of_ours()
        self._codes = {function.__code__ for function in map(_original, _globals()) if _attends(function)}
        self._codes.add(self._wrapper)

    def __call__(self, frame, event, argument):
        if frame.f_code not in self._codes:
            return
        if event == "return":
            self._depth -= 1
        elif event == "call":
            self._depth += 1
            self._count(frame)

    def _count(self, frame):
        caller = frame.f_back
        if self._depth == 1:
            (self.ours if frame.f_code is self._wrapper else self.own)[_name(caller)] += 1
        elif caller.f_code is self._wrapper:
            self.ours[_name(caller.f_back)] -= 1
            self.own[_name(caller.f_back)] += 1


calls = None


class Probe(scripts.Script):
    def title(self):
        return "probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process(self, p, *args):
        global calls
        calls = Calls()
        torch.manual_seed(0)  # token merging draws from PyTorch's own numbers, and not all of them seed those
        sys.setprofile(calls)

    def postprocess(self, p, processed, *args):
        sys.setprofile(None)


def routes(_page, app):
    @app.get("/probe/calls")
    def who_called():
        return {"own": +calls.own, "ours": +calls.ours}

    @app.get("/probe/holders")
    def holders():
        """The names of modules, attributes of classes and of layers that hold anything of ours."""
        found = [f"{module.__name__}.{name}" for module, name, value in _names() if _is_ours(value)]
        for cls in {value for value in _globals() if issubclass(type(value), type) and not _is_ours(value)}:
            found += [f"{cls.__qualname__}.{name}" for name, value in list(vars(cls).items()) if _is_ours(value)]
        for layer in [it for it in gc.get_objects() if issubclass(type(it), torch.nn.Module)]:
            found += [f"a {type(layer).__name__}.{name}" for name, value in vars(layer).items() if _is_ours(value)]
        return sorted(found)

    @app.get("/probe/held")
    def held():
        """The names that hold a function of attention of the web UI's own: name -> which."""
        return {f"{module.__name__}.{name}": id(value) for module, name, value in _names() if _attends(value)}

    @app.get("/probe/options")
    def options():
        """All settings; the web UI's own route may leave out those of extensions."""
        return {key: getattr(shared.opts, key) for key in shared.opts.data_labels}

    @app.get("/probe/checkpoints")
    def checkpoints():
        """The titles on the web UI's list; its own route for them may fail."""
        return [info.title for info in sd_models.checkpoints_list.values()]

    @app.get("/probe/estimate")
    def estimate(batch: int = 2, height: int = 64, width: int = 64):
        """What the web UI thinks that the loaded model needs, in bytes."""
        return float(shared.sd_model.forge_objects.unet.model.memory_required([batch, 4, height, width]))

    @app.post("/probe/copy")
    def copy():
        """Keep a copy of something of ours with heads as a late import would, and one where nothing finds it."""
        held = next(value for _, _, value in _names() if _is_ours(value) and _has_heads(value))
        late = sys.modules.setdefault("late_import", types.ModuleType("late_import"))
        late.optimized_attention = held
        KEPT.hidden = [held]
        return True

    @app.get("/probe/copies")
    def copies():
        """Of each copy: whether it is ours still, whether our attention computes it, and how far off its result is."""
        found = {"late": sys.modules["late_import"].optimized_attention, "hidden": KEPT.hidden[0]}
        return {name: _try(function) for name, function in found.items()}

    @app.post("/probe/reload")
    def reload():
        """What the button "Reload UI" does."""
        shared.state.request_restart()
        return True


def _name(frame):
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"


def _try(function):
    status = sys.modules[f"{OURS}.webui.status"]
    query, key, value = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.view(2, 24, 4, 4).transpose(1, 2) for tensor in (query, key, value))
    )
    before = status.generation().calls
    result = function(query, key, value, 4)
    return {
        "ours": _is_ours(function),
        "acts": status.generation().calls > before,
        "error": float((result - expected.transpose(1, 2).reshape(2, 24, 16)).abs().max()),
    }


def _names():
    """(module, name, value) of whatever the web UI's modules and its extensions' hold, but for ours and this one."""
    for module in list(sys.modules.values()):
        if issubclass(type(module), types.ModuleType) and module is not KEPT:
            names = vars(module)
            file, name = str(names.get("__file__")), str(names.get("__name__"))
            if (
                name.split(".")[0] != OURS
                and not file.startswith(LIBRARIES)
                and "subquad" not in os.path.basename(file)
            ):
                for name, value in list(names.items()):
                    yield module, name, value


def _globals():
    return [value for _, _, value in _names()]


def _is_ours(value):
    while type(value) in (types.MethodType, functools.partial):
        value = value.__func__ if type(value) is types.MethodType else value.func
    home = value.__module__ if type(value) is types.FunctionType or issubclass(type(value), type) else None
    return str(home or type(value).__module__).split(".")[0] == OURS


def _original(value):
    return value.original.function if type(value).__name__ == "Wrapper" and _is_ours(value) else value


def _attends(function):
    code = getattr(function, "__code__", None) if type(function) is types.FunctionType else None
    if code is None or "attention" not in code.co_name or code.co_varnames[:3] not in QUERY_KEY_VALUE:
        return False
    return code.co_argcount == 3 or code.co_varnames[3] == "heads"  # one with positions asks one of these


def _has_heads(value):
    return "heads" in _original(value).__code__.co_varnames[:4]


def _code_of_ours():
    module = sys.modules.get(f"{OURS}.webui.hosts.wrapper")
    return module and module.Wrapper.__call__.__code__


script_callbacks.on_app_started(routes)
