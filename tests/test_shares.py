"""Several devices report of a reward model what one does: nothing is left out, nothing counts twice."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from jaxtyping import Float
from test_parallel import QUIET, two_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from vp_rl.algorithms.reward_model import RewardModel
from vp_rl.algorithms.shares import unrepeated
from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.callbacks.accuracy import AccuracyReport
from vp_rl.data.preferences import PairLoaders
from vp_rl.interfaces import Annotator, TrainableReward
from vp_rl.types import ASPECTS, Answer, Aspect, Images, PreferenceBatch, Rating, Scores, Split

PROMPTS = ["d", "b", "a", "e", "c"]  # in another order than that of their names; two devices have 3 each


def item(number: int, prompt: str, rated: bool) -> PreferenceBatch:
    """A prompt with two or three images and all pairs of them, by their rating or by the people's word."""
    random = torch.Generator().manual_seed(number)
    images = torch.rand(2 + number % 2, 3, 4, 4, generator=random)
    ratings = torch.stack([torch.randperm(5, generator=random)[: len(images)] + 1 for _ in ASPECTS], 1)
    pairs = [(a, b) for a in range(len(images)) for b in range(len(images)) if ratings[a, 0] > ratings[b, 0]]
    better, worse = torch.tensor(pairs).unbind(1)
    columns = torch.full_like(better, 0 if rated else -1)
    margins = torch.ones(len(better))
    return PreferenceBatch([prompt] * len(images), images, ratings * rated, better, worse, columns, margins)


def joined(items: Sequence[PreferenceBatch]) -> PreferenceBatch:
    first = torch.tensor([0, *(len(each.prompts) for each in items)]).cumsum(0).tolist()
    better, worse = (
        torch.cat([getattr(each, side) + start for each, start in zip(items, first, strict=False)])
        for side in ("better", "worse")
    )
    prompts = [prompt for each in items for prompt in each.prompts]
    parts = [torch.cat(fields) for fields in zip(*(each[1:] for each in items), strict=True)]
    return PreferenceBatch(prompts, parts[0], parts[1], better, worse, *parts[4:])


class Pairs(PairLoaders):
    """Other images in each split."""

    def __init__(self, batch_size: int, rated: bool) -> None:
        super().__init__(batch_size, 0, 0, 0)
        self._rated = rated

    def prompts(self, split: Split) -> Any:
        first = 100 * ["train", "validation", "test"].index(split)
        return [item(first + number, prompt, self._rated) for number, prompt in enumerate(PROMPTS)]

    def collate(self, shift: int) -> Callable[[Any], PreferenceBatch]:
        return joined


class Coloured(TrainableReward):
    """Looks at means of pixels, one for each aspect."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.mean, self.std, self.weights = torch.zeros(4), torch.ones(4), torch.ones(4)

    def outputs(self, images: Images, prompts: list[str]) -> Float[Tensor, "batch outputs"]:
        return (self.scale * images[:, 0, :, :].mean(1) - self.mean) / self.std

    def combine(self, outputs: Float[Tensor, "batch outputs"]) -> Scores:
        return outputs @ self.weights

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return self.combine(self.outputs(images, prompts))

    def weigh(self, weights: Float[Tensor, " outputs"]) -> None:
        self.weights = weights

    def freeze(self, fraction: float) -> None: ...

    def standardise(self, outputs: Float[Tensor, "batch outputs"]) -> None:
        self.mean, self.std = outputs.mean(0), outputs.std(0)

    def save(self, folder: Path) -> None:
        torch.save([self.mean, self.std, self.weights], folder)


class Hasty(Annotator):
    """Rates by an image's bytes."""

    name, version, concurrency = "hasty", "1", 4

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        return Answer(write_ratings([Rating(1 + sum(image) % 5, "") for image in images]))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


def report(folder: Path, batch_size: int, rated: bool, **settings: Any) -> None:
    """Trains for nothing, standardises, tests."""
    module = RewardModel(
        Coloured(), lambda trained: torch.optim.SGD(trained, lr=0.0), str(folder / "saved"), learn_weights=rated
    )
    callbacks = [AccuracyReport(Hasty() if rated else None)]
    quiet = {"accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, **QUIET, **settings}
    trainer = lightning.Trainer(callbacks=callbacks, default_root_dir=folder, **quiet)
    data = Pairs(batch_size, rated)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)


def in_two(rank: int, folder: Path, batch_size: int, rated: bool) -> None:
    report(folder, batch_size, rated, strategy="ddp", devices=2)


# The repeated prompt is alone in its batch, or with others.
@pytest.mark.parametrize(("rated", "batch_size"), [(True, 2), (True, 3), (False, 2)])
def test_two_processes_report_the_accuracy_of_one(rated: bool, batch_size: int, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    report(tmp_path / "one", batch_size, rated)
    assert two_processes(in_two, tmp_path / "two", batch_size, rated) == [0, 0]
    for file in ("accuracy.md", "summary.json"):
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()
    found = json.loads((tmp_path / "two" / "summary.json").read_text())["accuracy"]["VP-Score"]
    pairs = sum(len(each.better) for each in Pairs(1, rated).prompts("test"))
    assert found["prompt_following" if rated else "people"]["pairs"] == pairs
    for one, two in zip(
        *(torch.load(tmp_path / name / "saved", weights_only=True) for name in ("one", "two")), strict=True
    ):
        torch.testing.assert_close(two, one, rtol=1e-4 if rated else 1e-6, atol=1e-6)  # weights are an iteration's end


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("prompts", "devices"), [(5, 2), (4, 2), (7, 3), (1, 3), (2, 5)])
def test_the_shares_of_all_devices_are_the_whole(prompts: int, devices: int, batch_size: int) -> None:
    """Also where neighbours have the same prompt, as people's data may."""
    items = [item(number, "same", True) for number in range(prompts)]
    seen = []
    for rank in range(devices):
        sampler = DistributedSampler(items, devices, rank, shuffle=False)  # type: ignore[arg-type]
        loader = DataLoader(items, batch_size, sampler=sampler, collate_fn=joined)  # type: ignore[arg-type]
        for number, batch in enumerate(loader):
            own = unrepeated(batch, number, loader)
            assert len(own.prompts) == len(own.images) == len(own.ratings)
            assert len(own.better) == len(own.worse) == len(own.aspects) == len(own.margins)
            seen += [own.images[row] for pair in zip(own.better, own.worse, strict=True) for row in pair]
    expected = [
        each.images[row] for each in items for pair in zip(each.better, each.worse, strict=True) for row in pair
    ]
    assert sorted(image.sum().item() for image in seen) == sorted(image.sum().item() for image in expected)
