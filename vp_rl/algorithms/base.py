"""What every way of training a policy against a reward shares."""

import time
import zlib
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from vp_rl.functional import gaussian_kl
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Scores, Steps, Transition

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@runtime_checkable
class PromptBatches(Protocol):
    """An epoch's batches of prompts."""

    batch_size: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PromptBatch]: ...


class PolicyTraining(lightning.LightningModule, ABC):
    """Holds the policy, the frozen reward and the sampler; checkpoints the adapter only.

    Precision, accumulation, gradient clipping, devices and strategy are the Trainer's settings.

    Args:
        policy: what is trained.
        reward: what it is trained against.
        sampler: how its images are made while it trains.
        optimizer: given the adapter's parameters, makes the optimizer.
        decay: whether the learning rate falls to 0 by a cosine over the run, or stays.
        seed: of prompts' noise and of every other random choice.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        decay: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reward = reward.requires_grad_(False).eval()
        self.sampler = sampler
        self.seed = seed
        self.images = 0  # of the running epoch
        self.strict_loading = False  # checkpoints hold the adapter alone; `on_load_checkpoint` is the strict one
        self._make_optimizer, self._decay = optimizer, decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over the adapter."""
        optimizer = self._make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return decaying(optimizer, self.trainer) if self._decay else optimizer

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        self.images, self._started = 0, time.monotonic()

    def on_train_epoch_end(self) -> None:
        """Logs how many images the epoch sampled, scored and learned from in a second."""
        self.log("train/images_per_second", self.images * self.trainer.world_size / self.epoch_seconds())

    def epoch_seconds(self) -> float:
        """Wall time of the running epoch so far."""
        return time.monotonic() - self._started

    def batches(self, prompts: PromptBatches) -> Iterable[Any]:
        """What an epoch of this algorithm trains on, given the epoch's prompts: here, the prompts themselves."""
        return prompts

    def generator(self, *position: int) -> torch.Generator:
        """Random numbers of this rank at a position (epoch, batch, ...): nothing to save, nothing to restore."""
        key = (self.seed, self.trainer.global_rank, *position)
        return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    def kl_to_reference(
        self, transition: Transition, latents: Latents, step: Steps, conditioning: Conditioning
    ) -> Float[Tensor, " batch"]:
        """KL of the policy's steps to those without its adapter, averaged over latent dimensions.

        Gradients flow into `transition` alone. Its steps must be random ones.
        """
        with torch.no_grad(), self.policy.reference():
            reference = self.sampler.transition(self.policy, latents, step, conditioning)
        return gaussian_kl(transition.mean, reference.mean, transition.std)

    def score(self, images: Images, prompts: list[str]) -> Scores:
        """The reward's scores, which must be finite numbers.

        Raises:
            ValueError: some are not; names the reward and the first such prompt.
        """
        scores = self.reward(images, prompts)
        bad = ~torch.isfinite(scores)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{type(self.reward).__name__} gave {scores[row].item()} for the image of {prompts[row]!r} "
                f"({int(bad.sum())} of {len(scores)} scores are not finite). The last checkpoint is intact: "
                "look at that image, or try trainer.precision=32-true."
            )
        return scores

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the frozen weights: they come from the policy's and the reward's own files."""
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in self._trained()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another adapter.

        Raises:
            ValueError: the checkpoint's tensors are not the ones this run trains.
        """
        wrong = checkpoint["state_dict"].keys() ^ self._trained()
        if wrong:
            raise ValueError(
                f"This checkpoint is of another policy or adapter: {len(wrong)} tensors differ, {min(wrong)!r} first. "
                "Resume with the settings of the run that wrote it."
            )

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def decaying(optimizer: Optimizer, trainer: lightning.Trainer) -> OptimizerLRScheduler:
    """The optimizer with a learning rate that falls to 0 by a cosine over the whole run."""
    schedule = CosineAnnealingLR(optimizer, int(trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
