"""`scripts/evaluate.py accuracy`: from a command to one table of rewards and sets, published numbers beside."""

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from test_human_sets import CONF, human, packed, pick_a_pic, vision_prefer

from scripts.evaluate import evaluate, expand
from vp_rl.data.sets.base import HumanSet, Judged, shares_of
from vp_rl.evaluation import calibration, protocols
from vp_rl.evaluation.accuracy import pairwise_accuracy
from vp_rl.evaluation.accuracy_report import console, write
from vp_rl.evaluation.human_accuracy import ALL_ASPECTS, measure
from vp_rl.evaluation.published import HPD_V2, IMAGE_REWARD, PICK_A_PIC, published
from vp_rl.evaluation.scoring import Scores
from vp_rl.types import ASPECTS

ROOT = CONF.parent


class Made(HumanSet):
    """Judgements without images."""

    def __init__(self, title: str = "made", note: str = "") -> None:
        self.title, self.note, self.protocols = title, note, [protocols.prompt_mean]

    def load(self) -> list[Judged]:
        raise NotImplementedError

    def read(self, wanted: object) -> None:  # type: ignore[override]
        raise NotImplementedError

    def stamp(self) -> str:
        raise NotImplementedError


def judged(prompts: int = 20, images: int = 4) -> list[Judged]:
    """Three people each rank all images; two generators; one aspect that is the reverse."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(prompts):
        people = rng.permuted(np.tile(np.arange(images), (3, 1)), axis=1).astype(float)
        names = tuple(f"{number}-{i}" for i in range(images))
        ranks = people.mean(0)
        generators = ("sd", "sd", "xl", "xl")[:images]
        found.append(Judged(f"p{number}", names, ranks, shares_of(people), generators, {"one": ranks, "other": -ranks}))
    return found


def scores_of(them: list[Judged], sign: float = -1.0) -> Scores:
    """The people's own order, or the opposite."""
    pairs = {(n, e.prompt): sign * float(r) for e in them for n, r in zip(e.images, e.ranks, strict=True)}
    return Scores(pairs, {})


# --- what is measured


def test_a_reward_of_the_peoples_order_is_right_everywhere() -> None:
    them = judged()
    result = measure("same", Made(), them, scores_of(them))
    assert [m.outcome.protocol for m in result.measured] == [protocols.PROMPTS, protocols.POOLED]
    assert [m.accuracy.share for m in result.measured] == [1, 1]
    assert {name: each.share for name, each in result.aspects.items()} == {ALL_ASPECTS: 0.5, "one": 1, "other": 0}
    assert [each.accuracy.share for each in result.generators.values()] == [1, 1]
    assert (result.prompts, result.images) == (20, 80)


def test_generators_win_by_people_and_by_the_reward_what_they_win_in_pairs_with_others() -> None:
    ranks = np.array([1.0, 2.0, 3.0])
    people = np.array([[1, 2, 3], [2, 1, 3], [3, 2, 1]], float)
    them = [Judged("p", ("a", "b", "c"), ranks, shares_of(people), ("x", "y", "y"))]
    scores = Scores({("a", "p"): 1.0, ("b", "p"): 2.0, ("c", "p"): 1.0}, {})
    x, y = measure("r", Made(), them, scores).generators.values()
    # x: a beats b for 1 of 3 people and c for 2 of 3; by the reward it loses to b and ties with c.
    assert x.people == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert x.reward == 0.25
    assert (y.people, y.reward) == (pytest.approx(1 - x.people), 1 - x.reward)
    assert (x.accuracy.share, x.accuracy.pairs) == (0.0, 2)  # by the ranks a is better than both


def test_images_that_could_not_be_read_are_left_out_with_their_pairs() -> None:
    them = judged(prompts=2, images=3)
    scores = scores_of(them)
    for name in ("0-1", "1-0", "1-2"):
        del scores.by_image[name, f"p{name[0]}"]
    scores = scores._replace(unreadable={"0-1": "cut off", "1-0": "cut off", "1-2": "empty"})
    result = measure("r", Made(), them, scores)
    assert (result.prompts, result.images) == (1, 2)  # of the second prompt only one image is left
    assert result.measured[1].accuracy.pairs <= 1
    with pytest.raises(ValueError, match="no prompt with two images"):
        measure("r", Made(), them, Scores({}, {}))


