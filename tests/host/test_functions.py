"""Web UIs that hold attention as a function: on small packages that hold it the ways the real ones do."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import re
import sys
from html import unescape
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_subquad import retry
from tests.host import function_hosts
from tests.host.function_hosts import ERSATZ, FAMILIES, FORGE, NEO, REFORGE, FunctionHost

USE = "subquad_use"
EVERYTHING, UNET_ONLY, VAE_ONLY = "everything", "U-Net or transformer only", "VAE only"
close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)

pytestmark = pytest.mark.usefixtures("one_thread")


class WebUI:
    """A web UI of a family with the extension loaded, and what a user does there."""

    def __init__(self, family) -> None:
        self.fake = FunctionHost(family)
        self.family = family
        function_hosts.load_extension()
        from modules import processing, scripts, shared

        from lib_subquad.webui import api, axes, infotext, laboratory, models, options, status
        from lib_subquad.webui.hosts import functions, host, wrapper

        self.processing, self.scripts, self.opts = processing, scripts, shared.opts
        self.api, self.axes, self.infotext, self.models = api, axes, infotext, models
        self.options, self.status, self.laboratory = options, status, laboratory.LABORATORY
        self.Wrapper, self.Functions, self.host = wrapper.Wrapper, functions.Functions, host()

    def use(self, what: str) -> None:
        """Choose it in the settings; it takes effect on the next image."""
        self.opts.set(USE, what)
        self.generate()

    def generate(self, image=lambda: None, **request):
        """Make an image by `image()`: what that returned, and the infotext."""

        class Request(self.processing.StableDiffusionProcessingTxt2Img):
            def sample(self):
                return image()

        self.status.begin()
        made = self.processing.process_images(Request(scripts=self.scripts.scripts_txt2img, **request))
        return made.images[0], made.infotexts[0]

    @property
    def calls(self) -> int:
        """How many calls of the last image were ours."""
        return self.status.generation().calls

    def of(self, place: str):
        """What is held there, to be called."""
        return self.fake.held(place)

    def state(self) -> dict:
        """GET /subquad/v1/status."""
        app = FastAPI()
        app.add_api_route("/sdapi/v1/options", lambda: {})
        self.api.mount(None, app)
        return TestClient(app).get("/subquad/v1/status").json()

    def line(self) -> str:
        """The status line, as text."""
        return words_of(self.laboratory.status())


def words_of(html: str) -> str:
    """What a page shows of it."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", "", html, flags=re.S))).strip()


@pytest.fixture
def start(host, monkeypatch):
    """start(family): a web UI of that family, without a list of optimizations."""
    function_hosts.without_a_list(monkeypatch)
    started = []

    def start(family) -> WebUI:
        started.append(WebUI(family))
        return started[-1]

    yield start
    retry.forget()
    for web_ui in started:
        web_ui.host.undo()
        web_ui.fake.close()


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def any_ui(request, start):
    return start(request.param)


@pytest.fixture
def forge(start):
    return start(FORGE)


@pytest.fixture
def reforge(start):
    return start(REFORGE)


def tensors(batch=2, tokens=9, keys=None, heads=2, width=8, dtype=torch.float32):
    """Queries, keys and values, and how many heads they have."""
    shapes = ((batch, many, heads * width) for many in (tokens, keys or tokens, keys or tokens))
    return (*(torch.randn(shape).to(dtype) for shape in shapes), heads)


def maps():
    return torch.randn(3, 1, 8, 3, 4)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


# -------------------------------------------------------------------------------------------------- where it is held


def test_which_kind_of_host_this_is(any_ui):
    assert type(any_ui.host) is any_ui.Functions and any_ui.host.has_switch
    assert any_ui.host.callbacks() == {}


def test_nothing_is_touched_before_it_is_chosen(any_ui):
    held = any_ui.fake.everything()
    any_ui.generate(lambda: any_ui.of(any_ui.family.main)(*tensors()))
    assert same(any_ui.fake.everything(), held)
    assert any_ui.calls == 0 and len(any_ui.fake.calls) == 1 and not any_ui.host.active


def test_every_name_that_holds_it_and_no_other(any_ui):
    """Homes, names of choice, and late ones; not text encoders, nor implementations by their own names, nor another
    function that happens to be called the same."""
    any_ui.fake.load_late()
    family, held = any_ui.family, any_ui.fake.everything()
    any_ui.use(EVERYTHING)
    now = any_ui.fake.everything()
    ours = {place for place, value in now.items() if isinstance(value, any_ui.Wrapper)}
    assert ours == {*family.served, *family.late_served}
    assert all(now[place] is held[place] for place in family.alone)
    for place in ours:
        assert now[place].original.function is held[place]


def test_each_serves_and_each_is_counted_by_itself(any_ui):
    given, feature_maps = tensors(), maps()
    any_ui.use(EVERYTHING)

    def image():
        return [
            any_ui.of(place)(*(feature_maps if "spatial" in place or "vae" in place else given))
            for place in any_ui.family.served
        ]

    found, _ = any_ui.generate(image)
    seen = any_ui.status.generation()
    assert seen.calls == len(any_ui.family.served) == len(seen.served) and any_ui.fake.calls == []
    any_ui.opts.set(USE, "off")
    for one, other in zip(found, any_ui.generate(image)[0]):
        close(one, other)
    assert len(any_ui.fake.calls) == len(any_ui.family.served) and any_ui.calls == 0


def test_the_homes_own_calls_are_ours_too(reforge):
    """Its own code looks the name up anew each time."""
    reforge.use(EVERYTHING)
    reforge.generate(lambda: reforge.of(f"{function_hosts._REFORGE_HOME}:attend")(*tensors()))
    assert reforge.calls == 1


