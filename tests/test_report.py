"""The report is self-contained, honest and safe to pass on."""

import base64
import csv
import dataclasses
import hashlib
import math
import re
import socket
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import SAMPLER, Bright, Brightness, Given, evaluator, made_up, shifted

from vp_rl.evaluation import report as report_module
from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.claims import Compared, decide
from vp_rl.evaluation.compare import Change, compare
from vp_rl.evaluation.distances import Distances
from vp_rl.evaluation.duel import Duel
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.settings import command, override, public
from vp_rl.evaluation.signs import Sign
from vp_rl.evaluation.verdict import Chosen, Verdict, number, verdicts
from vp_rl.types import Usage

CONFIG = """
folders: [/mnt/someone/a b/c, ~/someone/d, 'C:\\Users\\someone\\e']
by_another_name: sk-or-v1-0123456789abcdef
remote:
  host: gpu7.internal.example
  plain: from-the-environment
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


def write(
    folder: Path,
    base: Evaluation,
    tuned: Evaluation,
    categories: dict | None = None,
    pairs: dict | None = None,
    **settings: object,
) -> str:
    found = decide(compare(base, tuned), categories, pairs)
    report = write_report(folder, base, tuned, found, sampler=SAMPLER, seconds={"training": 90.0}, **settings)
    return report.read_text(encoding="utf-8")


def curves(folder: Path, name: str, epochs: range, value: float) -> None:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/reward", "held_out/reward"])
        writer.writeheader()
        for epoch in epochs:
            writer.writerow({"epoch": epoch, "step": 10 * epoch, "train/reward": value + epoch})


def cards(text: str, title: str) -> list[str]:
    """The prompts below a heading."""
    section = re.split("<h[23]", re.split(f"<h[23][^>]*>{title}</h[23]>", text)[1])[0]
    return re.findall(r'<p class="prompt">(.*?)</p>', section)


def test_a_report_asks_the_network_for_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    curves(folder, "metrics.csv", range(5), 0.0)
    tool = evaluator()
    text = write(folder, tool.evaluate(Bright(), Brightness()), tool.evaluate(shifted(0.5), Brightness()))
    page = Page(text)
    assert "svg" in page.tags
    assert not {"iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("script") == 1
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loaded
    assert all(value.startswith(("data:image/", "data:,", "#")) for value in loaded)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    script = text.split("<script>")[1].split("</script>")[0]
    named = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{named}'"
    assert ("content", policy) in page.attributes, "no other script can run"


def test_a_prompt_cannot_put_anything_into_the_page(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script> '\"><img src=x onerror=alert(2)>"
    tool = evaluator(Given(evil, "fine"))
    base = tool.evaluate(Bright(), Brightness())
    tuned, word = tool.evaluate(shifted(1.0), Brightness()), "<script>alert(3)</script>"
    given = {"note": word, "signs": [Sign(word, 1, "warning")], "categories": {word: compare(base, tuned)}}
    page = Page(write(run_folder(tmp_path), base, tuned, **given))
    assert page.tags.count("script") == 1, "the page's own"
    assert not any(name == "onerror" for name, _ in page.attributes)
    assert any(evil in words for words in page.words)


def test_images_of_full_size_stay_below_ten_megabytes(tmp_path: Path) -> None:
    base, tuned = made_up(np.random.default_rng(0).normal(size=(40, 1)))
    tuned.ratings[::2] += 1
    tuned.ratings[1::2] -= 1
    noise = np.random.default_rng(0).integers(0, 256, (1, 768, 768, 3), dtype=np.uint8).repeat(40, 0)
    large = (dataclasses.replace(side, images=noise) for side in (base, tuned))
    report = write_report(
        run_folder(tmp_path), *large, decide(compare(base, tuned)), sampler=SAMPLER, seconds={"training": 90.0}
    )
    assert 2e6 < report.stat().st_size < 10e6, "noise, which no format makes small"


def test_failures_are_shown_beside_successes(tmp_path: Path) -> None:
    base, tuned = made_up(np.zeros((30, 1)))
    tuned.ratings[3:5] += 1
    tuned.ratings[4] += 1
    tuned.ratings[7] -= 2
    text = write(run_folder(tmp_path), base, tuned)
    assert cards(text, "Held-out prompts, before and after") == [f"prompt {index}" for index in range(12)]
    assert cards(text, "Largest gains by the judge") == ["prompt 4", "prompt 3"]
    assert cards(text, "Largest losses by the judge") == ["prompt 7"]


def test_the_summary_says_what_the_intervals_say(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    rose, fell, same = np.full((20, 1), 0.5), np.full((20, 1), -0.5), np.zeros((20, 1))
    words = {name: " ".join(Page(write(folder, *made_up(value))).words) for name, value in
             {"rose": rose, "fell": fell, "same": same}.items()}  # fmt: skip
    assert "rose by 0.50" in words["rose"]
    assert "fell by 0.50" in words["fell"]
    assert "did not clearly change" in words["same"]
    assert "reward hacking" in words["rose"], "the reward rose and the judge's ratings stayed"
    assert "reward hacking" not in words["fell"] + words["same"]


def change(low: float, high: float) -> Change:
    return Change(base=3.0, tuned=3.0 + (low + high) / 2, difference=(low + high) / 2, low=low, high=high,
                  win=0.4, tie=0.3, loss=0.3, clear=low > 0 or high < 0)  # fmt: skip


UP, DOWN, EVEN = change(0.1, 0.3), change(-0.3, -0.1), change(-0.1, 0.2)
FEW = dataclasses.replace(EVEN, low=math.nan, high=math.nan)


def said(*signs: Sign, chosen: Chosen | None = None, **changes: Change) -> list[Verdict]:
    known = {"reward": EVEN, "fidelity": EVEN, "mean_rating": EVEN, "correct": EVEN}
    return verdicts(Compared(known | changes, {}, {}), 20, signs, chosen=chosen)


def answers(*signs: Sign, **changes: Change) -> list[str]:
    return [verdict.answer for verdict in said(*signs, **changes)]


def test_a_run_that_only_moved_within_its_intervals_is_not_said_to_have_improved() -> None:
    assert answers() == ["Not clearly", "Not clearly", "No sign of it"]
    assert answers(mean_rating=UP, reward=UP) == ["Yes", "Not clearly", "No sign of it"]
    assert answers(mean_rating=DOWN) == ["No, it got worse", "Yes", "No sign of it"]
    assert answers(mean_rating=UP, fidelity=DOWN)[1] == "Yes"
    assert answers(reward=UP)[2] == answers(reward=UP, mean_rating=DOWN)[2] == "Possibly"
    assert answers(Sign("Alike.", 3, "warning"), mean_rating=UP)[2] == "There are signs of it"
    assert answers(Sign("Alike.", 3, "note"), mean_rating=UP)[2] == "No warning; 1 note below"
    assert answers(mean_rating=dataclasses.replace(UP, clear=False))[0] == "Not clearly", "its own interval is not all"


def test_a_note_reaches_the_card_and_a_warning_goes_before_it() -> None:
    note, warning = Sign("Something is to be known.", 3, "note"), Sign("It is exploited.", 3, "warning")
    third = said(note, note, reward=UP, mean_rating=UP)[2]
    assert (third.answer, third.mood) == ("No warning; 2 notes below", "mixed")
    assert third.sentence.endswith("Something is to be known.")
    assert said(note, warning)[2].sentence == "It is exploited. (1 more below.)"


def test_of_too_few_prompts_the_cards_say_that_and_nothing_else() -> None:
    cards = said(mean_rating=FEW, correct=FEW, reward=FEW, fidelity=FEW)
    assert [card.answer for card in cards] == ["Too few prompts to say", "Not clearly", "No sign of it"]
    assert "did not clearly change (+0.05, too few prompts)" in cards[0].sentence
    assert not any("nan" in card.sentence for card in cards)


def test_a_page_of_two_prompts_has_no_interval_and_no_colour(tmp_path: Path) -> None:
    base, tuned = made_up(np.full((2, 3), 1.0))
    tuned.ratings[:] = 5
    found = compare(base, tuned)
    pairs = {"overall": Duel(1.0, 0.0, 0.0, math.nan, math.nan, 1.0)}
    text = write(run_folder(tmp_path), base, tuned, categories={"size": found}, pairs=pairs)
    assert "nan" not in text.lower().replace("nano", "")
    assert "too few prompts" in text
    assert not re.findall(r'<b class="(?:up|down|moved|mixed)">[−+]?[\d.]+ ?(?:points)?</b></td>', text)


def test_images_that_became_alike_are_worse_though_no_rating_fell() -> None:
    second = said(reward=UP, mean_rating=UP, **{"look/diversity": DOWN, "look/colour": DOWN})[1]
    assert (second.answer, second.mood) == ("Images became more alike", "mixed")
    assert "Diversity within a prompt fell by 0.20 [−0.30, −0.10]" in second.sentence
    assert "No rating or reward clearly fell" in second.sentence
    assert "diversity within a prompt fell" in said(fidelity=DOWN, **{"look/diversity": DOWN})[1].sentence


def test_no_epoch_that_beats_the_base_is_said_in_the_first_card_and_which_epoch_it_is_in_the_head(
    tmp_path: Path,
) -> None:
    good, bad = Chosen("mean_rating", 12, 20, 4.09, 3.70), Chosen("mean_rating", 2, 4, 3.69, 3.72)
    assert good.words == "epoch 12 of 20, best on validation by mean of the four (4.09; base 3.70)"
    assert "no epoch beats the base" in said(chosen=bad)[0].sentence
    assert "no epoch beats the base" not in said(chosen=good)[0].sentence
    for chosen in (good, bad):
        text = write(run_folder(tmp_path / chosen.words[:8]), *made_up(np.ones((3, 1))), chosen=chosen)
        assert chosen.words in re.sub(r"\s+", " ", " ".join(Page(text).words))


def test_a_section_of_notes_alone_is_called_notes_and_shows_the_prompts_images(tmp_path: Path) -> None:
    base, tuned = made_up(np.zeros((20, 2)))
    note = Sign("One was bought with another.", None, "note", ["prompt 17", "prompt 18"])
    text = write(run_folder(tmp_path), base, tuned, signs=[note])
    assert '<h2 id="signs">Notes</h2>' in text
    assert "Signs of an exploited reward" not in text
    assert '<a href="#signs">Notes</a>' in text
    assert cards(text, "Notes") == ["prompt 17", "prompt 18"]
    other = write(run_folder(tmp_path / "other"), base, tuned, signs=[note, Sign("It is.", 1, "warning")])
    assert '<h2 id="signs">Signs of an exploited reward</h2>' in other


def test_blank_images_are_called_so(tmp_path: Path) -> None:
    base, tuned = made_up(np.zeros((4, 1)))
    half = np.zeros((4, 4, 4, 3), np.uint8)
    half[:, :2] = (230, 200, 20)
    plain = half.copy()
    plain[3] = (230, 200, 20)
    base, tuned = dataclasses.replace(base, images=half), dataclasses.replace(tuned, images=plain)
    tuned.ratings[:] -= 1
    text = write(run_folder(tmp_path), base, tuned)
    losses = text.split("Largest losses by the judge</h3>")[1].split('<h2 id="metrics">')[0]
    assert losses.count("blank image") == 1, "of the fourth prompt, which got one colour"


def test_other_rewards_and_categories_that_fell_are_named_and_looks_are_not() -> None:
    changes = {"reward": UP, "mean_rating": UP, "correct": UP, "panel/PickScore": DOWN, "look/colour": DOWN}
    parts = {"counting": {"mean_rating": DOWN, "fidelity": DOWN}, "colours": {"mean_rating": UP}}
    second = verdicts(Compared(changes, parts, {}), 20)[1]
    assert "The reward PickScore fell by 0.20 [−0.30, −0.10]" in second.sentence
    assert "the judge's mean rating in “counting” fell by" in second.sentence
    assert "fidelity in “counting” fell by" in second.sentence
    assert "olour" not in second.sentence


def test_numbers_have_the_digits_that_their_intervals_have() -> None:
    small = dataclasses.replace(EVEN, low=-0.00312, high=0.00123, difference=-0.001)
    assert number(0.21341, small, "panel/PickScore") == "0.2134"
    assert number(-0.001, small, "reward", signed=True) == "−0.0010"
    assert number(0.21345, small, "mean_rating") == "0.21"
    assert number(-0.00001, small, "mean_rating", signed=True) == "0.00", "no minus before nothing"
    assert number(0.345, small, "correct") == "34%"


def test_everything_that_is_known_of_a_run_is_in_its_report(tmp_path: Path) -> None:
    base, tuned = made_up(np.ones((6, 1)))
    base, tuned = (dataclasses.replace(side, panel={"PickScore": np.full(6, 0.25 + place)})
                   for place, side in enumerate((base, tuned)))  # fmt: skip
    found = compare(base, tuned)
    given = {"signs": [Sign("Images look alike.", 7, "warning")]}
    parts = {"training": 3600.0, "base images": 1900.0}
    compared = decide(found, {"counting": found})
    path = write_report(run_folder(tmp_path), base, tuned, compared, sampler=SAMPLER, seconds=parts, **given)
    words = re.sub(r"\s+", " ", " ".join(Page(path.read_text(encoding="utf-8")).words))
    for shown in ("PickScore", "epoch 7", "Images look alike.", "counting", "seed 0",
                  "training 60.0 minutes", "base images 31.7 minutes", "1.5 hours", "torch"):  # fmt: skip
        assert shown in words, shown


def test_categories_stand_from_the_largest_gain_to_the_largest_loss(tmp_path: Path) -> None:
    base, tuned = made_up(np.zeros((20, 1)))
    tuned.ratings[:10] += 1
    tuned.ratings[15:] -= 1
    parts = {"lost": range(15, 20), "same": range(10, 15), "won": range(10)}
    found = {name: compare(base.rows(rows), tuned.rows(rows)) for name, rows in parts.items()}
    text = write(run_folder(tmp_path), base, tuned, categories=found)
    drawn, tables = text.split('<div class="charts">')[1].split("These and the single aspects in tables")
    for metric in re.split("<h3>", drawn)[1:]:
        order = re.findall(r'<span class="what">(.*?)</span>', metric)
        assert order[0] == "all prompts"
        if metric.startswith("Mean"):
            assert order[1:] == ["won", "same", "lost"]
            fills = re.findall(r'<i class="fill" style="left:([\d.]+)%;width:([\d.]+)%"', metric)
            # One point up or down is as far as it goes; of all prompts (10 - 5) / 20 of it.
            assert [(float(left), float(width)) for left, width in fills] == [(50, 12), (50, 48), (50, 0), (2, 48)]
    assert all(f'<th scope="row">{name}</th>' in tables for name in parts), "for whoever wants numbers"


def test_what_the_judge_took_and_said_of_pairs_and_the_distances_are_shown(tmp_path: Path) -> None:
    base, tuned = made_up(np.ones((3, 1)))
    duel = Duel(win=0.5, tie=0.3, loss=0.2, low=0.1, high=0.5, consistent=0.75)
    apart = Distances("a <b>", 768, 3, 9, {"reference and base": 12.345}, {"reference and base": 0.5}, "Too few.")
    asked = {"one way": Asked(1200, 34, Usage(5000, 600, 1.25)), "another": Asked(0, 7)}
    text = write(run_folder(tmp_path), base, tuned, pairs={"overall": duel}, distances=apart, asked=asked)
    words = re.sub(r"\s+", " ", " ".join(Page(text).words))
    for shown in ("prefers the trained model's in 50% of the pairs, the base model's in 20%.",
                  "Overall +30 [+10, +50] 75%", "768 features of a <b>", "9 of the reference",
                  "reference and base 12.3 0.5", "none of those", "Too few.",
                  "1,200 questions · 34 more answered in earlier evaluations · 5,000 tokens in", "600 out · $1.25",
                  "Judge, another 7 answered in earlier evaluations"):  # fmt: skip
        assert shown in words, shown
    plain = " ".join(Page(write(run_folder(tmp_path / "other"), base, tuned)).words)
    assert "Judge, " not in plain
    assert "FID" not in plain


def test_settings_are_shown_without_secrets_hosts_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MY_JUDGE_KEY", "from-the-environment")
    folder = run_folder(tmp_path)
    (folder / ".hydra" / "config.yaml").write_text(CONFIG)
    (folder / ".hydra" / "overrides.yaml").write_text(
        "- experiment=x\n- prompts.path=/home/someone/p.txt\n- k.api_key=sk-1\n"
    )
    words = " ".join(Page(write(folder, *made_up(np.ones((3, 1))))).words)
    hidden = ("someone", "secret", "internal", "user:pw", "sk-1", "sk-or", "from-the-environment", str(tmp_path))
    for each in (*hidden, socket.gethostname()):
        assert each not in words
    for shown in (
        "my-sd",
        "max_tokens: 300",
        'prompts.path="$HOME"/p.txt',
        "${hydra:runtime.output_dir}",
        "1.5 minutes",
    ):
        assert shown in words


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("trainer.num_nodes=2", "trainer.num_nodes=2"),
        ("annotator.max_tokens=300", "annotator.max_tokens=300"),
        ("policy.path=org/model", "policy.path=org/model"),
        ("policy.path=/data/my models/sd", "policy.path=…/sd"),
        ("policy.path=../someone/sd", "policy.path=…/sd"),
        ("x.address=10.0.0.7:6379", "x.address=(host)"),
        ("x.hub_token=abc", "x.hub_token=(hidden)"),
        ("x.files=[/a/b/c.txt,/d]", "x.files=[…/c.txt,…/d]"),
        ("~callbacks.progress", "~callbacks.progress"),
        ("logger.save_dir=${oc.env:HOME}/x", "logger.save_dir=${oc.env:HOME}/x"),
    ],
)
def test_an_override_keeps_what_repeats_the_run_and_nothing_else(given: str, seen: str) -> None:
    assert override(given) == seen
    assert public(override(given)) == seen, "nothing is left to hide"


def test_what_repeats_a_run_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole paths, in a shell of the same user and folder; and not `resume`, which would go on with another run."""
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    given = {
        "experiment=x": "experiment=x",
        f"folder={tmp_path}/home/work/outputs/a b": "folder=outputs/a b",
        f"prompts.path={tmp_path}/home/p.txt": f"prompts.path={tmp_path}/home/p.txt",
        "k.path=/srv/data/x.txt": "k.path=/srv/data/x.txt",
        "k.api_key=sk-1": "k.api_key=(hidden)",
        "reward.url=http://gpu7.internal:8000/x": "reward.url=http://(host)/x",
        "x=$(rm -rf .)": "x=$(rm -rf .)",
    }
    line = command(["python", "train.py", "resume=auto", *given, "+resume=outputs/x"])
    assert str(tmp_path / "home") not in line, "who it was does not matter"
    shown = subprocess.run(
        ["sh", "-c", f"set -- {line}; printf '%s\\n' \"$@\""], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == ["python", "train.py", *given.values()]


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


def test_the_first_cards_are_of_as_many_prompts_and_not_of_one_prompts_seeds(tmp_path: Path) -> None:
    base, tuned = (evaluator(seeds=(0, 1, 2)).evaluate(shifted(by), Brightness()) for by in (0.0, 0.3))
    assert base.of_first_seed().tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]
    first = report_module._galleries(base, tuned)["first"]
    assert [card["prompt"] for card in first] == [f"test prompt {number}" for number in range(12)]


def test_the_lines_for_a_flow_model_leave_its_own_scheduler_and_say_what_it_was_loaded_with() -> None:
    policy = {"_target_": "vp_rl.policies.flux.Flux", "path": "org/flux", "dtype": "bfloat16", "variant": None,
              "revision": "abc", "t5_tokens": 512, "resolution": 1024}  # fmt: skip
    code = report_module._code(policy, SAMPLER, "a cat", 3)
    compile(code, "report", "exec")
    assert "DDIM" not in code
    assert "eta" not in code
    assert "from_pretrained('org/flux', revision='abc', dtype=torch.bfloat16)" in code
    assert "max_sequence_length=512" in code
    assert "manual_seed(3000009)" in code
