"""A sweep's table and page survive unfinished runs, and show them all."""

import csv
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page

from vp_rl.evaluation import sweep
from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.sweep import write_table


def finished(folder: Path, number: str, override: str, gain: float) -> None:
    (folder / number / ".hydra").mkdir(parents=True)
    (folder / number / ".hydra" / "overrides.yaml").write_text(f"- {override}\n- ~callbacks.progress\n")
    change = {"base": 1.0, "tuned": 1.0 + gain, "difference": gain, "low": gain - 0.1, "high": gain + 0.1}
    change |= {"win": 0.5, "tie": 0.2, "loss": 0.3, "chance": 1e-4 if abs(gain) > 0.15 else 0.04, "clear": True}
    summary = {"held_out": {"reward": change, "mean_rating": change}, "training_seconds": 12.5}
    (folder / number / "summary.json").write_text(json.dumps(summary))


def test_a_sweep_leaves_one_table_unfinished_runs_included(tmp_path: Path) -> None:
    for number in range(11):
        finished(tmp_path, str(number), f"optimizer.lr={number}", number / 10)
    (tmp_path / "3" / "summary.json").unlink()
    (tmp_path / "4" / "summary.json").write_text('{"held_out": {"rew')
    rows = write_table(tmp_path)
    assert [row["run"] for row in rows] == [str(number) for number in range(11)]
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert (read[2]["optimizer.lr"], read[2]["mean_rating"], read[2]["mean_rating.low"]) == ("2", "1.2", "0.1")
    assert read[3]["mean_rating"] == read[4]["mean_rating"] == ""
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 13
    assert "1.200 (+0.200 [+0.100, +0.300])" in table[4]
    assert {path.name for path in tmp_path.glob("results*")} == {"results.csv", "results.md", "results.html"}


def test_a_sweep_of_reward_models_has_their_accuracies(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "summary.json").write_text(json.dumps({"accuracy": {"VP-Score": {"mean": {"share": 0.8125}}}}))
    assert write_table(tmp_path) == [{"run": "0", "accuracy of VP-Score": "0.8125"}]


def test_of_two_jobs_that_end_together_neither_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path, "0", "seed=0", 0.1)
    (tmp_path / "1" / ".hydra").mkdir(parents=True)
    other, read = threading.Thread(target=write_table, args=[tmp_path]), sweep._summary

    def slowly(file: Path) -> dict[str, Any]:
        """The first job has read that the second is not finished; then that one ends, and writes too."""
        found = read(file)
        if file.parent.name == "1" and not other.ident:
            (tmp_path / "1" / "summary.json").write_text((tmp_path / "0" / "summary.json").read_text())
            other.start()
            other.join(timeout=1)
        return found

    monkeypatch.setattr(sweep, "_summary", slowly)
    write_table(tmp_path)
    other.join()
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["mean_rating"] for row in csv.DictReader(file)] == ["1.1", "1.1"]


def samples(folder: Path, epoch: int, base: int, trained: int) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    rows = [np.full((3, 8, 8, 3), value, dtype=np.uint8) for value in (base, trained)]
    grid(rows).save(folder / "samples" / f"epoch_{epoch:04d}.png")


def test_the_page_shows_the_last_images_of_each_run_and_the_base_once(tmp_path: Path) -> None:
    for number in range(4):
        finished(tmp_path, str(number), f"optimizer.lr={number}", number / 10)
    for number in range(3):
        samples(tmp_path / str(number), 4, 100, 120)
        samples(tmp_path / str(number), 12, 100, 150 + number)
    (tmp_path / "2" / "samples" / "epoch_0012.png").write_bytes(b"\x89PNG half")
    (tmp_path / "1" / "summary.json").unlink()  # it is still training, beside the run that writes the page
    write_table(tmp_path)
    page = Page((tmp_path / "results.html").read_text(encoding="utf-8"))
    named = [value for name, value in page.attributes if name == "alt"]
    assert named == ["The base model's images", "Images of run 0", "Images of run 1"]
    images = [value for name, value in page.attributes if name == "src"]
    assert len(set(images)) == 3, "of two runs and their common base"
    words = re.sub(r"\s+", " ", " ".join(page.words))
    assert "+0.30" in words
    assert words.count("best rating") == 1
    assert "no adapter" not in words


def test_a_run_that_left_no_adapter_is_not_the_best_of_a_sweep(tmp_path: Path) -> None:
    for number in range(2):
        finished(tmp_path, str(number), f"optimizer.lr={number}", number / 10)
    file = tmp_path / "1" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best": {"beats_base": False}}))
    write_table(tmp_path)
    rows = (tmp_path / "results.html").read_text(encoding="utf-8").split("<tbody>")[1].split("<tr>")[1:]
    assert "best rating" in rows[0]
    assert "no adapter" in rows[1]
    assert "best rating" not in rows[1]


def test_the_page_is_safe_to_pass_on_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    finished(tmp_path, "0", "reward.checkpoint=/home/someone/<script>.pt", 0.1)
    finished(tmp_path, "1", "reward.api_key=abc", 0.2)
    (tmp_path / "1" / "report.html").write_text("")
    write_table(tmp_path)
    page = Page((tmp_path / "results.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert [value for name, value in page.attributes if name == "href"] == ["data:,", "1/report.html"]
    for file in ("results.html", "results.csv", "results.md"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "someone" not in text
        assert "abc" not in text


def test_a_reward_model_that_people_have_judged_has_its_accuracy_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "summary.json").write_text(json.dumps({"accuracy": {"VP-Score": {"people": {"share": 0.625}}}}))
    assert write_table(tmp_path) == [{"run": "0", "accuracy of VP-Score": "0.625"}]
    assert "62.5%" in (tmp_path / "results.html").read_text()


def test_more_runs_are_more_looks(tmp_path: Path) -> None:
    for number in range(10):
        finished(tmp_path, str(number), f"seed={number}", 0.2 if number == 3 else 0.11)
    write_table(tmp_path)
    text = (tmp_path / "results.html").read_text(encoding="utf-8")
    coloured = re.findall(r'<b>[\d.]+</b> <span class="up">(.*?)</span>', text)
    assert coloured == ["+0.20", "+0.20"], "not those whose intervals, each by itself, exclude 0"


def test_a_run_of_too_few_prompts_has_a_row_without_intervals(tmp_path: Path) -> None:
    finished(tmp_path, "0", "seed=0", 0.3)
    summary = json.loads((tmp_path / "0" / "summary.json").read_text())
    for own in summary["held_out"].values():
        own |= {"low": None, "high": None, "chance": 1.0, "clear": False}
    (tmp_path / "0" / "summary.json").write_text(json.dumps(summary))
    (row,) = write_table(tmp_path)
    assert row["mean_rating"] == "1.3"
    assert row.get("mean_rating.low", "") == ""
    for name in ("results.md", "results.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "too few prompts" in text
        assert "nan" not in text
