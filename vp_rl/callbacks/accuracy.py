"""Reports a reward model's accuracy on the test split when training ends."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from vp_rl.evaluation.accuracy import Accuracy, as_markdown, pairwise_accuracy, preferred
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, PreferenceBatch
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.generate import as_png, to_uint8


class AccuracyReport(lightning.Callback):
    """Writes `accuracy.md` and `summary.json`: VP-Score beside a single noisy annotator and chance.

    On data that rate no aspects it is the share of pairs whose order is that of the people who judged them.

    Args:
        noisy: a second, less careful annotator of the same images; None: VP-Score stands alone, as it does on images
            whose aspects nobody has rated.
    """

    def __init__(self, noisy: Annotator | None = None) -> None:
        self._noisy = noisy
        self._prompts: list[str] = []
        self._scores: list[Tensor] = []
        self._ratings: list[Tensor] = []
        self._images: list[np.ndarray] = []
        self._right: list[tuple[str, bool]] = []

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        *_: Any,
    ) -> None:
        """Collects the scores of the batch's images, or what they make of its pairs."""
        if not batch.ratings.any():
            right = (outputs[batch.better, -1] > outputs[batch.worse, -1]).tolist()
            self._right += zip([batch.prompts[row] for row in batch.better.tolist()], right, strict=True)
            return
        self._prompts += batch.prompts
        self._scores.append(outputs.float().cpu())
        self._ratings.append(batch.ratings.cpu())
        if self._noisy is not None:
            self._images.append(to_uint8(batch.images))

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Computes, prints and writes the table."""
        if not trainer.is_global_zero:
            return
        columns = self._by_people() if self._right else self._by_ratings()
        table = as_markdown(columns)
        print(f"\nPairwise accuracy on held-out prompts, with 95% intervals\n{table}")
        folder = Path(trainer.default_root_dir)
        (folder / "accuracy.md").write_text(table + "\n")
        summary = {name: {rule: asdict(value) for rule, value in column.items()} for name, column in columns.items()}
        (folder / "summary.json").write_text(json.dumps({"accuracy": summary}, indent=2) + "\n")

    def _by_people(self) -> dict[str, dict[str, Accuracy]]:
        prompts, right = zip(*self._right, strict=True)
        return {"VP-Score": {"people": preferred(np.array(right), prompts)}}

    def _by_ratings(self) -> dict[str, dict[str, Accuracy]]:
        ratings = torch.cat(self._ratings).numpy()
        scores = torch.cat(self._scores).numpy()
        aspects, whole = scores[:, : len(ASPECTS)], scores[:, -1]
        columns = {"VP-Score": pairwise_accuracy(aspects, ratings, self._prompts, score=whole)}
        if self._noisy is not None:
            second = self._second_ratings(self._noisy)
            columns["one noisy judge"] = pairwise_accuracy(second, ratings, self._prompts, tie=0.5)
        return columns

    def _second_ratings(self, annotator: Annotator) -> np.ndarray:
        pictures = [[as_png(image)] for image in np.concatenate(self._images)]
        rated = asyncio.run(rate_all(annotator, self._prompts, pictures, quiet=True))
        return np.array([[row[aspect][0].rating for aspect in ASPECTS] for row in rated], dtype=float)
