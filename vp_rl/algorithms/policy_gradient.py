"""The clipped policy gradient on denoising steps (Black et al. 2023): what DDPO and its branching variant share.

Objective: minimise E_t[ w_t max(-A ratio, -A clip(ratio, 1 +- c)) ] + kl_weight * E_t[ w_t KL(policy || reference) ],
with ratio = p(x_next | x_t, prompt) / p_old(x_next | x_t, prompt) and A the image's advantage.

w_t = std_t / mean std with `weight_by_std`, else 1. With a `divergence_limit` the ratio is not clipped: a term is left
out where the policy's step is that far from the one that sampled, and would be taken further (Flow-DPPO).
"""

from abc import ABC
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vp_rl.algorithms.online import OnlineTraining
from vp_rl.algorithms.rounds import Batch
from vp_rl.functional import clipped_surrogate, divergence_bounded, gaussian_kl
from vp_rl.sampler import log_prob_of, repeat
from vp_rl.types import Conditioning, Latents, Steps, Transition, take

_DRIFT = {False: 1e-4, True: 1e-2}  # between log-probabilities that rounding makes: in float32, in half precision


class Drawn(NamedTuple):
    """States x_t, each with the steps that were drawn from it: one, or where images branch several."""

    latents: Float[Tensor, "batch *latent"]
    next_latents: Float[Tensor, "batch draws *latent"]
    step: Steps
    log_probs: Float[Tensor, "batch draws"]
    """Under the policy that sampled."""
    means: Float[Tensor, "batch kept *latent"]
    """Of the steps of the policy that sampled; kept, once for a state, where there is a `divergence_limit`."""


class PolicyGradient(OnlineTraining, ABC):
    """Trains the denoising steps in a window of the sampling steps, whose examples are `Drawn`.

    A subclass sets what its constructor takes: `clip_range`, `kl_weight`, and by `_train_on` the steps.
    """

    clip_range: float
    kl_weight: float
    divergence_limit: float | None = None
    largest: ClassVar[frozenset[str]] = frozenset({"train/log_prob_drift"})

    def _train_on(self, window: range, min_std: float, weight_by_std: bool) -> None:
        """Chooses the steps that are trained, and their weights in the loss.

        Raises:
            ValueError: none of them has a density.
        """
        stds = self.sampler.stds(self.policy)
        self.trained_steps = [step for step in window if stds[step] > min_std]
        if not self.trained_steps:
            raise ValueError(
                f"No sampling step has a density to train on (sampler.eta={self.sampler.eta}, min_std={min_std}, "
                f"largest std {stds.max():.3g}): DDPO needs a stochastic sampler, so raise sampler.eta."
            )
        self._weight = stds / stds[self.trained_steps].mean() if weight_by_std else torch.ones_like(stds)

    def loss(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate of states, plus the KL where it is wanted."""
        states: Drawn = batch.examples
        transition = self._transition(states, conditioning)
        log_ratio = _log_ratio(states, transition)
        weight = self._weight.to(states.step.device)[states.step]
        surrogate, beyond = self._surrogate(states, transition, log_ratio, batch.advantages.flatten())
        loss = (weight.repeat_interleave(states.next_latents.shape[1]) * surrogate).mean()
        if self.kl_weight:
            kl = self.sampler.kl_to_reference(self.policy, transition, states.latents, states.step, conditioning)
            kl = kl if batch.kl_weights is None else kl * batch.kl_weights.mean(1)
            loss = loss + self.kl_weight * (weight * kl).mean()
        moved = log_ratio.detach()
        values = {"train/ratio": moved.exp(), "train/clip_fraction": beyond.float()}
        return loss, values | ({"train/log_prob_drift": moved.abs()} if self.on_policy else {})

    def _surrogate(
        self,
        states: Drawn,
        transition: Transition,
        log_ratio: Float[Tensor, " draws"],
        advantages: Float[Tensor, " draws"],
    ) -> tuple[Float[Tensor, " draws"], Bool[Tensor, " draws"]]:
        """The loss of each draw, and whether the policy has moved further there than it may."""
        if self.divergence_limit is None:
            beyond = (log_ratio.detach().exp() - 1).abs() > self.clip_range
            return clipped_surrogate(log_ratio, advantages, self.clip_range), beyond
        divergence, limit = _divergence(states, transition), self.divergence_limit
        return divergence_bounded(log_ratio, advantages, divergence, limit), divergence >= limit

    def distance(self, batch: Batch, conditioning: Conditioning) -> Float[Tensor, " examples"]:
        """KL of the states' steps to those of the model without its adapter."""
        states: Drawn = batch.examples
        transition = self._transition(states, conditioning)
        return self.sampler.kl_to_reference(self.policy, transition, states.latents, states.step, conditioning)

    def made_up(self, latents: Latents) -> Drawn:
        """States whose next ones are themselves."""
        draws = self.images_per_prompt if self.whole_prompts else 1
        step = torch.full((len(latents),), self.trained_steps[0], device=latents.device)
        after = latents[:, None].expand(-1, draws, *latents.shape[1:])
        means = after[:, :0] if self.divergence_limit is None else latents[:, None]
        return Drawn(latents, after, step, torch.zeros(after.shape[:2], device=latents.device), means)

    def self_test(self, batch: Batch) -> str:
        """Replays steps of the round under the policy that sampled them: their log-probabilities must be the same.

        With gradients, as many at once as are trained: so it is the code of training that is compiled, and tested.
        """
        transition = self._transition(batch.examples, take(self.conditioning, batch.prompt))
        log_ratio = _log_ratio(batch.examples, transition)
        drift = log_ratio.detach().abs().max().item()
        tolerance = _DRIFT[self.in_half_precision()]
        if not drift <= tolerance:
            raise ValueError(
                f"Before any update the policy gives its own steps log-probabilities that differ by {drift:.2g} from "
                f"those it sampled them with (rounding makes at most {tolerance:.0e}): DDPO would learn from that "
                "difference. Is dropout on, or is sampling done in another precision than training?"
            )
        limit = self.divergence_limit
        if limit is not None and (moved := _divergence(batch.examples, transition).max().item()) >= limit:
            raise ValueError(
                f"Before any update the policy's steps are a KL of {moved:.2g} from those that it sampled with, by "
                f"rounding alone, and algorithm.divergence_limit={limit:g} is no more than that: raise it, or take "
                "trainer.precision=32-true policy.dtype=float32."
            )
        return f"replayed log-probabilities are those of sampling, to {drift:.1e}"

    def describe(self, batch: Batch) -> str:
        """Its prompts and sampling steps."""
        return f"sampling steps {batch.examples.step.unique().tolist()} of {super().describe(batch)}"

    def _transition(self, states: Drawn, conditioning: Conditioning) -> Transition:
        return self.sampler.transition(self.policy, states.latents, states.step, conditioning)


@torch.no_grad()
def _divergence(states: Drawn, transition: Transition) -> Float[Tensor, " batch"]:
    """KL between the step that the policy takes now and the one of the policy that sampled."""
    return gaussian_kl(transition.mean, states.means[:, 0], transition.std)


def _log_ratio(states: Drawn, transition: Transition) -> Float[Tensor, " samples"]:
    draws = states.next_latents.shape[1]
    return log_prob_of(states.next_latents.flatten(0, 1), repeat(transition, draws)) - states.log_probs.flatten()
