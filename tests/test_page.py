"""Reports in headless Chromium: no error on the console, no request, figures drawn, at both widths, light and dark.

`make test-page` runs these. With RAYMERGE_SCREENSHOTS set to a folder, what was seen is left there; runs named in
RAYMERGE_RUNS (separated by ':') are looked at beside the synthetic ones.
"""

import os
import shutil
from pathlib import Path

import pytest
from report_runs import search_run, sensitivity_run, similarity_run, sweep_run

from raymerge.report import write_report

pytestmark = pytest.mark.page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
HOSTILE = '<img src=x onerror="window.hostile=1">'


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no Chromium: apt-get install chromium, or set CHROMIUM"
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as started:
            yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every kind of report, of runs made by hand, and one of them all."""
    root = tmp_path_factory.mktemp("page")
    runs = {
        "search": search_run(root / "search", control=HOSTILE, subjects=("algebra", HOSTILE, "law")),
        "similarity": similarity_run(root / "similarity", subsets=("medical", "</script>", HOSTILE, "law")),
        "one": similarity_run(root / "one", subsets=("all",)),
        "sweep": sweep_run(root / "sweep"),
        "sensitivity": sensitivity_run(root / "sensitivity"),
    }
    paths = {name: [run.path_of()] for name, run in runs.items()}
    paths["together"] = [path for (path,) in paths.values()]
    for path in filter(None, os.environ.get("RAYMERGE_RUNS", "").split(":")):
        paths[Path(path).name] = [path]
    return {name: write_report(of, root / f"{name}.html") for name, of in paths.items()}


def visit(browser, path, size, scheme="light"):
    """An open page with all its figures drawn, and what was wrong with it."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.documentElement.dataset.figures === 'drawn'", timeout=120_000)
    return page, wrong


def look(page, name):
    if folder := os.environ.get("RAYMERGE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("narrow", "dark")])
def test_every_report_opens_without_error_or_request(browser, pages, size, scheme):
    for name, path in pages.items():
        page, wrong = visit(browser, path, size, scheme)
        assert wrong == [], name
        drawings = page.evaluate(
            "[...document.querySelectorAll('.view')].map(v => [!!v.querySelector('svg'), v.scrollWidth, v.clientWidth,"
            " v.ariaLabel ?? ''])"
        )
        assert drawings and all(drawn and label for drawn, _, _, label in drawings), name
        assert not [drawing for drawing in drawings if drawing[1] > drawing[2] + 1], name
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], f"{name} scrolls sideways"
        assert page.evaluate("window.hostile") is None
        assert page.evaluate("document.images.length") == 0
        look(page, f"{name}-{size}-{scheme}")
        page.context.close()


def test_no_table_of_a_search_scrolls_on_a_small_laptop(browser, tmp_path):
    """At 1,100 pixels with a scroll bar, the first table of the demo's page did."""
    path = write_report([search_run(tmp_path / "run", control="best of 10 random").path_of()], tmp_path / "page.html")
    context = browser.new_context(viewport={"width": 1024, "height": 800})
    page = context.new_page()
    page.goto(path.as_uri())
    sizes = page.evaluate("[...document.querySelectorAll('.scroll')].map(s => [s.scrollWidth, s.clientWidth])")
    assert len(sizes) > 2 and not [size for size in sizes if size[0] > size[1]]
    context.close()


def test_marks_stand_where_the_rows_say(browser, pages):
    page, _ = visit(browser, pages["search"], "wide")
    first = page.locator("#figure-1 svg").first
    # a mark of a screen reader's list says the row that it is of
    labels = first.locator("[aria-roledescription=point]").evaluate_all("nodes => nodes.map(n => n.ariaLabel)")
    assert len(labels) == 4 and any("drop" in label for label in labels)
    page.context.close()


def test_zoom_rows_hover_and_theme(browser, pages, tmp_path):
    page, wrong = visit(browser, pages["search"], "wide")
    figure = page.locator("#figure-1")
    ticks = figure.locator("svg").first.locator(".role-axis-label text")

    def shown():
        return sorted(ticks.all_text_contents())

    before = shown()
    figure.get_by_role("button", name="Zoom in").press("Enter")
    page.wait_for_timeout(300)
    assert shown() != before
    figure.get_by_role("button", name="Reset").click()
    page.wait_for_timeout(300)
    assert shown() == before

    figure.locator("[aria-roledescription=point]").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "plan" in page.locator("#vg-tooltip-element").inner_text()

    figure.locator("summary").click()
    figure.locator(".rows-table tbody tr").nth(3).wait_for()  # the rows are made when the details' event comes
    assert figure.locator(".rows-table tbody tr").count() == 4
    with page.expect_download() as download:
        figure.get_by_role("button", name="Download").click()
    text = Path(download.value.path()).read_text()
    assert text.splitlines()[0].startswith("plan,role,accuracy") and len(text.splitlines()) == 5

    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate(colour) != light
    assert wrong == []
    page.context.close()


def test_lines_do_not_strike_through_words(browser, pages):
    page, _ = visit(browser, pages["search"], "wide")
    look_of = "nodes => nodes.map(n => [getComputedStyle(n).paintOrder, getComputedStyle(n).strokeWidth])"
    words = page.locator("svg [class*=words_] text").evaluate_all(look_of)
    assert len(words) >= 4 and {tuple(each) for each in words} == {("stroke", "4px")}
    page.context.close()


def test_a_subject_is_compared_with_the_plan_that_is_chosen(browser, pages):
    page, wrong = visit(browser, pages["search"], "wide")
    select = page.get_by_role("combobox", name="against")
    panel = page.locator("figure", has=page.get_by_role("combobox", name="against"))
    before = panel.locator("svg").inner_html()
    select.select_option("drop")
    page.wait_for_timeout(300)
    assert panel.locator("svg").inner_html() != before and wrong == []
    page.context.close()


def test_text_has_contrast_in_both_themes(browser, pages):
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for marks, of the colours that the style sheet names."""
    script = """() => { const style = getComputedStyle(document.documentElement);
      return Object.fromEntries(['paper','ink','soft','accent','control','warn','warn-paper',
        ...[1,2,3,4,5,6,7,8].map(i => `series-${i}`)].map(n => [n, style.getPropertyValue(`--${n}`).trim()])); }"""
    for scheme in ("light", "dark"):
        page, _ = visit(browser, pages["one"], "wide", scheme)
        colours = page.evaluate(script)
        for name in ("ink", "soft", "accent"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, (scheme, name)
        assert contrast(colours["ink"], colours["warn-paper"]) >= 4.5
        for name in ("control", "warn", *(f"series-{i}" for i in range(1, 9))):
            assert contrast(colours[name], colours["paper"]) >= 3, (scheme, name)
        page.context.close()


def contrast(a, b):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_prints_on_white_whatever_the_theme(browser, pages, tmp_path):
    page, wrong = visit(browser, pages["search"], "wide", "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".tools").first.is_hidden()
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000 and wrong == []
    page.context.close()
