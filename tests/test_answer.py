"""The first sentence of the tab: right for every situation, and with one thing to do about it."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from lib_subquad import Settings
from lib_subquad import device as devices
from lib_subquad.checkpoint import AttentionLayer, Checkpoint, from_shapes
from lib_subquad.console import UserError
from lib_subquad.device import GIB, MIB
from lib_subquad.engines import fused, order, portable
from lib_subquad.engines.table import Found, class_of
from lib_subquad.lab.explain.question import Question
from lib_subquad.lab.measured import rounds
from lib_subquad.lab.survey import doctor
from lib_subquad.webui import words
from lib_subquad.webui.answer import answer
from lib_subquad.webui.status import Standing
from tests.checkpoint import public_models

ACTIVE = Standing("subquad is active")
INACTIVE = Standing("subquad is not active", "the web UI uses sdp.", "Select subquad in Settings.")
SWITCHED_OFF = Standing("subquad is selected, but not active", "the web UI has switched it off for now.")
NO_MODEL = UserError("No checkpoint is loaded yet.", "Choose one from the list.")


@pytest.fixture(autouse=True)
def a_device(monkeypatch, the_two):
    monkeypatch.setattr(doctor, "device_name", lambda device: "a <b>card</b>")
    monkeypatch.setattr(doctor, "advise", lambda here: [])


@pytest.fixture
def no_kernel(monkeypatch):
    """PyTorch has none for the VAE's one wide head."""
    why_not = fused.why_not

    def wide(problem):
        return [f"PyTorch has no fused kernel for heads {problem.width} wide"] * (problem.width > 256) or why_not(
            problem
        )

    monkeypatch.setattr(fused, "why_not", wide)


def question(name="sdxl_base", side=1024, free=8 * GIB, batch=1, settings=Settings(), **parts):
    found = from_shapes(public_models.tensors(name)) if isinstance(name, str) else name
    cpu = torch.device("cpu")
    return Question(found, side, side, batch, torch.float32, cpu, settings, free_bytes=free, **parts)


def told(asked, standing=ACTIVE, active=True):
    return answer(asked, standing, active)


def test_fused_everywhere(fused_kernel):
    found = told(question())
    assert str(found) == (
        "SDXL base at 1024 × 1024 on a <b>card</b>: PyTorch's fused kernel in all 142 layers, at most "
        f"{max(row.plan.workspace_bytes for row in question().rows()) / MIB:.1f} MiB at a time. Not measured "
        "yet: the engines are timed before the first image of this size, for up to 5 s."
    )
    assert found.step is None and found.can_measure and not found.may_gain


def test_some_shapes_without_a_kernel(fused_kernel, no_kernel):
    found = told(question())
    assert str(found) == (
        "SDXL base at 1024 × 1024 on a <b>card</b>: 2 of 6 shapes run without a fused kernel, because PyTorch has no "
        "fused kernel for heads 512 wide. Measure finds the chunk sizes that are fastest on this device."
    )
    assert found.can_measure and found.may_gain


def test_the_doctors_first_advice_is_the_step(fused_kernel, no_kernel, monkeypatch):
    monkeypatch.setattr(doctor, "advise", lambda here: [doctor.Advice("Update torch to 2.13 or newer", "a source")] * 2)
    found = told(question())
    assert str(found.step) == "Update torch to 2.13 or newer." and "Nothing to gain" not in str(found)
    assert str(told(question(vae=False)).step) == str(found.step)  # of what is fused, too


def test_no_shape_with_a_kernel(fused_kernel, no_kernel):
    found = told(question(model=False))
    assert ": no layer has a fused kernel, because PyTorch has no fused kernel for heads 512 wide." in str(found)


@pytest.mark.parametrize("settings", [{"query_chunk": 64}, {"kv_chunk": 64}, {"engine": "portable"}])
def test_what_the_user_chose_is_no_reason_to_say_that_nothing_can_be_gained(fused_kernel, settings):
    found = told(question(settings=Settings(**settings)))
    assert str(found.step) == (
        "Your own engine or chunk sizes are not what automatic takes: Measure tells which is faster."
    )
    assert found.may_gain and "Nothing to gain" not in str(found)


def test_a_choice_that_comes_to_the_same_is_none(fused_kernel):
    for settings in (Settings(query_chunk=16384), Settings(engine="fused"), Settings(measure=False)):
        assert str(told(question("sd15", 512, settings=settings))).endswith(
            " at a time. By rules there is nothing to gain; with your settings nothing is measured."
        )
    assert "Not measured yet" in str(told(question("sd15", 512, settings=Settings(memory_limit=50))))


