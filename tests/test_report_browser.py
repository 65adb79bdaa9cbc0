"""A report in a browser: opened from a file it shows, says and does what it should, and what a model says does nothing."""

from __future__ import annotations

import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from runs_made import make_run, said

from patchscopes.views.report import report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'patchscopes[dev]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EVIL = "</script><img src=x onerror=\"document.title='hacked'\">"


def cell(where):
    """Every state that a cell can have; what is said is an attack."""
    layer, own = where["source_layer"], where["control"] == "none"
    if where["prompt"] == 0 and layer == 4:
        return None
    if where["prompt"] == 0 and layer == 3:
        return {"status": "failed" if own else "skipped", "error": f"{EVIL} went wrong"}
    known = said(where)
    if where["prompt"] == 0 and layer == 2 and own:
        known["bits_over_others"] = math.nan
    if where["prompt"] == 1:
        known |= {"text": EVIL, "next_token": EVIL}
    return known


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    prompts = ("We talked about France", EVIL, "She lives in Peru")
    run = make_run(
        folder / "run", prompts=prompts, positions=(2, 3, 5), scopes=("describe", "identity"), cell=cell, status="stopped"
    )
    return report(run, folder / "a folder" / "report #1.html")


@pytest.fixture
def opened(browser, file):
    """Open a report, watching for faults and for requests; at the end there must have been none."""
    pages, faults, asked = [], [], []

    def open_page(path: Path = file, fragment: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready=yes]")
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()
    assert not faults
    assert all(url.startswith("file://") and ".html" in url for url in asked)


def live(page) -> str:
    return page.locator("#live").text_content()


def until(page, what: str) -> None:
    """Wait for something to be true; the page's policy forbids playwright's own way to."""
    for _ in range(100):
        if page.evaluate(what):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {what}")


def card(page) -> str:
    return page.locator("#card").inner_text()


# ------------------------------------------------------------------------------------------------------------------- shown


def test_the_map_is_painted_with_values_and_states(opened):
    page = opened()
    colours = page.evaluate(
        """() => { const c = document.getElementById('canvas'); const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const found = new Set(); for (let i = 0; i < p.length; i += 4) found.add(p[i] << 16 | p[i+1] << 8 | p[i+2]); return found.size; }"""
    )
    assert colours > 50
    legend = page.locator("#legend").inner_text()
    for words in ("evidence over others (bits)", "above its controls", "NaN: not a number", "failed", "waiting: not run yet"):
        assert words in legend, words
    assert "readings of this view" in legend
    assert page.locator("#legend canvas.swatch").count() == 3


def test_the_map_is_sharp_on_sharp_screens(opened):
    page = opened(device_scale_factor=2)
    width, shown = page.evaluate(
        "[document.getElementById('canvas').width, parseFloat(document.getElementById('canvas').style.width)]"
    )
    assert width == pytest.approx(2 * shown, abs=2)


def test_hatches_differ_from_each_other(opened):
    swatches = opened().evaluate("[...document.querySelectorAll('#legend canvas.swatch')].map((c) => c.toDataURL())")
    assert len(set(swatches)) == len(swatches) == 3


def test_words_can_be_read_on_every_colour(opened):
    # the page's functions are private to its script; what they give is asked from the page's own text
    page = opened()
    source = page.locator("script").last.text_content()
    colours = re.search(r"// Colours.*?(?=\n// Which reading)", source, re.DOTALL)[0]  # type: ignore[index]
    least = page.evaluate(
        colours
        + """; Math.min(...Object.values(RAMPS).flat().map((c) => { const l = luminance(c);
        return inkOn(c) === '#000' ? (l + 0.05) / 0.05 : 1.05 / (l + 0.05); }))"""
    )
    assert least >= 4.5


def test_the_table_of_the_map_has_the_values_of_the_map(opened):
    page = opened()
    page.locator("#grid-details summary").click()
    rows = page.locator("#grid-table tbody tr")
    assert rows.count() == 5 and page.locator("#grid-table thead th").count() == 4
    page.focus("#grid")
    page.keyboard.press("Control+End")  # layer 0, last position
    lowest = rows.last.locator("td").last
    value = lowest.get_attribute("data-value")
    assert f"{float(value):+.1f}" in lowest.inner_text() and f"{float(value):+.1f} bits" in live(page)
    assert "word" in lowest.inner_text() and "word" in card(page)
    assert "waiting" in rows.nth(0).inner_text() and "failed" in rows.nth(1).inner_text() and "NaN" in rows.nth(2).inner_text()


# ---------------------------------------------------------------------------------------------------------------- keyboard