def test_a_text_encoder_that_asks_by_device_gets_the_web_uis_own(reforge):
    reforge.use(EVERYTHING)
    attend = reforge.of("ldm_patched.modules.clip_model:attend")
    given = tensors()
    reforge.generate(lambda: attend(None, small_input=True)(*given))
    assert reforge.calls == 0 and [name for name, _ in reforge.fake.calls] == ["attention_pytorch"]


@pytest.mark.parametrize("module", ["backend.nn.t5", "backend.nn.llm.llama", "backend.text_processing.classic_engine",
                                    "ldm_patched.modules.text_encoders.flux", "backend.nn.clip", "comfy.clip_model",
                                    "comfy.image_encoders.dino2", "comfy.audio_encoders.wav2vec2"])  # fmt: skip
@pytest.mark.parametrize("late", [False, True], ids=["", "loaded while ours is in place"])
def test_text_encoders_are_left_alone_also_where_they_hold_what_models_hold(forge, module, late):
    if late:
        forge.use(EVERYTHING)
    forge.fake.add(module, "from backend.attention import attention_function as attend")
    forge.use(EVERYTHING)
    assert forge.of(f"{module}:attend") is forge.of("backend.attention:attention_pytorch")
    forge.generate(lambda: forge.of(f"{module}:attend")(*tensors()))
    assert forge.calls == 0


def test_a_name_of_choice_for_what_the_home_chose(forge):
    forge.fake.add("extension.nodes", "from backend.attention import attention_function as sdpa, attention_pytorch")
    forge.use(EVERYTHING)
    assert isinstance(forge.of("extension.nodes:sdpa"), forge.Wrapper)
    assert not isinstance(forge.of("extension.nodes:attention_pytorch"), forge.Wrapper)


OWN = "def attention(q, k, v, heads, mask=None):\n    return host_computes('attention', locals())\n"


def test_a_models_own_function(forge):
    """SD 3 came with one; it is ours wherever the model holds it, and undone; the status speaks of what was chosen."""
    forge.fake.add("backend.nn.mmditx", OWN)
    forge.fake.add("backend.nn.mmditx_blocks", "from backend.nn.mmditx import attention as joint")
    held = forge.fake.everything()
    places = ["backend.nn.mmditx:attention", "backend.nn.mmditx_blocks:joint"]
    query, key, value, heads = tensors()
    given = (query, key, value.unflatten(-1, (heads, -1)), heads)  # as its blocks leave the values
    own, _ = forge.generate(lambda: [forge.of(place)(*tensors_of_three(given)) for place in places])
    forge.use(EVERYTHING)
    ours, _ = forge.generate(lambda: [forge.of(place)(*given) for place in places])
    assert forge.calls == 2 and len(forge.fake.calls) == 2
    for one, other in zip(ours, own):
        close(one, other)
    assert forge.state()["passed_on"] == forge.state()["out_of_reach"] == {}
    assert "without it the web UI would use PyTorch's attention" in forge.state()["standing"]
    forge.use("off")
    assert same(forge.fake.everything(), held)


def test_a_guests_in_the_place_of_a_models_own(forge):
    """It stays there, under whatever name its decorator gave it, and asks the web UI's own."""
    forge.fake.add("backend.nn.mmditx", OWN)
    own = forge.of("backend.nn.mmditx:attention")

    @functools.wraps(own)
    def guests(*args, **kwargs):
        return own(*args, **kwargs)

    forge.fake.hold("backend.nn.mmditx:attention", guests)
    forge.use(EVERYTHING)
    assert forge.of("backend.nn.mmditx:attention") is guests
    forge.generate(lambda: guests(*tensors()))
    assert forge.calls == 0 and len(forge.fake.calls) == 1


def tensors_of_three(given: tuple) -> tuple:
    return tuple(it.flatten(2) if isinstance(it, torch.Tensor) else it for it in given)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("extension.mmditx", OWN),
        ("backend.nn.t5x", OWN),
        ("backend.nn.sag", OWN.replace("def attention", "def attention_basic_with_sim")),
        ("backend.nn.rotary", OWN.replace("heads, mask=None", "pe")),
        ("backend.nn.maps", OWN.replace(", heads, mask=None", "")),
    ],
    ids=["a guest's", "a text encoder's", "of another name", "with a position", "without heads"],
)
def test_functions_that_are_no_models_own(forge, module, source):
    forge.fake.add(module, source)
    held = {place: value for place, value in forge.fake.everything().items() if place.startswith(module)}
    forge.use(EVERYTHING)
    assert all(forge.fake.everything()[place] is value for place, value in held.items())
    forge.generate(lambda: forge.of("backend.nn.unet:attention_function")(*tensors()))
    assert forge.state()["out_of_reach"] == {}


def test_the_web_ui_chooses_anew(forge):
    """As it does where attention can be changed while it runs."""
    forge.use(EVERYTHING)
    forge.fake.hold("backend.attention:attention_function", forge.of("backend.attention:attention_split"))
    forge.use(EVERYTHING)
    wrapper = forge.of("backend.attention:attention_function")
    assert isinstance(wrapper, forge.Wrapper) and wrapper == forge.of("backend.attention:attention_split")
    assert forge.of("backend.nn.unet:attention_function") == forge.of("backend.attention:attention_pytorch")


def test_late_modules_come_to_us_before_the_next_sampling(any_ui):
    """They copy what stands in the home by then, which is ours."""
    any_ui.use(EVERYTHING)
    script = any_ui.scripts.scripts_txt2img.alwayson_scripts[0]

    def image():
        any_ui.fake.load_late()
        script.process_before_every_sampling(SimpleNamespace())
        return [any_ui.of(place)(*(maps() if "vae" in place else tensors())) for place in any_ui.family.late_served]

    any_ui.generate(image)
    assert len(any_ui.status.generation().served) == any_ui.calls == len(any_ui.family.late_served)


class Shy:
    """Something that loads what it stands for when it is looked at, as many packages hold it."""

    @property
    def __class__(self):
        raise AssertionError("it was loaded")

    def __getattribute__(self, name):
        raise AssertionError("it was loaded")


