"""The blind comparison: a page that gives nothing away, and answers that say what people said, or what is wrong."""

import base64
import html
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluate_images import SMALL, config, run  # noqa: F401  # a fixture

from scripts.evaluate_blind import ask
from scripts.evaluate_images import evaluate
from vp_rl.evaluation import compare
from vp_rl.evaluation.blind import KEY, PAGE, Key, read_key, write_page
from vp_rl.evaluation.blind_answers import Outcome, read_answers, results
from vp_rl.evaluation.blind_report import write
from vp_rl.evaluation.images import Evaluation
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.votes import OVERALL

ROOT = Path(__file__).parents[1]
ASKED = {OVERALL: "Which would *you* keep? <b>", "fidelity": "Look."}
Choose = Callable[[bool, bool], str]
"""From whether the left image and the right one are the tuned model's."""
LEFT: Choose = lambda left, right: "left"  # noqa: E731
TUNED: Choose = lambda left, right: "left" if left else "right"  # noqa: E731
BASE: Choose = lambda left, right: "right" if left else "left"  # noqa: E731
TIE: Choose = lambda left, right: "tie"  # noqa: E731


def made(prompts: int = 12, seeds: int = 2, size: int = 8, prompt: str = "prompt {}") -> tuple[Evaluation, Evaluation]:
    """Base and tuned, all of whose images are different; the judge gives the tuned one more."""
    rng = np.random.default_rng(0)
    names = [prompt.format(number) for number in range(prompts) for _ in range(seeds)]
    sides = []
    for rating in (2, 4):
        images = rng.integers(0, 256, (len(names), size, size, 3), dtype=np.uint8)
        rated = np.full((len(names), len(ASPECTS)), rating)
        reasons = [("",) * len(ASPECTS)] * len(names)
        sides.append(
            Evaluation(names, [*range(seeds)] * prompts, images, np.full(len(names), rating / 7), rated, reasons)
        )
    return sides[0], sides[1]


def page(folder: Path, *, pairs: int = 12, asked: dict[str, str] | None = None, **how: Any) -> dict[str, Any]:
    """Writes one, and gives what it was told."""
    return told(write_page(folder, *made(**how), pairs, ASKED if asked is None else asked).read_text("utf-8"))


