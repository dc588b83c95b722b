"""Web UIs whose pipelines call PyTorch's function, and that put functions of their own in its place."""

from __future__ import annotations

import functools
import re
import sys
from html import unescape
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.host import function_hosts

USE = "subquad_use"
EVERYTHING, UNET_ONLY, VAE_ONLY = "everything", "U-Net or transformer only", "VAE only"
STAGES = ("before_process", "after_process")
OWN = F.scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def callbacks(host, monkeypatch):
    """The web UI's callbacks: no list of optimizations, and one before and one after every generation."""
    function_hosts.without_a_list(monkeypatch)
    from modules import script_callbacks

    for stage in STAGES:
        monkeypatch.setitem(script_callbacks.callback_map, f"callbacks_{stage}", [])
        register = functools.partial(script_callbacks._add, stage, name=None)
        monkeypatch.setattr(script_callbacks, f"on_{stage}", register, raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    yield script_callbacks
    F.scaled_dot_product_attention = OWN


class WebUI:
    """The web UI with the extension loaded, and what a user does there."""

    def __init__(self, callbacks) -> None:
        self.callbacks = callbacks
        function_hosts.load_extension()
        from modules import processing, scripts, shared

        from lib_subquad.webui import laboratory, status
        from lib_subquad.webui.hosts import host, pipelines

        self.processing, self.scripts, self.opts, self.status = processing, scripts, shared.opts, status
        self.host, self.Pipelines = host(), pipelines.Pipelines
        self.laboratory = laboratory.LABORATORY

    def use(self, what: str) -> None:
        self.opts.set(USE, what)

    def generate(self, image, scripts: bool = True):
        """What `image()` returned, and the infotext; the extension's script is left out unless `scripts`."""

        class Request(self.processing.StableDiffusionProcessingTxt2Img):
            def sample(self):
                return image()

        request = Request(scripts=self.scripts.scripts_txt2img if scripts else None)
        self.callbacks._run("before_process", request)
        try:
            made = self.processing.process_images(request)
        finally:
            self.callbacks._run("after_process", request)
        return made.images[0], made.infotexts[0]

    @property
    def seen(self):
        return self.status.generation()


@pytest.fixture
def web_ui(callbacks):
    started = WebUI(callbacks)
    yield started
    started.host.undo()


def unet_and_vae():
    """A call of each, as a pipeline makes them: looked up when it is made."""
    torch.manual_seed(0)
    unet, vae = torch.randn(3, 2, 8, 40, 16).unbind(), torch.randn(3, 1, 1, 40, 64).unbind()
    return [
        F.scaled_dot_product_attention(*unet, attn_mask=None, dropout_p=0.0, is_causal=False),
        F.scaled_dot_product_attention(query=vae[0], key=vae[1], value=vae[2]),
    ]


def put(name: str):
    """What a web UI puts in the place of PyTorch's function, and what it is called for."""
    asked, before = [], F.scaled_dot_product_attention
    source = f"""
def {name}(query, *rest, **more):
    asked.append(query.shape[-3])
    return before(query, *rest, **more)
"""
    namespace = {"__name__": "modules.attention", "asked": asked, "before": before}
    exec(source, namespace)
    F.scaled_dot_product_attention = functools.wraps(OWN)(namespace[name])
    return F.scaled_dot_product_attention, asked


def close(found, expected):
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_which_kind_of_host_this_is(web_ui):
    assert type(web_ui.host) is web_ui.Pipelines and web_ui.host.has_switch and not web_ui.host.active


@pytest.mark.parametrize("lacking", ["diffusers", *STAGES])
def test_a_web_ui_that_lacks_one_of_these_is_none(callbacks, monkeypatch, lacking):
    if lacking == "diffusers":
        monkeypatch.delitem(sys.modules, lacking)
    else:
        monkeypatch.delattr(callbacks, f"on_{lacking}")
        monkeypatch.delattr(callbacks, f"on_{STAGES[STAGES[0] == lacking]}")
    function_hosts.load_extension()
    from lib_subquad.webui.hosts import host

    assert type(host()).__name__ == "Host"


def test_switched_off_nothing_is_touched(web_ui):
    standing, _ = web_ui.generate(lambda: F.scaled_dot_product_attention)
    assert standing is OWN and web_ui.seen.calls == 0
    assert "not active: the web UI uses PyTorch's attention. Set " in str(web_ui.host.standing())


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize(("use", "calls"), [(EVERYTHING, 2), (UNET_ONLY, 1), (VAE_ONLY, 1)])
def test_what_is_chosen_is_served_from_the_beginning_of_a_generation_to_its_end(web_ui, use, calls, scripts):
    expected = unet_and_vae()
    web_ui.use(use)
    for _ in range(2):  # counted anew each time
        close(web_ui.generate(unet_and_vae, scripts)[0], expected)
        assert web_ui.seen.calls == calls
        assert F.scaled_dot_product_attention is OWN
    unet_and_vae()
    assert web_ui.seen.calls == calls  # between generations nothing is ours


def test_settings_hold(web_ui):
    web_ui.use(EVERYTHING)
    web_ui.opts.set("subquad_engine", "portable")
    _, infotext = web_ui.generate(unet_and_vae)
    assert web_ui.seen.largest.engine == "portable"
    assert "Subquad use: everything, Subquad engine: portable" in infotext


def test_what_the_web_ui_put_there_gives_way_and_comes_back(web_ui):
    theirs, asked = put("sdpa_sage_atten")
    expected = unet_and_vae()
    asked.clear()
    web_ui.use(EVERYTHING)
    assert web_ui.host.standing().why == "without it the web UI would use SageAttention."
    close(web_ui.generate(unet_and_vae)[0], expected)
    assert asked == [] and web_ui.seen.calls == 2
    assert F.scaled_dot_product_attention is theirs


def test_what_is_not_ours_goes_to_what_the_web_ui_put_there(web_ui):
    _, asked = put("sdpa_sage_atten")
    web_ui.use(VAE_ONLY)
    web_ui.generate(unet_and_vae)
    assert asked == [8] and web_ui.seen.calls == 1


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("whose", ["modules.attention", "PyTorch"])
def test_a_web_ui_that_puts_its_own_there_anew_meanwhile(web_ui, whose, scripts):
    """The image is right, the status line says whose attention it was, and nothing of ours stays."""
    expected = unet_and_vae()
    web_ui.use(EVERYTHING)

    def put_anew():
        F.scaled_dot_product_attention = OWN
        return put("dynamic_attention")[0] if whose != "PyTorch" else OWN

    def image():
        left.append(put_anew())
        return unet_and_vae()

    left = []
    close(web_ui.generate(image, scripts)[0], expected)
    assert web_ui.seen.calls == 0 and web_ui.seen.reach.owners == {whose: 1}
    line = f"1 of 1 places that call attention were out of reach: {whose} (1) computed them."
    assert line in web_ui.status.summary()
    assert left == [F.scaled_dot_product_attention]
    close(web_ui.generate(unet_and_vae)[0], expected)
    assert web_ui.seen.calls == 2 and web_ui.seen.reach.owners == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [("flash_atten", "FlashAttention"), ("dynamic_sdpa", "dynamic attention"), ("flex_atten", "FlexAttention")],
)
def test_the_status_line_names_what_the_web_ui_has_put_there(web_ui, name, words):
    put(name)
    assert f"not active: the web UI uses {words}. Set " in str(web_ui.host.standing())


