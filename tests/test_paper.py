"""The embedded reproduction: its jobs can be composed, and its verdicts say no more than the numbers."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from evaluate import expand
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from jobs import Job, do
from paper import dataset, share_images, stages
from paper_page import Claim, verdict, write_page
from paper_results import METRICS, Difference, Measured, accuracies, accurate, more_accurate, more_changed, read

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1)


def jobs(folder: Path) -> list[Job]:
    return [job for stage in stages(folder, SEEDS) for job in stage]


def test_every_job_has_its_own_name_and_leaves_its_own_file(tmp_path: Path) -> None:
    every = jobs(tmp_path)
    assert len({job.name for job in every}) == len(every)
    assert len({job.result for job in every}) == len(every) - 1  # the images are done when the dataset is


def test_every_command_is_one_that_hydra_can_compose_and_leads_where_its_result_is_looked_for(tmp_path: Path) -> None:
    configs = {"train.py": "train", "scripts/build_visionprefer.py": "build", "scripts/evaluate.py": "evaluate"}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs(tmp_path):
            script, *arguments = job.command
            if script == "scripts/evaluate.py":
                arguments = expand(arguments[1:])
            config = compose(configs[script], arguments, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            run = Path(config.folder if script != "train.py" else config.hydra.run.dir)
            assert job.result.parent == run


def test_a_reward_that_is_tuned_against_is_one_that_an_earlier_stage_trains(tmp_path: Path) -> None:
    trained: set[str] = set()
    for stage in stages(tmp_path, SEEDS):
        wanted = [a for job in stage for a in job.command if "checkpoint=" in a]
        assert {Path(a.partition("=")[2]).parent.name for a in wanted} <= trained
        trained |= {job.name for job in stage if "experiment=vpscore" in job.command}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); open({str(tmp_path / 'result')!r}, 'w')"
    job = Job("job", ("-c", code), tmp_path / "result")
    assert (do(job, tmp_path), do(job, tmp_path)) == (0, 0)
    assert (tmp_path / "ran").read_text() == "x"
    assert do(Job("failing", ("-c", "print('why'); raise SystemExit(3)"), tmp_path / "none"), tmp_path) == 3
    assert (tmp_path / "failing.log").read_text() == "why\n"


def test_other_annotators_are_shown_the_same_images_also_after_a_copy_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "data.work").mkdir()
    (tmp_path / "data.work" / "image").write_text("whole")
    (tmp_path / "data-30.unfinished").mkdir()
    share_images(tmp_path)
    assert [file.read_text() for file in tmp_path.glob("data-*.work/image")] == ["whole", "whole"]
    assert not list(tmp_path.glob("*.unfinished"))
    assert dataset(tmp_path, "30").parent.name == "data-30"


def test_a_difference_of_rewards_has_the_errors_of_both_its_sources() -> None:
    exact, apart = (
        {s: Measured(v, 0.0) for s, v in enumerate((1.0, 2.0, 3.0))},
        {s: Measured(0.0, 0.3) for s in range(3)},
    )
    seeds = 4.303 / 1.96 / 3**0.5  # sd 1, t of 2 degrees of freedom
    both = pytest.approx(math.hypot(seeds, 0.3), rel=1e-3)
    assert accurate(exact) == more_accurate(exact, dict.fromkeys(range(3), Measured(0.0, 0.0)))
    assert more_accurate(exact, apart) == Difference(2.0, both, 3)
    alike = {seed: Measured(1.0, 0.4) for seed in range(3)}
    assert accurate(alike) == Difference(1.0, pytest.approx(0.4), 3)  # the same prompts three times
    assert more_accurate(alike, apart) == Difference(1.0, pytest.approx(0.5), 3)  # 0.4 and 0.3 make 0.5
    assert more_accurate(alike, {1: Measured(0.5, 0.0)}) == Difference(0.5, pytest.approx(0.4), 1)
    assert more_accurate(alike, {}) is None


def by_prompt(file: Path, right: dict[str, np.ndarray], pairs: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["set", "protocol", "reward", "prompt", "earned", "possible"])
        for reward, earned in right.items():
            for protocol, own in (("the set's own", earned), ("another", 0 * earned)):
                rows = enumerate(zip(own, pairs, strict=True))
                writer.writerows(["s", protocol, reward, f'a "{n}", b', *row] for n, row in rows)


def test_rewards_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard, pairs = rng.uniform(0.2, 0.9, 400), rng.integers(1, 11, 400)
    right = {name: rng.binomial(pairs, hard) for name in ("one", "other")}
    by_prompt(tmp_path / "a" / "by_prompt.csv", right, pairs)
    found = accuracies(tmp_path / "a" / "by_prompt.csv")
    assert [each.value for each in found.values()] == pytest.approx([own.sum() / pairs.sum() for own in right.values()])
    gap = more_accurate({0: found["one"]}, {0: found["other"]})
    assert gap is not None
    drawn = rng.multinomial(400, np.full(400, 1 / 400), size=4000) @ np.stack([*right.values(), pairs], 1)
    shares = drawn[:, :2] / drawn[:, 2:]
    # A standard deviation of 4000 draws is sure to 1.1%; linearising a ratio of 400 prompts costs less.
    assert gap.error == pytest.approx((shares[:, 0] - shares[:, 1]).std(), rel=0.05)
    assert accurate({0: found["one"]}).error == pytest.approx(shares[:, 0].std(), rel=0.05)
    assert gap.error < 0.8 * math.hypot(*(each.error for each in found.values()))
    assert more_accurate({0: found["one"]}, {0: found["one"]}) == Difference(0.0, 0.0, 1)


def test_models_are_compared_prompt_by_prompt() -> None:
    prompts = np.array([0.0, 4.0, 8.0, 12.0])
    one, other = ({seed: prompts + ahead for seed in range(3)} for ahead in (1.0, 0.0))
    found = more_changed(one, other)
    assert found == Difference(1.0, pytest.approx(0.0), 3)  # every prompt says the same, however much they differ
    of_prompts = prompts.std(ddof=1) / 2
    assert more_changed(one) == Difference(7.0, pytest.approx(of_prompts), 3)  # the same prompts three times
    by_seed = {seed: prompts * 0 + value for seed, value in enumerate((1.0, 2.0, 3.0))}
    assert more_changed(by_seed) == Difference(2.0, pytest.approx(4.303 / 1.96 / 3**0.5, rel=1e-3), 3)
    assert more_changed(one, {1: prompts}) == Difference(1.0, 0.0, 1)
    assert more_changed(one, {}) is None
    assert more_changed({}) is None


@pytest.mark.parametrize(
    ("value", "enough", "says"),
    [
        (2.0, False, "agrees"),
        (1.9, False, "undecided"),
        (-2.0, False, "disagrees"),
        (-1.9, True, "agrees"),
        (-2.0, True, "disagrees"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_its_opposite(value: float, enough: bool, says: str) -> None:
    claim = Claim("", "", "", lambda _: None, enough=enough)
    assert verdict(claim, Difference(value, 1.0, 3)) == says


def test_noise_is_seldom_taken_for_agreement() -> None:
    rng, claim, hits = np.random.default_rng(0), Claim("", "", "", lambda _: None), 0
    for _ in range(1000):
        # A model is a seed's luck, the same on all prompts, and what it does to each of them.
        one, other = ({seed: rng.normal(0, 0.1) + rng.normal(0, 1, 100) for seed in range(3)} for _ in range(2))
        found = more_changed(one, other)
        assert found is not None
        hits += verdict(claim, found) != "undecided"
    # 5% if the errors were known; the larger of two estimates is more careful than that. 3 sigma: 5% + 2.1%.
    assert hits / 1000 < 0.071


def test_a_difference_that_seeds_and_prompts_make_equally_unsure_is_held_in_95_of_100_cases() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):  # the error is 0.095 by ten seeds, 0.1 by a hundred prompts; the larger alone holds 86%
        prompts = rng.normal(0, 1, 100)
        low, high = more_changed(
            {seed: rng.normal(0, 0.3) + prompts + rng.normal(0, 0.5, 100) for seed in range(10)}
        ).interval()
        held += low <= 0 <= high
    assert held / 1000 > 0.929  # 3 sigma below 95%


def results(folder: Path, better: float) -> None:
    """Files of finished jobs: the reward of all data is ahead by `better` points, as is the model tuned against it."""
    for seed in SEEDS:
        right = {f"reward-all-{seed}": np.array([61, 59]) + better, "clip": np.array([61, 59])}
        by_prompt(folder / f"accuracy-{seed}" / "by_prompt.csv", right, np.array([100, 100]))
        (folder / f"refl-all-{seed}").mkdir()
        with (folder / f"refl-all-{seed}" / "scores.csv").open("w", newline="") as file:
            columns = [f"{model}/{metric}" for model in ("base", "tuned") for metric in METRICS]
            writer = csv.writer(file)
            writer.writerow(["prompt", "seed", *columns])
            for number, noise in enumerate((-0.05, 0.05, 0.0, 0.0)):  # two seeds of two prompts
                after = [3 + better / 10 + noise if metric == "mean_rating" else 3.0 for metric in METRICS]
                writer.writerow([f'a "red", circle {number // 2}', number % 2, *[3.0] * len(METRICS), *after])


def test_the_page_says_what_agrees_what_does_not_and_what_is_missing(tmp_path: Path) -> None:
    results(tmp_path, 10.0)
    found = read(tmp_path, SEEDS)
    assert found.accuracy["all"][1][:2] == (pytest.approx(0.7), pytest.approx(0.01))  # 0.71 and 0.69
    assert found.change["refl-all", "mean_rating"][1] == pytest.approx([1.0, 1.0])
    page = write_page(tmp_path, SEEDS)
    text = (tmp_path / "paper.md").read_text()
    assert "| VP-Score predicts preferences better than CLIP | Table 2 |" in text
    assert "+10.0 [" in text
    assert "**2 claims agree, 0 disagree, 0 are undecided.**" in text
    assert "- more training pairs raise its accuracy" in text.partition("## Not measured yet")[2]
    html = page.read_text()
    assert "<script" not in html
    assert html.count('src="data:image/png;base64,') == 2


def test_the_page_admits_that_a_claim_fails(tmp_path: Path) -> None:
    results(tmp_path, -10.0)
    write_page(tmp_path, SEEDS)
    assert "**0 claims agree, 2 disagree, 0 are undecided.**" in (tmp_path / "paper.md").read_text()
