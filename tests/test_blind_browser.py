"""The labelling pages in a browser, where there is one: keys, sides, what is kept, what is saved."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from test_blind import ASKED, answers, made, saved, told
from test_label import GUIDELINES, pairs
from test_report_browser import LOADED, OVERFLOW, UNSAID, WIDTHS, browser, opened  # noqa: F401  # a fixture

from vp_rl.evaluation.blind import read_key, write_page
from vp_rl.evaluation.blind_answers import read_answers, results
from vp_rl.evaluation.blind_report import write
from vp_rl.visionprefer.label import Labeler
from vp_rl.visionprefer.votes import Votes

pytestmark = pytest.mark.slow

HOSTILE = "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)> {} " + "Donaudampfschiff" * 20
LEFT = "study.pairs.flatMap(pair => pair.images).find(image => image.url === images[0].src).name"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_page(tmp_path, *made(prompts=4, seeds=1), 4, ASKED)


def seen(page: Any) -> None:
    """Waits for the images; by itself, as the page's policy forbids what playwright would wait with."""
    end = time.monotonic() + 20
    while not page.evaluate("seen !== null"):
        assert time.monotonic() < end
        time.sleep(0.02)


def begin(page: Any, voter: str = "") -> None:
    if voter:
        page.keyboard.type(voter)
    page.keyboard.press("Enter")
    seen(page)


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        seen(page)


def save(page: Any, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the answers").click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_complains_of_nothing(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:  # noqa: F811
    file = write_page(tmp_path, *made(prompts=3, seeds=1, prompt=HOSTILE), 3, ASKED)
    page, said = opened(browser, file, width, color_scheme=scheme)
    assert page.evaluate(OVERFLOW) == 0
    begin(page, "ann " + "x" * 190)
    assert page.inner_text("h1#prompt").startswith("<script>document.title = 'taken over'</script><img src=x")
    for _ in range(6):
        assert page.evaluate(OVERFLOW) == 0
        assert page.evaluate(LOADED)
        assert page.evaluate(UNSAID) == 0
        page.keyboard.press("ArrowDown")
        if page.locator("#ask").is_visible():
            seen(page)
    assert page.evaluate(OVERFLOW) == 0
    assert "Thank you!" in page.inner_text("#end")
    assert page.title() == "Which image is better?"
    assert said == []


def test_whoever_knows_the_key_wins_everything_by_the_keyboard_alone(browser: Any, page: Path, tmp_path: Path) -> None:  # noqa: F811
    key, chosen = read_key(tmp_path), []
    tuned = {pair.tuned for pair in key.pairs}
    view, said = opened(browser, page, 1440, accept_downloads=True)
    begin(view, "ann")
    for _ in range(8):
        left = view.evaluate(LEFT)
        chosen.append((left, "left" if left in tuned else "right"))
        view.keyboard.press("ArrowLeft" if left in tuned else "ArrowRight")
        if view.locator("#ask").is_visible():
            seen(view)
    votes = read_answers([save(view, tmp_path)], key)
    assert [(vote.left, vote.choice) for vote in votes] == chosen
    assert [vote.aspect for vote in votes] == [aspect for aspect in ASKED for _ in range(4)]
    assert all(outcome.win.value == 1 for outcome in results(votes, key).outcomes.values())
    assert said == []


def test_answers_outlive_a_reload_and_can_be_undone(browser: Any, page: Path, tmp_path: Path) -> None:  # noqa: F811
    view, _ = opened(browser, page, 390, accept_downloads=True)
    begin(view, "ann")
    order = view.evaluate("state.questions.map(each => [each.pair, each.aspect, each.turned])")
    press(view, "ArrowLeft", "ArrowRight", "ArrowDown", "z", "t", "s")
    assert view.inner_text("#count") == "3 of 8"
    left = view.evaluate(LEFT)
    view.reload()
    begin(view)  # the name stands there already
    assert (view.inner_text("#count"), view.evaluate(LEFT)) == ("3 of 8", left)
    view.get_by_role("button", name="Stop and save").click()
    said = json.loads(save(view, tmp_path).read_text())
    assert [answer["choice"] for answer in said["answers"]] == ["left", "right", "tie"]
    assert view.evaluate("state.questions.at(-1).pair") == order[3][0], "what was skipped comes last"
    view.get_by_role("button", name="Go on").click()
    press(view, "ArrowLeft")
    assert view.inner_text("#count") == "4 of 8"
    view.reload()
    view.locator("input").fill("bob")
    begin(view)
    assert view.inner_text("#count") == "0 of 8", "another person's answers are not theirs"


def test_sides_and_order_are_each_persons_own(browser: Any, page: Path) -> None:  # noqa: F811
    view, _ = opened(browser, page, 1440)
    drawn = [json.dumps(view.evaluate("drawn().questions")) for _ in range(40)]
    assert len(set(drawn)) > 30
    for aspect in (0, 1):
        turned = [{q["turned"] for q in json.loads(each) if q["aspect"] == aspect} for each in drawn]
        assert {len(each) for each in turned} == {1}, "so that each person's sides are as fair as the page's"
        assert 5 < sum(each == {True} for each in turned) < 35


def test_a_browser_that_keeps_nothing_says_so(browser: Any, page: Path, tmp_path: Path) -> None:  # noqa: F811
    context = browser.new_context(accept_downloads=True)
    context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })")
    view = context.new_page()
    view.goto(page.as_uri())
    begin(view, "ann")
    press(view, "ArrowLeft")
    assert view.get_by_text("does not keep your answers").is_visible()
    view.get_by_role("button", name="Stop and save").click()
    assert len(json.loads(save(view, tmp_path).read_text())["answers"]) == 1
    context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_results_fit_and_complain_of_nothing(browser: Any, page: Path, tmp_path: Path, width: int) -> None:  # noqa: F811
    key, study = read_key(tmp_path), told(page.read_text())
    names = ("ann " + "x" * 190, "bob " * 40 + "b")
    said = [answers(study, key, lambda left, right: "left", name, turned=name[0] == "b") for name in names]
    files = [saved(tmp_path / f"{number}.json", each) for number, each in enumerate(said)]
    view, complaints = opened(browser, write(results(read_answers(files, key), key), tmp_path, "x " * 200), width)
    assert view.evaluate(OVERFLOW) == 0
    assert complaints == []


@contextmanager
def served(votes: Path) -> Iterator[str]:
    """The address of the page that `scripts/label.py` serves, with some pairs."""
    loop, runners = asyncio.new_event_loop(), []

    async def start() -> int:
        runner = web.AppRunner(Labeler(pairs(), GUIDELINES, Votes(votes)).application())
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), loop).result(20)}"
    finally:
        for runner in runners:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_the_page_that_is_served_takes_the_same_keys(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    view = browser.new_page()
    said: list[str] = []
    view.on("pageerror", lambda error: said.append(str(error)))
    with served(tmp_path / "journal.sqlite") as address:
        view.goto(address)
        view.keyboard.type("ann")
        with view.expect_navigation():
            view.keyboard.press("Enter")
        seen(view)
        for number, key in enumerate(("ArrowLeft", "t", "s", "ArrowRight"), start=1):
            with view.expect_navigation():
                view.keyboard.press(key)
            seen(view)
            assert view.get_by_text(f"{number - (number > 2)} of 12").is_visible()
        with view.expect_navigation():
            view.keyboard.press("z")
        seen(view)
        with view.expect_navigation():
            view.keyboard.press("ArrowDown")
    assert [vote.choice for vote in Votes(tmp_path / "journal.sqlite").read()] == ["left", "tie", "tie"]
    assert said == []
