"""The report: one page, whole without a script, and its sliders checked against `kvbuy.economics` in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Run
from figures import WEIGHTS, benchmark, row

from kvbuy.cost import Estimate, Terms, estimate
from kvbuy.economics import Case, count_costs, gpu_usd
from kvbuy.figures import Weights
from kvbuy.prices import shipped_prices
from kvbuy.render_cost import verdict
from kvbuy.report import make_report
from kvbuy.subject import Facts, find_subject

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def priced(**terms: Any) -> Estimate:
    wanted = Terms(loads=(1e6,), usd_per_hour=10, keep="H100", **terms)
    return estimate(find_subject(None, benchmark(), Facts()), wanted, shipped_prices())


def page_of_everything() -> str:
    return make_report(benchmark(), Weights.model_validate(WEIGHTS), priced())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = page_of_everything()
    assert re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=", page) == []
    links = set(re.findall(r"""(?:src|href)=["']([^"']*)""", page))
    assert {link for link in links if not link.startswith("#")} == set()
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_the_page_says_everything_without_its_script() -> None:
    page = re.sub(r"<script.*?</script>", "", page_of_everything(), flags=re.DOTALL)
    assert "Reuse is 40 times faster than prefill at 2000 tokens" in page
    assert verdict(priced().cases[-1]) in page
    assert page.count("<svg ") == 3
    assert "assumed: half" in page
    widths = [float(width) for width in re.findall(r'<span style="width:([\d.e-]+)%">', page)]
    assert (len(widths), max(widths)) == (4, 100)
    assert len(set(widths)) > 1


def test_colours_are_the_page_s_own() -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page_of_everything(), flags=re.DOTALL))
    assert re.findall(r"#0102\w\w", drawn) == []
    assert "var(--one)" in drawn
    assert "var(--two)" in drawn


def test_equal_figures_make_equal_pages() -> None:
    assert page_of_everything() == page_of_everything()


def test_what_is_not_there_is_left_out() -> None:
    only_weights = make_report(None, Weights.model_validate(WEIGHTS), None)
    assert "What a document&#x27;s KV weighs" in only_weights
    assert "Prefill and reuse" not in only_weights
    only_bench = make_report(benchmark(), None, None)
    assert "How small" not in only_bench
    assert "What it costs" not in only_bench


def test_names_cannot_break_out_of_the_page() -> None:
    hostile = benchmark(model="</script><script>alert(1)</script>", document="<b>$css")
    page = make_report(hostile, None, estimate(find_subject(None, hostile, Facts()), Terms(), shipped_prices()))
    assert "<script>alert" not in page
    assert "<b>" not in page