def test_looking_loads_nothing(forge, tmp_path, monkeypatch, recwarn):
    (tmp_path / "subquad_lazy.py").write_text("raise AssertionError('it was loaded')", encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.find_spec("subquad_lazy")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)
    monkeypatch.setitem(sys.modules, "subquad_lazy", lazy)
    sys.modules["backend.nn.unet"].attention = Shy()
    monkeypatch.setitem(sys.modules, "subquad_shy", Shy())
    for use in (EVERYTHING, "off"):
        forge.use(use)
    from lib_subquad.webui.hosts import places

    assert forge.Functions().look(places.all_modules())
    assert type(lazy) is not ModuleType and not [it for it in recwarn if "lib_subquad" in it.filename]


# ------------------------------------------------------------------------------------------------------------- undone


@pytest.mark.parametrize("how", ["off", "reload", "undo twice"])
def test_undo_gives_back_exactly_what_was_there(any_ui, how):
    plain = any_ui.fake.everything()
    any_ui.use(EVERYTHING)
    assert not same(any_ui.fake.everything(), plain)
    any_ui.fake.load_late()
    copied = [any_ui.of(place) for place in any_ui.family.late_served]
    assert any(isinstance(it, any_ui.Wrapper) for it in copied)
    if how == "off":
        any_ui.use("off")
    elif how == "reload":
        function_hosts.reload_extension()
    else:
        any_ui.host.undo()
        any_ui.host.undo()
    now = any_ui.fake.everything()
    assert not any(isinstance(value, any_ui.Wrapper) for value in now.values())
    assert all(now[place] is value for place, value in plain.items())
    own = (it.original.function if isinstance(it, any_ui.Wrapper) else it for it in copied)
    assert all(now[place] is it for place, it in zip(any_ui.family.late_served, own))


def test_on_again_after_reload(any_ui):
    any_ui.use(EVERYTHING)
    function_hosts.reload_extension()
    any_ui.generate(lambda: any_ui.of(any_ui.family.main)(*tensors()))
    assert any_ui.calls == 1


@pytest.mark.parametrize("how", ["off", "reload", "not yet generated"])
def test_what_others_captured_steps_aside(forge, how):
    forge.use(EVERYTHING)
    captured = forge.of("backend.nn.unet:attention_function")
    partial, method = functools.partial(captured), MethodType(captured, torch.randn(1, 4, 8))
    if how == "reload":
        function_hosts.reload_extension()
    else:
        forge.opts.set(USE, "off")
    if how == "off":
        forge.generate()
    forge.status.begin()
    forge.fake.calls.clear()
    captured(*tensors())
    partial(*tensors())
    method(torch.randn(1, 4, 8), torch.randn(1, 4, 8), 2)
    assert forge.calls == 0 and len(forge.fake.calls) == 3 and not forge.status.generation().passed_on


# ------------------------------------------------------------------------------------------------------ per instance


@pytest.fixture(params=[REFORGE, ERSATZ, NEO], ids=["reForge", "ersatzForge", "Forge Nunchaku"])
def keeping(request, start):
    return start(request.param)


def made(ui):
    return ui.of(ui.family.keeper)()


def test_instances_that_keep_a_function(keeping):
    """Made before, while ours is in place, and after; each keeps the web UI's own."""
    keeper, x = keeping.of(keeping.family.keeper), torch.randn(1, 8, 3, 4)
    before = made(keeping)
    own = vars(before)["optimized_attention"]
    expected = before(x)
    keeping.use(EVERYTHING)
    meanwhile = made(keeping)
    keeping.fake.calls.clear()
    for block in (before, meanwhile, copy.deepcopy(before)):
        found, _ = keeping.generate(functools.partial(block, x))
        close(found, expected)
        assert keeping.calls == 1 and keeping.fake.calls == []
        assert vars(block)["optimized_attention"] is own and block.optimized_attention == own
        assert isinstance(block.norm, torch.nn.Identity) and [*block.state_dict()] == []
    keeping.use("off")
    assert "optimized_attention" not in vars(keeper)
    for block in (before, meanwhile, made(keeping)):
        assert block.optimized_attention is own
        keeping.generate(functools.partial(block, x))
        assert keeping.calls == 0


def test_an_instance_made_by_a_late_import_before_the_next_sampling(start):
    """Its module copied ours, and the instance kept that."""
    ui = start(NEO)
    ui.use(EVERYTHING)
    ui.fake.load_late()
    block = ui.of("backend.nn.qwen_vae:QwenBlock")()
    ui.generate(lambda: block(torch.randn(1, 8, 3, 4)))
    assert ui.calls == 1
    ui.use("off")
    ui.generate(lambda: block(torch.randn(1, 8, 3, 4)))
    assert ui.calls == 0 and block.optimized_attention == ui.of(
        "backend.attention:pytorch_attention_single_head_spatial"
    )


def test_what_a_guest_gave_an_instance_stays(keeping):
    """Assigned before or while ours is in place: it is the guest's, and not ours to replace."""

    def guest(q, k, v):
        return torch.zeros_like(q)

    before, meanwhile = made(keeping), made(keeping)
    before.optimized_attention = guest
    keeping.use(EVERYTHING)
    meanwhile.optimized_attention = guest
    for block in (before, meanwhile):
        found, _ = keeping.generate(lambda block=block: block(torch.randn(1, 8, 3, 4)))
        assert not found.any() and keeping.calls == 0 and block.optimized_attention is guest


