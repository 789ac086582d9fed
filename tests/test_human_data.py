"""Training pairs from sets that people have judged: the same laws as VisionPrefer's, and VP-Score learns from each."""

import io
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from test_data_preferences import dataset, random_ratings
from test_data_preferences import module as by_ratings
from test_human_sets import CONF, human, image
from test_reward_model import train
from test_vp_score import random_vp_score

from vp_rl.algorithms.reward_model import RewardModel
from vp_rl.callbacks.accuracy import AccuracyReport
from vp_rl.data.human import HumanDataModule, compared, plain, scaled
from vp_rl.data.sets import pack
from vp_rl.data.sets.base import HumanSet, Judged, pair
from vp_rl.data.sets.pack import Pack
from vp_rl.data.sets.visionprefer import VisionPreferSet
from vp_rl.rewards.preprocess import OPENAI, preprocess
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import PreferenceBatch

few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")
quick_log = pytest.mark.filterwarnings("ignore:The number of training batches")
NUMBER = 16  # prompts


# --- sets in their public schemas: three images a prompt, or two pairs that share one


def image_reward_db(folder: Path, split: str) -> None:
    rows = [
        {
            "image_path": f"images/{split}/{split}_1/{n}{i}.webp",
            "prompt_id": f"{n}",
            "prompt": f"{split} {n}",
            "rank": r,
        }
        | {"overall_rating": 4, "image_text_alignment_rating": 4, "fidelity_rating": 4}
        for n in range(NUMBER)
        for i, r in enumerate([1, 2, 2])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"metadata-{split}.parquet")
    (folder / "images" / split).mkdir(parents=True)
    with zipfile.ZipFile(folder / "images" / split / f"{split}_1.zip", "w") as archive:
        for place, row in enumerate(rows):
            archive.writestr(Path(row["image_path"]).name, image(place))  # WebP would move shades


def hpd_v2(folder: Path, split: str) -> None:
    names = [[f"{n}{i}.jpg" for i in "abc"] for n in range(NUMBER)]
    rankings = [{"prompt": f"test {n}", "image_path": own, "rank": [1, 2, 2]} for n, own in enumerate(names)]
    choices = [
        {"prompt": f"train {n}", "file_path": two, "human_preference": choice}
        for n, (a, b, c) in enumerate(names)
        for two, choice in (([a, b], [1, 0]), ([c, a], [0, 1]))
    ]
    rows = [{**row, "raw_annotations": []} for row in rankings] if split == "test" else choices
    (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / split).mkdir()
    for place, name in enumerate(name for own in names for name in own):
        (folder / split / name).write_bytes(image(place, "jpeg"))


def hpd_v3(folder: Path, split: str) -> None:
    common = {"model1": "flux", "model2": "sd2", "confidence": 0.9, "choice_dist": [15, 5]}
    rows = [
        {**common, "prompt": f"{split} {n}", "path1": f"images/{split}{n}a.jpg", "path2": f"images/{split}{n}{i}.jpg"}
        for n in range(NUMBER)
        for i in "bc"
    ]
    (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / "images").mkdir(exist_ok=True)
    for n in range(NUMBER):
        for i, name in enumerate("abc"):
            (folder / "images" / f"{split}{n}{name}.jpg").write_bytes(image(3 * n + i, "jpeg"))


def pick_a_pic(folder: Path, split: str) -> None:
    (folder / "data").mkdir(exist_ok=True)
    name = "test_unique" if split == "test" else split
    rows = [
        {
            "caption": f"{split} {n}",
            "image_0_uid": f"{n}{first}",
            "image_1_uid": f"{n}{second}",
            "jpg_0": image(3 * n + "abc".index(first), "jpeg"),
            "jpg_1": image(3 * n + "abc".index(second), "jpeg"),
            "label_0": label,
            "model_0": "sdxl",
            "model_1": "dreamlike",
            "has_label": first != "b",
        }
        for n in range(NUMBER)
        for first, second, label in (("a", "b", 1.0), ("c", "a", 0.0), ("b", "c", 0.5 if split == "test" else -1.0))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / f"{name}-0.parquet", row_group_size=5)


MAKERS: dict[str, Callable[[Path, str], None]] = {
    "image_reward_db": image_reward_db,
    "hpd_v2": hpd_v2,
    "hpd_v3": hpd_v3,
    "pick_a_pic": pick_a_pic,
    "pick_a_pic_v2": pick_a_pic,
}


def made(name: str, folder: Path, split: str) -> HumanSet:
    folder.mkdir(exist_ok=True)
    MAKERS[name](folder, split)
    if name.startswith("pick") and split == "test":
        return human(name, folder, "data.it.tuning_files=null")
    return human(name if split == "test" else f"{name}_{split}", folder)


def module(folder: Path, name: str = "hpd_v3", **settings: object) -> HumanDataModule:
    given = {"validation": {}, "validation_share": 0.4, "size": 8, "batch_size": 4, "cache": str(folder / "cache")}
    sets = {split: {"set": made(name, folder, split)} for split in ("train", "test")}
    return HumanDataModule(**{**sets, **given, **settings})