def told(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="study">(.*?)</script>', text)
    assert len(found) == 1
    return json.loads(found[0])


def answers(study: dict[str, Any], key: Key, choose: Choose, voter: str = "ann", turned: bool = False) -> dict:
    """As the page saves them, of somebody who knows the key."""
    tuned = {pair.tuned for pair in key.pairs}
    rows = []
    for aspect in study["aspects"]:
        for pair in study["pairs"]:
            left, right = [image["name"] for image in pair["images"]][:: -1 if turned else 1]
            choice = choose(left in tuned, right in tuned)
            rows.append({"left": left, "right": right, "aspect": aspect, "choice": choice, "seconds": 1.5})
    return {"study": study["study"], "voter": voter, "answers": rows}


def saved(file: Path, content: Any) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def outcomes(folder: Path, *given: dict) -> dict[str, Outcome]:
    key = read_key(folder)
    files = [saved(folder / f"answers-{number}.json", each) for number, each in enumerate(given)]
    return results(read_answers(files, key), key).outcomes


# --- the page


def test_the_page_is_the_same_whichever_model_is_the_tuned_one(tmp_path: Path) -> None:
    """With the same random names, and sides that make up for it, not a byte differs: so no byte tells which it is."""

    class Turned(random.Random):
        def shuffle(self, x: Any) -> None:
            super().shuffle(x)
            if all(isinstance(each, bool) for each in x):
                x[:] = [not each for each in x]

    base, tuned = made()
    one = write_page(tmp_path / "one", base, tuned, 12, ASKED, random.Random(0))
    other = write_page(tmp_path / "other", tuned, base, 12, ASKED, Turned(0))
    assert one.read_bytes() == other.read_bytes()
    ours, theirs = read_key(tmp_path / "one").pairs, read_key(tmp_path / "other").pairs
    assert [(pair.tuned, pair.base) for pair in ours] == [(pair.base, pair.tuned) for pair in theirs]


def test_the_page_says_nothing_but_prompts_and_pictures(tmp_path: Path) -> None:
    study = page(tmp_path)
    assert study.keys() == {"study", "aspects", "pairs"}
    for pair in study["pairs"]:
        assert pair.keys() == {"prompt", "images"}
        assert all(image.keys() == {"name", "url"} for image in pair["images"])
    text = re.sub(r"data:image/webp;base64,[\w+/=]*", "", (tmp_path / PAGE).read_text("utf-8"))
    assert not re.search(r"(?i)\btuned\b|\bbase\b|adapter|trained|seed|reward|judge", text.split("</style>")[1])


def test_names_and_sides_are_drawn_anew_for_every_page_and_fair(tmp_path: Path) -> None:
    first, below, names = Counter(), 0, set()
    for number in range(20):
        study = page(tmp_path / str(number))
        key = {pair.tuned: pair for pair in read_key(tmp_path / str(number)).pairs}
        own = [pair["images"][0]["name"] in key for pair in study["pairs"]]
        assert sum(own) == 6, "half of the pairs of every page"
        first.update(pair["prompt"] for pair, tuned in zip(study["pairs"], own, strict=True) if tuned)
        below += sum(pair.tuned < pair.base for pair in key.values())
        names |= {study["study"], *key}
    assert len(names) == 20 * 13
    assert 0 < min(first.values()) <= max(first.values()) < 20, "no prompt has its side for good"
    assert len(first) == 12
    assert abs(below - 120) < 4 * (240 / 4) ** 0.5  # 4 standard deviations


@pytest.mark.parametrize("pairs", [1, 7])
def test_an_odd_number_of_pairs_is_divided_as_well_as_it_can_be(tmp_path: Path, pairs: int) -> None:
    counts = set()
    for number in range(12):
        study = page(tmp_path / str(number), pairs=pairs)
        tuned = {pair.tuned for pair in read_key(tmp_path / str(number)).pairs}
        counts.add(sum(pair["images"][0]["name"] in tuned for pair in study["pairs"]))
    assert counts == {pairs // 2, pairs // 2 + 1}


def test_pairs_are_of_as_many_prompts_as_can_be(tmp_path: Path) -> None:
    for pairs in (5, 12, 17, 24, 99):
        study = page(tmp_path / str(pairs), pairs=pairs)
        each = Counter(pair["prompt"] for pair in study["pairs"])
        assert sum(each.values()) == min(pairs, 24)
        assert len(each) == min(pairs, 12)
        assert max(each.values()) - min(each.values()) <= 1


def test_the_key_knows_the_images_that_the_page_shows(tmp_path: Path) -> None:
    base, tuned = made()
    study = page(tmp_path)
    shown = {image["name"]: image["url"] for pair in study["pairs"] for image in pair["images"]}
    for pair in read_key(tmp_path).pairs:
        row = next(i for i in range(24) if (base.prompts[i], base.seeds[i]) == (pair.prompt, pair.seed))
        for name, side in ((pair.base, base), (pair.tuned, tuned)):
            data = base64.b64decode(shown[name].partition(",")[2])
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), side.images[row])
            assert list(pair.judged[name]) == side.ratings[row].tolist()


def test_the_page_stays_below_ten_megabytes_and_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vp_rl.evaluation.blind._BYTES", 400_000)
    base, tuned = made(prompts=8, seeds=1, size=300)  # noise: no format makes it much smaller
    ask(tmp_path / "smaller", base, tuned, 3, [OVERALL])
    text = (tmp_path / "smaller" / PAGE).read_text()
    assert "at 256 of 300 pixels" in text
    assert len(read_key(tmp_path / "smaller").pairs) == 3
    ask(tmp_path / "fewer", base, tuned, 8, [OVERALL])
    number = len(read_key(tmp_path / "fewer").pairs)
    assert 0 < number < 8
    assert f"{number} pairs are compared, not 8" in caplog.text
    for folder in ("smaller", "fewer"):
        assert (tmp_path / folder / PAGE).stat().st_size < 430_000


def test_a_prompt_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = "</script><script>alert({})</script><img src=x onerror=alert(1)>'\"&"
    study = page(tmp_path, prompt=hostile)
    text = (tmp_path / PAGE).read_text("utf-8")
    assert "alert(0)</script>" not in text
    assert text.count("<script") == 2, "the data and the script"
    assert text.count("<img ") == 2
    assert {pair["prompt"] for pair in study["pairs"]} == {hostile.replace("{}", str(n)) for n in range(12)}
    assert "<em>you</em> keep? &lt;b&gt;" in text, "guidelines are Markdown without HTML"


