"""The report is self-contained, honest and safe to pass on; a sweep's table survives unfinished runs."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import SAMPLER, Bright, Brightness, Given, evaluator, made_up, shifted

from vp_rl.evaluation import report as report_module
from vp_rl.evaluation.compare import compare
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.sweep import write_table

CONFIG = """
policy:
  path: /home/someone/models/my-sd
  hub_token: hf_verysecret
annotator:
  base_url: https://user:pw@judge.internal.example:8000/v1
  api_key: sk-verysecret
  max_tokens: 300
logger:
  save_dir: ${hydra:runtime.output_dir}
"""


class Page(HTMLParser):
    """What a browser would make of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def run_folder(path: Path) -> Path:
    folder = path / "outputs" / "my_experiment" / "2026-01-02_03-04-05"
    (folder / ".hydra").mkdir(parents=True)
    return folder


def write(folder: Path, base: Evaluation, tuned: Evaluation, **settings: object) -> str:
    report = write_report(folder, base, tuned, compare(base, tuned), sampler=SAMPLER, seconds=90.0, **settings)
    return report.read_text(encoding="utf-8")


def curves(folder: Path, name: str, epochs: range, value: float) -> None:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/reward", "held_out/reward"])
        writer.writeheader()
        for epoch in epochs:
            writer.writerow({"epoch": epoch, "step": 10 * epoch, "train/reward": value + epoch})


def cards(text: str, title: str) -> list[str]:
    """The prompts below a heading."""
    section = text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
    return re.findall(r'<p class="prompt"[^>]*>(.*?)</p>', section)


