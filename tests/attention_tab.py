"""The tab "Attention" in a browser, on whichever host: what a visitor does there, and what the tab must then show."""

from __future__ import annotations

from collections.abc import Callable

ANSWER = "#subquad_answer"


class AttentionTab:
    """The tab of an open page."""

    def __init__(self, page) -> None:
        self.page = page

    def open(self, side: int | None = None) -> AttentionTab:
        """Bring it to the front, and ask about an image of side x side pixels."""
        self.page.locator("#tabs button").get_by_text("Attention", exact=True).first.click()
        self.page.wait_for_selector("#subquad_explain")
        if side is not None:
            for name in ("width", "height"):
                set_number(self.page, f"subquad_{name}", side)
        return self

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


def from_explain_to_undo(page, set_query_chunk: Callable[[int], None], generate: Callable[[], int]) -> None:
    """The whole way: explain, measure, cancel, measure, apply, generate, see it in the status line, undo.

    `set_query_chunk` sets the slider as a visitor of this host does, `generate` makes an image and tells how many
    tokens it has; both may leave the tab.
    """
    tab = AttentionTab(page).open(side=512)  # of which measuring does not end before it is cancelled
    tab.click("explain")
    tab.wait_for(ANSWER, "attention layers in the U-Net")
    assert page.locator(f"{ANSWER} abbr[title]").count() >= 9
    assert "4096" in page.locator(f"{ANSWER} tbody tr").first.inner_text()

    tab.click("measure")
    tab.wait_until_measuring()
    tab.click("cancel")
    tab.wait_for(ANSWER, "Cancelled")

    set_query_chunk(1)  # a setting that Automatic beats by far, so that there is something to apply
    tab.open(side=256)
    tab.click("measure")
    tab.wait_until_measuring()
    tab.wait_for(f"{ANSWER} table", "recommended")
    page.wait_for_selector("#subquad_plot svg[role=img]")

    assert tab.settings == ("1", "0", "automatic")
    tab.click("apply")
    tab.wait_for("#subquad_message", "→")
    page.wait_for_function("() => document.querySelector('[id=setting_subquad_query_chunk] input').value !== '1'")
    query_chunk, kv_chunk, engine = tab.settings
    assert (query_chunk, kv_chunk, engine) != ("1", "0", "automatic")

    tokens = generate()
    tab.open()  # asks anew what the state is
    tab.wait_for("#subquad_status", "Last generation")
    assert "subquad is active" in tab.status
    assert page.locator("#subquad_status abbr[title]").count() >= 5
    assert ", 1 x " not in tab.status  # no longer one query at a time
    assert ("portable" if engine == "portable" else "fused") in tab.status
    if query_chunk != "0":
        assert f" {min(int(query_chunk), tokens)} x " in tab.status

    tab.click("undo")
    tab.wait_for_setting("query_chunk", "1")
    assert tab.settings == ("1", "0", "automatic")


def hidden_columns(page) -> list[str]:
    """What an answer's tables tell that cannot be seen at this width without moving them aside."""
    return page.evaluate(
        """answer => [...document.querySelectorAll(`${answer} .subquad-table td`)].filter(cell => {
            const box = cell.getBoundingClientRect();
            return cell.innerText && !(0 <= box.left && box.width && box.right <= innerWidth);
        }).map(cell => cell.innerText)""",
        ANSWER,
    )


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
