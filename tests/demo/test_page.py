"""The page, through headless Chromium: move a slider, generate, see the plan's line change."""


def text(page, elem_id):
    return page.locator(f"#{elem_id}").last.inner_text()  # gradio 3 gives an HTML block's id to two elements


def wait_for_text(page, elem_id, part):
    page.wait_for_function(
        "([id, part]) => [...document.querySelectorAll('#' + id)].some(e => e.innerText.includes(part))",
        arg=[elem_id, part],
    )


def set_slider(page, key, label, value):
    number = page.locator(f"#setting_{key} input[type=number]")
    number.fill(str(value))
    number.press("Tab")
    wait_for_text(page, "demo_settings_result", f"{label}: {value}")


def generate(page):
    """The plan's line after one image."""
    before = page.locator("#demo_image img").get_attribute("src") if page.locator("#demo_image img").count() else ""
    page.click("#demo_generate")
    page.wait_for_function(
        "before => { const i = document.querySelector('#demo_image img'); return i && i.src && i.src !== before; }",
        arg=before,
    )
    page.wait_for_function("() => document.querySelector('#demo_infotext textarea').value.includes('Steps: 2')")
    return text(page, "demo_plan")


def test_a_slider_changes_the_next_plan(page):
    seed = page.locator("#demo_seed input")
    plans = []
    for i, chunk in enumerate((64, 16)):
        set_slider(page, "subquad_query_chunk", "Query chunk size", chunk)
        seed.fill(str(i))
        plans.append(generate(page))
    assert plans[0] != plans[1]
    assert "16" in plans[1]
    assert "subquad" in text(page, "demo_table")


def test_every_setting_is_drawn_with_its_help(page):
    from lib_subquad.settings import OPTIONS

    for field, option in OPTIONS.items():
        assert page.locator(f"#setting_subquad_{field}").first.is_visible()
        assert option.label in page.locator("#settings_subquad").inner_text()


def test_compare_fills_a_line_per_optimizer(page):
    page.click("#demo_compare")
    page.wait_for_function(
        "() => { const rows = [...document.querySelectorAll('#demo_table tbody tr')];"
        " return rows.length >= 3 && rows.every(row => row.innerText.includes('MiB')); }"
    )
    names = page.locator("#demo_table tbody tr td:first-child").all_inner_texts()
    assert {"None", "sdp"} <= {name.split()[0] for name in names}


def test_a_wrong_request_is_told(page):
    page.locator("#demo_width input[type=number]").fill("100")
    page.locator("#demo_width input[type=number]").press("Tab")
    page.click("#demo_generate")
    page.get_by_text("it must be a multiple of 64").first.wait_for()
