"""`scripts/evaluate.py images`: from a run's folder to its adapter's results, with nothing made twice."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from scripts.evaluate_images import _encoder, complete, evaluate, expand
from vp_rl.evaluation.conclusion import ALONE, PAIRS
from vp_rl.evaluation.duel import OVERALL
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SMALL = ("limit=5", "seeds=[0,1]", "batch_size=4", "sampler.steps=2", "device=cpu", "curve=null")


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate_images", overrides=expand(overrides))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the embedded world leaves: settings and an adapter, which does something."""
    return made(tmp_path_factory.mktemp("outputs") / "run", 2, 0)


@pytest.fixture(scope="module")
def another(run: Path) -> Path:
    """Another run's, whose adapter has another rank and does something else."""
    return made(run.parent / "another run", 4, 1)


def made(folder: Path, rank: int, seed: int) -> Path:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = compose(
            "train",
            overrides=[
                "experiment=ddpo_vpscore",
                f"policy.lora.r={rank}",
                "evaluation.sampler.eta=1.0",
                "prompts.test=8",
            ],
        )
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(settings, folder / ".hydra" / "config.yaml")
    from hydra.utils import instantiate

    torch.manual_seed(seed)
    policy: StableDiffusion = instantiate(settings.policy)
    with torch.no_grad():
        for name, each in policy.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.02)
    (folder / "adapter").mkdir()
    policy.save_adapter(folder / "adapter")
    return folder


def test_a_run_is_evaluated_as_it_was_set_and_nothing_is_made_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (reference := tmp_path / "reference").mkdir()
    given = (f"adapter={run}", f"cache={tmp_path}/c.sqlite", f"folder={tmp_path}/out", "pairs=true", *SMALL)
    given = (*given, "distances=tiny_clip", f"reference={reference}")
    for number in range(3):
        Image.new("RGB", (9, 7), (80 * number, 0, 0)).save(reference / f"{number}.png")
    panel = "panel=[compressibility]"
    first = evaluate(config(*given, panel))
    assert (first["prompts"], first["images"]) == (5, 10)
    assert first["held_out"]["look/distance"]["difference"] > 0  # of five prompts, no interval is sure of it
    assert {"panel/compressibility", "mean_rating"} <= first["held_out"].keys()
    assert OVERALL in first["pairs"]
    assert set(first["categories"]) <= {"size", "binding", "relation", "count", "composition"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == first
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({(line["prompt"], line["seed"]) for line in lines}) == 10
    for metric in ("reward", "mean_rating", "panel/compressibility"):
        for model in ("base", "tuned"):
            mean = sum(float(line[f"{model}/{metric}"]) for line in lines) / len(lines)
            assert mean == pytest.approx(first["held_out"][metric][model], rel=1e-6), (model, metric)
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("an image is made again"))
    again = evaluate(config(*given, panel))
    for part in ("held_out", "pairs", "categories", "distances"):
        assert again[part] == first[part], part
    assert first["judge"][ALONE]["questions"] == 4 * 2 * 5
    assert (again["judge"][ALONE]["questions"], again["judge"][PAIRS]["questions"]) == (0, 0)
    assert again["judge"][PAIRS]["kept"] == 8 * 10
    assert first["distances"]["encoder"] == "tiny_clip (tiny-clip)"
    assert first["distances"]["cmmd"]["reference and base"] > first["distances"]["cmmd"]["base and adapter"] > 0


def test_the_guidance_curve_of_an_evaluation_is_not_made_twice_either(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (f"adapter={run}", f"cache={tmp_path}/c.sqlite", f"folder={tmp_path}/out")
    curve = ("curve.candidates=[1.0,2.0]", "curve.scales=[4.0]", "curve.prompts=2")
    given = config(*where, *SMALL[:-1], *curve)
    first = evaluate(given)["guidance_curve"]
    assert {"4"} <= set(first["scales"]) <= {"1", "2", "4"}
    assert first["images"]["4"] == 2
    assert set(first["chosen"]["means"]["tuned"]) == {"1", "2"}
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("an image is made again"))
    again = evaluate(given)
    assert again["guidance_curve"] == first
    assert again["judge"][ALONE]["questions"] == 0


