"""The web UI with its page, started with PyTorch's attention: our settings, tab and axes there, and "Reload UI"."""

from __future__ import annotations

import numpy as np
import pytest

from lib_subquad.settings import OPTIONS
from tests.attention_tab import DETAILS, SENTENCE, AttentionTab, cut_off, from_answer_to_undo, wait_for
from tests.forge.conftest import FARTHEST, USES
from tests.forge.models import CALLS
from tests.pages import generate, open_page, open_section, open_tab, set_query_chunk
from tests.real_tab import (
    it_reads_at_every_width_and_for_everyone,
    the_answer_comes_by_itself,
    the_status_is_current,
    whoever_makes_others_wait_is_asked_first,
)
from tests.servers import infotexts

PYTORCH = "--attention-pytorch"
QUICKSETTINGS = ("quicksettings_list", "quick_setting_list")  # the option's names
XYZ = "x/y/z plot"


@pytest.fixture(scope="module")
def server(forge):
    flags = [PYTORCH] if forge.knows(PYTORCH) else []
    with forge.running(*flags, **dict.fromkeys(QUICKSETTINGS, ["sd_model_checkpoint", "subquad_use"])) as running:
        yield running
    forge.check_log(running, *flags)


@pytest.fixture(scope="module")
def page(server, browser):
    page = open_page(browser, server)
    yield page
    page.close()


def test_beside_pytorchs_attention(forge, server):
    """With its own flag it keeps that for what it estimates memory by, and names it in the status."""
    if not forge.knows(PYTORCH):
        pytest.skip(f"it has no flag {PYTORCH}")
    assert "the web UI uses PyTorch's attention" in server.status()["standing"]
    server.check_ours()
    ours = server.call("/probe/estimate")
    server.use("off")
    server.generate()
    print(f"{ours} bytes")
    assert server.call("/probe/estimate") == ours


def test_the_section_shows_every_setting_with_its_help(page):
    assert shown_settings(page) == [name for name in OPTIONS if name != "vae"]  # the switch is in Quicksettings
    shown = page.locator("#settings_subquad")
    shown.get_by_text(OPTIONS["retry"].help).wait_for()  # help comes by JavaScript
    for name, option in OPTIONS.items():
        assert (option.label in shown.inner_text() and option.help in shown.inner_text()) == (name != "vae")


def shown_settings(page) -> list[str]:
    """The names of the settings in our section, as they stand there, each once."""
    open_section(page, "Sub-quadratic attention")
    ids = page.evaluate("[...document.querySelectorAll('#settings_subquad [id^=setting_subquad_]')].map(it => it.id)")
    names = [it.removeprefix("setting_subquad_") for it in ids]
    return [name for name in names if name in (*OPTIONS, "use")]


def test_the_switch_in_quicksettings(page, server):
    """Live, and a page that shows it in two places shows the same in both."""
    page.locator("#quicksettings #setting_subquad_use label", has_text="everything").first.click()
    page.wait_for_timeout(200)
    for _ in range(100):  # the page tells the server when it is ready to
        if server.options()["subquad_use"] == "everything":
            break
        page.wait_for_timeout(200)
    _, infotext = server.generate()
    assert "Subquad use: everything" in infotext and server.status()["calls"] == CALLS + 1


def test_apply_takes_effect_at_the_next_image(page, server):
    assert "subquad_query_chunk" in set_query_chunk(page, 192)
    _, infotext = server.generate(override_settings={"subquad_use": "everything"})
    assert "Subquad query chunk: 192" in infotext and server.status()["query_chunk"] == 192


def test_an_infotext_brings_the_settings_back(browser, server):
    """As overrides of the next image, with the page's own button."""
    override = {"subquad_use": "VAE only", "subquad_engine": "portable"}
    _, infotext = server.generate(override_settings=override)
    page = open_page(browser, server)  # one of its own: what it was brought stays there
    open_tab(page, "txt2img")
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#paste")
    for part in ("Subquad use: VAE only", "Subquad engine: portable"):
        wait_for(page, "#txt2img_override_settings", part)
    generate(page, steps=1)
    for part in ("Subquad use: VAE only", "Subquad engine: portable"):
        wait_for(page, "#html_info_txt2img", part)
    page.close()
    assert server.status()["calls"] == 1
    assert server.options()["subquad_use"] == "off"


def test_the_tab_says_that_it_is_off_and_what_to_do(page, server):
    server.use("off")
    server.generate()
    tab = AttentionTab(page).open(side=512)
    tab.wait_for("#subquad_status", "subquad is not active: the web UI uses")
    tab.wait_for("#subquad_status", "The last generation used nothing of subquad.")
    tab.wait_for(SENTENCE, "subquad is not active: the web UI uses")
    tab.unfold()
    tab.wait_for(DETAILS, "attention layers in the U-Net")
    assert "Set “Use subquad”" in tab.sentence and cut_off(page) == []


