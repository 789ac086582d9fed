"""Preferences from disk to batches: each image once, pairs that say the truth, an order that resumes."""

import io
import json
import math
import pickle
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import load_dataset
from fakes import read_dataset, write_dataset
from PIL import Image
from test_visionprefer import builder, fail
from torch import nn

from vp_rl.data.preferences import PreferenceDataModule, ratings_of, shifted
from vp_rl.types import ASPECTS, Aspect, PreferenceBatch, Split
from vp_rl.visionprefer import schema
from vp_rl.visionprefer.pairs import pairs
from vp_rl.visionprefer.prompts import ScenePrompts
from vp_rl.visionprefer.schema import SPLITS

Ratings = dict[Aspect, list[int]]
TIED: Ratings = {aspect: [2, 2, 2, 2] for aspect in ASPECTS}


# --- pairs

EQUAL: Ratings = {aspect: [3, 3, 3] for aspect in ASPECTS}


def test_a_single_aspect_ranks_its_own_untied_pairs() -> None:
    ratings = {**EQUAL, "fidelity": [2, 5, 2]}
    assert pairs(ratings, "fidelity") == [(1, 0, 2), (1, 2, 2)]
    assert pairs(ratings, "aesthetic") == []


def test_pooled_pairs_are_those_of_each_aspect_and_may_contradict_each_other() -> None:
    ratings = {**EQUAL, "prompt_following": [1, 2, 2], "harmlessness": [5, 1, 5]}
    assert pairs(ratings) == [(1, 0, 0), (2, 0, 0), (0, 1, 3), (2, 1, 3)]
    assert pairs(ratings) == [pair for aspect in ASPECTS for pair in pairs(ratings, aspect)]


def test_the_mean_ranks_by_the_sum_over_aspects() -> None:
    ratings = {**EQUAL, "prompt_following": [1, 2, 3], "harmlessness": [3, 2, 3]}  # sums 10, 10, 12
    assert pairs(ratings, "mean") == [(2, 0, -1), (2, 1, -1)]


@pytest.mark.parametrize("rule", ["pooled", "mean", *ASPECTS])
def test_all_ties_and_single_images_give_no_pair(rule: str) -> None:
    assert pairs(EQUAL, rule) == []
    assert pairs({aspect: [place] for place, aspect in enumerate(ASPECTS, start=1)}, rule) == []


def test_n_different_ratings_give_every_pair_once() -> None:
    ratings = {aspect: [4, 1, 5, 2, 3] for aspect in ASPECTS}
    ranked = pairs(ratings, "mean")
    assert len({frozenset(pair[:2]) for pair in ranked}) == len(ranked) == 10
    assert all(ratings["fidelity"][better] > ratings["fidelity"][worse] for better, worse, _ in ranked)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="beauty.*pooled, mean"):
        pairs(EQUAL, "beauty")


# --- on disk


def png(shade: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, format="png")
    return buffer.getvalue()


def row(number: int, split: Split, ratings: Ratings, images: list[bytes] | None = None) -> schema.Row:
    """A prompt with as many images as there are ratings."""
    names = [f"{number}-{index}" for index in range(len(ratings["aesthetic"]))]
    pictures = images or [png(shade) for shade in range(len(names))]
    maker = {"generator": "g", "guidance_scale": 2.5, "seed": 2**48 - 1, "steps": 8, "width": 8, "height": 8}
    noted = {"rationale": "ümlaut, \n newline", "annotator": "judge", "template_version": "1", "position": 0}
    return {
        "prompt_id": number,
        "source_prompt": f"source {number}",
        "prompt": f"prompt {number}",
        "split": split,
        "images": [
            {"image_id": name, "image": {"bytes": picture, "path": None}, **maker}
            for name, picture in zip(names, pictures, strict=True)
        ],
        "annotations": [
            {"image_id": name, "aspect": aspect, "rating": rating, **noted}
            for aspect in ASPECTS
            for name, rating in zip(names, ratings[aspect], strict=True)
        ],
    }


def some_rows() -> dict[Split, list[schema.Row]]:
    """More than a row group, and an empty split."""
    ratings: Ratings = {aspect: [1, 5] for aspect in ASPECTS}
    train, validation = [row(i, "train", ratings) for i in range(150)], [row(150, "validation", ratings)]
    rows: dict[Split, list[schema.Row]] = {"train": train, "validation": validation, "test": []}
    return rows


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_dataset(some_rows(), tmp_path / "a" / "set", "card")
    assert {split: read_dataset(tmp_path / "a" / "set", split) for split in SPLITS} == some_rows()


