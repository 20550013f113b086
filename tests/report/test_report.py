from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from manyheads.report import write_claims_report, write_trial_report
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.runner import run_claims
from tests.report.trials import example_trial


@pytest.fixture(scope="module")
def trial_page(tmp_path_factory):
    return write_trial_report(example_trial(), tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def claims_page(tmp_path_factory):
    def found(seed):
        return Finding({"accuracy": 0.9, "long_" * 30: 1.0}, 0.5, Verdict.CONFIRMED)

    def broken(seed):
        raise ValueError("<script>alert(1)</script>")

    claims = [
        Claim("davit", "linear_cost", "Cost is linear.", "confirmed at 0.5", found, "manyheads train " + "x" * 90),
        Claim("davit", "stopped", "It stops.", "never", broken),
    ]
    return write_claims_report(run_claims(claims), tmp_path_factory.mktemp("claims"))


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser is installed here: the report's page was not opened (apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page was opened")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=options)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser):
    """Open a page and hold what it logged and asked for; an error in the page fails the test."""
    contexts, complaints = [], []

    def open_page(path, width=1200, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(f"asked {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint for complaint in complaints if "asked data:" not in complaint] == []


def _pixels(page) -> str:
    return page.evaluate("document.getElementById('pattern').toDataURL()")


def test_page_is_one_file_that_names_no_other(trial_page):
    text = trial_page.read_text(encoding="utf-8")
    assert [path.name for path in trial_page.parent.iterdir()] == ["index.html"]
    assert 'src="' not in text
    assert "@import" not in text
    assert text.count("</script>") == 2  # the data and the code: the token "</script><b>." is escaped


def test_head_map_shows_every_head_and_its_state(visit, trial_page):
    page = visit(trial_page)
    trial = example_trial()
    assert page.locator(".cell").count() == 30 * 9
    assert page.locator(".group.keeps").count() == sum(map(sum, trial.retrieval))
    page.locator(".cell[data-layer='4'][data-head='7']").hover()
    tip = page.locator("#tip").inner_text()
    assert "Layer 4, head 7" in tip
    assert f"{trial.head_scores[4][7]:.3f}" in tip
    assert ("keeps its whole cache" if trial.retrieval[4][2] else "streaming") in tip


def test_clicking_a_head_shows_its_pattern(visit, trial_page):
    page = visit(trial_page)
    best = max(
        (score, layer, head) for layer, row in enumerate(example_trial().head_scores) for head, score in enumerate(row)
    )
    assert page.locator("#head-name").inner_text() == f"Layer {best[1]}, head {best[2]}"
    before = _pixels(page)
    page.locator(".cell[data-layer='12'][data-head='3']").click()
    assert page.locator("#head-name").inner_text() == "Layer 12, head 3"
    assert _pixels(page) != before


def test_pattern_reads_out_the_weight_under_the_pointer(visit, trial_page):
    page = visit(trial_page)
    trial = example_trial()
    page.locator(".cell[data-layer='5'][data-head='1']").click()
    canvas = page.locator("#pattern")
    canvas.scroll_into_view_if_needed()
    box, count = canvas.bounding_box(), len(trial.tokens)
    query, key = 20, 4
    page.mouse.move(box["x"] + box["width"] * (key + 0.5) / count, box["y"] + box["height"] * (query + 0.5) / count)
    percent = 100 * trial.patterns[5][1][query][key] / 255
    wanted = f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
    readout = page.locator("#readout").inner_text()
    assert f"Token {query} “{trial.tokens[query].strip()}” gives {wanted}" in readout
    assert f"token {key} “{trial.tokens[key].strip()}”" in readout


def test_keyboard_reaches_heads_pattern_and_tokens(visit, trial_page):
    page = visit(trial_page)
    page.keyboard.press("Tab")
    name = page.locator("#head-name").inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#head-name").inner_text() != name
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    readout = page.locator("#readout").inner_text()
    page.keyboard.press("ArrowUp")
    assert page.locator("#readout").inner_text() != readout
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".token[aria-pressed='true']").inner_text() == "The"


def test_needle_grid_and_figures_are_there(visit, trial_page):
    page = visit(trial_page)
    trial = example_trial()
    shown = [[int(text) for text in table.locator("td").all_inner_texts()] for table in page.locator("table").all()]
    for cells, measured in zip(shown, (trial.before, trial.after), strict=True):
        assert cells == [round(100 * value) for row in measured.needle for value in row]
    tiles = page.locator(".tiles").inner_text()
    assert "47.0 MiB" in tiles
    assert "−47.8 %" in tiles
    widths = [element.bounding_box()["width"] for element in page.locator(".bar .fill").all()]
    assert widths[1] / widths[0] == pytest.approx(trial.after.cache_bytes / trial.before.cache_bytes, rel=0.02)


@pytest.mark.parametrize("width", [320, 390, 820, 1600])
@pytest.mark.parametrize("which", ["trial_page", "claims_page"])
def test_no_sideways_scroll_at_any_width(visit, request, which, width):
    page = visit(request.getfixturevalue(which), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("which", ["trial_page", "claims_page"])
def test_light_and_dark_differ(visit, request, which):
    style = "getComputedStyle(document.body).backgroundColor + ' ' + getComputedStyle(document.body).color"
    light, dark = (visit(request.getfixturevalue(which), scheme=scheme).evaluate(style) for scheme in ("light", "dark"))
    assert light != dark


def test_pattern_is_redrawn_when_the_scheme_changes(visit, trial_page):
    page = visit(trial_page)
    light = _pixels(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.getElementById('pattern').toDataURL() !== before", arg=light)


def test_claims_page_shows_verdicts_and_escapes_errors(visit, claims_page):
    page = visit(claims_page)
    assert page.locator(".verdict").all_inner_texts() == ["confirmed", "error"]
    assert "<script>alert(1)</script>" in page.locator("main").inner_text()
    assert (claims_page.parent / "claims.json").exists()


def test_grids_that_do_not_fit_are_refused(tmp_path):
    trial = example_trial()
    with pytest.raises(ValueError, match="not a multiple"):
        write_trial_report(replace(trial, retrieval=[row[:2] for row in trial.retrieval]), tmp_path)
    with pytest.raises(ValueError, match="patterns has shape"):
        write_trial_report(replace(trial, tokens=trial.tokens[:-1]), tmp_path)
    with pytest.raises(ValueError, match=r"after\.needle"):
        write_trial_report(replace(trial, after=replace(trial.after, needle=[[1.0]])), tmp_path)
    assert list(tmp_path.iterdir()) == []
