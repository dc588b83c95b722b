"""What one page is shown when its events overtake one another: what is true when it is told, not when it was asked."""

from __future__ import annotations

import gradio as gr
import pytest

QUESTION = ("the loaded checkpoint", 64, 64, 1)
NAMES = ("measure", "cancel", "apply", "undo")


@pytest.fixture
def tab(loaded, monkeypatch):
    from lib_subquad.webui import laboratory, tab

    monkeypatch.setattr(tab, "LABORATORY", laboratory.Laboratory())
    return tab


def buttons(answer) -> dict[str, dict]:
    return dict(zip(NAMES, answer[-len(NAMES) :]))


def texts(answer) -> list:
    """All that has to be computed: not the buttons, nor what waits to be decoded and its own."""
    return answer[: -len(NAMES) - 5]


@pytest.mark.parametrize("looks", ["_look", "_look_again"])
def test_an_answer_that_was_on_its_way_knows_of_a_measure_asked_for_since(tab, looks, monkeypatch):
    visit = tab.Visit()
    look = tab.LABORATORY.look

    def pressed_meanwhile(*question):
        tab._request(visit)
        return look(*question)

    monkeypatch.setattr(tab.LABORATORY, "look", pressed_meanwhile)
    shown = buttons(getattr(tab, looks)(visit, *QUESTION))
    assert shown["cancel"]["visible"] and shown["measure"]["interactive"] is False


def test_an_answer_that_was_on_its_way_knows_of_a_cancel_since(tab, monkeypatch):
    visit = tab.Visit()
    tab._request(visit)
    look = tab.LABORATORY.look

    def cancelled_meanwhile(*question):
        tab._cancel(visit)
        return look(*question)

    monkeypatch.setattr(tab.LABORATORY, "look", cancelled_meanwhile)
    shown = buttons(tab._look(visit, *QUESTION))
    assert not shown["cancel"]["visible"] and shown["measure"]["interactive"] is True


def test_whatever_arrived_last_the_next_look_shows_the_buttons_as_they_are(tab):
    """Also while another page measures, of which this one is to take back its own wish."""
    one, other = tab.Visit(), tab.Visit()
    tab._look(other, *QUESTION)
    assert buttons(tab._look_again(other, *QUESTION))["cancel"]["visible"] is False
    tab._request(one)
    steps = tab.LABORATORY.measure(*QUESTION, one.run)
    next(steps)
    assert tab.LABORATORY.measuring
    for _ in range(2):
        tab._request(other)
    again = tab._look_again(other, *QUESTION)
    assert all(it == gr.update() for it in texts(again))  # nothing is computed beside what is measured
    assert buttons(again)["cancel"]["visible"] and buttons(again)["measure"]["interactive"] is False
    tab._cancel(other)
    again = buttons(tab._look_again(other, *QUESTION))
    assert not again["cancel"]["visible"] and again["measure"]["interactive"] is True
    tab._request(other)
    assert buttons(tab._look_again(other, *QUESTION))["measure"]["value"] == "Measure all the same"
    steps.close()


def test_pages_do_not_see_one_another(tab):
    one, other = tab.Visit(), tab.Visit()
    tab._request(one)
    assert buttons(tab._look(one, *QUESTION))["cancel"]["visible"]
    assert not buttons(tab._look(other, *QUESTION))["cancel"]["visible"]
