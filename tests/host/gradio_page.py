"""A page of gradio, asked over HTTP as the browser does."""

from __future__ import annotations

import json
import uuid

import gradio as gr
from fastapi.testclient import TestClient


class Page:
    """The events of a page with our tab, each by the element that triggers it and how."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self.client = TestClient(gr.routes.App.create_app(blocks))
        config = self.client.get("/config").json()
        elements = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
        self.events = {}
        after = {}
        for position, event in enumerate(config["dependencies"]):
            number = event.get("id", position)
            [element, how] = _target(event, elements, after)
            after[number] = element
            while (element, how) in self.events:  # what follows on what follows
                how += " then"
            if event["backend_fn"] and str(element).removeprefix("tab_").startswith("subquad_"):
                self.events[element, how] = (number, [elements[it] for it in event["inputs"]])

    def send(self, element: str, how: str, data: list[str], session: str | None) -> list[list]:
        """What one event answers, again and again; `data` in JSON."""
        number, inputs = self.events[element, how]
        data = [*data, *["null"] * (len(inputs) - len(data))]
        head = {"fn_index": number, "session_hash": session, "event_id": uuid.uuid4().hex}
        body = f'{{"data": [{", ".join(data)}], {json.dumps(head)[1:]}'
        answers, more = [], True
        while more:
            response = self.client.post("/run/predict", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 200, f"{element}, {how}: {response.text}"
            answer = response.json()
            more = answer["is_generating"]
            if more or not answers:
                answers.append(answer["data"])
        return answers


def _target(event: dict, elements: dict, after: dict) -> tuple[str | None, str]:
    """The element that triggers an event and how; for one that follows another, the element of that one."""
    if event["trigger_after"] is not None:
        return after[event["trigger_after"]], "then"
    target = event["targets"][0] if event["targets"] else None
    if isinstance(target, list):  # gradio 4, and 3.41's events of several elements
        return elements.get(target[0]), target[1]
    return elements.get(target), event.get("trigger")


def sentences(answers) -> str:
    """All text in it; gradio 4 sends what follows a first answer as [["replace", [], text]]."""
    if isinstance(answers, list):
        return " ".join(filter(None, map(sentences, answers)))
    return answers if isinstance(answers, str) else ""