def test_a_page_that_is_there_keeps_its_key(tmp_path: Path) -> None:
    page(tmp_path)
    files = [(tmp_path / name).read_bytes() for name in (PAGE, KEY)]
    page(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (PAGE, KEY)] == files
    with pytest.raises(ValueError, match="move the folder away"):
        page(tmp_path, pairs=11)
    with pytest.raises(ValueError, match="move the folder away"):
        page(tmp_path, asked={OVERALL: "Something else."})


def test_a_key_whose_page_was_moved_away_is_not_written_over(tmp_path: Path) -> None:
    page(tmp_path)
    key = (tmp_path / KEY).read_bytes()
    (tmp_path / PAGE).rename(tmp_path / "sent.html")
    with pytest.raises(ValueError, match="key of a page that is no longer there"):
        page(tmp_path)
    assert (tmp_path / KEY).read_bytes() == key


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    base, tuned = made()
    with pytest.raises(
        ValueError, match=r"blind.aspects=\['beauty'\]: give a list, as \[overall\], of overall, prompt"
    ):
        ask(tmp_path, base, tuned, 3, ["beauty"])
    with pytest.raises(ValueError, match="asks nothing"):
        write_page(tmp_path, base, tuned, 0, ASKED)
    assert not list(tmp_path.iterdir())


# --- the answers


@pytest.mark.parametrize("rival", [compare.BASE, compare.OTHER])
def test_the_results_name_what_the_tuned_model_was_compared_with(tmp_path: Path, rival: compare.Rival) -> None:
    study = told(write_page(tmp_path, *made(), 12, ASKED, rival=rival).read_text("utf-8"))
    key = read_key(tmp_path)
    votes = read_answers([saved(tmp_path / "a.json", answers(study, key, BASE))], key)
    text = write(results(votes, key), tmp_path, "").read_text("utf-8")
    assert f"People prefer {rival.name}" in text
    assert ("the other adapter" in text) == (rival is compare.OTHER)
    before = json.loads((tmp_path / KEY).read_text("utf-8"))
    del before["rival"]  # keys of before there were others
    saved(tmp_path / KEY, before)
    assert read_key(tmp_path).rival == "the base model"


@pytest.mark.parametrize("turned", [False, True])
def test_who_always_takes_the_tuned_one_gives_it_all_wins_on_whichever_side(tmp_path: Path, turned: bool) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)
    for choose, wanted in ((TUNED, (1, 0, 0)), (TIE, (0, 1, 0)), (BASE, (0, 0, 1))):
        found = outcomes(tmp_path, answers(study, key, choose, turned=turned))
        assert list(found) == list(ASKED)
        for outcome in found.values():
            assert (outcome.win.value, outcome.tie.value, outcome.loss.value) == wanted
            assert outcome.net.value == wanted[0] - wanted[2]
            for share in outcome[:3]:
                assert share.low <= share.value <= share.high
                assert 0.1 < share.high - share.low < 0.4, "twelve prompts leave doubt, even where all say the same"


def test_who_always_takes_the_left_one_gives_as_many_wins_as_losses(tmp_path: Path) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)
    found = results(read_answers([saved(tmp_path / "a.json", answers(study, key, LEFT))], key), key)
    for outcome in found.outcomes.values():
        assert outcome.win.value == outcome.loss.value == 0.5
        assert outcome.net.low < 0 < outcome.net.high
    assert found.voters["ann"].left.value == 1
    assert found.voters["ann"].left.low > 0.6