def test_calibration_counts_the_people_who_prefer_the_higher_score() -> None:
    # The gap says which share of ten people agree: 50% at 0, then 60%, ... 100%.
    them, by_image = [], {}
    for number in range(600):
        agree = 5 + number // 100
        people = np.array([[0, 1]] * agree + [[1, 0]] * (10 - agree), float)
        them.append(Judged(f"{number}", (f"{number}a", f"{number}b"), np.array([0.0, 1.0]), shares_of(people)))
        by_image[f"{number}a", f"{number}"] = 5.0 + number // 100
        by_image[f"{number}b", f"{number}"] = 5.0
    bins = measure("r", Made(), them, Scores(by_image, {})).calibration
    # Ten parts of 60 pairs; the second is 40 pairs of 50% and 20 of 60%.
    expected = [0.5, (40 * 0.5 + 20 * 0.6) / 60, (80 * 0.6 - 20 * 0.6) / 60, (20 * 0.6 + 40 * 0.7) / 60, 0.7]
    values = [each.agree.value for each in bins]
    assert values[:5] == pytest.approx(expected)
    assert values[5:] == pytest.approx([0.8, (40 * 0.8 + 20 * 0.9) / 60, 0.9, (20 * 0.9 + 40 * 1.0) / 60, 1.0])
    assert bins[0].gap == 0
    assert bins[-1].gap == pytest.approx(5 / np.std(list(by_image.values())))


