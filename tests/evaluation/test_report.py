"""report.html in a real browser, from file://, and what can be said of it without one."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from browser import Page, start_browser
from PIL import Image
from scored import make_model

from sdpo.common.errors import UserError
from sdpo.evaluation.compare.report import render, write_report
from sdpo.evaluation.compare.results import Model, Study, compare_models
from sdpo.evaluation.generate.manifest import read_manifest
from sdpo.evaluation.score.table import read_scores

MARKUP = '</script><img src=x onerror="document.title=`hit`"> <b>bold</b> &amp; “quotes”'
LABEL = "<i>ours</i> & co"
CATEGORY = '<u>"animals"</u>'
PAIRS = 120  # more than two pages of the list
METRICS = ["clip", "oracle"]


def read_models(paths: dict[str, Path]) -> list[Model]:
    return [Model(label, read_scores(read_manifest(path))) for label, path in paths.items()]


def write_page(folder: Path, models: list[Model], **options: Any) -> Path:
    """A report on these models, in a folder beside theirs."""
    comparisons = [
        compare_models(a, b, METRICS, "prompt", "half", 0) for a, b in combinations(models, 2)
    ]
    folder.mkdir(exist_ok=True)
    study = Study(models, METRICS, comparisons, ["<b>note</b>"])
    write_report(folder / "report.html", study, **options)
    return folder / "report.html"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[str, Path]:
    """Three models of 120 prompts, one of them markup. Under "clip" the pair's number i decides: A
    wins by i/100 where it is even, B where it is odd, 0 is a tie; under "oracle" all are ties."""
    root = tmp_path_factory.mktemp("report")
    prompts = [f"prompt {i:03d}" for i in range(PAIRS - 1)] + [MARKUP]
    categories = [CATEGORY if i % 3 else "plants" for i in range(PAIRS)]
    margins = [i / 100 * (-1) ** i for i in range(PAIRS)]
    flat = [0.0] * PAIRS
    a = {"clip": [*margins, 9.0], "oracle": [*flat, 0.0]}
    # Signs that mean something in a URL.
    ours = make_model(root / "a #1 50%", [*prompts, MARKUP + "2"], a, [*categories, "plants"])
    base = make_model(root / "b", prompts, {"clip": flat, "oracle": flat}, categories)
    third = make_model(root / "c", prompts, {"clip": [0.5] * PAIRS, "oracle": flat}, categories)
    return {LABEL: ours, "base": base, "third": third}


@pytest.fixture(scope="module")
def two(manifests) -> list[Model]:
    """Two of them, whose scores say what one of the numbers is."""
    models = read_models({label: manifests[label] for label in (LABEL, "base")})
    models[0].table.about["oracle"]["meaning"] = "0 to 1"
    return models


@pytest.fixture(scope="module")
def page(manifests, two) -> Path:
    """The report on two models, beside their folders."""
    return write_page(manifests["base"].parent.parent / "two", two)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    """One headless browser for all of them."""
    session = start_browser(tmp_path_factory.mktemp("profile"))
    yield session
    session.quit()


@pytest.fixture
def opened(driver, page) -> Page:
    return Page(driver, page)


def images_loaded(page: Page) -> bool:
    return page.driver.execute_async_script(
        "const done = arguments[0]; const all = [...document.querySelectorAll('#images img')];"
        "Promise.all(all.map(i => i.decode().then(() => i.naturalWidth > 0, () => false)))"
        ".then(ok => done(ok.length === 2 && ok.every(Boolean)));"
    )


def test_the_page_asks_for_nothing_but_itself_and_its_images(opened):
    assert images_loaded(opened)
    assert opened.console() == []
    asked = opened.requests()
    assert asked and all(url.startswith(("file://", "data:,")) for url in asked), asked
    assert any(
        unquote(url).endswith("a #1 50%/suite_seed0_8x8_7.5cfg/118_8x8.png") for url in asked
    )


def test_summary_charts_and_categories(opened):
    rows = opened.js(
        "return [...document.querySelectorAll('#summary tbody tr')].map(r =>"
        " [...r.cells].map(c => c.textContent))"
    )
    # Of 120 pairs 0 is tied, 59 even ones are won and 60 odd ones lost.
    assert rows[0][0] == "Clip" and rows[0][2] == "59 / 1 / 60"
    assert rows[0][1].startswith("49.6%") and rows[0][-1] == "undecided"
    assert rows[1][2] == "0 / 120 / 0" and rows[1][3] == "1.000"
    assert opened.texts("#summary-note")[0].endswith("number of metrics. Oracle: 0 to 1.")
    charts = opened.js("return [...document.querySelectorAll('#charts svg')].map(s => s.ariaLabel)")
    assert len(charts) == 2 * len(METRICS)
    assert "A wins 49.6% of the pairs" in charts[0]
    assert "A better in 59, B better in 60, tied in 1 pairs" in charts[1]
    assert opened.texts("#categories tbody th") == [CATEGORY, "plants"]
    assert "1 of 121 images have no partner" in opened.texts("#leftovers summary")[0]
    assert opened.texts("#leftovers li") == [MARKUP + "2"]


def test_markup_is_shown_and_does_nothing(opened):
    opened.set("text", "onerror")
    assert opened.count == "1 of 120 pairs"
    assert opened.prompt == MARKUP
    assert opened.js("return document.querySelectorAll('b, i, u, img[src=x]').length") == 0
    assert opened.driver.title == f"{LABEL} vs base"
    assert f"A {LABEL} against B base" in opened.texts("#title")[0]
    assert opened.texts("#notes li") == ["<b>note</b>"]
    assert opened.console() == []


def test_filters(opened):
    assert opened.count == "120 of 120 pairs"
    for winner, expected in {"a": 59, "b": 60, "tie": 1, "all": 120}.items():
        opened.set("winner", winner)
        assert opened.count == f"{expected} of 120 pairs"
    opened.set("text", " PROMPT 01")
    assert opened.count == "10 of 120 pairs"
    opened.set("winner", "a")
    assert opened.count == "5 of 120 pairs"
    opened.set("category", "=plants")
    assert opened.texts("#list .line") == ["prompt 018", "prompt 012"]
    opened.set("metric", "oracle")
    assert opened.count == "0 of 120 pairs"
    assert "No pair matches" in opened.one("#list").text
    opened.press("j")
    opened.set("winner", "tie")
    assert opened.texts("#list .line") == ["prompt 012", "prompt 015", "prompt 018"]
    assert opened.console() == []


def test_orders(opened):
    expected = {
        "margin": [MARKUP, "prompt 118", "prompt 117"],
        "a": ["prompt 118", "prompt 116", "prompt 114"],
        "b": [MARKUP, "prompt 117", "prompt 115"],
        "closest": ["prompt 000", "prompt 001", "prompt 002"],
        "row": ["prompt 000", "prompt 001", "prompt 002"],
    }
    for order, first in expected.items():
        opened.set("sort", order)
        assert opened.texts("#list .line")[:3] == first
        assert opened.prompt == first[0]


def test_a_pair_shows_both_images_and_all_scores(opened):
    opened.set("sort", "a")
    assert images_loaded(opened)
    sources = opened.js("return [...document.querySelectorAll('#images img')].map(i => i.src)")
    assert [unquote(url).rsplit("/", 3)[1:] for url in sources] == [
        ["a #1 50%", "suite_seed0_8x8_7.5cfg", "118_8x8.png"],
        ["b", "suite_seed0_8x8_7.5cfg", "118_8x8.png"],
    ]
    assert "wins by 1.180" in opened.one("#images figure.won.side-a").text
    rows = opened.texts("#scores tbody tr")
    assert rows == ["Clip1.1800.000+1.180 A", "Oracle0.000.000.00 ="]


def test_keys(opened):
    from selenium.webdriver.common.keys import Keys

    opened.set("sort", "row")
    for key, expected in [
        ("j", 1), (Keys.ARROW_RIGHT, 2), ("k", 1), (Keys.ARROW_LEFT, 0), ("k", 0)
    ]:  # fmt: skip
        opened.press(key)
        assert opened.prompt == f"prompt {expected:03d}", key
    for key, expected in [
        (Keys.ARROW_DOWN, 1), (Keys.PAGE_DOWN, 51), (Keys.ARROW_UP, 50), (Keys.ARROW_UP, 49),
        (Keys.END, 119), (Keys.HOME, 0),
    ]:  # fmt: skip
        opened.press(key, "#list")
        shown = opened.prompt
        assert shown == (f"prompt {expected:03d}" if expected < 119 else MARKUP), key
        selected = opened.texts("#list [aria-selected=true] .line")
        assert selected == [shown]
        chosen = opened.js(
            "return document.getElementById('list').getAttribute('aria-activedescendant')"
        )
        assert chosen == f"pair-{expected}"
    focus = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.js(focus) == "solid"
    opened.press("/")
    assert opened.js("return document.activeElement.id") == "text"
    opened.press("jk", "#text")  # letters are letters there
    assert opened.count == "0 of 120 pairs"
    assert "next pair" in opened.one(".keys").text


def test_only_a_page_of_the_list_is_in_the_document(opened):
    opened.set("sort", "row")
    assert len(opened.texts("#list li")) == 50 and opened.one("#page").text == "page 1 of 3"
    opened.one("#page-on").click()
    assert opened.prompt == "prompt 050"
    opened.one("#page-on").click()
    assert len(opened.texts("#list li")) == 20
    assert not opened.one("#page-on").is_enabled()
    opened.one("#page-back").click()
    opened.one("#previous").click()
    assert opened.prompt == "prompt 049" and opened.one("#page").text == "page 1 of 3"


@pytest.mark.parametrize("width", [390, 320, 1280])
def test_no_width_makes_the_page_scroll_sideways(opened, width):
    opened.device(width)
    opened.set("sort", "row")
    opened.set("text", MARKUP[:20])
    assert opened.js("return innerWidth") == width
    root = "document.documentElement"
    assert opened.js(f"return {root}.scrollWidth === {root}.clientWidth")
    beside = opened.js(
        "const [a, b] = [...document.querySelectorAll('#images figure')].map(f =>"
        " f.getBoundingClientRect()); return b.top === a.top;"
    )
    assert beside == (width > 640)


def test_dark_and_light(opened):
    def contrast() -> tuple[int, int]:
        colours = opened.js(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        background, ink = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colours)
        return background, ink

    background, ink = contrast()
    assert background > 690 and ink < 150
    opened.device(dark=True)
    background, ink = contrast()
    assert background < 150 and ink > 600


def test_an_image_that_is_gone_is_said(driver, page, tmp_path):
    moved = tmp_path / "far/away"
    moved.mkdir(parents=True)
    shutil.copy(page, moved)
    opened = Page(driver, moved / page.name)
    assert not images_loaded(opened)
    assert "The image is not there" in opened.one("#images").text


def test_three_models(driver, manifests):
    page = Page(
        driver, write_page(manifests["base"].parent.parent / "three", read_models(manifests))
    )
    assert page.texts("#matrices h3") == ["Clip", "Oracle"]
    cells = page.texts("#matrices .card:first-child tbody tr:nth-child(2) td")
    assert cells[0].startswith("50.4%") and cells[1] == "–" and cells[2].startswith("0.0%")
    assert len(page.js("return [...document.querySelectorAll('#comparison option')]")) == 3
    page.one("[data-pair='2-1']").click()
    assert page.texts("#title") == ["A base against B third"]
    assert page.texts("#summary tbody tr:first-child td")[1] == "0 / 0 / 120"
    assert page.one("#comparison").get_attribute("value") == "2"
    page.set("comparison", "1")
    assert page.texts("#title") == [f"A {LABEL} against B third"]
    page.device(390)
    assert page.js("return document.documentElement.scrollWidth") == 390
    assert page.console() == []


def test_inlined_images_need_no_file(driver, two, tmp_path):
    path = write_page(tmp_path / "inline", two, inline_images=True)
    page = Page(driver, path)
    assert images_loaded(page)
    assert page.console() == []
    assert {url for url in page.requests() if not url.startswith("data:")} == {path.as_uri()}


def test_large_images_are_inlined_as_thumbnails(tmp_path):
    scores = {"clip": [0.0], "oracle": [0.0]}
    paths = {name: make_model(tmp_path / name, ["x"], scores, size=(900, 600)) for name in "ab"}
    models = read_models(paths)
    text = write_page(tmp_path / "page", models, inline_images=True).read_text()
    found = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", text)
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found] == 2 * [
        (512, 341)
    ]
    (paths["a"].with_suffix("") / "0_8x8.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="--inline_images: cannot decode"):
        write_page(tmp_path / "page", models, inline_images=True)


def test_thousands_of_pairs_stay_quick(driver, page, tmp_path):
    data = json.loads(re.search(r'"application/json">(.*?)</script>', page.read_text(), re.S)[1])
    rows, times = 3200, 3200 // PAIRS + 1
    for model in data["models"]:
        for values in (model["prompts"], model["images"], *model["scores"].values()):
            values[:] = (values * times)[:rows]
    comparison = data["comparisons"][0]
    comparison["rows_a"] = comparison["rows_b"] = list(range(rows))
    comparison["pair_categories"] = [None] * rows
    (tmp_path / "large.html").write_text(render("large", data))
    large = Page(driver, tmp_path / "large.html")
    assert large.count == "3200 of 3200 pairs"
    took = large.js(
        "const field = document.getElementById('text'); const start = performance.now();"
        "for (const words of ['p', 'pr', 'prompt 01', '']) {"
        "  field.value = words; field.dispatchEvent(new Event('input'));"
        "} document.body.offsetHeight; return performance.now() - start;"
    )
    assert took < 4 * 500  # milliseconds; some 10 each on an idle machine
    assert large.js("return document.querySelectorAll('*').length") < 2500
    assert large.js("return document.querySelectorAll('#images figure').length") == 2


def test_the_page_names_no_host(page):
    text = page.read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert hosts == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert text.count("</script>") == 2
    assert "default-src 'none'" in text


def test_what_was_put_in_is_not_looked_through_for_more(page):
    data = json.loads(re.search(r'"application/json">(.*?)</script>', page.read_text(), re.S)[1])
    data["models"][0]["prompts"][0] = "@@STYLE@@ @@NAME@@"
    assert "@@STYLE@@ @@NAME@@" in render("@@DATA@@", data)