@pytest.fixture
def measured(monkeypatch):
    """measured(finding): what is known of every kind of call."""

    def know(found):
        monkeypatch.setattr(order, "found", lambda problem: found)

    rounds.forget()
    yield know
    rounds.forget()


def test_nothing_is_said_to_gain_nothing_before_it_was_measured(fused_kernel, measured):
    asked = question("sd15", 512)
    assert str(told(asked)).endswith("Not measured yet: the engines are timed before the first image of this size, "
                                     "for up to 5 s.")  # fmt: skip
    measured(Found("fused"))
    assert str(told(asked)).endswith(" at a time. Nothing to gain.")
    measured(Found("fused").beside_others())
    assert "Not measured yet" in str(told(asked))  # not well enough
    rounds._tried.update((order.machine(row.problem.device), class_of(row.problem)) for row in asked.rows())
    assert str(told(asked)).endswith(
        "Nothing was clearly faster, but other programs disturbed the measurement: it is made again after the next "
        "start."
    )
    measured(None)
    assert str(told(asked)).endswith("By rules there is nothing to gain; measuring could not tell.")


def test_where_there_is_one_way_there_is_nothing_to_gain(fused_kernel, monkeypatch):
    monkeypatch.setattr(rounds, "candidates", lambda problem, settings: {None: settings})
    for settings in (Settings(), Settings(measure=False)):
        assert str(told(question("sd15", 512, settings=settings))).endswith(" at a time. Nothing to gain.")


def test_an_engine_that_is_set_in_vain_comes_first(fused_kernel):
    """Whatever else there is to say."""
    order.register(not_installed(), before="portable")
    try:
        found = told(question("sd15", 512, settings=Settings(engine="absent")))
        assert str(found).startswith(
            "The engine is set to absent, which computes nothing here: absent is not installed. Stable Diffusion 1.x "
            "at 512 × 512 on "
        )
        assert str(found.step) == "Set the engine to automatic, or to one that can."
        assert "othing to gain" not in str(found) and "PyTorch's fused kernel in all 34 layers" in str(found)
        large = told(question("sd15", 4096, free=100 * MIB, settings=Settings(engine="absent")))
        assert str(large).startswith("The engine is set to absent,") and "does not fit" in str(large)
    finally:
        order.withdraw("absent")


def test_an_engine_that_is_set_and_does_some_of_it(fused_kernel, no_kernel):
    found = str(told(question(settings=Settings(engine="fused"))))
    assert found.startswith(
        "The engine is set to fused, which computes 140 of 142 layers. For the others: PyTorch has no fused kernel for "
        "heads 512 wide. SDXL base at"
    )
    assert "The engine is set" not in str(told(question(settings=Settings(engine="portable"))))
    assert "The engine is set" not in str(told(question()))


def not_installed():
    return SimpleNamespace(**vars(portable) | {"NAME": "absent", "why_not": lambda problem: ["absent is not installed"],
                                               "installed": lambda: False})  # fmt: skip


def test_an_image_that_does_not_fit(fused_kernel):
    free = 100 * MIB
    found, asked = told(question(side=4096, free=free)), question(side=4096, free=free)
    assert "does not fit. Decoding it takes" in str(found) and "even in bands" in str(found)
    assert "limit leaves 70 MiB." in str(found)
    width, height = asked.largest_image()
    assert str(found.step) == f"Make images of {width} × {height} at most."
    assert told(question(side=width, free=free)).can_measure and not found.can_measure


def test_where_the_limit_is_what_is_in_the_way(fused_kernel):
    needed = question(side=2048, free=1000).halves()[0].plan.bytes
    asked = question(side=2048, free=needed * 4, settings=Settings(memory_limit=20))
    found = told(asked)
    assert str(found.step).startswith("Set the memory limit to 25 %, or make images of")
    again = question(side=2048, free=needed * 4, settings=Settings(memory_limit=25))
    assert "does not fit" not in str(told(again))


def test_where_lower_bands_are_what_is_left(fused_kernel):
    free = max(half.lowest_bytes for half in question().halves())
    found = told(question(free=free))
    assert "more than the" in str(found) and "goes on in lower bands, for which there is enough." in str(found)
    assert "does not fit" not in str(found) and found.can_measure
    assert re.fullmatch(r"Images of \d+ × \d+ at most stay inside the memory limit\.", str(found.step))
    assert "does not fit" in str(told(question(free=free - 1)))


def test_where_attention_is_what_does_not_fit(fused_kernel):
    found = told(question("flux_dev", side=4096, free=100 * MIB))
    assert "does not fit. A call of attention takes" in str(found) and "limit leaves 70 MiB." in str(found)


