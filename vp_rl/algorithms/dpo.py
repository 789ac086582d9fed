"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908): preference pairs, without a reward and without sampling.

Objective: minimise E[-log sigmoid(-beta / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)])], with e the mean squared denoising
error of the preferred and of the other image at one timestep and one noise, and ref the model without its adapter.

What differs from the published code (SalesforceAIResearch/DiffusionDPO@5233e75):
1. A LoRA is trained; the reference is the same model with it off, at no memory.
2. Each image of a prompt is noised and denoised once, at one timestep and noise for all of them, and is in all its
   pairs: a prompt's images cost as many passes as there are images, not as pairs.
3. `bound` (SDPO, arXiv:2511.03317): the loser's gradient is scaled, pair by pair, so that the winner's error still
   falls. Without it both errors rise and the policy drifts from all images. None: the published loss.

The winner's and the loser's error against the reference are logged; where the winner's rises, the log says so.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining, trained_timesteps
from vp_rl.algorithms.latents import ImageLatents
from vp_rl.algorithms.phases import Load, Phase, alike
from vp_rl.configuration import kinds
from vp_rl.files.paths import user_path
from vp_rl.functional import diffusion_dpo_loss, loser_bound, mean_square, seed_of
from vp_rl.interfaces import Policy
from vp_rl.types import Conditioning, Images, Latents, PreferenceBatch, take

log = logging.getLogger(__name__)

_IMAGES = 4  # of a prompt, for the planner: VisionPrefer's


@dataclass(frozen=True)
class PairLoss:
    """The loss of pairs of noised images, against the policy's reference.

    Attributes:
        beta: strength of the pull to the reference.
        bound: SDPO's mu in [0, 1], see the module's point 3; None: no bound.

    Raises:
        ValueError: a number is outside its range.
    """

    beta: float
    bound: float | None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"algorithm.beta={self.beta} must be above 0.")
        if self.bound is not None and not 0 <= self.bound <= 1:
            raise ValueError(f"algorithm.bound={self.bound} must be in [0, 1], or null.")

    def __call__(
        self,
        policy: Policy,
        x0: Latents,
        noise: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        better: Tensor,
        worse: Tensor,
    ) -> tuple[Float[Tensor, " pairs"], dict[str, Tensor]]:
        """The loss of each pair, and by name other values of each.

        Args:
            policy: what is trained.
            x0, noise, timestep, conditioning: of each image; those of a pair have the same noise and timestep.
            better, worse: rows of each pair's images.
        """
        process = policy.process
        latents, target = process.add_noise(x0, noise, timestep), process.target(x0, noise, timestep)
        with torch.no_grad(), policy.reference():
            reference = mean_square(policy.predict(latents, timestep, conditioning, 1.0) - target)
        wrong = policy.predict(latents, timestep, conditioning, 1.0) - target
        error = mean_square(wrong)
        winner, loser = error[better], error[worse]
        if self.bound is not None:
            kept = loser_bound(wrong[better], wrong[worse], self.bound)
            loser = loser.detach() + kept * (loser - loser.detach())
        gained, lost = winner - reference[better], loser - reference[worse]
        return diffusion_dpo_loss(gained, lost, self.beta), {
            "train/accuracy": (gained < lost).float(),
            "train/winner_error": gained.detach(),
            "train/loser_error": lost.detach(),
        }


class Drift:
    """Says so where the preferred images have become less likely, too, for three epochs in a row."""

    def __init__(self) -> None:
        self._rises = 0

    def see(self, rise: float | None) -> None:
        """An epoch's mean error of the preferred images, less the reference's; None: there was no pair."""
        self._rises = self._rises + 1 if rise is not None and rise > 0 else 0
        if self._rises == 3:
            log.warning(
                "the preferred images' denoising error has been above the reference's for 3 epochs (train/winner_error "
                "%.2g): the policy moves away from all images. Lower algorithm.optimizer.lr, or raise algorithm.bound.",
                rise,
            )


