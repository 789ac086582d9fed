"""Reports a reward model's accuracy on the test split when training ends."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
from jaxtyping import Float, Int

from vp_rl.algorithms.shares import of_all_devices, unrepeated
from vp_rl.evaluation.accuracy import Accuracy, as_markdown, pairwise_accuracy, preferred
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, PreferenceBatch
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.estimates import without_nan
from vp_rl.visionprefer.generate import as_png, to_uint8
from vp_rl.waiting import wait


class AccuracyReport(lightning.Callback):
    """Writes `accuracy.md` and `summary.json`: VP-Score beside a single noisy annotator and chance.

    On data that rate no aspects it is the share of pairs whose order is that of the people who judged them. Devices
    have their shares of the split, and the figures are those of one that has all of it.

    Args:
        noisy: a second, less careful annotator of the same images; None: VP-Score stands alone, as it does on images
            whose aspects nobody has rated.
    """

    def __init__(self, noisy: Annotator | None = None) -> None:
        self._noisy = noisy
        self._rated: list[Rated] = []
        self._images: list[np.ndarray] = []
        self._right: list[tuple[str, bool]] = []

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Collects the scores of the batch's images, or what they make of its pairs."""
        batch = unrepeated(batch, batch_idx, trainer.test_dataloaders)
        if not batch.ratings.any():
            right = (outputs[batch.better, -1] > outputs[batch.worse, -1]).tolist()
            self._right += zip([batch.prompts[row] for row in batch.better.tolist()], right, strict=True)
            return
        scores = outputs[: len(batch.prompts)].float().cpu().numpy()
        self._rated += map(Rated, batch.prompts, scores, batch.ratings.cpu().numpy())
        if self._noisy is not None:
            self._images.append(to_uint8(batch.images))

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Computes, prints and writes the table."""
        if self._noisy is not None and self._rated:
            self._rate_again(self._noisy)
        shares = of_all_devices((self._right, self._rated))
        if not trainer.is_global_zero:
            return
        right = [each for own, _ in shares for each in own]
        rated = [each for _, own in shares for each in own]
        columns = _by_people(right) if right else self._by_ratings(rated)
        table = as_markdown(columns)
        print(f"\nPairwise accuracy on held-out prompts, with 95% intervals\n{table}")
        folder = Path(trainer.default_root_dir)
        (folder / "accuracy.md").write_text(table + "\n")
        summary = {name: {rule: asdict(value) for rule, value in column.items()} for name, column in columns.items()}
        (folder / "summary.json").write_text(json.dumps(without_nan({"accuracy": summary}), indent=2) + "\n")

    def _by_ratings(self, rated: list["Rated"]) -> dict[str, dict[str, Accuracy]]:
        rated.sort(key=lambda image: image.prompt)  # whichever device had it: intervals are drawn in this order
        prompts, scores, ratings, again = zip(*rated, strict=True)
        columns, ratings = np.stack(scores), np.stack(ratings)
        aspects, whole = columns[:, : len(ASPECTS)], columns[:, -1]
        found = {"VP-Score": pairwise_accuracy(aspects, ratings, prompts, score=whole)}
        if self._noisy is not None:
            found["one noisy judge"] = pairwise_accuracy(np.stack(again), ratings, prompts, tie=0.5)
        return found

    def _rate_again(self, annotator: Annotator) -> None:
        """What a second annotator says of this device's images."""
        pictures = [[as_png(image)] for image in np.concatenate(self._images)]
        rated = wait(rate_all(annotator, [image.prompt for image in self._rated], pictures, quiet=True))
        again = (np.array([row[aspect][0].rating for aspect in ASPECTS], float) for row in rated)
        self._rated = [image._replace(again=each) for image, each in zip(self._rated, again, strict=True)]


class Rated(NamedTuple):
    """An image of the test split, by aspect."""

    prompt: str
    scores: Float[np.ndarray, " aspects_and_score"]
    ratings: Int[np.ndarray, " aspects"]
    again: Float[np.ndarray, " aspects"] | None = None
    """By the second annotator."""


def _by_people(right: list[tuple[str, bool]]) -> dict[str, dict[str, Accuracy]]:
    prompts, ordered = zip(*right, strict=True)
    return {"VP-Score": {"people": preferred(np.array(ordered), prompts)}}
