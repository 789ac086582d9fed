"""Advantage-weighted matching (Xue et al. 2025, arXiv:2509.25050): the denoising error in place of a log-probability.

Objective: minimise E[ max(-A rho, -A clip(rho, 1 +- c)) ] + kl_weight E[ |new - ref|^2 ] + anchor_weight E[ |new -
ema|^2 ], with rho = exp(e_old - e_new) at the same noise and timestep, e the mean squared denoising error in output
space, A the image's standardised score, and `ema` a slow average of the adapter. On policy rho is 1 and the gradient
is A grad e: good images are matched, bad ones are un-matched. Without an anchor it collapses (docs/methods.md).

What differs from the published code (scxue/advantage_weighted_matching@be51372): noise predictions of U-Nets as well
as velocities; no weight by timestep; scores are standardised within a prompt's images of a round.
"""

import torch
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.forward_process import ForwardProcess, Noised
from vp_rl.algorithms.rounds import Batch
from vp_rl.configuration import kinds
from vp_rl.functional import clipped_surrogate, mean_square
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents


class AdvantageWeightedMatching(ForwardProcess):
    """Fine-tunes a policy against any reward by its denoising error on its own images.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, train_batch, inner_epochs, advantage_clip,
            noise_levels, window, kl_weight, reference_guidance, shared_noise, decay,
            seed: see `ForwardProcess` and `OnlineTraining`.
        clip_range: how far rho may move.
        anchor_weight: scale of the mean squared difference of the outputs to those of the average.
        anchor_decay: how much of the average stays after a round, at most.
        anchor_warmup: rounds until then; before, it is that share of `anchor_decay`.

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
        advantage_clip: kinds.Positive = 1.0,
        clip_range: kinds.Positive = 0.2,
        noise_levels: kinds.Count = 4,
        window: kinds.Span = (0.0, 1.0),
        kl_weight: kinds.Amount = 3e-3,
        anchor_weight: kinds.Amount = 1.0,
        anchor_decay: kinds.Share = 0.3,
        anchor_warmup: kinds.Whole = 300,
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
        if not clip_range > 0 or not anchor_weight >= 0:
            raise ValueError(
                f"algorithm.clip_range={clip_range} must be above 0, and anchor_weight={anchor_weight} 0 or more."
            )
        if not 0 <= anchor_decay < 1 or anchor_warmup < 0:
            raise ValueError(
                f"algorithm.anchor_decay={anchor_decay} must be in [0, 1), and anchor_warmup={anchor_warmup} 0 or more."
            )
        self.clip_range, self.anchor_weight, self._decays = clip_range, anchor_weight, (anchor_decay, anchor_warmup)
        self._behaviour = policy.adapter_weights()

    def before_round(self, number: int) -> None:
        """The average moves; the adapter that is about to sample is kept for rho."""
        most, warmup = self._decays
        if number:
            self.older.move(self.policy, most * min(1.0, number / max(1, warmup)))
        self._behaviour = self.policy.adapter_weights()

    def loss(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate of a micro-batch of noised images, and its anchors."""
        noised: Noised = batch.examples
        target = self._target(noised)
        # First, what other weights say: they stand in the policy's place, which a graph must not see.
        held = [
            (weight, output(noised, conditioning))
            for weight, output in (
                (self.kl_weight, self._output_of_reference),
                (self.anchor_weight, self._output_of_older),
            )
            if weight
        ]
        before = None if self.on_policy else self._error_of_behaviour(noised, target, conditioning)
        new = self._output(noised, conditioning)
        error = mean_square(new - target)
        log_ratio = (error.detach() if before is None else before) - error
        loss = clipped_surrogate(log_ratio, batch.advantages.flatten(), self.clip_range).mean()
        for weight, other in held:
            loss = loss + weight * mean_square(new - other).mean()
        ratio = log_ratio.detach().exp()
        return loss, {"train/ratio": ratio, "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float()}

    @torch.no_grad()
    def _error_of_behaviour(self, noised: Noised, target: Latents, conditioning: Conditioning) -> Tensor:
        with self.policy.using(self._behaviour):
            return mean_square(self._output(noised, conditioning) - target)
