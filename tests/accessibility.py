"""What can be told of a page's accessibility without a person: by axe, the keyboard, and a page from right to left."""

from __future__ import annotations

from pathlib import Path

SERIOUS = ("serious", "critical")


def violations(page, element: str = "#subquad_page") -> list[str]:
    """What axe finds serious or critical in an element and what it holds."""
    import axe_playwright_python

    page.evaluate(Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("element => axe.run(element)", element)["violations"]
    return [
        f"{it['id']}: {it['help']}, as in {it['nodes'][0]['html'][:200]}" for it in found if it["impact"] in SERIOUS
    ]


def turned_around(page) -> list[str]:
    """Sizes such as 16 × 8, and numbers such as 3 MiB, of which the first part stands to the right of the second."""
    return page.evaluate(
        """() => {
            const texts = document.createTreeWalker(document.querySelector("#subquad_page"), NodeFilter.SHOW_TEXT);
            const found = [];
            while (texts.nextNode()) {
                const text = texts.currentNode;
                for (const match of text.data.matchAll(/([0-9.]+²?)( [×x] | )([0-9]+²?|[KMG]iB|[mµ]?s|%)/g)) {
                    const [one, other] = [[0, 1], [match[1].length + match[2].length, match[0].length]].map(part => {
                        const range = document.createRange();
                        range.setStart(text, match.index + part[0]);
                        range.setEnd(text, match.index + part[1]);
                        return range.getBoundingClientRect();
                    });
                    if (one.width && one.top === other.top && one.left > other.left) found.push(match[0]);
                }
            }
            return found;
        }"""
    )


def tab_stops(page, first: str, last: str) -> list[str]:
    """What the tab key goes to, from one element to another; an element without a visible focus is marked."""
    page.locator(first).first.focus()
    found = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found.append(
            page.evaluate(
                """() => {
                    const it = document.activeElement, style = getComputedStyle(it);
                    const block = it.closest("[id^=subquad_]");
                    const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
                    return (block ? block.id : it.tagName) + (seen ? "" : ", unseen");
                }"""
            )
        )
        if page.evaluate("last => document.activeElement.closest(last) !== null", last):
            break
    return found