def test_other_things_of_that_name(keeping):
    """A method, a part of the model, nothing at all, something to be called that is no function: as they were."""
    source = """
import torch

class Method(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = self.optimized_attention

    def optimized_attention(self, q, k, v):
        return "a method"

class Child(Method):
    def __init__(self):
        super().__init__()
        self.again = self.optimized_attention

class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.optimized_attention = torch.nn.Identity()

class Nothing:
    def __init__(self, optimized_attention=None):
        if optimized_attention:
            self.optimized_attention = optimized_attention

class Unhashable(dict):
    def __call__(self, q, k, v):
        return "unhashable"
"""
    module = keeping.fake.add("somewhere.model", source)
    method = vars(module.Method)["optimized_attention"]
    keeping.use(EVERYTHING)
    assert module.Method().optimized_attention(1, 2, 3) == module.Child().again(1, 2, 3) == "a method"
    assert isinstance(module.Part().optimized_attention, torch.nn.Identity)
    assert not hasattr(module.Nothing(), "optimized_attention")
    assert module.Nothing(module.Unhashable(a=1)).optimized_attention(1, 2, 3) == "unhashable"
    odd = module.Nothing(1)
    del odd.optimized_attention
    with pytest.raises(AttributeError):
        del odd.optimized_attention
    keeping.use("off")
    assert vars(module.Method)["optimized_attention"] is method
    assert "optimized_attention" not in vars(module.Child)
    assert module.Child().again(1, 2, 3) == "a method"


# --------------------------------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize(
    ("use", "unet", "vae"), [("off", 0, 0), (EVERYTHING, 1, 1), (UNET_ONLY, 1, 0), (VAE_ONLY, 0, 1)]
)
def test_the_switch(any_ui, use, unet, vae):
    any_ui.use(use)
    assert any_ui.host.active == bool(unet or vae) == any_ui.state()["active"]
    any_ui.fake.calls.clear()
    any_ui.generate(lambda: any_ui.of(any_ui.family.main)(*tensors()))
    assert any_ui.calls == unet
    if any_ui.family.spatial:
        any_ui.generate(lambda: any_ui.of(any_ui.family.spatial)(*maps()))
        assert any_ui.calls == vae
    if any_ui.family.keeper:
        any_ui.generate(lambda: made(any_ui)(torch.randn(1, 8, 3, 4)))
        assert any_ui.calls == vae
    assert not any_ui.status.generation().passed_on  # what is off is not worth a word


@pytest.mark.parametrize(("setting", "override"), [("off", EVERYTHING), (EVERYTHING, "off"), (VAE_ONLY, UNET_ONLY)])
def test_an_override_holds_for_one_request(any_ui, setting, override):
    def image():
        return any_ui.of(any_ui.family.main)(*tensors())

    any_ui.use(setting)
    for _ in range(2):
        any_ui.generate(image, override_settings={USE: override})
        assert any_ui.calls == (override != "off")
        any_ui.generate(image)
        assert any_ui.calls == (setting == EVERYTHING)


@pytest.mark.parametrize("value", ["", "no such word", None, 5, ["everything"], {"a": 1}, float("nan")])
def test_a_broken_switch_is_off_and_fails_nothing(forge, value):
    forge.use(EVERYTHING)
    forge.generate(lambda: forge.of(FORGE.main)(*tensors()), override_settings={USE: value})
    assert forge.calls == 0 and forge.opts.data[USE] == EVERYTHING


def test_however_it_is_spelled(forge):
    forge.use(" Vae ONLY ")
    assert forge.opts.data[USE] == VAE_ONLY and forge.host.parts_in_use() == ("vae",)


def test_a_word_of_another_version_is_kept_and_told(start, host, monkeypatch, tmp_path):
    from modules import shared

    config = tmp_path / "config.json"
    config.write_text(json.dumps({USE: "refiner only"}), encoding="utf8")
    shared.opts.load(str(config))
    ui = start(FORGE)
    ui.generate(lambda: ui.of(FORGE.main)(*tensors()))
    assert ui.calls == 0 and ui.opts.data[USE] == "refiner only"
    assert "Use subquad is set to 'refiner only', which is not known here" in ui.line()
    info = ui.opts.data_labels[USE]
    assert info.component_args()["choices"] == ["off", EVERYTHING, UNET_ONLY, VAE_ONLY, "refiner only"]


def test_it_is_the_first_of_the_settings_and_says_the_vaes_too(forge):
    """The VAE's own setting is there for requests that name it, but not on the page, and it decides nothing."""
    ours = [name for name in forge.opts.data_labels if name.startswith("subquad_")]
    assert ours[0] == USE and len(ours) == 11
    info = forge.opts.data_labels[USE]
    assert (info.default, info.section[0], info.infotext) == ("off", "subquad", "Subquad use")
    assert forge.opts.data_labels["subquad_vae"].section[0] is None
    assert {forge.opts.data_labels[name].section[0] for name in ours} == {"subquad", None}
    forge.opts.set("subquad_vae", False)
    forge.use(EVERYTHING)
    forge.generate(lambda: forge.of(FORGE.spatial)(*maps()))
    assert forge.calls == 1 and "subquad is active:" in forge.line()
    assert forge.opts.data_labels["subquad_vae"].infotext is None
    assert "Subquad VAE" not in forge.options.changed_from_default()


def test_there_is_no_switch_where_there_is_a_list(loaded):
    assert USE not in loaded.opts.data_labels and not hasattr(loaded.opts, USE)
    assert loaded.opts.data_labels["subquad_vae"].section[0] == "subquad"


def plot_axes(ui) -> dict:
    class AxisOption:
        def __init__(self, label, type, apply, confirm=None, choices=None):
            self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices

    class Script:
        pass

    Script.__module__ = "xyz_grid.py"
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    ui.scripts.scripts_data.append(ui.scripts.ScriptClassData(Script, "xyz_grid.py", "", module))
    for _ in range(2):
        ui.axes.register()
    return {axis.label: axis for axis in module.axis_options}