def test_the_verb_writes_the_page(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(benchmark().model_dump_json())
    (tmp_path / "measure.json").write_text(json.dumps(WEIGHTS))
    ran = run("report", "--bench", "bench.json", "--measure", "measure.json", "--json")
    assert ran.json == {"report": "report.html", "bytes": (tmp_path / "report.html").stat().st_size}
    again = run("report", "--bench", "bench.json")
    assert again.code == 1
    assert "there already" in again.err
    assert run("report", "--measure", "measure.json", "--force").out == "report.html\n"


def test_a_report_of_nothing_is_refused(run: Run) -> None:
    ran = run("report")
    assert ran.code == 2
    assert "nothing to report" in ran.err


@pytest.fixture(scope="module")
def browser_page(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Page]":
    """The page in a headless Chromium; anything that it says to the console fails the test."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(page_of_everything(), encoding="utf-8")
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(file.as_uri())
        yield page
        browser.close()
    assert said == []


def set_slider(page: "Page", name: str, value: float) -> None:
    slider = page.locator(f"#{name}")
    slider.evaluate("(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value)


def test_the_browser_s_verdict_is_the_command_line_s(browser_page: "Page") -> None:
    browser_page.reload()
    assert browser_page.inner_text("#verdict") == verdict(priced().cases[-1])


def test_a_slider_changes_the_verdict(browser_page: "Page") -> None:
    browser_page.reload()
    set_slider(browser_page, "agents", 0)
    assert browser_page.inner_text("#verdict").startswith("Prefill: 1 load costs ")
    set_slider(browser_page, "agents", 4)
    assert browser_page.inner_text("#verdict") == verdict(replace(priced().cases[-1], loads=10_000))
    set_slider(browser_page, "agents", 3)
    set_slider(browser_page, "egress", 0)
    assert browser_page.inner_text("#verdict").startswith("Ship: 1,000 loads cost ")
    assert browser_page.inner_text("tr.cheapest td") == "ship every time, reuse"


def test_sliders_reach_from_where_a_case_starts(browser_page: "Page") -> None:
    browser_page.reload()
    shown = [browser_page.inner_text(f"label[for={name}] output") for name in ("agents", "egress", "gpu", "ratio")]
    assert shown == ["1 M", "$0.0900", "$10.00", "40.0x"]
    set_slider(browser_page, "gpu", 5)
    set_slider(browser_page, "ratio", 1)
    wanted = replace(priced().cases[-1], prefill_usd=gpu_usd(10.0, 5), ratio=10.0)
    assert browser_page.inner_text("#verdict") == verdict(wanted)
    for name in ("gpu", "agents", "egress"):
        set_slider(browser_page, name, 0)
    words = browser_page.inner_text("#verdict")
    assert words == verdict(replace(wanted, loads=1, usd_per_gb=0, prefill_usd=0))


def test_a_case_beyond_the_sliders_usual_ends_still_fits_them() -> None:
    slow = benchmark(rows=[row(1000, prefill=0.1, load=0.1, first=0.1)])
    found = estimate(find_subject(None, slow, Facts()), Terms(loads=(1e12,), usd_per_hour=200), shipped_prices())
    page = make_report(slow, None, found)
    assert "Reuse is not faster than prefill at 1000 tokens" in page
    ends = re.findall(r'id="(\w+)" min="([^"]*)" max="([^"]*)" step="any" value="([^"]*)"', page)
    assert [name for name, *_ in ends] == ["agents", "egress", "gpu", "ratio"]
    assert all(float(low) <= float(value) <= float(high) for _, low, high, value in ends)


def test_the_script_computes_what_the_library_computes(browser_page: "Page") -> None:
    """Many random cases in one call: the browser is slower to ask than to answer."""
    cases = [draw_case(seed) for seed in range(300)]
    found = browser_page.evaluate("(cases) => cases.map((c) => [countCosts(c), verdict(c)])", list(map(asdict, cases)))
    for case, (costs, words) in zip(cases, found, strict=True):
        assert costs == pytest.approx(asdict(count_costs(case)))
        assert words == verdict(case)


def draw_case(seed: int) -> Case:
    random = Random(seed)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** random.random()

    return Case(
        tokens=random.randrange(1, 100_000),
        kv_bytes=between(1e4, 1e11),
        prefill_usd=random.choice([0.0, 0.125, 2.5, between(1e-6, 10), between(1e-6, 10)]),  # among them ties
        ratio=random.choice([1.0, 4.0, between(0.5, 500), between(0.5, 500)]),
        loads=float(round(between(1, 1e9))),
        usd_per_gb=random.choice([0.0, between(1e-3, 0.2)]),
        usd_per_gb_hour=random.choice([0.0, between(1e-6, 0.1)]),
        usd_per_fetch=random.choice([0.0, between(1e-7, 1e-4)]),
        store_usd_per_gb_hour=random.choice([0.0, between(1e-6, 0.1)]),
        store_usd_per_fetch=random.choice([0.0, between(1e-7, 1e-4)]),
        hours=between(0.1, 1000),
        input_usd=between(0.1, 20),
        write_usd=between(0.1, 20),
        read_usd=between(0.01, 2),
        publisher_share=random.random(),
    )


def test_the_page_fits_a_telephone_and_prints(browser_page: "Page") -> None:
    browser_page.set_viewport_size({"width": 390, "height": 800})
    browser_page.reload()
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= 390
    browser_page.set_viewport_size({"width": 900, "height": 1000})
    browser_page.emulate_media(media="print")
    assert browser_page.evaluate("getComputedStyle(document.querySelector('.controls input')).display") == "none"
    assert browser_page.inner_text("label[for=agents] output") == "1 M"
    adjusted = "getComputedStyle(document.querySelector('td.bar span')).printColorAdjust"
    assert browser_page.evaluate(adjusted) == "exact"
    assert len(browser_page.pdf()) > 10_000
    browser_page.emulate_media(media="screen")
