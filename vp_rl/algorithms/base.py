"""What every way of training a policy shares: an adapter, an optimizer, random numbers by position, checkpoints."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

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
from vp_rl.algorithms.phases import Cut, Load, Phase
from vp_rl.functional import seed_of
from vp_rl.interfaces import Policy, Process, Reward
from vp_rl.types import Conditioning, Images, Latents, Scores

_EXTRA = "_extra_state"  # torch's name for it
SCALES = -2  # in place of an image's number: of the random numbers that draw a prompt's guidance scale
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class PolicyTraining(ClippedModule):
    """Trains a policy's adapter; checkpoints hold the adapter only. It need not have a reward or a sampler.

    A subclass has a `training_step`, whose loss goes through `weighed`. The rest are hooks for callbacks and for the
    planner, with defaults for an algorithm that trains on a data module's own batches. Precision, accumulation,
    gradient clipping, devices and strategy are the Trainer's settings.

    Args:
        policy: what is trained.
        optimizer: given the adapter's parameters, makes the optimizer.
        reward: what it is trained against; None: it learns from data alone.
        decay: whether the learning rate falls to 0 by a cosine over the run, or stays.
        seed: of images' noise and of every other random choice.
    """

    bounds: ClassVar[tuple[str, str]] = ("data.batch_size", "data.batch_size")
    """The settings that say how much is trained on at once, and sampled at once: what fits, where they are auto."""
    rounding: ClassVar[frozenset[str]] = frozenset()
    """Its own settings that a resumed run may change at the cost of rounding."""
    dealt: ClassVar[frozenset[str]] = frozenset()
    """Its own settings that may change with the number of devices, as long as `together` stays."""

    def __init__(
        self,
        policy: Policy,
        optimizer: MakeOptimizer,
        *,
        reward: Reward | None = None,
        decay: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reward = None if reward is None else reward.requires_grad_(False).eval()
        self.seed = seed
        self.images = 0  # of the running epoch
        self.on_nonfinite: Literal["raise", "skip"] = "raise"
        """What becomes of scores that are not finite: an error, or what they are of is left out."""
        self.averaged: Callable[[], AbstractContextManager[None]] = nullcontext
        """Inside it the policy has the adapter that counts as the run's: its own, or the average of a callback."""
        self.scores: Float[Tensor, "prompts images"] | None = None
        """What the reward last gave, of this rank's images: of a round, or of a batch; None: there is no reward."""
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

    # --- hooks of callbacks

    def self_test(self, batch: Any) -> str | None:
        """Looks, on the first rows of a batch, whether training could teach anything; before the first update.

        Leaves no gradients behind, and draws no random numbers that training does.

        Returns:
            What was found, in words; None: there is nothing to look at.

        Raises:
            ValueError: it could not.
        """
        return None

    def describe(self, batch: Any) -> str:
        """The prompts of a batch, and the sampling steps it trains, in words; empty: it has no words for it."""
        return ""

    # --- hooks of the planner (vp_rl/planning)

    @classmethod
    def together(cls, settings: Mapping[str, Any], devices: int) -> Any:
        """What all devices do together, whatever each of them does: a resumed run may be dealt out to others.

        Args:
            settings: of the run, by dotted names.
            devices: in all.
        """
        accumulated = devices * settings["trainer.accumulate_grad_batches"]
        prompts = settings["data.batch_size"] / settings.get("data.devices_per_prompt", 1)
        images = settings.get("data.images_per_batch", 1) if settings.get("data.images") is not None else 0
        epoch = settings.get("data.batches_per_epoch", 1) / settings["trainer.accumulate_grad_batches"]
        return prompts * accumulated, images * accumulated, epoch

    def cut(self) -> Cut:
        """How an update's examples follow from its images: here, each image is one."""
        return Cut()

    def load(self, data: Mapping[str, Any], accumulate: int) -> tuple[Load, int]:
        """One device's work as a run's settings have it, without a stated size of an update.

        Args:
            data: settings of the data module.
            accumulate: micro-batches of an update.

        Returns:
            It, and how many updates it is: of an epoch, here.
        """
        size, batches = data["batch_size"], data.get("batches_per_epoch", 1)
        return Load(size * batches, size * batches, size, size, batches), math.ceil(batches / accumulate)

    def settings_of(self, load: Load, accumulate: int, devices_per_prompt: int) -> dict[str, int]:
        """The settings that make a device do this, where the size of an update is stated."""
        return {
            "data.batch_size": load.train_batch,
            "data.batches_per_epoch": load.micro_batches,
            "trainer.accumulate_grad_batches": accumulate,
        }

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Takes the sizes of its own that the planner has found, by their settings' names; here, it has none."""
        assert not sizes, f"{type(self).__name__} has no {', '.join(sizes)}"

    def phases(self, load: Load, prompt: Conditioning) -> list[Phase]:
        """The pieces of work that a round of so much is made of, on made-up data.

        Args:
            load: of the round, or of the epoch where there are no rounds.
            prompt: `PROMPT`, encoded.

        Raises:
            ValueError: this algorithm does not say.
        """
        raise ValueError(
            f"{type(self).__name__} does not say what its work is made of, so dry_run, auto and geometry cannot plan "
            "it: give data.batch_size and trainer.accumulate_grad_batches, or write its `phases`."
        )

    # --- for subclasses

    def generator(self, *position: int) -> torch.Generator:
        """Random numbers for what has this position in the run: epoch, round or update, and in it prompt and image.

        There is nothing to save and nothing to restore, and it plays no part which device draws them, or beside what.
        """
        return torch.Generator().manual_seed(seed_of(self.seed, *position))

    def generators(self, places: Iterable[int], images: Iterable[int], *position: int) -> list[torch.Generator]:
        """One for each image of each prompt, by the prompts' places in the batch of all devices."""
        images = list(images)
        return [self.generator(*position, place, image) for place in places for image in images]

    def score(self, images: Images, prompts: list[str]) -> Scores:
        """The reward's scores, which must be finite numbers unless `on_nonfinite` is to skip.

        Raises:
            ValueError: see `finite`.
        """
        assert self.reward is not None, "whoever scores has one"
        return self.finite(self.reward(images, prompts), prompts, self.reward)

    def finite(self, scores: Scores, prompts: list[str], reward: Reward) -> Scores:
        """These scores of a reward's, which must be finite numbers unless `on_nonfinite` is to skip.

        Raises:
            ValueError: some are not; names the reward, the first such prompt and the update.
        """
        bad = ~torch.isfinite(scores)
        if self.on_nonfinite == "raise" and bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{type(reward).__name__} gave {scores[row].item()} for the image of {prompts[row]!r} "
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
        rest = {name: value for name, value in state.items() if name.endswith(_EXTRA)}
        self.load_state_dict(rest, strict=False)
        return state

    def _kept(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | self.extra_state().keys()

    def extra_state(self) -> dict[str, Any]:
        """What modules are resumed with beside their parameters (`get_extra_state`), by name."""
        stateful = (
            (f"{name}.{_EXTRA}".lstrip("."), module)
            for name, module in self.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        )
        return {name: module.get_extra_state() for name, module in stateful}


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists: what a denoiser is a row of."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def trained_timesteps(process: Process, window: tuple[float, float]) -> range:
    """The denoiser's timesteps between two shares of all of them, at least one; 1 is pure noise.

    Raises:
        ValueError: these are not rising shares.
    """
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"algorithm.window={tuple(window)} must be two rising shares of the timesteps, in [0, 1].")
    steps = process.train_timesteps
    first = int(low * steps)
    return range(first, max(first + 1, int(high * steps)))


def draw_levels(like: Latents, timesteps: range, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the shape of a row of `like`, and as many timesteps at random: one of each equal part of the range."""
    noise = torch.stack([torch.randn(like.shape[1:], generator=generator) for _ in range(number)])
    share = (torch.rand(number, generator=generator) + torch.arange(number)) / number
    return noise, timesteps.start + (share * len(timesteps)).floor()


def total_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm of all of them together; NaN or infinite where any number of theirs is."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # sharded by FSDP2


def decaying(optimizer: Optimizer, trainer: lightning.Trainer) -> OptimizerLRScheduler:
    """The optimizer with a learning rate that falls to 0 by a cosine over the whole run."""
    schedule = CosineAnnealingLR(optimizer, int(trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
