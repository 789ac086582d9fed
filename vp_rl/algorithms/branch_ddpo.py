"""DDPO whose images of a prompt part at one random step (TempFlow-GRPO's branching, MixGRPO's window).

The objective is in policy_gradient.py. In each round one step k is drawn from a window. The images of a prompt share
their starting noise and the deterministic way to k, draw their own noise there, and go on without any; only step k is
trained. What scores differ by is then the doing of the step that is credited for it, the images have a deterministic
sampler's quality, and as all draws of a prompt are from one state, a round trains on as many states as it has prompts.

What it estimates: with J_k the expected reward of "deterministic but for step k", the partial derivative of J_k through
step k's mean alone, over the standard deviation of the scores of a group. That is not the whole gradient of any one
policy's expected reward: how the deterministic steps depend on the weights is left out. As the noise goes to 0 it
becomes the deterministic sampler's gradient, step by step. A group's scores spread by std_k times the gain of what
comes after, so that without weights step k would count as 1 / std_k: `weight_by_std` takes exactly that out.
"""

import torch

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.phases import Load
from vp_rl.algorithms.policy_gradient import Drawn, PolicyGradient
from vp_rl.algorithms.rounds import Part
from vp_rl.configuration import kinds
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Latents


class BranchDDPO(PolicyGradient):
    """Fine-tunes a policy against any reward, differentiable or not, one random step at a time.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, inner_epochs, advantage_clip, decay, seed:
            see `OnlineTraining`. The sampler's eta, of the one random step, must be above 0.
        train_batch: states x_t trained at once; a round has one for each prompt.
        clip_range: how far the ratio may move, on the log-density averaged over latent dimensions.
        window: first and last branching step as a share of the sampling steps.
        min_std: steps with at most this standard deviation are not trained on; deterministic ones never are.
        weight_by_std: see the module's text.
        kl_weight: scale of the KL to the reference; 0 saves its forward passes.

    Raises:
        ValueError: a setting is outside its range, or no step has a density.
    """

    whole_prompts = True

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
        clip_range: kinds.Positive = 1e-4,
        advantage_clip: kinds.Positive = 5.0,
        window: kinds.Span = (0.0, 0.6),
        min_std: kinds.Amount = 0.0,
        weight_by_std: bool = True,
        kl_weight: kinds.Amount = 0.0,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        super().__init__(
            policy,
            reward,
            sampler,
            optimizer,
            images_per_prompt=images_per_prompt,
            sample_batch=sample_batch,
            train_batch=train_batch,
            inner_epochs=inner_epochs,
            advantage_clip=advantage_clip,
            decay=decay,
            seed=seed,
        )
        self.clip_range, self.kl_weight = clip_range, kl_weight
        self._train_on(sampler.window("algorithm.window", *window), min_std, weight_by_std)
        self.kept = 4  # before and after the step, twice while they are stacked

    def collect(self, part: Part, *position: int) -> tuple[Latents, Drawn]:
        """One state for each prompt: where its images part."""
        conditioning = {name: tensor[:: part.each] for name, tensor in part.conditioning.items()}
        choice = torch.randint(len(self.trained_steps), (1,), generator=self.generator(*position))
        step = self.trained_steps[int(choice)]
        start = self.generators(part.places, [-1], *position)  # of the prompt, whichever devices have its images
        found = self.sampler.branch(self.policy, conditioning, step, part.each, start, self.sample_batch, part.noise)
        steps = torch.full((len(part.places),), step, device=found.latents.device)
        after = found.next_latents
        return found.finished.flatten(0, 1), Drawn(found.latents, after, steps, found.log_probs, after[:, :0])

    def denoised(self, load: Load) -> float:
        """Until they part, the images of a prompt are one."""
        steps = self.sampler.steps
        shared = (sum(self.trained_steps) / len(self.trained_steps) + 1) / steps
        return steps * (1 - shared + shared * load.prompts / load.images)