def test_a_visionprefer_has_the_accuracies_that_training_reports(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ratings = {f"prompt {number}": rng.integers(1, 6, (4, 4)).tolist() for number in range(12)}
    vision_prefer(tmp_path / "set", ratings)
    it = human("visionprefer", tmp_path / "set")
    them = it.load()
    values = {(name, each.prompt): float(rng.normal()) for each in them for name in each.images}
    result = measure("r", it, them, Scores(values, {}))
    column = np.array([values[name, each.prompt] for each in them for name in each.images])
    flat = np.concatenate([np.array(own) for own in ratings.values()])
    prompts = [each.prompt for each in them for _ in each.images]
    old = pairwise_accuracy(np.repeat(column[:, None], 4, 1), flat, prompts)
    found = {"mean": result.measured[0].accuracy, "pooled": result.aspects[ALL_ASPECTS]}
    found |= {name: result.aspects[name] for name in ASPECTS}
    for rule, accuracy in found.items():
        assert (accuracy.share, accuracy.pairs) == (pytest.approx(old[rule].share), old[rule].pairs), rule
        # Prompts are drawn in another order, so the ends of the intervals differ by the noise of 2000 draws.
        assert (accuracy.low, accuracy.high) == pytest.approx((old[rule].low, old[rule].high), abs=0.02), rule


# --- what is written


class Tags(HTMLParser):
    """Opens and closes, and what a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and (value or "")[:1] != "#"]


def test_the_report_escapes_what_comes_from_outside_and_loads_nothing(tmp_path: Path) -> None:
    them = judged()
    evil = '<script>alert("$x$")</script>|*b*'
    result = measure(evil, Made(evil, evil), them, scores_of(them)._replace(unreadable={evil: evil}))
    page = write([result], tmp_path, f"python scripts/evaluate.py {evil} reward.api_key=sk-1")
    text, markdown = page.read_text(), (tmp_path / "accuracy.md").read_text()
    assert "script" not in Tags(text).names
    assert "<script" not in text
    assert "<script" not in markdown
    assert Tags(text).loads == ["data:,"], "no icon"
    assert "sk-1" not in text
    assert (tmp_path / "calibration-1.png").is_file()


def test_all_numbers_are_in_the_json_and_none_of_them_needs_another_reader(tmp_path: Path) -> None:
    them = judged()
    write([measure("r", Made(), them, scores_of(them))], tmp_path, "")
    [found] = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["accuracy"][protocols.POOLED]["share"] == 1
    assert 1 <= len(found["calibration"]) <= 10
    assert set(found["generators"]) == {"sd", "xl"}


def test_rewards_are_compared_prompt_by_prompt_with_the_first_of_them(tmp_path: Path) -> None:
    them = judged()
    right, wrong = (measure(name, Made(), them, scores_of(them, sign)) for name, sign in (("<b>", -1.0), ("bad", 1.0)))
    page = write([right, wrong], tmp_path, "").read_text()
    assert "More often right than &lt;b&gt;" in page
    assert "<td>-100.0<small>[-100.0, " in page
    assert "| bad | -100.0 [-100.0, " in (tmp_path / "accuracy.md").read_text()
    first, other = json.loads((tmp_path / "accuracy.json").read_text())
    assert first["more_than"] == {}
    assert other["more_than"]["<b>"].keys() == first["accuracy"].keys()
    assert all(each["value"] == each["low"] == -1 < each["high"] for each in other["more_than"]["<b>"].values())
    with (tmp_path / "by_prompt.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["reward"] == "<b>" and row["protocol"] == protocols.POOLED]
    assert [row["prompt"] for row in rows] == [each.prompt for each in them]
    assert sum(float(row["possible"]) for row in rows) == first["accuracy"][protocols.POOLED]["pairs"]
    assert [row["earned"] for row in rows] == [row["possible"] for row in rows]
    alone = write([right], tmp_path, "").read_text()
    assert "More often right" not in alone


def test_published_numbers_stand_in_the_column_of_their_protocol_and_name_their_source(tmp_path: Path) -> None:
    them = judged()
    write([measure("mine", Made(HPD_V2), them, scores_of(them))], tmp_path, "")
    lines = (tmp_path / "accuracy.md").read_text().splitlines()
    assert "| reward | HPD v2: mean over prompts | HPD v2: pooled pairs | published in |" in lines
    assert any(
        line.startswith("| mine | 100.0 [") and ", 100.0] of " in line and "measured here" in line for line in lines
    )
    assert "| MPS | – | 83.9 | imscore bench |" in lines
    assert not any("84.1" in line for line in lines)  # by HPD v2's own protocol, which is no column here


def test_published_numbers_are_those_of_the_papers() -> None:
    found = {(each.reward, each.source): each.accuracy for each in published(HPD_V2, IMAGE_REWARD, PICK_A_PIC)}
    assert found["HPS v2.1", "HPS v2 README"] == {
        (IMAGE_REWARD, protocols.PROMPTS): 66.8,
        (HPD_V2, protocols.INVERSIONS): 84.1,
    }
    assert found["ImageReward", "ImageReward repository"] == {(IMAGE_REWARD, protocols.POOLED): 65.14}
    assert found["PickScore", "HPS v3 README"][PICK_A_PIC, protocols.TIES] == 70.5
    assert published("nothing") == []


def test_the_console_has_a_line_for_each_reward_set_and_protocol() -> None:
    them = judged()
    lines = console([measure("r", Made(), them, scores_of(them, 1.0))]).splitlines()
    assert [re.sub(r"0\.0, [\d.]+\] of \d+", "0.0, H] of N", line) for line in lines[2:]] == [
        "| r | made | mean over prompts | 0.0 [0.0, H] of N prompts |",
        "| r | made | pooled pairs | 0.0 [0.0, H] of N pairs |",
    ]


def test_the_plot_has_the_pages_colours_and_the_same_bytes_every_time() -> None:
    them = judged()
    bins = measure("r", Made(), them, scores_of(them)).calibration
    svg = calibration.as_svg({"a < b": bins})
    assert svg == calibration.as_svg({"a < b": bins})
    assert "currentColor" in svg
    assert "a &lt; b" in svg


# --- the command


def test_lists_of_rewards_and_sets_are_put_at_nodes_of_their_own() -> None:
    given = ["reward=[a, b]", "data=c", "batch_size=2", "rewards.a.checkpoint=x=y"]
    assert expand(given) == [
        "+reward@rewards.a=a",
        "+reward@rewards.b=b",
        "+human@data.c=c",
        "batch_size=2",
        "rewards.a.checkpoint=x=y",
    ]


def test_what_is_not_chosen_is_the_embedded_one() -> None:
    assert expand([]) == ["+reward@rewards.vp_score=vp_score", "+human@data.visionprefer=visionprefer"]
    assert expand(["+reward@rewards.mine=vp_score"])[1:] == ["+human@data.visionprefer=visionprefer"]


@pytest.mark.parametrize("given", ["reward=", "reward=[]", "data=[a,]", "reward=[a,b,a]"])
def test_a_list_with_nothing_in_it_or_one_twice_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="give one name, or different ones"):
        expand([given])


def config(folder: Path, *arguments: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate", [*expand(arguments), f"folder={folder}"])


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, shade, shade)).save(buffer, format="png")
    return buffer.getvalue()


def test_two_rewards_on_three_sets_end_to_end_offline(tmp_path: Path) -> None:
    sets = {name: tmp_path / name for name in ("hpd_v2", "pick_a_pic", "visionprefer")}
    for name in ("hpd_v2", "pick_a_pic"):
        sets[name].mkdir()
    table = [
        {"prompt": f"p{n}", "image_path": [f"{n}{i}.jpg" for i in "abc"], "rank": [1, 2, 3], "raw_annotations": []}
        for n in range(3)
    ]
    packed(sets["hpd_v2"], table)
    (sets["hpd_v2"] / "test").mkdir()
    for row in table:
        for shade, name in enumerate(row["image_path"]):
            (sets["hpd_v2"] / "test" / name).write_bytes(png(60 * shade))
    (sets["hpd_v2"] / "test" / "2c.jpg").write_bytes(b"damaged")
    pick_a_pic(sets["pick_a_pic"])
    vision_prefer(sets["visionprefer"], {"a red circle": [[5] * 4, [1] * 4], "a blue square": [[1] * 4, [2] * 4]})
    folders = [f"data.{name}.folder={folder}" for name, folder in sets.items()]
    arguments = ["reward=vp_score", "+reward@rewards.blip=vp_score", "rewards.blip.checkpoint=tiny-blip"]
    settings = config(tmp_path / "out", *arguments, "data=[hpd_v2,pick_a_pic,visionprefer]", *folders)
    results = evaluate(settings)
    assert [(each.reward, each.title) for each in results] == [
        (reward, title) for reward in ("vp_score", "blip") for title in ("HPD v2", "Pick-a-Pic", "VisionPrefer")
    ]
    assert [m.outcome.protocol for m in results[0].measured] == [protocols.INVERSIONS, protocols.POOLED]
    assert set(results[0].unreadable) == {"2c.jpg"}
    assert "chosen on 2 other pairs" in results[1].measured[0].outcome.note
    page = write(results, tmp_path / "out", "python scripts/evaluate.py accuracy").read_text()
    numbers = (tmp_path / "out" / "accuracy.json").read_text()
    write(evaluate(settings), tmp_path / "out", "")  # from the scores that were kept
    assert (tmp_path / "out" / "accuracy.json").read_text() == numbers
    assert "2c.jpg" in page
    assert "published in: HPS v2 README" in page


def test_every_set_is_looked_for_before_a_reward_is_loaded(tmp_path: Path) -> None:
    settings = config(tmp_path, f"data.visionprefer.folder={tmp_path}/nothing", "rewards.vp_score.checkpoint=nothing")
    with pytest.raises(FileNotFoundError, match="no VisionPrefer dataset"):
        evaluate(settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "'' is nothing that can be evaluated: choose from accuracy"),
        (["acuracy"], "'acuracy' is nothing that can be evaluated"),
        (["accuracy", "reward=vp_scor"], "Could not find 'reward/vp_scor'"),
        (["accuracy", "data=[hpd2]"], "Could not find 'human/hpd2'"),
        (["accuracy", "data=[hpd_v2,hpd_v2]"], "error: 'data=[hpd_v2,hpd_v2]': give one name"),
        (["accuracy", "rewards.vp_score.checkpoint=nowhere"], "error: reward.checkpoint='nowhere' does not exist"),
        (["accuracy", "data.visionprefer.folder=nowhere"], "error: There is no VisionPrefer dataset in 'nowhere'"),
        (["accuracy", "device=gpu"], "error: device='gpu' must be text, auto, cpu"),
    ],
)
def test_mistakes_on_the_command_line_get_one_message(tmp_path: Path, arguments: list[str], said: str) -> None:
    vision_prefer(tmp_path / "set", {"a red circle": [[5] * 4, [1] * 4]})
    run = run_script(tmp_path, *arguments)
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_the_command_writes_its_report(tmp_path: Path) -> None:
    vision_prefer(tmp_path / "set", {"a red circle": [[5] * 4, [1] * 4], "a blue square": [[1] * 4, [2] * 4]})
    run = run_script(tmp_path, "accuracy", "reward=vp_score", "data=visionprefer")
    assert run.returncode == 0, run.stderr
    assert "| vp_score | VisionPrefer | pooled pairs |" in run.stdout
    assert (tmp_path / "out" / "accuracy.html").is_file()
    assert (tmp_path / "out" / ".hydra" / "config.yaml").is_file()


def run_script(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/evaluate.py", *arguments]
    if arguments[:1] == ("accuracy",):
        command.append(f"folder={tmp_path / 'out'}")
        if not any("folder" in each or "data=" in each for each in arguments) or "data=visionprefer" in arguments:
            command.append(f"data.visionprefer.folder={tmp_path / 'set'}")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