def test_rows_are_read_in_any_order_a_few_groups_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_GROUP_BYTES", 2000)
    monkeypatch.setattr(schema, "_SHARD", 8000)
    write_dataset(some_rows(), tmp_path / "set")
    assert len(schema.shards(tmp_path / "set", "train")) > 2
    groups = [parquet.read_metadata(file).num_row_groups for file in schema.shards(tmp_path / "set", "train")]
    assert max(groups) > 2
    for split, expected in some_rows().items():
        rows = schema.Rows(tmp_path / "set", split)
        assert len(rows) == len(expected)
        order = random.Random(0).sample(range(len(rows)), len(rows))
        assert [rows[place] for place in order] == [expected[place] for place in order]
    assert schema._read_group.cache_info().currsize <= schema._HELD


def test_the_datasets_library_loads_the_folder_and_decodes_its_images(tmp_path: Path) -> None:
    folder, cache = tmp_path / "set", str(tmp_path / "cache")
    builder(ScenePrompts(3, 2, 2)).build(folder)
    whole = load_dataset(str(folder), cache_dir=cache)
    files = load_dataset("parquet", data_files={"train": str(folder / "data" / "train-*.parquet")}, cache_dir=cache)
    assert {split: len(rows) for split, rows in whole.items()} == {"train": 3, "validation": 2, "test": 2}
    assert whole["train"].features == files["train"].features == schema.FEATURES
    loaded, ours = whole["test"][0]["images"][3], read_dataset(folder, "test")[0]["images"][3]
    assert loaded["image"].size == (loaded["width"], loaded["height"]) == (64, 64)
    assert loaded["image"].tobytes() == Image.open(io.BytesIO(ours["image"]["bytes"])).tobytes()


def test_a_dataset_that_is_absent_or_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(FileNotFoundError, match="No VisionPrefer dataset.*schema.json"):
        read_dataset(folder, "train")
    write_dataset({"train": []}, folder, "")
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has no validation split"):
        read_dataset(folder, "validation")
    (folder / "schema.json").write_text(json.dumps({"version": schema.VERSION + 1}))
    with pytest.raises(ValueError, match=f"version {schema.VERSION + 1}.*build it anew"):
        read_dataset(folder, "train")


# --- batches


def random_ratings(number: int, images: int = 4) -> list[Ratings]:
    rng = random.Random(0)
    return [{aspect: [rng.randint(1, 5) for _ in range(images)] for aspect in ASPECTS} for _ in range(number)]


def dataset(folder: Path, ratings: list[Ratings]) -> Path:
    """The same prompts in all splits, which no builder would do; the shade of an image is 10 x prompt + its number."""
    pictures = [[png(10 * n + i) for i in range(len(each["aesthetic"]))] for n, each in enumerate(ratings)]
    rows = {
        split: [row(n, split, each, images) for n, (each, images) in enumerate(zip(ratings, pictures, strict=True))]
        for split in SPLITS
    }
    write_dataset(rows, folder, "")
    return folder


def module(folder: Path, **settings: object) -> PreferenceDataModule:
    return PreferenceDataModule(str(folder), **{"batch_size": 3, **settings})


def numbers(batches: list[PreferenceBatch]) -> list[int]:
    """Of the prompts, in order, each once."""
    return [int(prompt.removeprefix("prompt ")) for batch in batches for prompt in dict.fromkeys(batch.prompts)]


@pytest.mark.parametrize("rule", ["pooled", "mean", *ASPECTS])
def test_each_image_comes_once_and_every_untied_pair_of_a_prompt_once(tmp_path: Path, rule: str) -> None:
    ratings = random_ratings(10)
    seen = []
    for batch in module(dataset(tmp_path / "set", ratings), aspects=rule).val_dataloader():
        prompts = [int(prompt.removeprefix("prompt ")) for prompt in batch.prompts]
        shades = (batch.images[:, 0, 0, 0] * 255).round().int().tolist()
        assert shades == [10 * prompt + place % 4 for place, prompt in enumerate(prompts)]
        for better, worse, aspect in zip(batch.better, batch.worse, batch.aspects, strict=True):
            column = batch.ratings.sum(1) if aspect < 0 else batch.ratings[:, aspect]
            assert prompts[better] == prompts[worse]
            assert column[better] > column[worse]
            seen.append((shades[better], shades[worse], int(aspect)))
        for place, prompt in enumerate(prompts):
            assert batch.ratings[place].tolist() == [ratings[prompt][aspect][place % 4] for aspect in ASPECTS]
    assert len(seen) == len(set(seen)) == sum(untied(each, rule) for each in ratings)