def test_its_axis(forge):
    axes = plot_axes(forge)
    assert len(axes) == 6
    axis = axes["[Subquad] Use"]
    assert axis.choices() == ["off", EVERYTHING, UNET_ONLY, VAE_ONLY]
    p = SimpleNamespace(override_settings={})
    axis.confirm(p, axis.choices())
    axis.apply(p, VAE_ONLY, axis.choices())
    assert p.override_settings == {USE: VAE_ONLY}
    with pytest.raises(RuntimeError, match="Use"):
        axis.confirm(p, ["everywhere"])


def test_no_such_axis_where_there_is_a_list(loaded):
    from modules import scripts

    from lib_subquad.webui import axes

    found = plot_axes(SimpleNamespace(scripts=scripts, axes=axes))
    assert len(found) == 5 and "[Subquad] Use" not in found


@pytest.mark.parametrize("use", ["off", EVERYTHING, UNET_ONLY, VAE_ONLY])
def test_the_infotext_brings_it_back(forge, use):
    _, text = forge.generate(override_settings={USE: use, "subquad_query_chunk": 64})
    written = dict(part.split(": ") for part in text.splitlines()[-1].split(", "))
    ours = {name: value for name, value in written.items() if name.startswith("Subquad")}
    assert ours == ({} if use == "off" else {"Subquad use": use, "Subquad query chunk": "64"})
    labels = {info.infotext: key for key, info in forge.opts.data_labels.items() if info.infotext}
    restored = {labels[name]: forge.opts.cast_value(labels[name], value) for name, value in ours.items()}
    assert forge.generate(override_settings=restored)[1] == text


# ------------------------------------------------------------------------------------------------------ like the other


def test_it_compares_as_the_original(any_ui):
    original = any_ui.of(any_ui.family.main)
    other = any_ui.of(any_ui.family.alone[-1])
    any_ui.use(EVERYTHING)
    wrapper = any_ui.of(any_ui.family.main)
    assert wrapper is not original
    assert wrapper == original and original == wrapper and not wrapper != original and not original != wrapper
    assert wrapper in [other, original] and original in [wrapper] and wrapper in {original} and {wrapper: 1}[original]
    assert wrapper != other or other is original
    assert wrapper != None and wrapper != "attention" and hash(wrapper) == hash(original)  # noqa: E711
    assert inspect.signature(wrapper) == inspect.signature(original) and callable(wrapper)
    assert (wrapper.__name__, wrapper.__module__) == (original.__name__, original.__module__)
    assert "subquad" in repr(wrapper) and original.__name__ in repr(wrapper)


def test_the_web_uis_estimate_of_memory_sees_no_stranger(forge):
    estimate = forge.fake.add(
        "backend.modules.k_model",
        """
from backend import attention

def memory_required():
    return 1.28 if attention.attention_function in [attention.attention_pytorch, attention.attention_xformers] else 1.65
""",
    ).memory_required
    for use in ("off", EVERYTHING, VAE_ONLY, "off"):
        forge.use(use)
        assert estimate() == 1.28


def test_a_guest_that_wraps_ours(forge):
    """What it does around ours is done, once, and ours inside it; and it keeps a working one when we go."""
    forge.use(EVERYTHING)
    given, done = tensors(), []

    def around(wrapper):
        @functools.wraps(wrapper)
        def guest(q, *args, **kwargs):
            done.append(q)
            return wrapper(q * 2, *args, **kwargs)

        return guest

    for place in ("backend.nn.unet:attention_function", "backend.attention:attention_function"):
        guest = around(forge.of(place))
        forge.fake.hold(place, guest)
        done.clear()
        found, _ = forge.generate(lambda place=place: forge.of(place)(*given))
        close(found, forge.fake._compute("by hand", dict(zip(("q", "k", "v", "heads"), (given[0] * 2, *given[1:])))))
        assert len(done) == forge.calls == 1 and forge.of(place) is guest
    forge.use("off")
    done.clear()
    forge.fake.calls.clear()
    forge.generate(lambda: guest(*given))
    assert len(done) == len(forge.fake.calls) == 1 and forge.calls == 0


def test_options_of_a_model_that_hold_ours_can_be_copied(any_ui):
    """Web UIs copy them for each image, with whatever a guest put there; functions are copied as themselves."""
    any_ui.use(EVERYTHING)
    for place in any_ui.family.served:
        held = any_ui.of(place)
        options = {"patches_replace": {"attn1": {("input", 1): functools.partial(held, heads=2)}}, "patch": held}
        for copied in (copy.copy(options), copy.deepcopy(options)):
            assert copied["patch"] is held
            assert copied["patches_replace"]["attn1"][("input", 1)].func is held


# ------------------------------------------------------------------------------------------------------ how it computes


@pytest.mark.parametrize("upcast", ["web UI", "always", "never"])
@pytest.mark.parametrize("family", [FORGE, REFORGE], ids=["a rule of one", "a rule of two"])
@pytest.mark.parametrize("rule", ["says nothing", "forces float32", "is asked by the call"])
def test_upcasting_follows_the_web_uis_own_rule_unless_told_otherwise(start, family, rule, upcast):
    ui = start(family)
    home = sys.modules[family.main.split(":")[0]]
    if rule == "forces float32":
        home.FORCED = torch.float32 if family is FORGE else {torch.float16: torch.float32}
    ui.opts.data["subquad_upcast"] = upcast
    ui.use(EVERYTHING)
    asked = {"attn_precision": torch.float32} if rule == "is asked by the call" else {}
    planned = []
    from lib_subquad.layers import projections

    attention = projections.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            projections, "attention", lambda *a, **k: planned.append(k["settings"].upcast) or attention(*a, **k)
        )
        ui.generate(lambda: ui.of(family.main)(*tensors(dtype=torch.float16), **asked))
    assert ui.calls == 1
    expected = "never" if rule == "says nothing" else "always"
    assert planned == [expected if upcast == "web UI" else upcast]
    if rule != "is asked by the call" and family is FORGE:  # the rule of two knows no dtype before a call
        assert ui.host.settings().upcast == planned[0]