def columns(folder: Path, model: str) -> dict[str, list[str]]:
    with (folder / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return {name.partition("/")[2]: [line[name] for line in lines] for name in lines[0] if name.startswith(f"{model}/")}


def test_an_adapter_is_compared_with_another_as_each_is_with_its_base(run: Path, another: Path, tmp_path: Path) -> None:
    given = (f"cache={tmp_path}/c.sqlite", *SMALL)
    one, other = (str(each).replace(" ", "\\ ") for each in (run, another))
    for name, adapter in (("one", one), ("other", other)):
        evaluate(config(f"adapter={adapter}", f"folder={tmp_path}/{name}", *given))
    forth = evaluate(config(f"adapter={one}", f"against={other}", f"folder={tmp_path}/forth", "pairs=true", *given))
    assert columns(tmp_path / "forth", "tuned") == columns(tmp_path / "one", "tuned")
    assert columns(tmp_path / "forth", "other") == columns(tmp_path / "other", "tuned")
    assert columns(tmp_path / "one", "tuned")["reward"] != columns(tmp_path / "other", "tuned")["reward"]
    assert (forth["judge"][ALONE]["questions"], forth["judge"][ALONE]["kept"]) == (0, 4 * 2 * 5)
    ahead, behind = (np.array(columns(tmp_path / "forth", of)["mean_rating"], float) for of in ("tuned", "other"))
    assert forth["held_out"]["mean_rating"]["difference"] == pytest.approx((ahead - behind).mean())
    page = (tmp_path / "forth" / "report.html").read_text()
    assert "Is it better?" in page
    assert "the other adapter’s" in page
    assert "base model’s" not in page.partition("Use the adapter")[0]
    assert not forth["signs"]


def test_what_comes_of_another_adapter_does_not_replace_what_came_of_the_base(run: Path, another: Path) -> None:
    found = config(f"adapter={run}", f"against='{another}'")
    assert found.folder == f"{run}/against_{another.parent.name}_another_run"
    assert config(f"adapter={run}", "against=x", "folder=y").folder == "y"
    assert config(f"adapter={run}").folder == f"{run}/evaluation"
    with pytest.raises(FileNotFoundError, match="against='/nowhere' is no folder of a run"):
        evaluate(config(f"adapter={run}", "against=/nowhere", *SMALL))


def test_the_runs_settings_hold_unless_others_are_given(run: Path) -> None:
    adapter, whole = complete(config(f"adapter={run}", "limit=3"))
    assert adapter == run / "adapter"
    assert whole.policy.lora.r == 2
    assert (whole.evaluation.sampler.eta, whole.evaluation.sampler.steps, whole.evaluation.limit) == (1.0, 20, 3)
    _, other = complete(
        config(f"adapter={run / 'adapter'}", "reward=compressibility", "policy.lora.r=8", "sampler.steps=7")
    )
    assert "Compressibility" in other.reward._target_
    assert (other.policy.lora.r, other.policy.path) == (8, "tiny-sd")
    assert (other.evaluation.sampler.steps, other.evaluation.sampler.eta) == (7, 1.0)


def test_an_adapter_of_no_run_needs_to_be_told_what_it_is_of(run: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
        (run / "adapter").glob("*.safetensors").__next__().read_bytes()
    )
    with pytest.raises(ValueError, match="policy=... must be given"):
        complete(config(f"adapter={tmp_path}"))
    nodes = ("policy=tiny_sd", "reward=vp_score", "prompts=scenes", "annotator=scene")
    _, whole = complete(config(f"adapter={tmp_path}", *nodes))
    assert whole.policy.path == "tiny-sd"
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        complete(config("adapter=/nowhere"))


@pytest.mark.parametrize("given", ["panel=[]", "panel=[a,a]", "panel=a,"])
def test_a_panel_without_names_or_with_one_twice_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="panel="):
        expand([given])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("reference=x",), "distances=clip_score"),
        (("reference=/nowhere", "distances=tiny_clip"), "no folder"),
        (("distances=compressibility",), "no features of images alone"),
    ],
)
def test_distances_that_cannot_be_taken_are_refused_before_anything_is_made(given: tuple[str, ...], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        _encoder(config("adapter=x", *given), "cpu")


def test_what_is_given_finds_its_place() -> None:
    found = expand(
        ["adapter=x", "panel=[a,b]", "reward.checkpoint=y", "prompts=file", "prompts.path=z", "sampler.steps=3"]
    )
    assert found == [
        "adapter=x",
        "+reward@panel.a=a",
        "+reward@panel.b=b",
        "+reward.checkpoint=y",
        "prompts=file",
        "prompts.path=z",
        "+sampler.steps=3",
    ]


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/evaluate.py", "images", f"adapter={tmp_path / 'nowhere'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: adapter='{tmp_path / 'nowhere'}' is no folder of a run")
