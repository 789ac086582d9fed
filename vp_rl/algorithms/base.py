"""What every way of training a policy against a reward shares."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from vp_rl.algorithms.clipping import ClippedModule
from vp_rl.functional import gaussian_kl, seed_of
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Scores, Steps, Transition

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@runtime_checkable
class PromptBatches(Protocol):
    """An epoch's batches of prompts, as one of several devices gets them."""

    batch_size: int
    devices_per_prompt: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PromptBatch]: ...


class PolicyTraining(ClippedModule, ABC):
    """Holds the policy, the frozen reward and the sampler; checkpoints the adapter only.

    Precision, accumulation, gradient clipping, devices and strategy are the Trainer's settings.

    Args:
        policy: what is trained.
        reward: what it is trained against.
        sampler: how its images are made while it trains.
        optimizer: given the adapter's parameters, makes the optimizer.
        decay: whether the learning rate falls to 0 by a cosine over the run, or stays.
        seed: of images' noise and of every other random choice.
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
        self.on_nonfinite: Literal["raise", "skip"] = "raise"
        """What becomes of scores that are not finite: an error, or what they are of is left out."""
        self.averaged: Callable[[], AbstractContextManager[None]] = nullcontext
        """Inside it the policy has the adapter that counts as the run's: its own, or the average of a callback."""
        self.scores: Float[Tensor, "prompts images"] | None = None
        """What the reward last gave, of this rank's images: of DDPO's round, of ReFL's batch."""
        self.strict_loading = False  # checkpoints hold the adapter alone; `on_load_checkpoint` is the strict one
        self._make_optimizer, self._decay = optimizer, decay

    def setup(self, stage: str) -> None:
        """Looks whether batches reach training as they were made: log-probabilities rounded to 8 bits are others.

        Raises:
            ValueError: the precision rounds them, and with them the adapter.
        """
        given = torch.zeros(1)
        if self.trainer.precision_plugin.convert_input(given).dtype.itemsize < given.dtype.itemsize:
            deepspeed = isinstance(self.trainer.precision_plugin, DeepSpeedPrecision)
            mixed = "" if deepspeed else " Or trainer.precision=bf16-mixed, which rounds neither."
            shown = f"trainer.precision={self.trainer.precision}{' with DeepSpeed' if deepspeed else ''}"
            raise ValueError(
                f"{shown} rounds the adapter and what was sampled to half precision, and what is learned from differs "
                f"by less: set trainer.precision=32-true policy.dtype=bfloat16, which rounds frozen weights.{mixed}"
            )

    def configure_model(self) -> None:
        """Divides the denoiser's weights among devices where the strategy is FSDP2's, block by block."""
        if self.device_mesh is None:
            return
        for part in self.policy.children():
            if any(p.requires_grad for p in part.parameters()) and not isinstance(part, FSDPModule):
                for block in (*_blocks(part), part):
                    fully_shard(block, mesh=self.device_mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over the adapter."""
        optimizer = self._make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return decaying(optimizer, self.trainer) if self._decay else optimizer

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        self.images, self._started = 0, time.monotonic()

    def on_train_epoch_end(self) -> None:
        """Logs how many images the epoch sampled, scored and learned from in a second."""
        rate = self.images * self.trainer.world_size / self.epoch_seconds()
        self.log("train/images_per_second", rate, sync_dist=True)

    def epoch_seconds(self) -> float:
        """Wall time of the running epoch so far."""
        return time.monotonic() - self._started

    def batches(self, prompts: PromptBatches) -> Iterable[Any]:
        """What an epoch of this algorithm trains on, given the epoch's prompts: here, the prompts themselves."""
        return PromptLoader(self, prompts)

    def resumable_after(self, batches: int) -> bool:
        """Whether a run that stops after so many of an epoch's batches can go on as if it had not; here, always."""
        return True

    @abstractmethod
    def self_test(self, batch: Any) -> str:
        """Looks, on the first rows of a batch, whether training could teach anything; before the first update.

        Leaves no gradients behind, and draws no random numbers that training does.

        Returns:
            What was found, in words.

        Raises:
            ValueError: it could not.
        """

    @abstractmethod
    def describe(self, batch: Any) -> str:
        """The prompts of a batch, and the sampling steps it trains, in words."""

    def generator(self, *position: int) -> torch.Generator:
        """Random numbers for what has this position in the run: epoch, round or update, and in it prompt and image.

        There is nothing to save and nothing to restore, and it plays no part which device draws them, or beside what.
        """
        return torch.Generator().manual_seed(seed_of(self.seed, *position))

    def generators(self, places: Iterable[int], images: Iterable[int], *position: int) -> list[torch.Generator]:
        """One for each image of each prompt, by the prompts' places in the batch of all devices."""
        images = list(images)
        return [self.generator(*position, place, image) for place in places for image in images]

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
        """The reward's scores, which must be finite numbers unless `on_nonfinite` is to skip.

        Raises:
            ValueError: some are not; names the reward, the first such prompt and the update.
        """
        scores = self.reward(images, prompts)
        bad = ~torch.isfinite(scores)
        if self.on_nonfinite == "raise" and bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{type(self.reward).__name__} gave {scores[row].item()} for the image of {prompts[row]!r} "
                f"after {self.global_step} updates ({int(bad.sum())} of {len(scores)} scores are not finite). The last "
                "checkpoint is intact: look at that image, try trainer.precision=32-true, or leave such prompts out "
                "with callbacks.guards.on_nonfinite=skip."
            )
        return scores

    def in_half_precision(self) -> bool:
        """Whether any of the policy's computing is in fewer than 32 bits."""
        weights = {parameter.dtype for parameter in self.policy.parameters()}
        whole = str(self.trainer.precision) in {"32-true", "64-true"}
        return not whole or bool(weights - {torch.float32, torch.float64})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the frozen weights: they come from the policy's and the reward's own files.

        What changes in a reward while the policy is trained, it has as its modules' extra state (`get_extra_state`).
        """
        kept = self._kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another adapter.

        Raises:
            ValueError: the checkpoint's tensors are not the ones this run trains, or its reward's state is another's.
        """
        wrong = (checkpoint.get("state_dict") or self._loaded()).keys() ^ self._kept()
        if wrong:
            what = "reward" if all(name.startswith("reward.") for name in wrong) else "policy or adapter"
            raise ValueError(
                f"This checkpoint is of another {what}: {len(wrong)} tensors differ, {min(wrong)!r} first. "
                "Resume with the settings of the run that wrote it."
            )

    def _loaded(self) -> dict[str, Any]:
        """The state of a checkpoint whose parameters FSDP2's strategy has taken and loaded; loads the rest of it."""
        assert self.trainer.ckpt_path is not None
        state = torch.load(self.trainer.ckpt_path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        rest = {name: value for name, value in state.items() if name.endswith("_extra_state")}
        self.load_state_dict(rest, strict=False)
        return state

    def _kept(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        extra = (name for name in self.reward.state_dict(prefix="reward.") if name.endswith("_extra_state"))
        return trained | set(extra)


class EpochLoader(ABC):
    """An epoch's batches from where the run is in it: all of them, or those that a resumed run has not had.

    What a batch is follows from its place in the run, which Lightning restores: there is nothing else to save. That it
    could be saved tells Lightning that the loader knows how to go on.
    """

    def __init__(self, algorithm: PolicyTraining, prompts: PromptBatches) -> None:
        self._algorithm, self._prompts = algorithm, prompts

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def done(self) -> int:
        """Batches of the running epoch that came before: above 0 where a resumed run asks for its first."""
        return self._algorithm.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  # Lightning looks whether it is there
        """Nothing to read."""


class PromptLoader(EpochLoader):
    """Batches of prompts."""

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[PromptBatch]:
        # A generator: it must not look before the first batch is asked for, when Lightning knows where it is.
        yield from islice(self._prompts, self.done(), None)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists: what a denoiser is a row of."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def total_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm of all of them together; NaN or infinite where any number of theirs is."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # sharded by FSDP2


def decaying(optimizer: Optimizer, trainer: lightning.Trainer) -> OptimizerLRScheduler:
    """The optimizer with a learning rate that falls to 0 by a cosine over the whole run."""
    schedule = CosineAnnealingLR(optimizer, int(trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
