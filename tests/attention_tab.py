"""The tab "Attention" in a browser, on whichever host: what a visitor does there, and what the tab must then show."""

from __future__ import annotations

from collections.abc import Callable

ANSWER = "#subquad_answer"
SENTENCE = "#subquad_sentence"
DETAILS = "#subquad_details"
MEASURE = "Measure"


class AttentionTab:
    """The tab of an open page."""

    def __init__(self, page) -> None:
        self.page = page

    def open(self, side: int | None = None) -> AttentionTab:
        """Bring it to the front, and ask about an image of side x side pixels."""
        title = self.page.locator("#tabs button").get_by_text("Attention", exact=True).first
        if self.page.locator("#subquad_page").is_visible():
            title.click()
        else:  # it brings the size that was used last
            with self.page.expect_response(lambda answer: "/run/predict" in answer.url):
                title.click()
            self.page.wait_for_timeout(200)
        self.page.wait_for_selector(f"{SENTENCE} .subquad-sentence")
        if side is not None:
            for name in ("width", "height"):
                set_number(self.page, f"subquad_{name}", side)
        return self

    def unfold(self, fold: str = "details_fold") -> None:
        """Open what is folded up, if it is not open."""
        inside = self.page.locator(f"#subquad_{fold} .label-wrap + div").first
        if not inside.is_visible():
            self.page.locator(f"#subquad_{fold} .label-wrap").first.click()
        inside.wait_for(state="visible")
        self.page.wait_for_timeout(400)  # its arrow turns

    def buttons(self) -> dict[str, str]:
        """What is written on each button that can be pressed, by its name."""
        found = {name: self.page.locator(f"#subquad_{name}").first for name in ("measure", "cancel", "apply", "undo")}
        return {name: it.inner_text().strip() for name, it in found.items() if it.is_visible() and it.is_enabled()}

    def wait_for_buttons(self, *names: str) -> dict[str, str]:
        """Until these can be pressed, and no others."""
        self.page.wait_for_function(
            """names => ["measure", "cancel", "apply", "undo"].every(name => {
                const it = document.querySelector(`#subquad_${name}`);
                return names.includes(name) === (it.getClientRects().length > 0 && !it.disabled);
            })""",
            arg=list(names),
        )
        return self.buttons()

    @property
    def sentence(self) -> str:
        return self.page.locator(SENTENCE).last.inner_text()

    @property
    def size(self) -> tuple[str, str]:
        """Width and height as they stand in their fields."""
        fields = (self.page.locator(f"#subquad_{name} input").first for name in ("width", "height"))
        width, height = (field.input_value() for field in fields)
        return width, height

    def click(self, button: str) -> None:
        self.page.click(f"#subquad_{button}")

    def wait_for(self, element: str, part: str) -> None:
        wait_for(self.page, element, part)

    def wait_until_measuring(self) -> None:
        self.page.wait_for_selector(f"{ANSWER} progress")

    def wait_for_setting(self, field: str, value: str) -> None:
        """Until the slider of a setting, on a page of its own, stands at this value."""
        self.page.wait_for_function(
            "([id, value]) => document.querySelector(`[id='${id}'] input`).value === value",
            arg=[f"setting_subquad_{field}", value],
        )

    @property
    def status(self) -> str:
        return self.page.locator("#subquad_status").last.inner_text()

    @property
    def settings(self) -> tuple[str, str, str]:
        """Query chunk, key/value chunk and engine as the open sliders show them."""
        query, keys = (
            self.page.locator(f"[id=setting_subquad_{field}] input").first.input_value()
            for field in ("query_chunk", "kv_chunk")
        )
        return query, keys, self.page.locator("[id=setting_subquad_engine] input:checked").first.input_value()