@pytest.mark.parametrize("rule", ["def get_attn_precision():\n    return torch.float32",
                                  "get_attn_precision = torch.float32", "del get_attn_precision"])  # fmt: skip
def test_rules_of_other_kinds(forge, rule):
    exec(rule, vars(sys.modules["backend.attention"]))
    forge.use(EVERYTHING)
    forge.generate(lambda: forge.of(FORGE.main)(*tensors()))
    assert forge.calls == 1


CALLS = {
    "by position": lambda f, q, k, v, h, m: f(q, k, v, h, m),
    "by name": lambda f, q, k, v, h, m: f(q, k, v, heads=h, mask=m, attn_precision=None, skip_reshape=False),
    "no mask by name": lambda f, q, k, v, h, m: f(q, k, v, h, mask=None),
    "all by position": lambda f, q, k, v, h, m: f(q, k, v, h, m, None, False),
    "heads apart": lambda f, q, k, v, h, m: f(
        *(it.unflatten(-1, (h, -1)).transpose(1, 2) for it in (q, k, v)), h, skip_reshape=True
    ),
}


@pytest.mark.parametrize("how", CALLS)
def test_arguments_are_bound_by_the_originals_signature(any_ui, how):
    q, k, v, heads = tensors(keys=5)
    mask = torch.randn(2, 1, 9, 5)
    call = functools.partial(CALLS[how], q=q, k=k, v=v, h=heads, m=mask)
    expected = call(any_ui.of(any_ui.family.main))
    any_ui.use(EVERYTHING)
    found, _ = any_ui.generate(lambda: call(any_ui.of(any_ui.family.main)))
    assert any_ui.calls == 1 and not any_ui.status.generation().passed_on
    close(found, expected)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_keys_of_several_images_are_served(any_ui, images):
    """The web UIs' functions view keys by query's number of batch entries; IP-Adapter gives those of all its images."""
    query, _, _, heads = tensors()
    key, value = torch.randn(2, 2 * images, 4, query.shape[2])
    expected = any_ui.of(any_ui.family.main)(query, *(it.view(2, -1, query.shape[2]) for it in (key, value)), heads)
    any_ui.use(EVERYTHING)
    found, _ = any_ui.generate(lambda: any_ui.of(any_ui.family.main)(query, key, value, heads))
    assert any_ui.calls == 1 and not any_ui.status.generation().passed_on
    close(found, expected)


def test_everything_by_the_originals_own_names(reforge):
    """Of this web UI's originals one calls them query, key and value, another q, k and v."""
    reforge.use(EVERYTHING)
    q, k, v, heads = tensors()
    reforge.generate(lambda: reforge.of(REFORGE.main)(heads=heads, value=v, key=k, query=q, skip_output_reshape=True))
    assert reforge.calls == 1
    with pytest.raises(TypeError):
        reforge.of(REFORGE.main)(q=q, k=k, v=v, heads=heads)


@pytest.mark.parametrize(
    "more",
    [
        {"transformer_options": {}},
        {"transformer_options": {"block": 3}},
        {"transformer_options": None},
        {"low_precision_attention": False},
        {"scale": None},
    ],
    ids=str,
)
def test_keywords_that_say_nothing_about_exact_attention(start, more):
    ui = start(NEO)
    ui.use(EVERYTHING)
    for place in (NEO.main, "comfy.ldm.flux.math:optimized_attention"):
        ui.generate(lambda place=place: ui.of(place)(*tensors(), **more))
        assert ui.calls == 1 and not ui.status.generation().passed_on


def test_an_override_that_the_options_bring_is_honoured(start):
    """By the original, which knows how."""
    ui = start(NEO)
    ui.use(EVERYTHING)
    options = {"optimized_attention_override": lambda func, q, *args, **kwargs: torch.zeros_like(q)}
    found, _ = ui.generate(
        lambda: ui.of("comfy.ldm.flux.math:optimized_attention")(*tensors(), transformer_options=options)
    )
    assert not found.any() and ui.calls == 0
    assert ui.status.generation().passed_on == {"the argument transformer_options": 1}


GQA = (torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), 4)
PASSED_ON = {
    "heads that share keys and values": (GQA, {"skip_reshape": True}),
    "a dtype that attention is not computed in": ((*(torch.ones(1, 4, 8, dtype=torch.complex64),) * 3, 2), {}),
    "a mask of a kind that is not known": ((*tensors(), torch.ones(9, 9, dtype=torch.int32)), {}),
    "the argument scale": (tensors(), {"scale": 0.5}),
    "the argument enable_gqa": (tensors(), {"enable_gqa": True}),
}


@pytest.mark.parametrize("reason", PASSED_ON)
def test_what_is_not_served_goes_to_the_original_once_with_its_arguments_and_is_told(start, monkeypatch, reason):
    ui = start(NEO)
    monkeypatch.setattr(ui.fake, "_compute", lambda name, given: ui.fake.calls.append((name, given)) or given["q"])
    vars(sys.modules["backend.attention"])["host_computes"] = ui.fake._compute
    ui.use(EVERYTHING)
    args, kwargs = PASSED_ON[reason]
    for _ in range(2):
        ui.fake.calls.clear()
        found, _ = ui.generate(lambda: [ui.of(NEO.main)(*args, **kwargs) for _ in range(2)])
        assert found[0] is args[0] and len(ui.fake.calls) == 2
    (name, given), _ = ui.fake.calls
    assert name == "attention_flash"
    own = {name: value for name, value in kwargs.items() if name not in given}
    assert given["kwargs"] == own and all(given[name] is kwargs[name] for name in kwargs.keys() - own.keys())
    assert all(one is other for one, other in zip(given.values(), args))
    assert f"2 calls were left to the web UI's own attention: {reason} (2)." in ui.status.summary()
    assert f"2 calls were left to the web UI's own attention: {reason} (2)." in ui.line()
    state = ui.state()
    assert state["passed_on"] == {reason: 2} and state["calls"] == 0 and reason in state["summary"]