def test_where_bands_would_help_and_are_never_taken(fused_kernel):
    never = {"settings": Settings(vae_bands="never")}
    found = told(question(free=3 * GIB, **never))
    assert "does not fit. Decoding it takes 4096 MiB all at once, and the memory limit leaves" in str(found)
    assert re.fullmatch(r"Set VAE in bands to when needed: then it takes \d+ MiB.", str(found.step))
    assert str(told(question(free=100 * MIB, **never)).step).startswith("Make images of ")


def test_details_tell_what_the_vae_takes(fused_kernel):
    told = words.details(question(free=5 * GIB))
    assert "<bdi>VAE decoder, convolutions</bdi>" in told and "<bdi>in bands</bdi>" in told
    assert "all at once it takes 4096 MiB, more than the memory limit" in told
    assert "convolutions</bdi>" not in words.details(question("flux_dev"))


def test_where_nothing_fits(fused_kernel):
    assert str(told(question(free=1000)).step) == "Close other programs that use this device's memory."


def test_not_active_comes_before_what_would_be_computed():
    found = told(question(), INACTIVE, False)
    assert str(found) == "subquad is not active: the web UI uses sdp. Select subquad in Settings."
    assert str(found.step) == "Select subquad in Settings." and found.can_measure and not found.may_gain


def test_no_model():
    found = told(NO_MODEL)
    assert str(found) == "No checkpoint is loaded yet. Choose one from the list."
    assert str(found.step) == "Choose one from the list." and not found.can_measure


@pytest.mark.parametrize(
    ("asked", "standing", "begins"),
    [
        (NO_MODEL, INACTIVE, "subquad is not active"),
        (NO_MODEL, SWITCHED_OFF, "No checkpoint is loaded yet."),  # which is why
        (UserError("Width is 5."), INACTIVE, "Width is 5."),
        (UserError("Width is 5."), ACTIVE, "Width is 5."),
    ],
)
def test_what_can_be_done_something_about_comes_first(asked, standing, begins):
    assert str(told(asked, standing, standing is ACTIVE)).startswith(begins)


def test_switched_off_for_now_has_nothing_to_press():
    found = told(question(), SWITCHED_OFF, False)
    assert str(found) == "subquad is selected, but not active: the web UI has switched it off for now."
    assert found.step is None


def test_a_file_without_attention_of_ours():
    found = told(question(Checkpoint("LoRA")))
    assert str(found) == "LoRA: no attention layer that subquad serves." and not found.can_measure


def test_one_layer_is_told_as_one_and_many_images_as_many(fused_kernel):
    layer = AttentionLayer("one", "vae_decoder", "self", 1, 64, 8)
    assert "kernel in its one layer, at most" in str(told(question(Checkpoint("VAE", (layer,)))))
    assert "SDXL base at 4 images of 64 × 64 on" in str(told(question(side=64, batch=4)))
    assert str(told(question(Checkpoint("like Stable Diffusion 1.x", (layer,))))).startswith("A model like Stable")


def test_what_was_measured_is_told_beside_the_fused_kernel(fused_kernel, monkeypatch):
    from dataclasses import replace

    from lib_subquad.lab.explain import question as module

    plan_problem = module.plan_problem

    def measured(problem, *more):
        made = plan_problem(problem, *more)
        return replace(made, engine="portable", measured=Found("portable", 0, 0, 1.2)) if problem.width > 256 else made

    monkeypatch.setattr(module, "plan_problem", measured)
    assert "PyTorch's fused kernel in 140 layers, portable in 2 layers, at most" in str(told(question()))


def test_markup_stays_text_and_values_are_apart_from_the_words(fused_kernel):
    found = told(question(Checkpoint("a <script>", question().checkpoint.layers)))
    html = found.sentences[0].html()
    assert html == "<bdi>a &lt;script&gt;</bdi> at <bdi>1024 × 1024</bdi> on <bdi>a &lt;b&gt;card&lt;/b&gt;</bdi>:"
    assert "<script>" in str(found)


def test_the_words_between_values_are_the_same_whatever_these_are(fused_kernel):
    """The web UI's localization looks them up."""
    sizes = [" ".join(it.html() for it in told(question(side=side)).sentences) for side in (512, 1024)]
    one, other = (re.sub("<bdi>.*?</bdi>", "<bdi>", html) for html in sizes)
    assert sizes[0] != sizes[1] and one == other
    assert re.split("<bdi>", one)[1:4] == [" at ", " on ", ": "]


def test_it_needs_no_web_ui():
    import subprocess

    code = "import lib_subquad.webui.answer, sys; sys.exit('gradio' in sys.modules or 'modules' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_driver_that_does_not_answer_has_a_name(monkeypatch):
    monkeypatch.undo()

    def silent(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr("lib_subquad.identity.device_name", silent)
    assert doctor.device_name(torch.device("cpu")) == devices.kind(torch.device("cpu")) == "cpu"
