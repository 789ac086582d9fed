"""ReFL (Xu et al. 2023): gradients of the reward through one late denoising step.

Objective: minimise weight * E[relu(target - r(x0_hat(x_t), prompt))] + pretrain_weight * E[|eps - eps_theta|^2].

What differs from the published script (paper.md 2.7):
1. A LoRA is trained, not the whole U-Net.
2. The stop step is drawn for each update from a window of sampling steps given as a share of all steps, so that it
   means the same at 10 steps as at 40.
3. The pretraining loss, which the paper alternates and the script leaves out, is a term of every step: 0 by default.
4. Guidance and the sampler are settings; as in the script, the default is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.reward_gradient import Finished, RewardGradient
from vp_rl.configuration import kinds
from vp_rl.functional import hinge_reward_loss
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Generators, Sampler
from vp_rl.types import Conditioning, Latents, Scores


class ReFL(RewardGradient):
    """Fine-tunes a policy by back-propagating a differentiable reward through the prediction of one step.

    Args:
        policy, reward, sampler, optimizer, decay, seed, reward_weight, pretrain_weight: see `RewardGradient`.
        window: first and last stop step as a share of the sampling steps; (0.75, 1.0) is the published 30-39 of 40.
        target: score at which an image is good enough and is pushed no further.

    Raises:
        ValueError: the reward is not differentiable, or the window is none.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        window: kinds.Span = (0.75, 1.0),
        target: kinds.Real = 2.0,
        reward_weight: kinds.Amount = 1e-3,
        pretrain_weight: kinds.Amount = 0.0,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        weights = {"reward_weight": reward_weight, "pretrain_weight": pretrain_weight}
        super().__init__(policy, reward, sampler, optimizer, **weights, decay=decay, seed=seed)
        self.starts, self.target = sampler.window("algorithm.window", *window), target
        self._stds = sampler.stds(policy).tolist()

    def finish(self, latents: Latents, start: int, conditioning: Conditioning, noise: Generators) -> Finished:
        """The image that the policy predicts at this step."""
        step = torch.full((len(latents),), start, device=latents.device)
        transition = self.sampler.transition(self.policy, latents, step, conditioning)
        images = self.policy.decode(transition.x0)
        if not self._stds[start]:  # a deterministic step has no density, so no KL
            return Finished(images)
        return Finished(images, kl=self.sampler.kl_to_reference(self.policy, transition, latents, step, conditioning))

    def of_scores(self, scores: Scores) -> Float[Tensor, ""]:
        """The hinge: scores of `target` or more are not pushed."""
        return hinge_reward_loss(scores, self.target)