def pairs(batches: list[PreferenceBatch]) -> list[tuple[str, int, int, float]]:
    """Prompt, shades of the better and of the worse image, margin."""
    found = []
    for batch in batches:
        shades = (batch.images[:, 0, 0, 0] * 255).round().int().tolist()
        for better, worse, margin in zip(
            *(x.tolist() for x in (batch.better, batch.worse, batch.margins)), strict=True
        ):
            assert batch.prompts[better] == batch.prompts[worse]
            found.append((batch.prompts[better], shades[better], shades[worse], margin))
    return found


# --- each set


@few_workers
@quick_log
@pytest.mark.parametrize("name", MAKERS)
def test_vp_score_trains_on_every_set(tmp_path: Path, name: str) -> None:
    data = module(tmp_path / "set", name)
    before = random_vp_score()
    algorithm = RewardModel(random_vp_score(), partial(torch.optim.Adam, lr=1e-3), str(tmp_path / "vp_score"))
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        default_root_dir=tmp_path,
        callbacks=[AccuracyReport()],
    )
    trainer.fit(algorithm, data)
    metrics = trainer.test(algorithm, data, verbose=False)[0]
    saved = VPScore.load(str(tmp_path / "vp_score"))
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), before.parameters(), strict=True))
    assert 0 <= metrics["test/accuracy"] <= 1
    assert not [key for key in metrics if key.startswith("test/accuracy/")]  # nobody rated an aspect
    told = json.loads((tmp_path / "summary.json").read_text())["accuracy"]["VP-Score"]
    assert told.keys() == {"people"}
    assert told["people"]["share"] == pytest.approx(metrics["test/accuracy"])
    assert told["people"]["pairs"] == 2 * NUMBER


@pytest.mark.parametrize("name", MAKERS)
def test_every_untied_pair_comes_once_and_every_image_once(tmp_path: Path, name: str) -> None:
    data = module(tmp_path / "set", name)
    batches = {split: list(loader) for split, loader in loaders(data).items()}
    split_of: dict[str, str] = {}
    for split, own in batches.items():
        for batch in own:
            assert len(set(zip(batch.prompts, batch.images[:, 0, 0, 0].tolist(), strict=True))) == len(batch.prompts)
            assert not batch.ratings.any()
            assert set(batch.aspects.tolist()) == {-1}
            assert {split_of.setdefault(prompt, split) for prompt in batch.prompts} == {split}
    found = {(p, b, w, m) for own in batches.values() for p, b, w, m in pairs(own)}
    known = {(p, n) for p in split_of for n in [3 * int(p.split()[1])]}
    tolerance = {0, 1}  # JPEG may move a shade
    assert len(split_of) == 2 * NUMBER
    assert len(found) == sum(len(pairs(own)) for own in batches.values()) == 4 * NUMBER
    for prompt, first in known:
        own = sorted((b, w, m) for p, b, w, m in found if p == prompt)
        assert [(abs(b - first) in tolerance, m) for b, _, m in own] == [(True, 1.0)] * 2
        assert all(abs(w - first - i) in tolerance for i, (_, w, _) in enumerate(own, start=1))


def loaders(data: HumanDataModule) -> dict[str, torch.utils.data.DataLoader]:
    return {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }


def test_a_visionprefer_as_a_set_of_judgements_gives_the_pairs_and_the_loss_of_its_means(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", random_ratings(12))
    sets = {split: VisionPreferSet(str(folder), [], split) for split in ("train", "validation", "test")}
    one = HumanDataModule({"a": sets["train"]}, {}, {}, 0.5, size=8, cache=str(tmp_path / "cache"))
    one._is_held_out = lambda prompt: False  # type: ignore[method-assign]  # of a dataset that is split already
    batch = next(iter(one.train_dataloader()))
    expected = next(iter(by_ratings(folder, aspects="mean", batch_size=16).train_dataloader()))
    assert batch.prompts == expected.prompts
    for name in ("images", "better", "worse", "aspects", "margins"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    algorithm = RewardModel(random_vp_score(), torch.optim.Adam, str(tmp_path))
    algorithm.reward.eval()
    algorithm.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    losses = [algorithm._loss("train", each, algorithm._columns(each)) for each in (batch, expected)]
    assert losses[0] == losses[1]


# --- splits and order


def test_a_prompt_of_a_later_split_is_left_out_however_it_is_written(tmp_path: Path) -> None:
    data = module(tmp_path / "set")
    judged = [pair(prompt, (f"images/train{n}a.jpg", f"images/train{n}b.jpg"), 1.0) for n, prompt in enumerate("abcd")]
    data._sets["train"]["set"].load = lambda: judged  # type: ignore[method-assign]
    data._sets["test"]["set"].load = lambda: [judged[0]._replace(prompt=" A\n")]  # type: ignore[method-assign]
    data._sets["validation"] = {"set": data._sets["train"]["set"]}
    with pytest.raises(ValueError, match=r"No prompt of data\.train .* in validation or test as well"):
        data.prepare_data()
    assert [plain(each.prompt) for each in data._splits["validation"]] == ["b", "c", "d"]


def test_two_devices_with_half_the_batch_see_together_what_one_sees(tmp_path: Path) -> None:
    whole = [sorted(set(batch.prompts)) for batch in module(tmp_path / "set", batch_size=4).train_dataloader()]
    halves = []
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        data = module(tmp_path / f"{rank}", batch_size=2)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        halves.append([set(batch.prompts) for batch in data.train_dataloader()])
    assert len(halves[0]) == len(halves[1])
    together = [sorted(a | b) for a, b in zip(*halves, strict=True)]
    assert together[: len(whole) - 1] == whole[:-1]  # where the number is odd, one prompt comes twice in the last


@pytest.mark.parametrize("name", ["image_reward_db", "pick_a_pic"])
def test_worker_processes_read_what_one_process_reads(tmp_path: Path, name: str) -> None:
    """Forked after archives and copies were opened: workers must not share a place in an open file."""
    data = module(tmp_path / "set", name, batch_size=1)
    alone = list(data.val_dataloader())
    data._num_workers = 2
    for _ in range(3):
        for batch, expected in zip(data.val_dataloader(), alone, strict=True):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.better, expected.better)


# --- pairs and pictures


def test_judgements_of_one_prompt_are_one_item_in_parts_of_so_many_images() -> None:
    ranking = Judged("p", ("a", "b", "c"), np.array([1.0, 3.0, 3.0]), np.full((3, 3), 0.5))
    tie, tuning = pair("p", ("a", "d"), 0.5), pair("q", ("x", "y"), 1.0, tuning=True)
    judged = [ranking, tie, pair("p", ("d", "a"), 0.9), tuning, pair("p", ("b", "a"), 1.0)]
    [whole] = compared(("train", "set"), judged, 4)
    assert whole.images == ("a", "b", "c", "d")
    assert whole.pairs == ((0, 1, 2.0), (0, 2, 2.0), (3, 0, 1.0), (1, 0, 1.0))
    parts = compared(("train", "set"), judged, 3)
    assert [each.images for each in parts] == [("a", "b", "c"), ("d", "a", "b")]
    assert [each.pairs for each in parts] == [((0, 1, 2.0), (0, 2, 2.0)), ((0, 1, 1.0), (2, 1, 1.0))]
    assert [each.images for each in compared(("train", "set"), judged, 2)][0] == ("a", "b", "c")  # it is not cut


@pytest.mark.parametrize("size", [(40, 40), (64, 41), (41, 90), (16, 20)])
def test_pictures_are_what_the_rewards_own_preprocessing_makes_of_them(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="png")
    ours = torch.from_numpy(scaled(buffer.getvalue(), 32).copy()).permute(2, 0, 1) / 255
    whole = torch.from_numpy(noise).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in OPENAI)
    expected = preprocess(whole, 32)[0] * std + mean
    assert (ours - expected).abs().mean() < 1 / 255


@pytest.mark.parametrize("name", ["hpd_v3", "pick_a_pic"])
def test_a_damaged_image_is_named_with_its_prompt_and_its_set(tmp_path: Path, name: str) -> None:
    data = module(tmp_path / "set", name)
    human_set = data._sets["train"]["set"]
    human_set.read = lambda wanted: ((each, b"\x00damaged") for each in wanted)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Image '.*' of the prompt 'train \d+', in data\.train\.set, cannot be read"):
        list(data.train_dataloader())


def test_a_copy_is_whole_or_absent_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = made("pick_a_pic", tmp_path / "set", "train")
    names = sorted({name for each in it.load() for name in each.images})
    contents = dict(it.read(names))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pack, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            pack.packed(it, names, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".unfinished"]
    place = pack.packed(it, names, tmp_path / "cache")
    assert [file for file in (tmp_path / "cache").iterdir()] == [place]
    copy = Pack(place)
    assert {name: copy.one(name) for name in reversed(names)} == contents
    it.read = stop  # type: ignore[method-assign]
    assert pack.packed(it, names, tmp_path / "cache") == place
    with pytest.raises(KeyboardInterrupt):
        pack.packed(it, names[1:], tmp_path / "cache")  # other images are another copy


# --- settings


def test_weights_of_aspects_are_not_learnt_where_nobody_rated_one(tmp_path: Path) -> None:
    batch = next(iter(module(tmp_path / "set", size=32).train_dataloader()))
    with pytest.raises(ValueError, match=r"learn_weights=true .* rate no aspects"):
        train(
            tmp_path,
            1,
            random_vp_score(by_aspect=True),
            data=(torch.utils.data.DataLoader([batch], batch_size=None),) * 2,
            recipe={"learn_weights": True},
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": {}}, "data.train has no set"),
        ({"validation_share": 0.0}, "validation_share=0.0"),
        ({"group": 1}, "data.group=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        module(tmp_path / "set", **settings)


def test_every_training_set_has_a_name_of_its_own() -> None:
    """Published numbers are found by a set's name, and none is about a training set."""
    titles = [file.read_text().split("title: ")[1].splitlines()[0] for file in (CONF / "human").glob("*.yaml")]
    assert len(titles) == len(set(titles))
