"""Prompts to train a policy on: every one in turn, in an order that the seed and the position alone decide."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import lightning
import pytest
import torch
from fakes import Words, write_dataset
from test_data_preferences import Ratings, png, row
from torch import nn

from vp_rl.data.prompts import EpochPrompts, PromptDataModule, Stream
from vp_rl.interfaces import PromptSource
from vp_rl.types import ASPECTS, PromptBatch, Split

Seen = list[tuple[int, PromptBatch]]
"""Epoch and batch of each training step."""


class Witness(lightning.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: Seen = []

    def batches(self, prompts: EpochPrompts) -> EpochPrompts:
        return prompts

    def training_step(self, batch: PromptBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Given(PromptSource):
    """The same prompts in every split."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = prompts

    def split(self, name: Split) -> list[str]:
        return list(self.prompts)


def fit(data: PromptDataModule, epochs: int, resume: Path | None = None, save: Path | None = None) -> Seen:
    """What a run trains on, by the real Trainer."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    witness = Witness()
    trainer.fit(witness, data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return witness.seen


class Device(lightning.Trainer):
    """One of several, standing at an epoch without being started."""

    # In place of the Trainer's properties.
    global_rank: int = 0  # pyright: ignore
    world_size: int = 1  # pyright: ignore
    current_epoch: int = 0  # pyright: ignore
    lightning_module: Witness = Witness()  # pyright: ignore

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size


def served(data: PromptDataModule, epochs: int, rank: int = 0, world_size: int = 1) -> list[PromptBatch]:
    """The batches of one device of several."""
    data.trainer = Device(rank, world_size)
    data.setup("fit")
    found = []
    for data.trainer.current_epoch in range(epochs):
        found += list(data.train_dataloader())
    return found


def prompts_of(batches: Sequence[PromptBatch]) -> list[str]:
    return list(chain.from_iterable(batch.prompts for batch in batches))


# --- the order


@pytest.mark.parametrize(("number", "batch_size"), [(16, 4), (10, 4), (7, 7), (13, 1), (9, 5)])
def test_each_pass_uses_every_prompt_once(number: int, batch_size: int) -> None:
    epochs = 4 * number  # four passes and more
    order = prompts_of([batch for _, batch in fit(PromptDataModule(Words(number), batch_size), epochs)])
    assert len(order) == epochs * batch_size
    for start in range(0, len(order) - number, number):
        assert sorted(order[start : start + number]) == sorted(Words(number).split("train"))


def test_each_pass_has_an_order_of_its_own() -> None:
    order = prompts_of(served(PromptDataModule(Words(16), 16), 5))
    passes = {tuple(order[start : start + 16]) for start in range(0, 80, 16)}
    assert len(passes) == 5
    assert tuple(Words(16).split("train")) not in passes


def test_an_epoch_has_the_batches_that_were_asked_for() -> None:
    seen = fit(PromptDataModule(Words(10), 4, batches_per_epoch=3), 5)
    assert Counter(epoch for epoch, _ in seen) == dict.fromkeys(range(5), 3)
    assert {len(batch.prompts) for _, batch in seen} == {4}


def test_how_batches_are_cut_into_epochs_does_not_change_the_order() -> None:
    one, three = (fit(PromptDataModule(Words(10), 4, batches_per_epoch=each), 12 // each) for each in (1, 3))
    assert [batch for _, batch in one] == [batch for _, batch in three]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_sees_the_prompts_of_an_unbroken_one(stop: int, tmp_path: Path) -> None:
    def data() -> PromptDataModule:
        return PromptDataModule(Words(10), 4, batches_per_epoch=3)

    whole = fit(data(), 5)
    first = fit(data(), stop, save=tmp_path / "run.ckpt")
    torch.manual_seed(1234)  # random numbers of elsewhere play no part
    assert first + fit(data(), 5, resume=tmp_path / "run.ckpt") == whole


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    first, again, other = (prompts_of(served(PromptDataModule(Words(16), 4, seed=seed), 4)) for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other)
    assert first != other


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_with_a_share_of_the_batch_see_together_what_one_sees(devices: int) -> None:
    alone = served(PromptDataModule(Words(20), 6, batches_per_epoch=2), 5)
    apart = [
        served(PromptDataModule(Words(20), 6 // devices, batches_per_epoch=2), 5, rank, devices)
        for rank in range(devices)
    ]
    assert [sorted(prompts_of(shares)) for shares in zip(*apart, strict=True)] == [
        sorted(batch.prompts) for batch in alone
    ]
    shares = [set(batch.prompts) for batch in (batches[0] for batches in apart)]
    assert not set.intersection(*shares)


def test_prompts_know_their_places_among_those_of_all_devices() -> None:
    alone = served(PromptDataModule(Words(20), 6), 3)
    for rank in range(3):
        for batch, whole in zip(served(PromptDataModule(Words(20), 2), 3, rank, 3), alone, strict=True):
            assert batch.places is not None
            assert batch.prompts == [whole.prompts[place] for place in batch.places]
            assert batch.share == (0, 1)


def test_devices_that_share_prompts_have_the_same_ones_and_other_images_of_them() -> None:
    alone = served(PromptDataModule(Words(20), 2), 3)
    batches = [served(PromptDataModule(Words(20), 1, devices_per_prompt=3), 3, rank, 6) for rank in range(6)]
    for number, whole in enumerate(alone):
        together = [device[number] for device in batches]
        assert [batch.prompts for batch in together] == [[prompt] for prompt in whole.prompts] * 3
        assert [batch.share for batch in together] == [(first, 3) for first in range(3) for _ in range(2)]


def test_a_stream_is_read_from_anywhere() -> None:
    forward = Stream(10, 4, "0/prompts", 0, 1)
    batches = [forward.batch(position) for position in range(30)]
    backward = Stream(10, 4, "0/prompts", 0, 1)
    assert [backward.batch(position) for position in reversed(range(30))] == batches[::-1]


def test_prompts_that_are_given_twice_are_used_once() -> None:
    order = prompts_of(served(PromptDataModule(Given(["a", "b", "a", "c", "b", "d"]), 4), 3))
    assert Counter(order) == dict.fromkeys("abcd", 3)


# --- what cannot be


@pytest.mark.parametrize(("number", "batch_size", "devices"), [(3, 4, 1), (7, 4, 2), (0, 1, 1)])
def test_fewer_prompts_than_a_batch_takes_are_refused(number: int, batch_size: int, devices: int) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.batch_size={batch_size} .*{devices} device.* has {number}: give more"
    ):
        served(PromptDataModule(Words(number), batch_size), 1, 0, devices)
    assert served(PromptDataModule(Words(batch_size * devices), batch_size), 1, 0, devices)


def test_the_trainer_passes_the_refusal_on() -> None:
    with pytest.raises(ValueError, match="A batch takes 8 different prompts"):
        fit(PromptDataModule(Given(["a", "b"] * 8), 8), 1)


@pytest.mark.parametrize("setting", ["batch_size", "batches_per_epoch", "images_per_batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{setting}={value} must be at least 1"):
        PromptDataModule(Words(), **{setting: value})


# --- images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six prompts of three images: the best on the whole, at n % 3 for prompt n, is the best in no single aspect."""
    good, some, others = (4, 4, 4, 4), (5, 5, 1, 1), (1, 1, 5, 5)

    def rated(best: int) -> Ratings:
        images = [some, others]
        images.insert(best, good)
        return {aspect: [image[place] for image in images] for place, aspect in enumerate(ASPECTS)}

    train = [
        row(number, "train", rated(number % 3), [png(10 * number + 1 + image) for image in range(3)])
        for number in range(6)
    ]
    write_dataset({"train": train, "validation": [row(6, "validation", rated(0))], "test": []}, tmp_path / "set", "")
    return tmp_path / "set"


