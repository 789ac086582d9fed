"""The comparison of methods: its jobs compose, each has its time, and the page says what was measured."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from compare import METHODS, command, dataset, epochs, timing, tuned
from compare_page import SHOWN, write_page
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from jobs import Job

ROOT = Path(__file__).parents[1]


def jobs(folder: Path) -> list[Job]:
    return [
        dataset(folder),
        *(timing(folder, method) for method in METHODS),
        *tuned(folder, list(METHODS), (0, 1), 4.0),
    ]


def test_every_job_has_its_own_name_and_leaves_its_own_file(tmp_path: Path) -> None:
    every = jobs(tmp_path)
    assert len({job.name for job in every}) == len({job.result for job in every}) == len(every)


def test_every_command_is_one_that_hydra_can_compose_and_leads_where_its_result_is_looked_for(tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs(tmp_path):
            script, *arguments = job.command
            name = "build" if "build" in script else "train"
            config = compose(name, arguments, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            assert job.result.parent == Path(config.folder if name == "build" else config.hydra.run.dir)


@pytest.mark.parametrize("method", METHODS)
def test_all_are_judged_alike_and_at_the_end_alone(method: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", list(command(tmp_path, method)[1:]))
    evaluation = config.evaluation
    shared = evaluation.sampler.guidance, evaluation.sampler.steps, list(evaluation.seeds), evaluation.limit
    assert shared == (2.0, 20, [0, 1, 2, 3], 128)
    assert config.callbacks.held_out.best is None
    assert config.callbacks.held_out.every > 500


def test_a_run_has_as_many_epochs_as_fit_into_its_time(tmp_path: Path) -> None:
    assert epochs(tmp_path, "nft", 4.0) == 1, "before it was timed"
    for seconds, expected in ((24.0, 10), (25.0, 10), (1000.0, 1)):
        folder = tmp_path / "timing-nft"
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text(json.dumps({"training_seconds": seconds}))
        assert epochs(tmp_path, "nft", 4.0) == expected
    [run] = [job for job in tuned(tmp_path, ["nft"], [3], 4.0)]
    assert "trainer.max_epochs=1" in run.command
    assert "seed=3" in run.command


def run_of(folder: Path, change: float, diversity: float) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    heads = ["prompt", "seed", *(f"{side}/{metric}" for metric in SHOWN for side in ("base", "tuned"))]
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, heads)
        rows.writeheader()
        for prompt in range(30):
            base = {f"base/{metric}": 3.0 for metric in SHOWN}
            noise = float(generator.normal(0, 0.1))
            rows.writerow({"prompt": prompt, "seed": 0, **base, **{f"tuned/{m}": 3.0 + change + noise for m in SHOWN}})
    held_out = {"look/diversity": {"base": 0.5, "tuned": 0.5 * diversity}}
    (folder / "summary.json").write_text(json.dumps({"training_seconds": 240.0, "held_out": held_out}))
    (folder / "metrics.csv").write_text("train/images_per_second,train/kl\n10.0,0.1\n,\n20.0,0.25\n")


def test_the_page_has_what_was_measured_and_names_what_was_not(tmp_path: Path) -> None:
    for seed, change in enumerate((0.1, 0.2)):
        run_of(tmp_path / f"nft-{seed}", change, 0.9)
    write_page(tmp_path, ["nft", "awm"], [0, 1, 2])
    text = (tmp_path / "compare.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| DiffusionNFT")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["2", "4.0", "20.0", "0.25", "-10%"]
    assert float(cells[6].split()[0]) == pytest.approx(0.15, abs=0.05)  # the noise's mean: 0.1 / sqrt(30)
    assert "- advantage-weighted matching" in text
    assert "<title>Methods compared" in (tmp_path / "compare.html").read_text()


def test_a_page_of_nothing_can_be_written(tmp_path: Path) -> None:
    assert "Not measured yet" in write_page(tmp_path, ["nft"], [0]).with_suffix(".md").read_text()
