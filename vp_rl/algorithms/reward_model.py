"""Trains VP-Score on preference pairs (Wu et al. 2024, after ImageReward).

Objective: minimise E[-log sigmoid(r(better) - r(worse))] over pairs of images of the same prompt.

What differs from ImageReward's published recipe:
1. The head starts with its input's variance instead of almost dead (see `Head` in `rewards/head.py`).
2. Each image of a prompt is scored once and its scores are shared by all its pairs.
3. The weights of the best validation accuracy are kept, and the score is standardised on the validation images.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from vp_rl.algorithms.base import decaying
from vp_rl.algorithms.clipping import ClippedModule
from vp_rl.algorithms.shares import of_all_devices, unrepeated
from vp_rl.configuration.kinds import Amount, Count, Seed, Share, Text
from vp_rl.files.paths import user_path
from vp_rl.functional import label_belief, preference_weights, ranking_loss, seed_of
from vp_rl.interfaces import TrainableReward
from vp_rl.types import ASPECTS, PreferenceBatch

log = logging.getLogger(__name__)


class RewardModel(ClippedModule):
    """Fits a reward to preferences and saves it where rewards are loaded from.

    A reward with an output for each aspect learns each from that aspect's pairs; pairs by the mean over aspects train
    the score that the outputs make together.

    Args:
        reward: what is trained.
        optimizer: given the trained parameters, makes the optimizer; its learning rate falls to 0 by a cosine.
        save_to: folder that the trained reward is written to.
        frozen: share of each tower's first layers that stays as it was pretrained; ImageReward froze 0.7.
        smoothing: share of labels that are thought to be flipped, in [0, 0.5).
        margin_scale: difference of ratings at which a label is believed to 73%, more to the larger ones; 0: all labels
            are believed alike, however close the ratings are.
        learn_weights: the outputs' weights in the score are fitted to the validation images' mean ratings, rather than
            equal; for a reward with an output for each aspect, on data that rate aspects.
        patience: validations in a row without a better accuracy after which training ends; None: it goes on.
        seed: of dropout.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        reward: TrainableReward,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        save_to: Text,
        frozen: Share = 0.0,
        smoothing: Share = 0.0,
        margin_scale: Amount = 0.0,
        learn_weights: bool = False,
        patience: Count | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"algorithm.smoothing={smoothing} must be in [0, 0.5): a label is more often right.")
        if not 0 <= margin_scale < math.inf:
            raise ValueError(f"algorithm.margin_scale={margin_scale} must be 0 or more, in units of the ratings.")
        if patience is not None and patience < 1:
            raise ValueError(f"algorithm.patience={patience} must be at least 1 validation, or null.")
        self.reward = reward
        self.reward.freeze(frozen)
        self._make_optimizer, self._save_to, self._seed = optimizer, user_path(save_to), seed
        self._smoothing, self._margin_scale, self._learn_weights = smoothing, margin_scale, learn_weights
        self._best_accuracy, self._best = -1.0, dict[str, Tensor]()
        self._patience, self._waited = patience, 0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over what is not frozen."""
        optimizer = self._make_optimizer([p for p in self.reward.parameters() if p.requires_grad])
        return decaying(optimizer, self.trainer)

    def on_fit_start(self) -> None:
        """Dropout on: a loaded reward comes in evaluation mode."""
        self.reward.train()

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Dropout depends on the position in the run and the rank alone, so that a resumed run repeats it.

        Raises:
            ValueError: weights of aspects are to be learnt from data without ratings.
        """
        if self._learn_weights and not batch.ratings.any():
            raise ValueError(
                "algorithm.learn_weights=true fits the aspects' weights to mean ratings, and these data rate no "
                "aspects: they say which image is better as a whole. Set it to false, or train on a VisionPrefer."
            )
        torch.manual_seed(seed_of(self._seed, self.trainer.global_rank, self.trainer.current_epoch, batch_idx))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The ranking loss over pairs, which all count alike, on whichever device and in whichever batch."""
        columns = self._columns(batch)
        belief = label_belief(batch.margins, self._margin_scale, self._smoothing)
        loss = self._loss("train", batch, columns, belief)
        pairs = torch.tensor(float(len(batch.better)), device=self.device)
        return self.weighed(loss, len(batch.better), of_all=self.trainer.strategy.reduce(pairs, reduce_op="mean"))

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Logs the loss and the pairwise accuracy."""
        self._loss("val", batch, self._columns(batch))

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Logs the same, and the accuracy by each aspect and by their mean; gives the columns to callbacks."""
        columns = self._columns(batch)
        self._loss("test", batch, columns)
        alike = self.trainer.world_size > 1 and bool(batch.ratings.any())  # devices log the same names in one order
        for name, right in by_aspect(columns, batch).items():
            if len(right) or alike:
                value = right.float().mean() if len(right) else 0.0
                self.log(f"test/accuracy/{name}", value, on_epoch=True, batch_size=len(right), sync_dist=True)
        return columns

    def _columns(self, batch: PreferenceBatch) -> Float[Tensor, "batch aspects_and_score"]:
        """What ranks the images in each aspect, and last, where index -1 finds it, the score."""
        outputs = self.reward.outputs(batch.images, batch.prompts)
        score = self.reward.combine(outputs)
        return torch.cat([outputs.expand(-1, len(ASPECTS)), score[:, None]], 1)

    def _loss(
        self,
        stage: str,
        batch: PreferenceBatch,
        columns: Float[Tensor, "batch aspects_and_score"],
        belief: Float[Tensor, " pairs"] | None = None,
    ) -> Tensor:
        better, worse = columns[batch.better, batch.aspects], columns[batch.worse, batch.aspects]
        loss = ranking_loss(better, worse, belief)
        values = {f"{stage}/loss": loss, f"{stage}/accuracy": (better > worse).float().mean()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(better), sync_dist=True, prog_bar=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        """Keeps the weights if they are the best so far; ends the training if they have not been for too long."""
        if self.trainer.sanity_checking:
            return
        accuracy = self.trainer.callback_metrics["val/accuracy"].item()
        if accuracy > self._best_accuracy:
            self._best_accuracy, self._waited = accuracy, 0
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in self.reward.state_dict().items()}
            return
        self._waited += 1
        if self._patience is not None and self._waited >= self._patience:
            log.info("no better accuracy in %d validations, the best is %.4f", self._waited, self._best_accuracy)
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the best weights, so that a resumed run ends as one that was never stopped."""
        checkpoint["best"] = (self._best_accuracy, self._best, self._waited)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        self._best_accuracy, self._best, self._waited = checkpoint["best"]

    def on_train_end(self) -> None:
        """Goes back to the best weights, standardises the score on the validation images, and saves."""
        if self._best:
            self.reward.load_state_dict(self._best)
        self.reward.requires_grad_(False).eval()
        outputs, better, worse = self._validation_outputs()
        self.reward.standardise(outputs)
        if self._learn_weights and not better:
            log.warning("algorithm.learn_weights: no validation images differ in their mean rating; weights stay equal")
        elif self._learn_weights:
            outputs = (outputs - outputs.mean(0)) / outputs.std(0)
            self.reward.weigh(preference_weights((outputs[better] - outputs[worse]).cpu()))
        if self.trainer.is_global_zero:
            self.reward.save(self._save_to)

    @torch.no_grad()
    def _validation_outputs(self) -> tuple[Float[Tensor, "images outputs"], list[int], list[int]]:
        """The outputs for the validation images, and the rows of the pairs among them by mean rating."""
        loader = self.trainer.val_dataloaders
        if not loader:
            raise ValueError(
                "The score is standardised on the validation images, but this run has none: "
                "give the data a validation split and leave trainer.limit_val_batches above 0."
            )
        own: list[tuple[Tensor, Tensor]] = []
        for number, every in enumerate(loader):
            batch = unrepeated(every, number, loader)
            if batch.prompts:
                outputs = self.reward.outputs(batch.images.to(self.device), batch.prompts)
                own.append((outputs.cpu(), decided(batch)["mean"].nonzero()))
        # Each device has its own share of the images; all must standardise alike.
        outputs, better, worse, first = [], [], [], 0
        for rows, pairs in itertools.chain(*of_all_devices(own)):
            better, worse = better + (pairs[:, 0] + first).tolist(), worse + (pairs[:, 1] + first).tolist()
            outputs.append(rows)
            first += len(rows)
        return torch.cat(outputs).to(self.device), better, worse


def decided(batch: PreferenceBatch) -> dict[str, Bool[Tensor, "better worse"]]:
    """By each aspect, and by the mean over aspects: which images are rated higher than which others of their prompt.

    Where nothing is rated, no image is.
    """
    first = {prompt: row for row, prompt in enumerate(batch.prompts)}
    prompts = torch.tensor([first[prompt] for prompt in batch.prompts], device=batch.ratings.device)
    together = prompts[:, None] == prompts
    ratings = {**dict(zip(ASPECTS, batch.ratings.unbind(1), strict=True)), "mean": batch.ratings.sum(1)}
    return {name: together & (rating[:, None] > rating) for name, rating in ratings.items()}


def by_aspect(
    columns: Float[Tensor, "batch aspects_and_score"], batch: PreferenceBatch
) -> dict[str, Bool[Tensor, " compared"]]:
    """Whether the columns order each pair as the ratings do: by each aspect, and by the mean over aspects.

    Pairs are of the same prompt; those that the ratings tie are left out, and equal scores are wrong.
    """
    pairs = zip(decided(batch).items(), columns.unbind(1), strict=True)
    return {name: (column[:, None] > column)[higher] for (name, higher), column in pairs}
