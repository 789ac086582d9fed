"""The pieces of work that a run is made of, one by one: what is counted, timed and tried on the device.

Each is done through the interfaces, on made-up latents and images, with the batch sizes of a plan.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import log_prob_of
from vp_rl.types import Conditioning, Images, Latents, take

PROMPT = "a red circle left of a blue square"

Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Work:
    """An algorithm's pieces of work.

    Attributes:
        algorithm: its settings; its policy and reward, unless others are given.
        conditioning: of one prompt.
        policy, reward: what does the work.
        precision: what everything is done within.
    """

    algorithm: PolicyTraining
    conditioning: Conditioning
    policy: Policy
    reward: Reward
    precision: Context = field(default=nullcontext)

    @torch.no_grad()
    def sample(self, batch: int) -> Latents:
        """One sampling step of so many images."""
        with self.precision():
            return self.algorithm.sampler.sample(self.policy, self._conditions(batch), until=1)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Of finished latents."""
        with self.precision():
            return self.policy.decode(latents)

    @torch.no_grad()
    def score(self, images: Images) -> Tensor:
        """The reward's scores."""
        with self.precision():
            return self.reward(images, [PROMPT] * len(images))

    def make(self, batch: int) -> Tensor:
        """Scores of so many images, of one sampling step each."""
        return self.score(self.decode(self.sample(batch)))

    def train(self, batch: int) -> None:
        """The forward and backward pass of a micro-batch; gradients stay."""
        with self.precision():
            loss = self._loss(self.policy.noise(batch), self._conditions(batch))
        loss.backward()

    def _loss(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        algorithm, sampler = self.algorithm, self.algorithm.sampler
        which = algorithm.trained_steps[0] if isinstance(algorithm, DDPO) else 0
        step = torch.full((len(latents),), which, device=latents.device)
        transition = sampler.transition(self.policy, latents, step, conditioning)
        if not isinstance(algorithm, DDPO):
            scores = self.reward(self.policy.decode(transition.x0), [PROMPT] * len(latents))
            return scores.mean()
        loss = log_prob_of(latents, transition).mean()
        if algorithm.kl_weight:
            with torch.no_grad(), self.policy.reference():
                reference = sampler.transition(self.policy, latents, step, conditioning)
            loss = loss + (transition.mean - reference.mean).square().mean()
        return loss

    def _conditions(self, batch: int) -> Conditioning:
        device = next(iter(self.conditioning.values())).device
        return take(self.conditioning, torch.zeros(batch, dtype=torch.long, device=device))

    def forget(self) -> None:
        """Drops the gradients."""
        for parameter in self.policy.parameters():
            parameter.grad = None


@contextmanager
def real(algorithm: PolicyTraining, device: torch.device, precision: Context = nullcontext) -> Iterator[Work]:
    """The work with the algorithm itself on a device; it is left as it was, and so are random numbers."""
    before = algorithm.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        algorithm.to(device)
        work = Work(algorithm, algorithm.policy.encode([PROMPT]), algorithm.policy, algorithm.reward, precision)
        try:
            yield work
        finally:
            work.forget()
            algorithm.to(before)