def test_shares_are_of_all_answers_and_prompts_are_what_varies(tmp_path: Path) -> None:
    """Two seeds of a prompt that are answered alike are no more evidence than one."""
    ones, twos = tmp_path / "ones", tmp_path / "twos"
    found = []
    for folder, seeds in ((ones, 1), (twos, 2)):
        study = page(folder, pairs=99, seeds=seeds)
        key = read_key(folder)
        wins = {f"prompt {number}" for number in range(8)}
        said = answers(study, key, TUNED)
        other = answers(study, key, BASE)["answers"]
        prompt = {image["name"]: pair["prompt"] for pair in study["pairs"] for image in pair["images"]}
        rows = zip(said["answers"], other, strict=True)
        said["answers"] = [won if prompt[won["left"]] in wins else lost for won, lost in rows]
        found.append(outcomes(folder, said)[OVERALL])
    assert found[0].win.value == found[1].win.value == 8 / 12
    assert (found[0].net.count, found[1].net.count) == (12, 24)
    assert found[1].net.low == pytest.approx(found[0].net.low)
    assert found[1].win.low == pytest.approx(found[0].win.low)


def test_people_and_the_judge_agree_as_far_as_they_do(tmp_path: Path) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)

    def all_of(*people: Choose) -> Any:
        files = [
            saved(tmp_path / f"{number}.json", answers(study, key, choose, f"voter {number}", turned=bool(number % 2)))
            for number, choose in enumerate(people)
        ]
        return results(read_answers(files, key), key)

    alone, alike, against, left = all_of(TUNED), all_of(TUNED, TUNED, TUNED), all_of(TUNED, BASE), all_of(LEFT, LEFT)
    assert (alone.people, alone.alpha) == ({}, {})
    for aspect in ASKED:
        assert alike.people[aspect].with_ties.value == 1
        assert alike.people[aspect].with_ties.count == 3 * 12
        assert np.isnan(alike.alpha[aspect]), "nothing varies: chance would do as well"
        assert against.people[aspect].decided.value == 0
        assert left.people[aspect].decided.value == 0, "they saw the sides the other way round"
        assert left.alpha[aspect] < 0
        assert alike.judge[aspect].decided.value == 1, "the judge rates all tuned images higher"
        assert against.judge[aspect].decided.value == 0.5
    same = all_of(LEFT, lambda left, right: "right")
    assert same.alpha == pytest.approx(dict.fromkeys(ASKED, 1.0))


def test_some_answers_are_enough(tmp_path: Path) -> None:
    study = page(tmp_path)
    said = answers(study, read_key(tmp_path), TUNED)
    said["answers"] = said["answers"][:5]
    found = outcomes(tmp_path, said)
    assert list(found) == [OVERALL], "the others were not reached"
    assert found[OVERALL].win.count == 5


DAMAGES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "half a file": (lambda said: json.dumps(said)[:500], "is damaged"),
    "nesting": (lambda said: "[" * 100_000, "is damaged"),
    "a list": (lambda said: [], "holds no answers"),
    "another file": (lambda said: {"a": 1}, "holds no answers"),
    "another page": (lambda said: {**said, "study": "0" * 16}, "answers another page"),
    "no name": (lambda said: {**said, "voter": " "}, "no name of a person"),
    "a name that is none": (lambda said: {**said, "voter": ["ann"]}, "no name of a person"),
    "no answer": (lambda said: {**said, "answers": []}, "has no answer"),
    "answers of no list": (lambda said: {**said, "answers": "all"}, "has no answer"),
    "an answer of no fields": (lambda said: {**said, "answers": [1]}, "answer 1 is damaged"),
    "another field": (lambda said: changed(said, 2, whose="tuned"), "answer 3 is damaged"),
    "twice": (lambda said: {**said, "answers": said["answers"] * 2}, "answer 25: this pair is answered twice"),
    "twice, turned": (
        lambda said: {**said, "answers": [said["answers"][0], {**said["answers"][0], "choice": "right"} | turn(said)]},
        "answer 2: this pair is answered twice in overall",
    ),
    "another image": (lambda said: changed(said, 0, left="0" * 16), "answer 1 is of no pair"),
    "the same image": (lambda said: changed(said, 0, left=said["answers"][0]["right"]), "answer 1 is of no pair"),
    "two pairs": (lambda said: changed(said, 0, left=said["answers"][1]["left"]), "answer 1 is of no pair"),
    "an aspect": (lambda said: changed(said, 0, aspect="aesthetic"), "'aesthetic' was not asked"),
    "a choice": (lambda said: changed(said, 1, choice="both"), "answer 2: 'both' is no answer"),
    "a choice of no name": (lambda said: changed(said, 1, choice=["left"]), "is no answer"),
    "time": (lambda said: changed(said, 0, seconds=-1), "from no seconds to a day"),
    "no time": (lambda said: changed(said, 0, seconds=float("nan")), "from no seconds to a day"),
}