def test_a_walk_by_keyboard(opened):
    page = opened()
    page.focus("#grid")
    page.keyboard.press("Control+End")
    assert live(page).startswith("layer 0, position 5 'token5', says 'word")
    page.keyboard.press("ArrowUp")
    assert live(page).startswith("layer 1, position 5")
    assert "above its controls" in live(page) and "evidence over others +" in live(page)
    page.keyboard.press("Home")
    assert live(page).startswith("layer 1, position 2")
    assert page.locator("#active-row").get_attribute("aria-rowindex") == "4"
    assert page.locator("#active").get_attribute("aria-colindex") == "1"
    assert page.locator("#active").text_content() == live(page)
    page.keyboard.press("PageUp")
    assert live(page) == "layer 4, position 2 'token2': waiting: not run yet"
    page.keyboard.press("ArrowDown")
    assert "failed" in live(page) and "went wrong" in card(page)
    page.keyboard.press("ArrowDown")
    assert "NaN bits" in live(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+Home")
    assert live(page).startswith("layer 4, position 2")


def test_enter_opens_the_card_and_escape_closes_it(opened):
    page = opened()
    page.focus("#grid")
    page.keyboard.press("Control+End")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "card"
    told = card(page)
    for words in ("layer 0", "above its controls", "over nothing", "over random vectors", "over other sources", "over the words alone",
                  "nothing patched in", "a random vector", "another source's state", "the mean of other sources", "the words alone",
                  "surprisal", "We talked about France", "p = 0.04"):  # fmt: skip
        assert words in told, words
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "grid"


def test_prompts_metrics_and_help_by_key(opened):
    page = opened()
    page.focus("#grid")
    page.keyboard.press("]")
    assert live(page).startswith("prompt 1: ")
    page.keyboard.press("]")
    assert "prompt 2: She lives in Peru" in live(page) and "She lives in Peru" in page.locator("#prompt-text").inner_text()
    page.keyboard.press("m")
    assert "evidence over nothing" in live(page) and "evidence over nothing" in page.locator("#legend").inner_text()
    page.keyboard.press("?")
    assert page.locator("dialog#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog#keys").is_visible() and page.evaluate("document.activeElement.id") == "grid"


def test_the_map_is_one_stop_of_the_tab_key(opened):
    page = opened()
    page.focus("#grid")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "copy-grid"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "grid"
    assert page.evaluate("getComputedStyle(document.getElementById('grid')).outlineStyle") == "solid"


def test_the_pointer_shows_the_card_of_what_it_points_at(opened):
    page = opened()
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 90, box["y"] + box["height"] - 90)
    assert "layer 0" in card(page) and "position 2" in card(page)
    before = live(page)
    page.mouse.move(box["x"] + 90, box["y"] + 20)
    assert "layer 4" in card(page) and live(page) == before
    page.mouse.click(box["x"] + 90, box["y"] + 20)
    assert live(page).startswith("layer 4, position 2")


# ----------------------------------------------------------------------------------------------------------------- choosing


def test_choosing_a_scope_and_the_address_that_keeps_it(opened):
    page = opened()
    page.select_option("#choose-scope", label="identity")
    page.select_option("#choose-metric", label="surprisal (bits)")
    page.focus("#grid")
    page.keyboard.press("Control+End")
    until(page, "location.hash.startsWith('#at=1,')")
    again = opened(fragment=page.evaluate("location.hash"))
    assert again.locator("#choose-scope option:checked").inner_text() == "identity"
    assert again.locator("#choose-metric option:checked").inner_text() == "surprisal (bits)"
    assert again.locator("#active").text_content() == page.locator("#active").text_content()


def test_target_layers_are_columns_and_prompts_are_where_each_has_one_cell(opened, tmp_path):
    square = report(make_run(tmp_path / "a", targets=range(4), prompts=("a b", "c d")), tmp_path / "a.html")
    page = opened(square)
    page.focus("#grid")
    page.keyboard.press("Control+End")
    assert live(page).startswith("layer 0 into layer 3, position 3")
    flat = report(make_run(tmp_path / "b"), tmp_path / "b.html")
    page = opened(flat)
    assert page.locator("#choose-prompt option:checked").inner_text() == "all, a column each"
    page.focus("#grid")
    assert page.locator("#grid").get_attribute("aria-colcount") == "3"
    page.keyboard.press("]")
    assert page.locator("#grid").get_attribute("aria-colcount") == "1"