def test_a_report_asks_the_network_for_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    curves(folder, "metrics.csv", range(5), 0.0)
    tool = evaluator()
    text = write(folder, tool.evaluate(Bright(), Brightness()), tool.evaluate(shifted(0.5), Brightness()))
    page = Page(text)
    assert "svg" in page.tags
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loaded
    assert all(value.startswith(("data:image/", "#")) for value in loaded)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_a_prompt_cannot_put_anything_into_the_page(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script> '\"><img src=x onerror=alert(2)>"
    tool = evaluator(Given(evil, "fine"))
    base = tool.evaluate(Bright(), Brightness())
    page = Page(write(run_folder(tmp_path), base, tool.evaluate(shifted(1.0), Brightness()), note="<script>"))
    assert "script" not in page.tags
    assert not any(name == "onerror" for name, _ in page.attributes)
    assert any(evil in words for words in page.words)


def test_images_of_full_size_stay_below_ten_megabytes(tmp_path: Path) -> None:
    base, tuned = made_up(np.random.default_rng(0).normal(size=(64, 1)))
    noise = np.random.default_rng(0).integers(0, 256, (1, 1024, 1024, 3), dtype=np.uint8)
    large = [
        Evaluation(side.prompts, side.seeds, noise.repeat(64, 0), side.scores, ratings, side.rationales)
        for side, ratings in ((base, base.ratings), (tuned, tuned.ratings + np.tile([[1], [-1]], (32, 4))))
    ]
    assert len(write(run_folder(tmp_path), *large)) < 10e6


def test_failures_are_shown_beside_successes(tmp_path: Path) -> None:
    base, tuned = made_up(np.zeros((30, 1)))
    tuned.ratings[3:5] += 1
    tuned.ratings[4] += 1
    tuned.ratings[7] -= 2
    text = write(run_folder(tmp_path), base, tuned)
    assert cards(text, "Held-out prompts, before and after") == [f"prompt {index}" for index in range(12)]
    assert cards(text, "Largest gains by the judge") == ["prompt 4", "prompt 3"]
    assert cards(text, "Largest losses by the judge") == ["prompt 7"]


def test_the_headline_says_what_the_intervals_say(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    rose, fell, same = np.full((20, 1), 0.5), np.full((20, 1), -0.5), np.zeros((20, 1))
    words = {name: " ".join(Page(write(folder, *made_up(value))).words) for name, value in
             {"rose": rose, "fell": fell, "same": same}.items()}  # fmt: skip
    assert "rose by 0.50" in words["rose"]
    assert "fell by 0.50" in words["fell"]
    assert "did not clearly change" in words["same"]
    assert "reward hacking" in words["rose"], "the reward rose and the judge's ratings stayed"
    assert "reward hacking" not in words["fell"] + words["same"]


def test_settings_are_shown_without_secrets_hosts_and_folders(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / ".hydra" / "config.yaml").write_text(CONFIG)
    (folder / ".hydra" / "overrides.yaml").write_text(
        "- experiment=x\n- prompts.path=/home/someone/p.txt\n- k.api_key=sk-1\n"
    )
    words = " ".join(Page(write(folder, *made_up(np.ones((3, 1))))).words)
    for hidden in ("someone", "secret", "judge.internal", "user:pw", "sk-1", str(tmp_path)):
        assert hidden not in words
    for shown in ("my-sd", "max_tokens: 300", "prompts.path=…/p.txt", "${hydra:runtime.output_dir}", "1.5 minutes"):
        assert shown in words


def test_curves_of_an_interrupted_run_go_on_after_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    curves(folder, "metrics.csv", range(4, 8), 0.0)
    assert write(folder, *made_up(np.ones((3, 1)))).count("<svg") == 1
    alone = (folder / "report.html").read_text()
    curves(folder, "metrics_before.csv", range(5), 0.0)
    assert write(folder, *made_up(np.ones((3, 1)))) != alone
    (folder / "metrics.csv").unlink()
    (folder / "metrics_before.csv").unlink()
    assert "<svg" not in write(folder, *made_up(np.ones((3, 1))))


# What `policies.sd` asks for by that name keeps diffusers 0.42 and its predecessors working.
@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_the_lines_of_the_report_make_its_first_image_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    from vp_rl.policies.sd import StableDiffusion

    folder = run_folder(tmp_path)
    (folder / ".hydra" / "config.yaml").write_text("policy: {path: tiny-sd, negative_prompt: '', resolution: null}")
    lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    policy = StableDiffusion("tiny-sd", lora)
    (folder / "adapter").mkdir()
    policy.save_adapter(folder / "adapter")
    tool = evaluator(Given("a large red triangle", 'it\'s "quoted"'), seeds=(5,))
    with policy.reference():
        base = tool.evaluate(policy, Brightness())
    tuned = tool.evaluate(policy, Brightness())
    assert not np.array_equal(base.images, tuned.images)
    text = "".join(Page(write(folder, base, tuned)).words)
    code = text[text.index("import torch\n") : text.index(").images[0]") + len(").images[0]")]
    monkeypatch.chdir(folder)
    result: dict = {}
    exec(code, result)  # noqa: S102
    difference = np.asarray(result["image"]).astype(int) - tuned.images[0]
    assert np.abs(difference).max() <= 1, "rounding to 8 bits"


def finished(folder: Path, number: str, override: str, gain: float) -> None:
    (folder / number / ".hydra").mkdir(parents=True)
    (folder / number / ".hydra" / "overrides.yaml").write_text(f"- {override}\n- ~callbacks.progress\n")
    change = {"base": 1.0, "tuned": 1.0 + gain, "difference": gain, "low": gain - 0.1, "high": gain + 0.1}
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
    assert {path.name for path in tmp_path.glob("results*")} == {"results.csv", "results.md"}


def test_a_sweep_of_reward_models_has_their_accuracies(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "summary.json").write_text(json.dumps({"accuracy": {"VP-Score": {"mean": {"share": 0.8125}}}}))
    assert write_table(tmp_path) == [{"run": "0", "accuracy of VP-Score": "0.8125"}]


def test_the_first_cards_are_of_as_many_prompts_and_not_of_one_prompts_seeds(tmp_path: Path) -> None:
    base, tuned = (evaluator(seeds=(0, 1, 2)).evaluate(shifted(by), Brightness()) for by in (0.0, 0.3))
    assert base.of_first_seed().tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]
    first = report_module._galleries(base, tuned)["first"]
    assert [card["prompt"] for card in first] == [f"test prompt {number}" for number in range(12)]