def test_in_the_vae_too(forge):
    forge.use(EVERYTHING)
    (query, _, _), (key, value) = maps(), torch.randn(2, 1, 8, 5, 4)
    forge.generate(lambda: forge.of(FORGE.spatial)(query, key, value))
    assert [name for name, _ in forge.fake.calls] == ["pytorch_attention_single_head_spatial"]
    assert forge.status.generation().passed_on == {"feature maps of different sizes": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(*tensors(), None, None, False, "one too many"),
        lambda f: f(torch.ones(1)),
        lambda f: f(*tensors(), q=1),
        lambda f: f(),
        lambda f: f(*tensors(), unknown=3),
    ],
)
def test_a_call_that_is_wrong_gets_the_originals_own_error(forge, call):
    with pytest.raises(TypeError) as expected:
        call(forge.of(FORGE.main))
    forge.use(EVERYTHING)
    with pytest.raises(TypeError) as found:
        call(forge.of(FORGE.main))
    assert str(found.value) == str(expected.value) and forge.fake.calls == []


class Refusal(Exception):
    pass


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"),
                                   RuntimeError("MPS backend out of memory"), MemoryError(), Refusal()])  # fmt: skip
@pytest.mark.parametrize("part", ["main", "spatial"])
def test_the_devices_own_error_comes_through(forge, monkeypatch, part, error):
    """Web UIs decode in tiles when the VAE runs out of memory: the original's turn would only run out again."""
    from lib_subquad.engines import fused, portable

    def fail(*args):
        raise error

    for engine in (fused, portable):
        monkeypatch.setattr(engine, "attend", fail)
    forge.use(EVERYTHING)
    with pytest.raises(type(error)) as found:
        forge.of(getattr(FORGE, part))(*(tensors() if part == "main" else maps()))
    assert found.value is error and forge.fake.calls == [] and not forge.status.generation().passed_on


# --------------------------------------------------------------------------------------------------- whose attention


def guest_from(folder: str):
    """A function that an extension of this name put there."""
    space = {"torch": torch}
    source = "def attention(q, k, v, heads, mask=None, **kwargs):\n    return torch.zeros_like(q)"
    exec(compile(source, f"/webui/extensions/{folder}/scripts/guest.py", "exec"), space)
    return space["attention"]


@pytest.mark.parametrize("when", ["before ours ever was there", "afterwards"])
def test_whose_attention_is_out_of_reach(forge, when):
    guest = guest_from("sd-webui-guest")
    if when == "afterwards":
        forge.use(EVERYTHING)
    forge.fake.hold("backend.nn.unet:attention_function", guest)

    def image():
        forge.of("backend.nn.vae:attention_function_single_head_spatial")(*maps())
        return forge.of("backend.nn.unet:attention_function")(*tensors())

    forge.opts.set(USE, EVERYTHING)
    found, _ = forge.generate(image)
    assert not found.any() and forge.calls == 1
    told = "1 of 4 places that call attention were out of reach: sd-webui-guest (1) computed them."
    assert told in forge.status.summary() and told in forge.line()
    assert forge.state()["layers"] == 4 and forge.state()["out_of_reach"] == {"sd-webui-guest": 1}
    forge.use("off")
    assert forge.of("backend.nn.unet:attention_function") is guest
    assert "out of reach" not in forge.status.summary()


def test_no_word_of_reach_where_all_is_ours(any_ui):
    any_ui.use(EVERYTHING)
    any_ui.generate(lambda: any_ui.of(any_ui.family.main)(*tensors()))
    reach = any_ui.status.generation().reach
    assert reach.owners == {} and reach.what == "places that call attention"
    assert reach.places == len(any_ui.family.served) + bool(any_ui.family.keeper)


def test_a_module_that_is_gone(forge):
    forge.use(EVERYTHING)
    del sys.modules["backend.nn.unet"].attention_function
    forge.generate(lambda: forge.of(FORGE.spatial)(*maps()))
    assert forge.calls == 1 and forge.status.generation().reach.owners == {}


# ------------------------------------------------------------------------------------------------------------ sentences


def test_the_status_line(any_ui):
    by = any_ui.family.by
    unet, vae = by.split(", and in the VAE ") if ", and" in by else (by, by)
    assert (
        f"subquad is not active: the web UI uses {by}. Set “Use subquad” (in Settings, Sub-quadratic attention, or in "
        "Quicksettings if you have put it there). No image has been made with subquad yet."
    ) in any_ui.line()
    model = "the U-Net or transformer"
    for use, expected in (
        (EVERYTHING, f"active: without it the web UI would use {by}."),
        (UNET_ONLY, f"active in {model}: without it the web UI would use {unet}. It does use {vae} in the VAE."),
        (VAE_ONLY, f"active in the VAE: without it the web UI would use {vae}. It does use {unet} in {model}."),
    ):
        any_ui.use(use)
        assert f"subquad is {expected}" in any_ui.line()
        assert any_ui.state()["standing"] == f"subquad is {expected}"
    any_ui.use("off")
    assert "subquad is not active" in any_ui.line() and not any_ui.state()["active"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("attention_basic", "plain attention"), ("attention_split", "split attention"), ("attention_xformers", "xformers"),
     ("attention_sub_quad", "its own sub-quadratic attention"), ("attention_mystery", "attention_mystery")],
)  # fmt: skip
def test_what_the_web_ui_would_use(start, monkeypatch, name, words):
    source = FORGE.modules["backend.attention"].replace("attention_function = attention_pytorch", "").rstrip()
    source += "\n" + function_hosts.implementations(("attention_mystery",), function_hosts._FORGE_HEADS)
    source += f"\nattention_function = {name}"
    ui = start(FORGE.__class__({"backend.attention": source}, {}, ("backend.attention:attention_function",), (), ()))
    assert f"the web UI uses {words}, and in the VAE PyTorch's attention" in ui.line()


