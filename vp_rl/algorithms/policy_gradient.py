"""The clipped policy gradient on denoising steps (Black et al. 2023): what DDPO and its branching variant share.

Objective: minimise E_t[ w_t max(-A ratio, -A clip(ratio, 1 +- c)) ] + kl_weight * E_t[ w_t KL(policy || reference) ],
with ratio = p(x_next | x_t, prompt) / p_old(x_next | x_t, prompt) and A the image's advantage.

w_t = std_t / mean std with `weight_by_std`, else 1.
"""

from abc import ABC
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vp_rl.algorithms.online import OnlineTraining
from vp_rl.algorithms.rounds import Batch
from vp_rl.functional import clipped_surrogate
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


class PolicyGradient(OnlineTraining, ABC):
    """Trains the denoising steps in a window of the sampling steps, whose examples are `Drawn`.

    A subclass sets what its constructor takes: `clip_range`, `kl_weight`, and by `_train_on` the steps.
    """

    clip_range: float
    kl_weight: float
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
        surrogate = clipped_surrogate(log_ratio, batch.advantages.flatten(), self.clip_range)
        loss = (weight.repeat_interleave(states.next_latents.shape[1]) * surrogate).mean()
        if self.kl_weight:
            kl = self.sampler.kl_to_reference(self.policy, transition, states.latents, states.step, conditioning)
            loss = loss + self.kl_weight * (weight * kl).mean()
        moved = log_ratio.detach()
        ratio = moved.exp()
        values = {"train/ratio": ratio, "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float()}
        return loss, values | ({"train/log_prob_drift": moved.abs()} if self.on_policy else {})

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
        return Drawn(latents, after, step, torch.zeros(after.shape[:2], device=latents.device))

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
        return f"replayed log-probabilities are those of sampling, to {drift:.1e}"

    def describe(self, batch: Batch) -> str:
        """Its prompts and sampling steps."""
        return f"sampling steps {batch.examples.step.unique().tolist()} of {super().describe(batch)}"

    def _transition(self, states: Drawn, conditioning: Conditioning) -> Transition:
        return self.sampler.transition(self.policy, states.latents, states.step, conditioning)


def _log_ratio(states: Drawn, transition: Transition) -> Float[Tensor, " samples"]:
    draws = states.next_latents.shape[1]
    return log_prob_of(states.next_latents.flatten(0, 1), repeat(transition, draws)) - states.log_probs.flatten()