def changed(said: dict, at: int, **fields: Any) -> dict:
    rows = [dict(row) for row in said["answers"]]
    rows[at] |= fields
    return {**said, "answers": rows}


def turn(said: dict) -> dict:
    first = said["answers"][0]
    return {"left": first["right"], "right": first["left"]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_answer_file_that_cannot_be_meant_is_named_with_what_is_wrong(tmp_path: Path, damage: str) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)
    spoil, message = DAMAGES[damage]
    file = saved(tmp_path / "answers-ann.json", spoil(answers(study, key, TUNED)))
    with pytest.raises(ValueError, match=message) as error:
        read_answers([file], key)
    assert "answers-ann.json" in str(error.value)


def test_one_persons_answers_count_once(tmp_path: Path) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)
    files = [saved(tmp_path / name, answers(study, key, TUNED)) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match="a.json' and '.*b.json' are both by 'ann'"):
        read_answers(files, key)
    with pytest.raises(ValueError, match="There are no answers"):
        read_answers([], key)
    with pytest.raises(ValueError, match=r"nowhere.json' cannot be read: No such file"):
        read_answers([tmp_path / "nowhere.json"], key)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"study": 1, "content": "", "aspects": [], "pairs": [{}]}'])
def test_a_key_that_is_damaged_or_missing_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="has no key.json"):
        read_key(tmp_path)
    saved(tmp_path / KEY, content)
    with pytest.raises(ValueError, match="key.json' is damaged"):
        read_key(tmp_path)


# --- what is written


def test_the_results_are_written_with_bars_and_names_as_text(tmp_path: Path) -> None:
    study = page(tmp_path)
    key = read_key(tmp_path)
    hostile = "<script>alert(1)</script>"
    files = [
        saved(tmp_path / f"{voter[:3]}.json", answers(study, key, choose, voter))
        for voter, choose in ((hostile, TUNED), ("bob", TIE), ("eve", TUNED))
    ]
    text = write(results(read_answers(files, key), key), tmp_path, "python <x>").read_text("utf-8")
    assert "<script" not in text
    assert html.escape(hostile) in text
    assert "People prefer the tuned model" in text
    assert "in 67% of 36 answers and the base model&#39;s in 0%, and found them equal in 33%." in text
    bars = re.findall(r'class="(win|tie|loss)" style="width:([\d.]+)%', text)
    assert bars[:2] == [("win", "66.67"), ("tie", "33.33")]
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["outcomes"][OVERALL]["win"]["value"] == 2 / 3
    assert written["voters"]["bob"]["left"]["value"] is None, "all ties: no side at all"
    assert set(written["outcomes"]) == set(ASKED)


@pytest.mark.slow
def test_the_command_reads_answers_or_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    study = page(tmp_path)
    file = saved(tmp_path / "answers-ann.json", answers(study, read_key(tmp_path), BASE))

    def command(*given: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "scripts/evaluate.py", "blind", *map(str, given)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    done = command(tmp_path, file)
    assert done.returncode == 0, done.stderr
    assert "| All in all | 0% [" in done.stdout
    assert str(tmp_path) not in (tmp_path / "results.html").read_text()
    wrong = command(tmp_path / "none", file)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith(f"error: '{tmp_path / 'none'}' has no key.json")


@pytest.mark.slow
def test_an_evaluation_of_an_adapter_leaves_a_page_with_its_images(run: Path, tmp_path: Path) -> None:  # noqa: F811
    evaluate(config(f"adapter={run}", f"folder={tmp_path}", "cache=null", "blind.pairs=4", *SMALL))
    key = read_key(tmp_path / "blind")
    study = told((tmp_path / "blind" / PAGE).read_text("utf-8"))
    assert (study["aspects"], len(study["pairs"])) == ([OVERALL], 4)
    assert {pair["prompt"] for pair in study["pairs"]} == {pair.prompt for pair in key.pairs}
    urls = {image["name"]: image["url"] for pair in study["pairs"] for image in pair["images"]}
    assert all(urls[pair.base] != urls[pair.tuned] for pair in key.pairs), "the adapter does something"