# ----------------------------------------------------------------------------------------------------- loaded models


@pytest.fixture(scope="module")
def tiny():
    """State dicts of a real checkpoint's names, of `model.` and `first_stage_model.`, and what they describe."""
    pytest.importorskip("ldm.modules.attention", reason="stable-diffusion-sdkit is not installed")
    from demo.model import random_model

    return {name: tensor.half() for name, tensor in random_model().state_dict().items()}


class Holder(torch.nn.Module):
    """A part of a model, in whatever classes, that shows the tensors given."""

    def __init__(self, tensors, **dtypes):
        super().__init__()
        self._tensors = tensors
        vars(self).update(dtypes)

    def state_dict(self, *args, **kwargs):
        return self._tensors


def engine_of(tiny, filename="", **dtypes):
    """A loaded model as this family has it: parts in `forge_objects`, and no `state_dict` of its own."""

    def part(prefix):
        return {name.removeprefix(prefix): it for name, it in tiny.items() if name.startswith(prefix)}

    return SimpleNamespace(
        sd_checkpoint_info=SimpleNamespace(filename=filename),
        forge_objects=SimpleNamespace(
            unet=SimpleNamespace(model=Holder(part("model."), **dtypes)),
            vae=SimpleNamespace(first_stage_model=Holder(part("first_stage_model."))),
        ),
    )


def explained(ui, **how) -> set[str]:
    """The parts of a model that Explain has rows of."""
    return {row.part for row in ui.models.question(how.get("title"), 64, 64, 1).rows()}


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        ("off", {"unet", "vae_decoder"}),  # as it would be
        (EVERYTHING, {"unet", "vae_decoder"}),
        (UNET_ONLY, {"unet"}),
        (VAE_ONLY, {"vae_decoder"}),
    ],
)
def test_explain_tells_of_the_loaded_model_what_the_switch_makes_ours(forge, tiny, use, parts):
    from modules import sd_models

    sd_models.model_data.sd_model = engine_of(tiny)
    forge.opts.set(USE, use)
    assert explained(forge) == parts
    answer = words_of(forge.laboratory.look(None, 64, 64, 1)[1])
    assert ("attention layers in the U-Net" in answer) == ("unet" in parts)
    assert "in the VAE" in answer or parts == {"unet"}


def test_the_dtype_is_the_loaded_models(forge, tiny):
    from modules import sd_models

    assert forge.host.dtype() == torch.float32
    for found in (torch.bfloat16, torch.float16):
        sd_models.model_data.sd_model = engine_of(tiny, computation_dtype=found, dtype=torch.int8)
        assert forge.host.dtype() == found
    sd_models.model_data.sd_model = engine_of(tiny, manual_cast_dtype=None, dtype=torch.float16)
    assert forge.host.dtype() == torch.float16


class StandIn:
    """What is there before the first image."""

    def __init__(self):
        self.cond_stage_model = None
        self.chunk_length = 75


@pytest.mark.parametrize(
    "model", [StandIn(), None, SimpleNamespace(forge_objects=None)], ids=["stand-in", "none", "empty"]
)
@pytest.mark.parametrize("listed", ["no list at all", "an empty list", "a file that is gone", "a ckpt"])
def test_before_the_first_image_without_a_checkpoint_to_read(forge, tmp_path, monkeypatch, model, listed):
    from modules import sd_models

    sd_models.model_data.sd_model = model
    (tmp_path / "old.ckpt").write_bytes(b"")
    if listed != "no list at all":
        files = {"a file that is gone": tmp_path / "gone.safetensors", "a ckpt": tmp_path / "old.ckpt"}
        found = {"one": SimpleNamespace(filename=str(files[listed]))} if listed in files else {}
        sd_models.checkpoints_list = sd_models.checkpoint_aliases = found
        forge.opts.data["sd_model_checkpoint"] = "one"
    answer = words_of(forge.laboratory.look(None, 64, 64, 1)[1])
    step = "Choose one from the list, or make an image first."
    if listed in ("no list at all", "an empty list"):
        step = "Put one into the web UI's folder of checkpoints."
    assert answer == f"No checkpoint is loaded yet. {step}"


def test_before_the_first_image_the_chosen_checkpoint_answers(forge, tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    from modules import sd_models

    file = tmp_path / "tiny.safetensors"
    safetensors.save_file({name: it.contiguous().clone() for name, it in tiny.items()}, str(file))
    sd_models.model_data.sd_model = StandIn()
    info = SimpleNamespace(filename=str(file))
    sd_models.checkpoint_aliases = {"tiny": info, "tiny.safetensors [1234]": info}
    sd_models.checkpoints_list = {"tiny.safetensors [1234]": info}
    forge.opts.data["sd_model_checkpoint"] = "tiny"
    assert explained(forge) == explained(forge, title="tiny.safetensors [1234]") == {"unet", "vae_decoder"}
    found = forge.models.question(None, 64, 64, 1)
    assert "It is not loaded yet: the web UI loads it for the next image." in found.notes
    assert "It is not loaded yet" in forge.laboratory.look(None, 64, 64, 1)[1]
    sd_models.model_data.sd_model = engine_of(tiny, str(file))
    found = forge.models.question(None, 64, 64, 1)
    assert not any("not loaded" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------------- the seam


def test_an_a1111_module_that_needs_what_is_not_there_is_no_such_web_ui(host, monkeypatch):
    """A web UI may keep a file of that name whose own imports fail."""
    function_hosts.without_a_list(monkeypatch)
    broken = ModuleType("modules.sd_hijack")
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(ModuleNotFoundError("No module named 'sgm'", name="sgm"))
    monkeypatch.setitem(sys.modules, "modules.sd_hijack", broken)
    fake = FunctionHost(FORGE)
    try:
        from lib_subquad.webui.hosts import host as found

        assert type(found()).__name__ == "Functions"
    finally:
        fake.close()