@pytest.mark.parametrize(
    ("label", "values", "written"),
    [
        ("[Subquad] Use", "off, VAE only", ["", "Subquad use: VAE only"]),
        ("[Subquad] Query chunk", "64, 128", ["Subquad query chunk: 64", "Subquad query chunk: 128"]),
        ("[Subquad] KV chunk", "0, 200", ["", "Subquad KV chunk: 200"]),
        ("[Subquad] Engine", "automatic, portable", ["", "Subquad engine: portable"]),
        ("[Subquad] Memory limit", "70, 30", ["", "Subquad memory limit: 30"]),
    ],
)
def test_an_axis(server, label, values, written):
    server.use("off" if label == "[Subquad] Use" else "everything")
    written_into = infotexts(plot(server, label, values))[-2:]  # after the grid
    assert len(written_into) == 2
    for infotext, part in zip(written_into, written):
        assert part in infotext and (part != "" or label.removeprefix("[Subquad] ").lower() not in infotext)
    assert server.options()["subquad_query_chunk"] == 0


def plot(server, label: str, values: str) -> dict:
    info = next(info for info in server.call("/sdapi/v1/script-info") if info["name"] == XYZ and not info["is_img2img"])
    labels = [argument["label"] for argument in info["args"]]
    types = info["args"][labels.index("X type")]["choices"]
    assert sum(choice == label for choice in types) == 1
    arguments = [argument["value"] for argument in info["args"]]
    wanted = {
        "X type": types.index(label), "X values": values, "Y type": 0, "Z type": 0, "Draw legend": False,
        "Include Sub Images": True, "Use text inputs instead of dropdowns": True,
    }  # fmt: skip
    for name, value in wanted.items():
        arguments[labels.index(name)] = value
    request = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "steps": 1, "sampler_name": "Euler"}
    return server.call("/sdapi/v1/txt2img", {**request, "script_name": XYZ, "script_args": arguments})


def test_from_answer_to_undo(page, server):
    server.use("everything")
    from_answer_to_undo(page, lambda value: set_query_chunk(page, value), lambda: generate(page, steps=1))
    assert server.options()["subquad_query_chunk"] == 1
    server.options(subquad_query_chunk=0)


def test_the_answer_comes_by_itself(page, server):
    the_answer_comes_by_itself(page, lambda ours: server.use("everything" if ours else "off"))


def test_the_status_is_current(page, server):
    server.use("everything")
    the_status_is_current(page, 5 * CALLS + 1, width=64, height=64, steps=5)


def test_whoever_makes_others_wait_is_asked_first(page):
    whoever_makes_others_wait_is_asked_first(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_reads_at_every_width_and_for_everyone(page, theme):
    it_reads_at_every_width_and_for_everyone(page, theme)


def test_reload_ui(page, server):
    """We are in force as before, once, and each of our settings is drawn once, the switch first."""
    shown = [name for name in QUICKSETTINGS if name in server.options()]
    server.options(**{name: ["sd_model_checkpoint"] for name in shown})
    server.use("everything")
    image, _ = server.generate()
    held = server.holders()
    server.reload()
    assert server.holders() == []
    again, infotext = server.generate()
    assert np.abs(again - image).max() == 0 and "Subquad use: everything" in infotext
    assert server.holders() == held
    status = server.status()
    assert status["active"] and status["calls"] == CALLS + 1 and status["out_of_reach"] == {}
    reloaded = open_page(page.context.browser, server)
    assert shown_settings(reloaded) == ["use", *(name for name in OPTIONS if name != "vae")]
    assert all(use in reloaded.locator("#settings_subquad").inner_text() for use in USES)
    reloaded.close()


def test_reload_ui_without_us(server):
    """Nothing holds anything of ours, and what was captured does what the web UI's own does. The last of this file."""
    server.use("off")
    own, _ = server.generate()
    server.use("everything")
    server.generate()
    server.call("/probe/copy", {})
    server.options(disabled_extensions=["subquad"])
    server.reload()
    assert server.holders() == []
    with pytest.raises(AssertionError, match="404"):
        server.status()
    copies = server.call("/probe/copies")
    assert (copies["late"]["ours"], copies["hidden"]["ours"]) == (False, True)
    assert all(copy["error"] < 1e-5 and not copy["acts"] for copy in copies.values())
    image, infotext = server.generate()
    assert np.abs(image - own).max() == 0 and "Subquad" not in infotext
    assert server.holders() == [] and not server.calls()["ours"]
    server.options(disabled_extensions=[])
    server.reload()
    image, infotext = server.generate()
    assert np.abs(image - own).max() <= FARTHEST and "Subquad use: everything" in infotext
    assert server.status()["calls"] == CALLS + 1