def test_the_table_of_readings_sorts_filters_and_turns_pages(opened):
    page = opened()
    assert page.locator("#pager-where").inner_text() == "1–45 of 45 readings"
    page.locator("#everywhere").check()
    assert page.locator("#pager-where").inner_text() == "1–50 of 90 readings"
    page.get_by_role("button", name="next ›").click()
    assert page.locator("#pager-where").inner_text() == "51–90 of 90 readings"
    page.get_by_role("button", name="surprisal").click()
    page.get_by_role("button", name="surprisal").click()
    heading = page.locator("#table th[aria-sort]")
    assert heading.get_attribute("aria-sort") == "descending"
    column = page.locator("#table thead th").all_inner_texts().index(heading.inner_text())
    values = [float(row.locator("td").nth(column).inner_text()) for row in page.locator("#table tbody tr").all()]
    assert values == sorted(values, reverse=True) and values[0] > 5
    page.fill("#find", "peru")
    until(page, "document.getElementById('pager-where').textContent.includes('of 30 ')")
    page.select_option("#kind", "above")
    assert page.locator("#pager-where").inner_text() == "1–18 of 18 readings"
    page.locator("#table tbody button").first.click()
    assert page.evaluate("document.activeElement.id") == "grid" and "She lives in Peru" in card(page)


def test_copying_the_map(opened):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-grid")
    until(page, "document.getElementById('copied').textContent === 'copied'")
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].split("\t")[1:] == ["2: token2", "3: token3", "5: token5"]
    assert [line.split("\t")[1] for line in lines[1:4]] == ["waiting", "failed", "NaN"]


# ------------------------------------------------------------------------------------------------------- safety, every screen


def test_what_a_model_says_is_never_executed(opened):
    page = opened()
    page.focus("#grid")
    page.keyboard.press("]")
    page.keyboard.press("Control+End")
    page.keyboard.press("Enter")
    page.locator("#grid-details summary").click()
    page.locator("#everywhere").check()
    page.wait_for_timeout(100)
    assert page.locator("img").count() == 0 and "hacked" not in page.title()
    assert "<img src=x onerror=" in card(page)


def test_the_policy_lets_nothing_in(browser, file):
    context = browser.new_context()
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = true' }))")
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('data:text/plain,x').then(() => 'fetched', () => 'refused')") == "refused"
    context.close()


def test_dark_narrow_and_zoomed(opened):
    for options in (
        {"color_scheme": "dark"},
        {"viewport": {"width": 380, "height": 700}},
        {"viewport": {"width": 640, "height": 450}},
    ):
        page = opened(**options)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), options
        ground, ink = page.evaluate(
            "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (ground == "rgb(22, 23, 26)") == ("color_scheme" in options)
        assert ground != ink
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    corner = page.evaluate("[...document.getElementById('canvas').getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert corner == [22, 23, 26, 255]  # the map follows


def test_names_and_roles(opened):
    page = opened()
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, select, input, a, canvas[role], svg, [role=region], [role=grid], summary, th')]
        .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-hidden') || e.getAttribute('aria-labelledby')
          || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert [name for name in nameless if not name.startswith('<th scope="col"></th>')] == []
    broken = page.evaluate(
        """[...document.querySelectorAll('[aria-labelledby], [aria-describedby], [aria-activedescendant], label[for]')]
        .flatMap((e) => ['aria-labelledby', 'aria-describedby', 'aria-activedescendant', 'for'].map((name) => e.getAttribute(name)))
        .filter((id) => id && !document.getElementById(id))"""
    )
    assert broken == []
    tree = page.locator("main").aria_snapshot()
    for words in ("grid", "gridcell", "rowheader", "combobox", "searchbox", "table", 'heading "Map"'):
        assert words in tree, words
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4')].filter((h) => !h.closest('dialog')).map((h) => +h.tagName[1])"
    )
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_a_big_map_is_seen_as_a_whole_and_walked_at_once(opened, tmp_path):
    run = make_run(tmp_path / "run", prompts=("a long prompt",), positions=range(400), layers=60, controls=False)
    page = opened(report(run, tmp_path / "big.html"))
    assert page.locator("#choose-cells option:checked").inner_text() == "the whole map"
    page.focus("#grid")
    page.keyboard.press("Control+End")
    assert live(page).startswith("layer 0, position 399")
    took = page.evaluate(
        """() => { const start = performance.now(); for (let k = 0; k < 10; k++)
        document.getElementById('grid').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }));
        return (performance.now() - start) / 10; }"""
    )
    assert took < 250  # milliseconds a step, on a slow machine
    page.select_option("#choose-cells", label="with words")
    assert page.locator("#scroller").evaluate("(e) => e.scrollLeft") > 1000  # the cell is still in sight
    assert live(page).startswith("layer 0, position 389")


def test_without_javascript_the_rest_is_there(browser, file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    words = page.inner_text("body")
    assert (
        "need JavaScript" in words and "This run is not finished" in words and "share above" in words and "Ghandeharioun" in words
    )
    context.close()