def with_images(batch: PromptBatch) -> tuple[list[str], torch.Tensor]:
    """A batch's captions and images, which it must have."""
    assert batch.captions is not None
    assert batch.images is not None
    return batch.captions, batch.images


def best_shade(caption: str) -> int:
    number = int(caption.removeprefix("prompt "))
    return 10 * number + 1 + number % 3


def test_images_are_the_best_rated_of_each_prompt_with_its_own_caption(folder: Path) -> None:
    seen = fit(PromptDataModule(Words(8), 4, images=str(folder), images_per_batch=3), 8)
    captions: Counter[str] = Counter()
    for _, batch in seen:
        captions_here, images = with_images(batch)
        shades = [best_shade(caption) for caption in captions_here]
        assert images.dtype == torch.float32
        expected = torch.tensor(shades)[:, None, None, None].expand(3, 3, 8, 8)
        assert torch.equal((images * 255).round().int(), expected)
        assert len(batch.prompts) == 4
        assert all(prompt.startswith("train prompt") for prompt in batch.prompts)
        captions.update(captions_here)
    assert captions == {f"prompt {number}": 4 for number in range(6)}


def test_equal_ratings_leave_the_first_image(tmp_path: Path) -> None:
    rows = [row(0, "train", {aspect: [3, 3] for aspect in ASPECTS}, [png(7), png(9)])]
    write_dataset({"train": rows, "validation": [], "test": []}, tmp_path / "set", "")
    (batch,) = served(PromptDataModule(Words(), 1, images=str(tmp_path / "set"), images_per_batch=1), 1)
    assert torch.equal((with_images(batch)[1] * 255).round(), torch.full((1, 3, 8, 8), 7.0))