def test_a_generation_that_fails_leaves_nothing_behind(web_ui):
    web_ui.use(EVERYTHING)
    with pytest.raises(ZeroDivisionError):
        web_ui.generate(lambda: 1 / 0)
    assert F.scaled_dot_product_attention is OWN


def test_the_switch_is_heeded_at_the_next_generation(web_ui):
    for use, calls in ((EVERYTHING, 2), ("off", 0), (UNET_ONLY, 1)):
        web_ui.use(use)
        web_ui.generate(unet_and_vae)
        assert web_ui.seen.calls == calls


def test_text_encoders_ask_causally_and_pytorch_answers(web_ui):
    web_ui.use(EVERYTHING)
    text = torch.randn(3, 1, 12, 77, 64)
    expected = OWN(*text, is_causal=True)
    found, _ = web_ui.generate(lambda: F.scaled_dot_product_attention(*text, is_causal=True))
    torch.testing.assert_close(found, expected)
    assert web_ui.seen.calls == 0


def test_reloaded_it_goes_on(web_ui):
    web_ui.use(EVERYTHING)
    function_hosts.reload_extension()
    web_ui.generate(unet_and_vae)
    assert web_ui.seen.calls == 2 and F.scaled_dot_product_attention is OWN
    assert [len(web_ui.callbacks.callback_map[f"callbacks_{stage}"]) for stage in STAGES] == [1, 1]


def test_unloaded_in_the_middle_of_a_generation(web_ui):
    web_ui.use(EVERYTHING)

    def unload():
        web_ui.callbacks.script_unloaded_callback()
        return F.scaled_dot_product_attention

    assert web_ui.generate(unload)[0] is OWN


def test_the_tab_answers(web_ui):
    web_ui.use(EVERYTHING)
    web_ui.generate(unet_and_vae)
    line = unescape(re.sub(r"<[^>]*>", "", web_ui.laboratory.status()))
    assert "subquad is active" in line and "Last generation: 2 calls, no retries." in line
