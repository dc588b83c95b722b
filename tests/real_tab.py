"""What the tab "Attention" must do on a real web UI's own page, whichever that is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from tests.accessibility import turned_around, violations
from tests.attention_tab import ANSWER, DETAILS, SENTENCE, AttentionTab, cut_off
from tests.pages import open_page, set_number


def the_answer_comes_by_itself(page, use: Callable[[bool], None]) -> None:
    """Right in four situations. The fifth, no model, needs a web UI of its own. `use`: whether subquad is, from now
    on."""
    server = page.server
    use(True)
    tab = AttentionTab(page).open(side=512)
    tab.wait_for(SENTENCE, "at 512 × 512 on")
    assert "PyTorch's fused kernel in all" in tab.sentence
    assert tab.sentence.endswith("By rules there is nothing to gain; with your settings nothing is measured.")
    server.options(subquad_engine="portable")
    tab.wait_for(SENTENCE, "no layer has a fused kernel, because the engine is set to portable.")
    assert tab.sentence.endswith("Measure tells which is faster.")
    server.options(subquad_engine="automatic", subquad_memory_limit=10)
    for name, value in (("width", 16384), ("height", 16384), ("batch", 64)):
        set_number(page, f"subquad_{name}", value)
    tab.wait_for(SENTENCE, "at 64 images of 16384 × 16384 on")
    assert "this does not fit. A call of attention takes" in tab.sentence
    tab.wait_for_buttons()  # nothing can be pressed
    use(False)
    tab.wait_for(SENTENCE, "subquad is not active: the web UI uses")
    server.options(subquad_memory_limit=70)
    set_number(page, "subquad_batch", 1)
    use(True)
    tab.wait_for(SENTENCE, "at 16384 × 16384 on")


def the_status_is_current(page, calls: int, **request) -> None:
    """Without a click, of an image that somebody else makes, which takes so many calls; what was typed stays."""
    tab = AttentionTab(page).open(side=64)
    page.server.generate(**request)
    tab.wait_for("#subquad_status", f"Last generation: {calls} calls")
    assert tab.size == ("64", "64")


@contextlib.contextmanager
def an_image_that_takes_long(server):
    """From its first step until it is interrupted, at the end."""
    size = {"width": 256, "height": 256}  # a step soon ends, and so does decoding it
    making = threading.Thread(target=server.generate, kwargs={**size, "steps": 1000})
    making.start()
    while server.call("/sdapi/v1/progress?skip_current_image=true")["progress"] == 0:
        assert making.is_alive()
        time.sleep(0.2)
    try:
        yield
        assert making.is_alive()
    finally:
        server.ask("/sdapi/v1/interrupt", {})
        making.join()


def whoever_makes_others_wait_is_asked_first(page) -> None:
    """And waits until the image is made, or takes it back meanwhile."""
    with an_image_that_takes_long(page.server):
        tab = AttentionTab(page).open(side=64)
        for cancelled in (True, False):
            tab.click("measure")
            tab.wait_for("#subquad_message", "Others use this web UI now: an image is being made.")
            tab.wait_for("#subquad_measure", "Measure all the same")
            tab.wait_for_buttons("measure")
            tab.click("measure")
            tab.wait_for(ANSWER, "An image is being made: measuring begins when it is done.")
            tab.wait_for_buttons("cancel")
            if cancelled:
                tab.click("cancel")
                tab.wait_for("#subquad_message", "Cancelled before its turn came: nothing was measured.")
                tab.wait_for_buttons("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")


def it_reads_at_every_width_and_for_everyone(page, theme: str) -> None:
    """After Measure, everything unfolded, on a page of its own."""
    opened = open_page(page.context.browser, page.server, f"/?__theme={theme}", viewport={"width": 1280, "height": 800})
    tab = AttentionTab(opened).open(side=64)
    for fold in ("details_fold", "about"):
        tab.unfold(fold)
    tab.wait_for(DETAILS, "attention layers in the U-Net")
    tab.click("measure")
    tab.wait_for(f"{ANSWER} table", "recommended")
    opened.wait_for_selector("#subquad_plot svg[role=img]")
    for width in (1280, 768, 390):
        for zoom in (1, 2):  # as the browser does: half as many pixels, each twice as large
            opened.set_viewport_size({"width": width // zoom, "height": 800})
            opened.wait_for_timeout(300)
            assert cut_off(opened) == [], f"at {width} pixels, {zoom * 100} %"
            assert violations(opened) == []
    opened.evaluate("document.documentElement.dir = 'rtl'")
    assert turned_around(opened) == [] and cut_off(opened) == []
    opened.close()