def test_a_batch_may_take_more_images_than_there_are(folder: Path) -> None:
    (batch,) = served(PromptDataModule(Words(), 4, images=str(folder), images_per_batch=16), 1)
    assert Counter(Counter(with_images(batch)[0]).values()) == {3: 4, 2: 2}


def test_images_do_not_change_the_order_of_prompts_and_have_their_own(folder: Path) -> None:
    without = served(PromptDataModule(Words(6), 3), 4)
    batches = served(PromptDataModule(Words(6), 3, images=str(folder), images_per_batch=3), 4)
    assert [batch.prompts for batch in batches] == [batch.prompts for batch in without]
    numbers = [
        [int(name.split()[-1]) for name in names]
        for batch in batches
        for names in (batch.prompts, with_images(batch)[0])
    ]
    assert numbers[0::2] != numbers[1::2]


def test_devices_share_the_images_too(folder: Path) -> None:
    def captions(size: int, rank: int, devices: int) -> list[list[str]]:
        data = PromptDataModule(Words(8), 4 // devices, images=str(folder), images_per_batch=size)
        return [with_images(batch)[0] for batch in served(data, 4, rank, devices)]

    apart = zip(captions(2, 0, 2), captions(2, 1, 2), strict=True)
    assert [sorted(first + second) for first, second in apart] == [sorted(each) for each in captions(4, 0, 1)]


def test_a_resumed_run_sees_the_images_of_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    def captions(seen: Seen) -> list[list[str]]:
        return [with_images(batch)[0] for _, batch in seen]

    data = PromptDataModule(Words(8), 4, images=str(folder), images_per_batch=4)
    whole = captions(fit(data, 6))
    first = captions(fit(data, 4, save=tmp_path / "run.ckpt"))
    assert first + captions(fit(data, 6, resume=tmp_path / "run.ckpt")) == whole


def test_without_images_there_are_none() -> None:
    assert all(batch.images is None and batch.captions is None for _, batch in fit(PromptDataModule(Words(), 4), 2))


def test_a_folder_that_is_no_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No VisionPrefer dataset.*schema.json"):
        served(PromptDataModule(Words(), 4, images=str(tmp_path)), 1)


def test_a_dataset_without_training_prompts_is_told(tmp_path: Path) -> None:
    write_dataset({"train": [], "validation": [], "test": []}, tmp_path / "set", "")
    with pytest.raises(ValueError, match=r"train.*set"):
        served(PromptDataModule(Words(), 4, images=str(tmp_path / "set")), 1)
