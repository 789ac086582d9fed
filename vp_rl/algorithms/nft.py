"""DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): reinforcement learning on the forward process.

Objective: minimise E[ r E(old + b (new - old)) + (1 - r) E(old - b (new - old)) ] / b + kl_weight E[ |new - ref|^2 ],
with E the normalised denoising error of an image noised to a random level, `old` the policy that sampled it, and r in
[0, 1] how good it is: (A / clip + 1) / 2 of its standardised score A. Good images pull the denoiser, bad ones push it.

What differs from the published code (NVlabs/DiffusionNFT@24af555):
1. The error is taken in the denoiser's output space, not in x0, so that it serves noise, v and flow predictions alike;
   no port to U-Nets was published.
2. A few noise levels of each image are trained, spread over the window, not all of the sampler's.
3. Scores are standardised within a prompt's images of a round.
"""

from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.forward_process import ForwardProcess, Noised
from vp_rl.algorithms.rounds import Batch, Part
from vp_rl.configuration import kinds
from vp_rl.functional import mean_square, nft_loss
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents


class DiffusionNFT(ForwardProcess):
    """Fine-tunes a policy against any reward; an older adapter samples and moves on after each round.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, train_batch, inner_epochs, advantage_clip,
            noise_levels, window, kl_weight, reference_guidance, shared_noise, decay,
            seed: see `ForwardProcess` and `OnlineTraining`.
        beta: strength of the guidance that is learned; 1 is the published setting for one reward, 0.1 for several.
        old_decay: how much of the older adapter stays after a round, at most.
        old_warmup: rounds until then; before, it is that share of `old_decay`.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        images_per_prompt: kinds.Several = 16,
        sample_batch: kinds.Count = 64,
        train_batch: kinds.Count = 64,
        inner_epochs: kinds.Count = 1,
        advantage_clip: kinds.Positive = 5.0,
        noise_levels: kinds.Count = 4,
        window: kinds.Span = (0.0, 1.0),
        beta: kinds.Part = 1.0,
        old_decay: kinds.Share = 0.5,
        old_warmup: kinds.Whole = 100,
        kl_weight: kinds.Amount = 1e-4,
        reference_guidance: kinds.Amount = 1.0,
        shared_noise: bool = True,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        super().__init__(
            policy,
            reward,
            sampler,
            optimizer,
            noise_levels=noise_levels,
            window=window,
            kl_weight=kl_weight,
            reference_guidance=reference_guidance,
            shared_noise=shared_noise,
            images_per_prompt=images_per_prompt,
            sample_batch=sample_batch,
            train_batch=train_batch,
            inner_epochs=inner_epochs,
            advantage_clip=advantage_clip,
            decay=decay,
            seed=seed,
        )
        if not 0 < beta <= 1:
            raise ValueError(f"algorithm.beta={beta} must be above 0 and at most 1.")
        if not 0 <= old_decay < 1 or old_warmup < 0:
            raise ValueError(
                f"algorithm.old_decay={old_decay} must be in [0, 1), and old_warmup={old_warmup} rounds 0 or more."
            )
        self.beta, self._decays = beta, (old_decay, old_warmup)

    def before_round(self, number: int) -> None:
        """The older adapter moves towards the one that the last round has made."""
        most, warmup = self._decays
        if number:
            self.older.move(self.policy, most * min(1.0, number / max(1, warmup)))

    def _sample(self, part: Part) -> Latents:
        with self.policy.using(self.older.weights):
            return super()._sample(part)

    def loss(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """Pull and push of a micro-batch of noised images."""
        noised: Noised = batch.examples
        old = self._output_of_older(noised, conditioning)
        new = self._output(noised, conditioning)
        good = (batch.advantages.flatten() / self.advantage_clip / 2 + 0.5).clamp(0, 1)
        loss = nft_loss(new, old, self._target(noised), good, self.beta).mean()
        moved = mean_square((new - old).detach())
        if self.kl_weight:
            reference = self._output_of_reference(noised, conditioning)
            loss = loss + self.kl_weight * mean_square(new - reference).mean()
        return loss, {"train/moved": moved}