def untied(ratings: Ratings, rule: str) -> int:
    columns = {**ratings, "mean": [sum(ratings[aspect][i] for aspect in ASPECTS) for i in range(4)]}
    chosen = ASPECTS if rule == "pooled" else [rule]
    return sum(columns[c][i] != columns[c][j] for c in chosen for i in range(4) for j in range(i))


def test_images_are_float_in_0_to_1_and_row_indices_int64(tmp_path: Path) -> None:
    batch = next(iter(module(dataset(tmp_path / "set", random_ratings(25))).train_dataloader()))
    assert batch.images.shape == (12, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() <= batch.images.max() <= 1
    assert {t.dtype for t in (batch.ratings, batch.better, batch.worse, batch.aspects)} == {torch.int64}


def test_prompts_without_an_untied_pair_are_dropped(tmp_path: Path) -> None:
    ratings = random_ratings(6)
    ratings[2] = ratings[4] = TIED
    data = module(dataset(tmp_path / "set", ratings))
    assert numbers(list(data.val_dataloader())) == numbers(list(data.test_dataloader())) == [0, 1, 3, 5]
    assert sorted(numbers(list(data.train_dataloader()))) == [0, 1, 3, 5]


def test_a_split_without_any_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No prompt of the train split.*'mean'"):
        module(dataset(tmp_path / "set", [TIED]), aspects="mean").train_dataloader()


def test_images_of_several_sizes_are_brought_to_the_smallest(tmp_path: Path) -> None:
    images = [png(0, (16, 12)), png(100, (8, 8)), png(200, (9, 30))]
    write_dataset({"train": [row(0, "train", random_ratings(1, 3)[0], images)]}, tmp_path / "set", "")
    batch = next(iter(module(tmp_path / "set").train_dataloader()))
    assert batch.images.shape == (3, 3, 8, 8)
    shades = torch.tensor([0.0, 100.0, 200.0]) / 255
    assert torch.allclose(batch.images, shades[:, None, None, None].expand_as(batch.images))


def test_shifting_moves_whole_images_and_depends_on_the_seed_alone() -> None:
    images = torch.rand(40, 3, 8, 8)
    moved = shifted(images, 2, seed=1)
    assert torch.equal(moved, shifted(images, 2, seed=1))
    assert not torch.equal(moved, shifted(images, 2, seed=2))
    assert torch.equal(images, shifted(images, 0, seed=1))
    offsets = set()
    for image, after in zip(images, moved, strict=True):
        found = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.equal(after[:, 2:-2, 2:-2], image[:, 2 + y : 6 + y, 2 + x : 6 + x])
        ]
        assert len(found) == 1
        offsets |= set(found)
    assert {-2, 2} <= {y for y, _ in offsets}
    assert {-2, 2} <= {x for _, x in offsets}


def test_only_training_images_are_shifted(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    gradient = [Image.linear_gradient("L").resize((8, 8)).convert("RGB") for _ in range(4)]
    buffers = [io.BytesIO() for _ in gradient]
    for image, buffer in zip(gradient, buffers, strict=True):
        image.save(buffer, format="png")
    images = [buffer.getvalue() for buffer in buffers]
    write_dataset({split: [row(0, split, random_ratings(1)[0], images)] for split in SPLITS}, folder, "")
    data = module(folder, shift=3)
    train, validation = (next(iter(loader)).images for loader in (data.train_dataloader(), data.val_dataloader()))
    assert torch.equal(validation, validation[:1].expand(4, -1, -1, -1))
    assert not torch.equal(train, train[:1].expand(4, -1, -1, -1))


def test_an_image_without_a_rating_is_refused_rather_than_taken_for_a_bad_one() -> None:
    rated = row(0, "train", random_ratings(1)[0])
    rated["annotations"] = [a for a in rated["annotations"] if (a["image_id"], a["aspect"]) != ("0-2", "fidelity")]
    with pytest.raises(ValueError, match="0-2 of 'prompt 0' has no rating in fidelity by judge"):
        ratings_of(rated, "judge")


def test_a_mistyped_rule_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="poled"):
        module(tmp_path / "absent", aspects="poled")


