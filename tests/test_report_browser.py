"""What a browser makes of the pages, where there is one: nothing overflows, nothing complains, all can be reached."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import SAMPLER, made_up
from test_guidance_curve import DOWN, EVEN, UP
from test_guidance_curve import made_up as curve
from test_report import curves, run_folder
from test_sweep import finished, samples

from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.claims import decide
from vp_rl.evaluation.compare import compare
from vp_rl.evaluation.distances import Distances
from vp_rl.evaluation.duel import Duel
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.signs import Sign
from vp_rl.evaluation.sweep import write_table
from vp_rl.types import Usage

WIDTHS = (390, 1440)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNSAID = "[...document.images].filter(image => !image.alt.trim()).length"
LOADED = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = run_folder(tmp_path)
    curves(folder, "metrics.csv", range(5), 0.0)
    (folder / ".hydra" / "config.yaml").write_text("long: " + "x" * 400)
    (folder / ".hydra" / "overrides.yaml").write_text("- experiment=" + "x" * 200)
    base, tuned = made_up(np.linspace(-1, 1, 20)[:, None])
    base.prompts[0] = tuned.prompts[0] = (
        "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)>" * 2
    )
    base.prompts[1] = tuned.prompts[1] = "Donaudampfschifffahrtsgesellschaft" * 8
    tuned.ratings[::2] += 1
    tuned.ratings[1::2] -= 1
    found = compare(base, tuned)
    signs = [Sign("w" * 300, 2, "warning")]
    categories = {"a category with a name of many words, or more": found, "y" * 80: found}
    pairs = {"prompt_following": Duel(win=0.5, tie=0.25, loss=0.25, low=-0.25, high=0.75, consistent=0.5)}
    kinds = dict.fromkeys(("base and adapter", "reference and base"), 12345.678)
    return write_report(
        folder,
        base,
        tuned,
        decide(found, categories, pairs),
        sampler=SAMPLER,
        seconds={"training": 90.0},
        note="z" * 200,
        signs=signs,
        distances=Distances("e" * 100, 768, 20, 20, kinds, kinds, "f" * 200),
        curves=[curve(UP, _1=UP, _1_5=EVEN, _2=EVEN, _7_5=DOWN)],
        asked={"images by themselves": Asked(10**7, 10**7, Usage(10**10, 10**9, 12345.0))},
    )


def opened(browser: Any, file: Path, width: int, **context: Any) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900}, **context)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    page.goto(file.as_uri())
    return page, said


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_and_complains_of_nothing(browser: Any, report: Path, width: int, scheme: str) -> None:
    page, said = opened(browser, report, width, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate(OVERFLOW) == 0
    page.get_by_role("button", name="Slider").click()
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(UNSAID) == 0
    assert page.evaluate(LOADED)
    assert "run report" in page.title()
    assert said == []


@pytest.mark.slow
def test_the_keyboard_alone_moves_a_slider(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, 1440)
    slider = page.locator(".pair input").first
    assert not slider.is_visible(), "side by side at first"
    page.get_by_role("button", name="Slider").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert slider.evaluate("element => element === document.activeElement")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "51% base, 49% trained"
    assert slider.evaluate("element => element.parentElement.style.getPropertyValue('--at')") == "51%"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the judge's reasons come next"


@pytest.mark.slow
def test_without_scripts_pairs_are_side_by_side(browser: Any, report: Path) -> None:
    page, said = opened(browser, report, 1440, java_script_enabled=False)
    assert not page.get_by_role("button", name="Slider").is_visible()
    before, after = (page.locator(".pair img").nth(place).bounding_box() for place in (0, 1))
    assert before["x"] + before["width"] < after["x"]
    assert before["y"] == after["y"]
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sweeps_page_fits_and_complains_of_nothing(browser: Any, tmp_path: Path, width: int) -> None:
    for number in range(3):
        finished(tmp_path, str(number), f"a.setting.of.a.long.name={'x' * 60}{number}", number / 10)
        samples(tmp_path / str(number), 4, 100, 150 + number)
    write_table(tmp_path)
    page, said = opened(browser, tmp_path / "results.html", width)
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(UNSAID) == 0
    assert page.evaluate(LOADED)
    assert said == []