def from_answer_to_undo(page, set_query_chunk: Callable[[int], None], generate: Callable[[], int]) -> None:
    """The whole way: answer, measure, cancel, measure, apply, generate, see it in the status line, undo; and which
    buttons there are at each step.

    `set_query_chunk` sets the slider as a visitor of this host does, `generate` makes a square image and tells how many
    tokens it has; both may leave the tab.
    """
    tab = AttentionTab(page).open(side=512)  # of which measuring does not end before it is cancelled
    tab.wait_for(SENTENCE, "at 512 × 512 on")
    assert list(tab.wait_for_buttons("measure").values()) == [MEASURE]
    tab.unfold()
    tab.wait_for(DETAILS, "attention layers in the U-Net")
    assert page.locator(f"{DETAILS} abbr[title]").count() >= 8
    assert "64²" in page.locator(f"{DETAILS} tbody tr").first.inner_text()

    tab.click("measure")
    tab.wait_until_measuring()
    tab.wait_for_buttons("cancel")
    tab.click("cancel")
    tab.wait_for(ANSWER, "Cancelled")
    tab.wait_for_buttons("measure")

    set_query_chunk(1)  # a setting that Automatic beats by far, so that there is something to apply
    tab.open(side=256)
    tab.wait_for(SENTENCE, "at 256 × 256 on")
    tab.wait_for(SENTENCE, "Measure tells which is faster")
    tab.click("measure")
    tab.wait_until_measuring()
    tab.wait_for(f"{ANSWER} table", "recommended")
    page.wait_for_selector("#subquad_plot svg[role=img]")

    assert tab.settings == ("1", "0", "automatic")
    assert tab.wait_for_buttons("measure", "apply")["apply"].startswith("Apply: ")
    tab.click("apply")
    tab.wait_for("#subquad_message", "→")
    page.wait_for_function("() => document.querySelector('[id=setting_subquad_query_chunk] input').value !== '1'")
    query_chunk, kv_chunk, engine = tab.settings
    assert (query_chunk, kv_chunk, engine) != ("1", "0", "automatic")
    assert "query chunk 1" in tab.wait_for_buttons("measure", "undo")["undo"]

    tokens = generate()
    tab.open()  # tells at once what the state is
    tab.wait_for("#subquad_status", "Last generation")
    side = str(int(tokens**0.5) * 8)
    tab.wait_for(SENTENCE, f"at {side} × {side} on")
    assert tab.size == (side, side)
    assert "subquad is active" in tab.status
    assert page.locator("#subquad_status abbr[title]").count() >= 5
    assert ", 1 × " not in tab.status  # no longer one query at a time
    assert ("portable" if engine == "portable" else "fused") in tab.status
    if query_chunk != "0":
        assert f" {min(int(query_chunk), tokens)} × " in tab.status

    tab.click("undo")
    tab.wait_for_setting("query_chunk", "1")
    assert tab.settings == ("1", "0", "automatic")
    tab.wait_for_buttons("measure", "apply")


def cut_off(page) -> list[str]:
    """What of the tab is wider than its place, scrolls sideways or lies outside of the page, and words in the plot that
    lie on others. Fields are left out: a checkpoint's name may be longer than any; and so is what the page would scroll
    by without the tab."""
    return page.evaluate(OVER_ONE_ANOTHER) + page.evaluate(
        """() => {
        const scrollsSideways = () => {
            const tab = document.querySelector("#subquad_page"), before = tab.style.display;
            const width = document.documentElement.scrollWidth;
            tab.style.display = "none";
            const without = document.documentElement.scrollWidth;
            tab.style.display = before;
            return width > Math.max(innerWidth, without);
        };
        return [...document.querySelectorAll("#subquad_page, #subquad_page *")].filter(it => {
            const box = it.getBoundingClientRect();
            if (!box.width || !box.height || it.closest(".subquad-table thead, .sr-only")) return false;
            if (it.closest("svg") && it.tagName !== "text") return false;
            if (getComputedStyle(it).visibility === "hidden") return false;
            const holds = it.clientWidth && !["INPUT", "text"].includes(it.tagName);
            const wide = holds && it.scrollWidth > it.clientWidth + 1;
            return wide || box.left < -1 || box.right > document.documentElement.clientWidth + 1;
        }).map(it => `${it.tagName} ${it.id} ${it.className}: ${it.scrollWidth} in ${it.clientWidth}, ` +
            `${it.innerText || it.value || ""}`.slice(0, 80)).concat(
            scrollsSideways() ? ["the page scrolls sideways"] : [])
        }"""
    )


OVER_ONE_ANOTHER = """() => {
    const shown = it => it.getClientRects().length && getComputedStyle(it).visibility !== "hidden";
    const words = [...document.querySelectorAll("#subquad_plot text")].filter(shown);
    const boxes = words.map(it => it.getBoundingClientRect());
    const over = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    return words.flatMap((it, one) => words.slice(0, one).filter((_, other) => over(boxes[one], boxes[other]))
        .map(other => `${it.textContent} lies on ${other.textContent}`));
}"""


def set_number(page, elem_id: str, value: int) -> None:
    number = page.locator(f"#{elem_id} input[type=number]").first
    number.fill(str(value))
    number.press("Tab")


def wait_for(page, selector: str, part: str) -> None:
    """Until some element of this selector shows this text."""
    page.wait_for_function(
        "([selector, part]) => [...document.querySelectorAll(selector)].some(e => e.innerText.includes(part))",
        arg=[selector, part],
    )