# --- built if absent


def test_an_absent_dataset_is_built_and_a_present_one_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "set"
    module(folder, builder=builder(ScenePrompts(3, 2, 2))).prepare_data()
    assert len(read_dataset(folder, "train")) == 3
    module(folder, builder=builder(makers={"never": fail})).prepare_data()
    module(folder).prepare_data()


def test_an_absent_dataset_without_a_builder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.*data.builder is null"):
        module(tmp_path / "absent").prepare_data()


# --- order


class Witness(lightning.LightningModule):
    """Remembers the batches that a real Trainer gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[PreferenceBatch]] = {}

    def training_step(self, batch: PreferenceBatch, index: int) -> torch.Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight * batch.images.mean()

    def validation_step(self, batch: PreferenceBatch, index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(data: PreferenceDataModule, epochs: int, checkpoint: Path | None = None, **settings: object) -> Witness:
    witness = Witness()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, max_epochs=epochs, **{**quiet, **settings})
    trainer.fit(witness, data, ckpt_path=checkpoint if checkpoint and checkpoint.exists() else None)
    if checkpoint and not checkpoint.exists():
        trainer.save_checkpoint(checkpoint)
    return witness


few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # said on machines with more cores
quick_log = pytest.mark.filterwarnings("ignore:The number of training batches")


@few_workers
@quick_log
def test_every_epoch_has_its_own_order_of_all_prompts_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", random_ratings(12))
    whole = trained(module(folder, seed=1), 3).epochs
    orders = [numbers(whole[epoch]) for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(12))]}) == 4
    run = partial(trained, checkpoint=tmp_path / "last.ckpt")
    assert numbers(run(module(folder, seed=1), 1).epochs[0]) == orders[0]
    resumed = run(module(folder, seed=1), 3).epochs
    assert {epoch: numbers(batches) for epoch, batches in resumed.items()} == {1: orders[1], 2: orders[2]}


def test_runs_with_neighbouring_seeds_share_no_order(tmp_path: Path) -> None:
    folder, orders = dataset(tmp_path / "set", random_ratings(12)), set()
    for seed in range(3):
        loader = module(folder, seed=seed).train_dataloader()
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            orders.add(tuple(numbers(list(loader))))
    assert len(orders) == 9


def test_two_devices_with_half_the_batch_see_together_what_one_sees(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", random_ratings(12))
    whole = [numbers([batch]) for batch in module(folder, batch_size=4).train_dataloader()]
    halves = []
    for rank in range(2):
        data = module(folder, batch_size=2)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        halves.append([numbers([batch]) for batch in data.train_dataloader()])
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]


@few_workers
@quick_log
def test_row_indices_stay_whole_numbers_when_the_trainer_casts_a_batch(tmp_path: Path) -> None:
    data = module(dataset(tmp_path / "set", random_ratings(3)))
    batch = trained(data, 1, precision="bf16-true").epochs[0][0]
    assert isinstance(batch, PreferenceBatch)
    assert batch.images.dtype == torch.bfloat16
    assert batch.better.dtype == batch.worse.dtype == batch.aspects.dtype == torch.int64


def test_what_worker_processes_need_can_be_sent_to_them(tmp_path: Path) -> None:
    loader = module(dataset(tmp_path / "set", random_ratings(3))).train_dataloader()
    prompts, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    sent, here = ([each[place] for place in range(3)] for each in (prompts, loader.dataset))
    assert torch.equal(collate(sent).images, loader.collate_fn(here).images)


def test_a_share_is_the_first_of_the_training_prompts_and_leaves_the_others_whole(tmp_path: Path) -> None:
    folder = dataset(tmp_path, random_ratings(21))
    whole, half = (module(folder, share=share) for share in (1.0, 0.5))
    rated = [data.train_dataloader().dataset for data in (whole, half)]
    every, some = ([each[i].prompt for i in range(len(each))] for each in rated)
    assert some == every[: math.ceil(len(every) / 2)]
    assert len(half.val_dataloader()) == len(whole.val_dataloader())


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_an_impossible_share_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="data.share"):
        module(tmp_path, share=share)
