"""What the tab does in the visitor's browser, as JavaScript: functions that gradio's events call."""

from __future__ import annotations

ROOT = 'const root = typeof gradioApp === "function" ? gradioApp() : document;'

LOOK_AGAIN = 5  # seconds, while the tab can be seen

# Once for each page. The tab is asked anew whenever it comes into sight, and while it is: an image may be made by
# somebody else. Gradio tells nothing of a number's field that was emptied, or that letters were typed into, and what
# gradio 3 folds up opens to the mouse alone. Answers may overtake one another: one to another question than that of
# the fields is asked for anew.
WATCH = f"""
() => {{
    {ROOT}
    const page = root.querySelector("#subquad_page");
    if (!page || page.subquadWatched) return [];
    page.subquadWatched = true;
    const press = name => {{ const it = root.querySelector(`#subquad_${{name}}`); if (it) it.click(); }};
    const seen = () => page.getClientRects().length && document.visibilityState === "visible";
    const look = () => {{ if (seen()) press("look"); }};
    document.addEventListener("visibilitychange", look);
    window.addEventListener("focus", look);
    setInterval(look, {LOOK_AGAIN * 1000});
    page.addEventListener("input", event => {{
        if (event.target.type === "number" && event.target.value === "") setTimeout(() => press("ask"), 50);
    }});
    let again = "", tries = 0;
    const check = () => {{
        const fields = ["width", "height", "batch"].map(name => root.querySelector(`#subquad_${{name}} input`));
        const now = JSON.stringify(fields.map(it => it.value === "" ? null : Number(it.value)));
        const told = root.querySelector("#subquad_sentence [data-asked]");
        tries = now === again ? tries + 1 : 0;
        again = now;
        if (told && told.dataset.asked !== now && tries < 20) press("ask");
    }};
    let soon;
    new MutationObserver(() => {{ clearTimeout(soon); soon = setTimeout(check, 200); }})
        .observe(root.querySelector("#subquad_sentence"), {{childList: true, subtree: true}});
    for (const name of ["sentence", "message", "kept", "forgotten", "taken"]) {{
        const it = root.querySelector(`#subquad_${{name}}`);
        if (it) it.setAttribute("aria-live", "polite");
    }}
    for (const fold of page.querySelectorAll("div.label-wrap")) {{
        const inside = fold.nextElementSibling;
        const told = () => fold.setAttribute("aria-expanded", getComputedStyle(inside).display !== "none");
        fold.setAttribute("role", "button");
        fold.tabIndex = 0;
        told();
        fold.addEventListener("click", () => setTimeout(told, 50));
        fold.addEventListener("keydown", event => {{
            if (event.key !== "Enter" && event.key !== " ") return;
            event.preventDefault();
            fold.click();
        }});
    }}
    return [];
}}
"""

# What the sliders of the web UI's own page stand at, as the last of what an event sends.
WITH_PAGE_SIZE = f"""
(...given) => {{
    {ROOT}
    const sizes = ["width", "height", "batch_size"].map(name => {{
        const input = root.querySelector(`#txt2img_${{name}} input[type=number]`);
        return input ? Number(input.value) : null;
    }});
    return [...given.slice(0, COUNT - 1), JSON.stringify(sizes)];
}}
"""

# Settings pages that are open show a value until they are told another; the web UI's own widgets carry these ids, in
# Quicksettings too.
MOVE_SLIDERS = f"""
(payload) => {{
    const setter = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
    {ROOT}
    for (const [key, value] of Object.entries(JSON.parse(payload || "{{}}"))) {{
        // not the range: it would round the value to its step
        for (const input of root.querySelectorAll(`[id="setting_${{key}}"] input:not([type=range])`)) {{
            if (input.type === "radio") {{
                if (input.value === String(value) && !input.checked) input.click();
                continue;
            }}
            setter.call(input, value);
            input.dispatchEvent(new Event("input", {{bubbles: true}}));
        }}
    }}
    return payload;
}}
"""

# A button that was pressed and is gone now leaves whoever uses the keyboard nowhere: the next one is what can be done.
KEEP_FOCUS = f"""
() => {{
    {ROOT}
    const now = root.activeElement || document.activeElement;
    if (now && now !== document.body && !now.disabled && now.getClientRects().length) return [];
    for (const name of ["cancel", "stop", "apply", "undo", "measure"]) {{
        const it = root.querySelector(`#subquad_${{name}}`);
        if (it && !it.disabled && it.getClientRects().length) {{ it.focus(); break; }}
    }}
    return [];
}}
"""


def with_page_size(inputs: int) -> str:
    """The script for an event of so many inputs, the last of which it fills."""
    return WITH_PAGE_SIZE.replace("COUNT", str(inputs))