class DiffusionDPO(PolicyTraining):
    """Fine-tunes a policy on pairs of images of which one is preferred, by AI or by people.

    Args:
        policy, optimizer, decay, seed: see `PolicyTraining`.
        beta: strength of the pull to the reference; 5000 is the published value for Stable Diffusion 1.5 and XL.
        bound: SDPO's mu in [0, 1], see the module's point 3; None: no bound.
        window: first and last timestep that is trained, as a share of the denoiser's; 1 is pure noise.
        latents: a file that keeps what the policy's VAE made of each image, for all epochs and runs; None: it is made
            in every epoch.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: MakeOptimizer,
        *,
        beta: kinds.Positive = 5000.0,
        bound: kinds.Share | None = 0.9,
        window: kinds.Span = (0.0, 1.0),
        latents: kinds.Text | None = None,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        super().__init__(policy, optimizer, decay=decay, seed=seed)
        self.pair_loss = PairLoss(beta, bound)
        self._timesteps = trained_timesteps(policy.process, window)
        self._file = None if latents is None else user_path(latents)
        self._encoded = ImageLatents(policy, None)
        self._drift = Drift()

    def setup(self, stage: str) -> None:
        """See `PolicyTraining`; looks what is encoded already.

        Raises:
            ValueError: see `ImageLatents`.
        """
        super().setup(stage)
        self._encoded.close()
        self._encoded = ImageLatents(self.policy, self._file)

    def teardown(self, stage: str) -> None:
        """Lets go of the file."""
        self._encoded.close()
        self._encoded = ImageLatents(self.policy, None)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The loss of all pairs of some prompts' images."""
        loss, values = self._of(batch, self.current_epoch)
        pairs = len(batch.better)
        self.images += len(batch.images)
        means = {name: value.mean() for name, value in values.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=pairs, sync_dist=True)
        number = torch.tensor(float(pairs), device=self.device)
        return self.weighed(loss, pairs, of_all=self.trainer.strategy.reduce(number, reduce_op="mean"))

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Logs the loss and the share of pairs that the policy orders rightly, always at the same noise."""
        loss, values = self._of(batch, -1)
        found = {"val/loss": loss, "val/accuracy": values["train/accuracy"].mean()}
        self.log_dict(found, on_step=False, on_epoch=True, batch_size=len(batch.better), sync_dist=True)

    def _of(self, batch: PreferenceBatch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = list(dict.fromkeys(batch.prompts))
        row = torch.tensor([prompts.index(prompt) for prompt in batch.prompts], device=self.device)
        conditioning = take(self.policy.encode(prompts), row)
        x0 = self._encoded(batch.images)
        noise, timestep = self._noise(prompts, x0, epoch)
        return self.loss(x0, noise[row], timestep[row], conditioning, batch.better, batch.worse)

    def loss(
        self,
        x0: Latents,
        noise: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        better: Tensor,
        worse: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of pairs, and by name a value of each.

        Args:
            x0, noise, timestep, conditioning: of each image; a prompt's have the same noise and timestep.
            better, worse: rows of each pair's images.
        """
        losses, values = self.pair_loss(self.policy, x0, noise, timestep, conditioning, better, worse)
        return losses.mean(), {"train/loss": losses.detach()} | values

    def on_train_epoch_end(self) -> None:
        """Says so where the preferred images have become less likely, too."""
        super().on_train_epoch_end()
        rise = self.trainer.callback_metrics.get("train/winner_error")
        self._drift.see(None if rise is None else float(rise))

    def _noise(
        self, prompts: list[str], like: Latents, epoch: int
    ) -> tuple[Float[Tensor, "prompts *latent"], Float[Tensor, " prompts"]]:
        """One noise and timestep for each prompt and epoch, whatever batch and device it is in."""
        noise, timesteps = [], []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, prompt))
            noise.append(torch.randn(like.shape[1:], generator=generator))
            timesteps.append(self._timesteps[int(torch.randint(len(self._timesteps), (1,), generator=generator))])
        return torch.stack(noise).to(like), torch.tensor(timesteps, device=like.device).float()

    def describe(self, batch: PreferenceBatch) -> str:
        """Its prompts."""
        return str(list(dict.fromkeys(batch.prompts)))

    # --- for the planner

    def load(self, data: Mapping[str, Any], accumulate: int) -> tuple[Load, int]:
        """An epoch's length is the data's: what is planned is one update. Its images are counted as prompts."""
        size = data["batch_size"]
        return Load(size * accumulate, size * accumulate, size, size, accumulate), 1

    def settings_of(self, load: Load, accumulate: int, devices_per_prompt: int) -> dict[str, int]:
        """Its batches are of prompts, with all their images."""
        return {"data.batch_size": load.train_batch, "trainer.accumulate_grad_batches": accumulate}

    def phases(self, load: Load, prompt: Conditioning) -> list[Phase]:
        """Encoding images one by one, and a micro-batch of prompts with four images each."""

        def pictures(number: int) -> Images:
            with torch.no_grad():
                return self.policy.decode(self.policy.noise(number))

        def learn(prompts: int) -> Tensor:
            x0 = self.policy.noise(prompts * _IMAGES)
            timestep = torch.full((len(x0),), float(self._timesteps.start), device=x0.device)
            better = torch.arange(0, len(x0), 2, device=x0.device)
            return self.loss(x0, x0, timestep, alike(prompt, len(x0)), better, better + 1)[0]

        label = f"activations, {load.train_batch} prompts of {_IMAGES} images at once"
        return [
            # Only while they are new, which is not in every epoch.
            Phase("encoding", "VAE encode, 1 image at once", 0, 1, self.policy.encode_images, pictures),
            Phase("training", label, load.micro_batches, load.train_batch, learn, setting=self.bounds[0]),
        ]
