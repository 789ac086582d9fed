"""Detectors, and `scripts/evaluate.py objects`: from a run's folder to scores by task and failures in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from random_clip import save_clip
from random_owl import save_owl

from scripts.evaluate_objects import complete, evaluate, expand
from vp_rl.evaluation.detectors import COLOURS, Embedder, SceneDetector, ZeroShotDetector
from vp_rl.evaluation.geneval import Found, Verdict, check, examine, iou
from vp_rl.evaluation.objects import OVERALL, Checked, Unasked, compare_tasks, examine_all
from vp_rl.evaluation.objects_page import write
from vp_rl.evaluation.store import Store
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.visionprefer.object_prompts import Clause, SceneObjects, Wanted

CONF = Path(__file__).parents[1] / "conf"
RGB = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate_objects", overrides=expand(overrides))


# --- OWLv2


class MeanColour:
    """Images are their mean colour, texts the colour that they name, or white."""

    def look(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)

    def read(self, prompts: list[str]) -> torch.Tensor:
        named = [next((rgb for name, rgb in RGB.items() if name in text), (1.0, 1.0, 1.0)) for text in prompts]
        return torch.nn.functional.normalize(torch.tensor(named), dim=1)


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owl")
    save_owl(folder)
    return folder


def image(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_owlv2_loads_and_gives_each_box_the_class_that_fits_it_best(owl: Path) -> None:
    detector = ZeroShotDetector(str(owl), MeanColour(), threshold=0.0, counting_threshold=0.5)
    assert not any(each.requires_grad for each in detector.parameters())
    both, turned = detector.find(image(), ["dog", "cup"]), detector.find(image(), ["cup", "dog"])
    assert len(both) == 16
    assert [each.name for each in both] == [each.name for each in turned], "names, not places in a list"
    alone = {name: detector.find(image(), [name]) for name in ("dog", "cup")}
    for place, each in enumerate(both):
        rivals = {name: found[place].confidence for name, found in alone.items()}
        assert each.confidence == pytest.approx(max(rivals.values()), abs=1e-6)
        assert rivals[each.name] == pytest.approx(each.confidence, abs=1e-6)
    assert {each.name for each in both} == {"dog", "cup"}, "a case in which both win somewhere"


def test_owlv2s_boxes_are_in_the_images_own_pixels(owl: Path) -> None:
    """It pads an image with black to a square, so one that is so padded already has the same boxes."""
    detector = ZeroShotDetector(str(owl), MeanColour(), threshold=0.0)
    flat = image(30, 60)
    square = np.full((60, 60, 3), 0, np.uint8)
    square[:30] = flat
    boxes = [each.box for each in detector.find(flat, ["dog"])]
    assert max(box[2] for box in boxes) > 32, "pixels of the image, not of what the network sees"
    np.testing.assert_allclose(boxes, [each.box for each in detector.find(square, ["dog"])], atol=1e-3)


def test_overlapping_and_unsure_boxes_do_not_count(owl: Path) -> None:
    loose = ZeroShotDetector(str(owl), MeanColour(), threshold=0.0, max_overlap=1.0)
    strict = ZeroShotDetector(str(owl), MeanColour(), threshold=0.0, max_overlap=0.3)
    wanted = Wanted("single_object", (Clause("dog"),))
    every, apart = (examine(each, image(), wanted, ["dog"]) for each in (loose, strict))
    assert len(every) == 16
    assert 0 < len(apart) < 16
    assert all(iou(a.box, b.box) < 0.3 for place, a in enumerate(apart) for b in apart[:place])
    surest = every[0].confidence
    assert not examine(ZeroShotDetector(str(owl), MeanColour(), threshold=surest), image(), wanted, ["dog"])


def test_colours_are_of_what_lies_in_the_box(owl: Path) -> None:
    detector = ZeroShotDetector(str(owl), MeanColour(), palette=("blue", "green", "red"))
    picture = np.zeros((20, 30, 3), np.uint8)
    for place, color in enumerate(("red", "green", "blue")):
        picture[:, 10 * place : 10 * place + 10] = np.array(RGB[color]) * 255
    found = [Found("cup", 0.9, (10.0 * place, -5.0, 10.0 * place + 10, 99.0)) for place in range(3)]
    assert detector.colors(picture, found) == ["red", "green", "blue"]
    beside = Found("cup", 0.9, (40.0, 3.0, 41.0, 3.2))  # beside the image: its last pixels
    assert detector.colors(picture, [beside]) == ["blue"]


def test_what_is_no_detector_is_named(owl: Path, tmp_path: Path) -> None:
    clip = MeanColour()
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        ZeroShotDetector(str(tmp_path / "none"), clip)
    save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="it is a clip model; those of owlv2, owlvit"):
        ZeroShotDetector(str(tmp_path / "clip"), clip)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((owl / name).read_bytes())
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        ZeroShotDetector(str(tmp_path), clip)
    with pytest.raises(ValueError, match=r"must have \{name\}"):
        ZeroShotDetector(str(owl), clip, query="a photo")
    with pytest.raises(ValueError, match="float64"):
        ZeroShotDetector(str(owl), clip, dtype="float64")


def test_weights_that_are_missing_are_not_made_up(owl: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in owl.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state.pop("box_head.dense0.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as box_head\.dense0\.weight"):
        ZeroShotDetector(str(tmp_path), MeanColour())


def test_detectors_say_which_class_or_colour_they_do_not_know(owl: Path) -> None:
    scene, real = SceneDetector(), ZeroShotDetector(str(owl), MeanColour())
    scene.check(["circle", "star"], ["red", "cyan"])
    with pytest.raises(ValueError, match="the class 'dog'; it knows circle, .*detector=owlv2"):
        scene.check(["circle", "dog"], [])
    with pytest.raises(ValueError, match="the colour 'pink'"):
        scene.check(["circle"], ["pink"])
    real.check(["anything at all"], COLOURS)
    with pytest.raises(ValueError, match="the colour 'teal'.*detector.palette"):
        real.check(["dog"], ["red", "teal"])


def test_the_configured_detector_runs_on_models_of_its_kind(owl: Path, tmp_path: Path) -> None:
    save_clip(tmp_path)
    found = config("adapter=x", "detector=owlv2", f"detector.model={owl}", f"detector.clip.model={tmp_path}",
                   "detector.threshold=0.0")  # fmt: skip
    detector = instantiate(found.detector, _convert_="all").eval()
    assert isinstance(detector.clip, Embedder)
    assert detector.palette == COLOURS
    picture = image(60, 60)  # square: of others some boxes lie in what they are padded with
    seen = examine(detector, picture, Wanted("colors", (Clause("dog", 1, "red"),)), ["dog"])
    assert seen[0].color in COLOURS
    texts = [f"a photo of a {color}{middle}" for color in COLOURS for middle in (" dog", "-colored dog", " object")]
    left, top, right, bottom = seen[0].box
    box = picture[max(int(np.floor(top)), 0) : int(np.ceil(bottom)), max(int(np.floor(left)), 0) : int(np.ceil(right))]
    looked = detector.clip.look(torch.from_numpy(box.copy()).permute(2, 0, 1)[None].float() / 255)[0]
    near = [(detector.clip.read(texts[3 * place : 3 * place + 3]).mean(0)) for place in range(len(COLOURS))]
    cosines = [float(mean @ looked / mean.norm()) for mean in near]
    assert seen[0].color == COLOURS[int(np.argmax(cosines))]


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the embedded world leaves; its adapter ruins the images."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = compose("train", overrides=["experiment=ddpo_vpscore", "policy.lora.r=2"])
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(settings, folder / ".hydra" / "config.yaml")
    torch.manual_seed(0)
    policy: StableDiffusion = instantiate(settings.policy)
    with torch.no_grad():
        for name, each in policy.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.05)
    (folder / "adapter").mkdir()
    policy.save_adapter(folder / "adapter")
    return folder


def test_a_run_is_checked_and_nothing_is_made_or_seen_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"adapter={run}", f"cache={tmp_path}/c.sqlite", f"folder={tmp_path}/out", "prompts.test=8", "device=cpu",
             "seeds=[0,1]", "sampler.steps=2")  # fmt: skip
    first = evaluate(config(*given))
    assert set(first) == {"colors", "counting", "position", "color_attr", OVERALL}
    assert first[OVERALL].prompts == 8
    lines = [json.loads(line) for line in (tmp_path / "out" / "objects.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 8 * 2
    for side, name in (("base", "base"), ("adapter", "tuned")):
        by_task = {
            task: [line["correct"] for line in lines if (line["model"], line["tag"]) == (side, task)]
            for task in first.keys() - {OVERALL}
        }
        for task, correct in by_task.items():
            assert getattr(first[task].change, name) == pytest.approx(np.mean(correct))
        means = [np.mean(correct) for correct in by_task.values()]
        assert getattr(first[OVERALL].change, name) == pytest.approx(np.mean(means))
    assert all(line["correct"] == (line["reason"] == "all is as asked") for line in lines)
    told = json.loads((tmp_path / "out" / "objects.json").read_text())
    assert told["scores"][OVERALL]["difference"] == pytest.approx(first[OVERALL].change.difference)
    page = (tmp_path / "out" / "objects.html").read_text()
    assert "Mask2Former" in page
    assert "no second opinion on that judge" in page
    assert "asked for" in page, "a failure in words"
    assert str(run.parent) not in page
    assert "| overall" in (tmp_path / "out" / "objects.md").read_text()
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("an image is made again"))
    monkeypatch.setattr(SceneDetector, "find", lambda *_: pytest.fail("an image is looked at again"))
    assert evaluate(config(*given)) == first


def test_what_the_detector_cannot_tell_is_said_before_any_image_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("an image is made"))
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    given = (f"adapter={run}", "cache=null", f"folder={tmp_path}", "device=cpu")
    with pytest.raises(ValueError, match="the class 'bench'"):
        evaluate(config(*given, "prompts=geneval", f"prompts.path={tmp_path}/m.jsonl"))
    with pytest.raises(ValueError, match="choose geneval or scene_objects"):
        evaluate(config(*given, "prompts=scenes"))


def test_the_runs_policy_and_sampler_hold_unless_others_are_given(run: Path, tmp_path: Path) -> None:
    adapter, policy, sampler = complete(config(f"adapter={run}", "sampler.steps=7", "policy.lora.r=8"))
    assert adapter == run / "adapter"
    assert (policy.lora.r, policy.path, sampler["steps"]) == (8, "tiny-sd", 7)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"policy=\.\.\. must be given, as in policy=NAME"):
        complete(config(f"adapter={tmp_path}"))
    assert complete(config(f"adapter={tmp_path}", "policy=tiny_sd"))[1].path == "tiny-sd"
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        complete(config("adapter=/nowhere"))


# --- pages and comparison


def checked(*correct: bool, prompts: tuple[str, ...] = ("a", "b"), reason: str = "cup: found none") -> Checked:
    verdicts = [Verdict(each, "all is as asked" if each else reason) for each in correct]
    wanted = [Wanted("colors", (Clause("cup", 1, "red"),))] * len(correct)
    images = np.zeros((len(correct), 64, 64, 3), np.uint8)
    found = [[Found("cup", 0.9, (0.0, 0.0, 5.0, 5.0), "red")]] * len(correct)
    return Checked(list(prompts), [0] * len(correct), images, wanted, found, verdicts)


def test_only_the_same_images_are_compared() -> None:
    with pytest.raises(ValueError, match="same prompts and seeds"):
        compare_tasks(checked(True, True), checked(True, True, prompts=("a", "c")))
    scores = compare_tasks(checked(True, False), checked(False, False))
    assert (scores["colors"].change.base, scores["colors"].change.tuned) == (0.5, 0.0)
    assert scores["colors"].change == pytest.approx(scores[OVERALL].change)


def test_the_page_shows_what_went_wrong_and_lets_no_markup_in(tmp_path: Path) -> None:
    hostile = ("<script>alert(1)</script>", "b | c")
    base, tuned = checked(True, False, prompts=hostile), checked(False, False, prompts=hostile, reason="<b>none</b>")
    page = write(tmp_path, base, tuned, compare_tasks(base, tuned), about=["<i>"], command="python x token=abc")
    text = page.read_text()
    assert not [tag for tag in ("<script", "<b>none", "<i>") if tag in text]
    assert "Right before, wrong now: 1 of 2 images" in text
    assert "Wrong before, right now: 0 of 2 images" in text
    assert "seen: 1 x red cup" in text
    assert "token=abc" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_one_prompt_alone_is_clear_of_nothing(tmp_path: Path) -> None:
    base, tuned = checked(True, prompts=("a",)), checked(False, prompts=("a",))
    text = write(tmp_path, base, tuned, compare_tasks(base, tuned), about=[]).read_text()
    assert '<b class="down">−100' not in text
    assert '<b class="even">−100 points</b></td><td>too few prompts</td>' in text


def test_what_was_kept_is_what_was_seen() -> None:
    """The store gives back objects that are judged alike."""
    source, detector = SceneObjects(4), SceneDetector()
    prompts = source.split("test")
    images = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    plain = examine_all(detector, source, prompts, [0], images, Store(None), "x")
    assert [check(found, source.wanted(p)) for found, p in zip(plain.found, prompts, strict=True)] == plain.verdicts


def test_nobody_is_asked() -> None:
    with pytest.raises(ValueError, match="ask no judge"):
        Unasked().read("", 1)
