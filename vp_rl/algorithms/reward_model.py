"""Trains VP-Score on preference pairs (Wu et al. 2024, after ImageReward).

Objective: minimise E[-log sigmoid(r(better) - r(worse))] over pairs of images of the same prompt.

What differs from ImageReward's published recipe:
1. The head starts with its input's variance instead of almost dead (see `Head` in `rewards/head.py`).
2. Each image of a prompt is scored once and its scores are shared by all its pairs.
3. The weights of the best validation accuracy are kept, and the score is standardised on the validation images.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Bool
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from vp_rl.algorithms.base import decaying
from vp_rl.functional import ranking_loss
from vp_rl.interfaces import TrainableReward
from vp_rl.types import ASPECTS, PreferenceBatch, Scores


class RewardModel(lightning.LightningModule):
    """Fits a reward to preferences and saves it where rewards are loaded from.

    Args:
        reward: what is trained.
        optimizer: given the trained parameters, makes the optimizer; its learning rate falls to 0 by a cosine.
        save_to: folder that the trained reward is written to.
        frozen: share of each tower's first layers that stays as it was pretrained; ImageReward froze 0.7.
        seed: of dropout.
    """

    def __init__(
        self,
        reward: TrainableReward,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        save_to: str,
        frozen: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.reward.freeze(frozen)
        self._make_optimizer, self._save_to, self._seed = optimizer, Path(save_to), seed
        self._best_accuracy, self._best = -1.0, dict[str, Tensor]()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over what is not frozen."""
        optimizer = self._make_optimizer([p for p in self.reward.parameters() if p.requires_grad])
        return decaying(optimizer, self.trainer)

    def on_fit_start(self) -> None:
        """Dropout on: a loaded reward comes in evaluation mode."""
        self.reward.train()

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Dropout depends on the position in the run and the rank alone, so that a resumed run repeats it."""
        position = (self._seed, self.trainer.global_rank, self.trainer.current_epoch, batch_idx)
        torch.manual_seed(zlib.crc32(repr(position).encode()))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The ranking loss over the batch's pairs."""
        loss, _ = self._step("train", batch)
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Logs the loss and the pairwise accuracy."""
        self._step("val", batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Logs the same, and the accuracy by each aspect and by their mean; gives the scores to callbacks."""
        _, scores = self._step("test", batch)
        for name, right in by_aspect(scores, batch).items():
            if len(right):
                value = right.float().mean()
                self.log(f"test/accuracy/{name}", value, on_epoch=True, batch_size=len(right), sync_dist=True)
        return scores

    def _step(self, stage: str, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        scores = self.reward(batch.images, batch.prompts)
        better, worse = scores[batch.better], scores[batch.worse]
        loss = ranking_loss(better, worse)
        values = {f"{stage}/loss": loss, f"{stage}/accuracy": (better > worse).float().mean()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(better), sync_dist=True, prog_bar=True)
        return loss, scores

    def on_validation_epoch_end(self) -> None:
        """Keeps the weights if they are the best so far."""
        accuracy = self.trainer.callback_metrics["val/accuracy"].item()
        if not self.trainer.sanity_checking and accuracy > self._best_accuracy:
            self._best_accuracy = accuracy
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in self.reward.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the best weights, so that a resumed run ends as one that was never stopped."""
        checkpoint["best"] = (self._best_accuracy, self._best)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        self._best_accuracy, self._best = checkpoint["best"]

    def on_train_end(self) -> None:
        """Goes back to the best weights, standardises the score on the validation images, and saves."""
        if self._best:
            self.reward.load_state_dict(self._best)
        self.reward.requires_grad_(False).eval()
        self.reward.standardise(self._validation_scores())
        if self.trainer.is_global_zero:
            self.reward.save(self._save_to)

    @torch.no_grad()
    def _validation_scores(self) -> Scores:
        loader = self.trainer.val_dataloaders
        if not loader:
            raise ValueError(
                "The score is standardised on the validation images, but this run has none: "
                "give the data a validation split and leave trainer.limit_val_batches above 0."
            )
        scores = torch.cat([self.reward(batch.images.to(self.device), batch.prompts) for batch in loader])
        # Each process has its own share of the images; all must standardise alike.
        return self.trainer.strategy.broadcast(scores)


def by_aspect(scores: Scores, batch: PreferenceBatch) -> dict[str, Bool[Tensor, " compared"]]:
    """Whether the scores order each pair as the ratings do: by each aspect, and by the mean over aspects.

    Pairs are of the same prompt; those that the ratings tie are left out, and equal scores are wrong.
    """
    first = {prompt: row for row, prompt in enumerate(batch.prompts)}
    prompts = torch.tensor([first[prompt] for prompt in batch.prompts], device=scores.device)
    together = prompts[:, None] == prompts
    higher = scores[:, None] > scores
    ratings = {"mean": batch.ratings.sum(1), **dict(zip(ASPECTS, batch.ratings.unbind(1), strict=True))}
    return {name: higher[together & (rating[:, None] > rating)] for name, rating in ratings.items()}
