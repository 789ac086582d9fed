"""DDPO against the arithmetic of kvablack/ddpo-pytorch, written down again from its formulas (the published ones).

Its scheduler step with a log-probability, its statistics by prompt and its clipped loss, accumulated over all samples
and timesteps to one update, know nothing of ours but the pipeline's networks.
"""

import math
from functools import partial
from typing import Any

import lightning
import torch
from fakes import Words
from peft import LoraConfig
from torch import Tensor

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.rounds import Rollout
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Reward
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Scores

STEPS, GUIDANCE, ETA, CLIP = 4, 5.0, 1.0, 1e-4
PROMPTS, IMAGES = 2, 3


class Brightness(Reward):
    differentiable = False

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return images.mean((1, 2, 3))


def tiny_sd() -> StableDiffusion:
    """With an adapter that has moved, so that all of its matrices have gradients."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    policy = StableDiffusion("tiny-sd", LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def their_log_prob(policy: StableDiffusion, text: Tensor, empty: Tensor, x: Tensor, t: Tensor, after: Tensor) -> Tensor:
    """Of `after` given `x` at timestep `t`: guidance, DDIM's equations 12 and 16, the density averaged."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()  # the pipeline's own: scaled_linear
    alphas = (1 - betas).cumprod(0)
    unconditional, conditional = (
        policy.unet(x, t, encoder_hidden_states=words).sample for words in (empty.expand_as(text), text)
    )
    v = unconditional + GUIDANCE * (conditional - unconditional)
    now, then = (alphas[i][:, None, None, None] for i in (t, (t - 1000 // STEPS).clamp(0, 999)))
    x0, epsilon = now.sqrt() * x - (1 - now).sqrt() * v, now.sqrt() * v + (1 - now).sqrt() * x
    sigma = ETA * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    mean = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * epsilon
    density = -((after - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
    return density.mean((1, 2, 3))


def their_advantages(rewards: Tensor, prompts: list[str]) -> Tensor:
    """Standardised by the images of the same prompt, clipped to 5."""
    found = torch.empty(len(rewards))
    for prompt in set(prompts):
        own = torch.tensor([other == prompt for other in prompts])
        found[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std(unbiased=False) + 1e-6)
    return found.clamp(-5, 5)


def test_two_updates_are_those_of_ddpo_pytorch() -> None:
    """The first at a ratio of 1, the second where the first has moved it, some ratios out of the clip range."""
    sampler = Sampler(steps=STEPS, guidance=GUIDANCE, eta=ETA)
    settings: dict[str, Any] = {"images_per_prompt": IMAGES, "train_batch": 6, "clip_range": CLIP, "inner_epochs": 2}
    lr = 1e-2
    ours = DDPO(tiny_sd(), Brightness(), sampler, partial(torch.optim.SGD, lr=lr), weight_by_std=False, **settings)
    rollouts: list[Rollout] = []
    rollout = ours.rollout
    ours.rollout = lambda *given: (rollouts.append(rollout(*given)), rollouts[-1])[1]  # type: ignore[method-assign]
    gradients: list[list[Tensor]] = []

    class Record(lightning.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            gradients.append([p.grad.clone() for p in ours.policy.parameters() if p.requires_grad])

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=PROMPTS * IMAGES * STEPS // 6,
        callbacks=[Record()],
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(ours, PromptDataModule(Words(), PROMPTS))
    [(batch, _, _)] = rollouts
    states = batch.examples

    policy = tiny_sd()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    x, after, old = states.latents, states.next_latents[:, 0], states.log_probs[:, 0]
    timesteps = (STEPS - 1 - states.step) * (1000 // STEPS) + 1  # `leading`, with an offset of 1
    prompts = [ours.prompts[row] for row in batch.prompt.tolist()]
    text, empty = policy.encode(prompts)["text"], policy.encode([""])["text"]
    last = states.step == STEPS - 1
    finished = [prompt for prompt, is_last in zip(prompts, last.tolist(), strict=True) if is_last]
    with torch.no_grad():
        advantages = their_advantages(policy.decode(after[last]).mean((1, 2, 3)), finished)
    advantages = advantages.repeat_interleave(STEPS)
    torch.testing.assert_close(batch.advantages[:, 0], advantages, rtol=0, atol=1e-4)

    clipped = 0
    for update, found in enumerate(gradients):
        log_prob = their_log_prob(policy, text, empty, x, timesteps, after)
        if update == 0:
            torch.testing.assert_close(old, log_prob.detach(), rtol=0, atol=1e-5)
        ratio = (log_prob - old).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        expected = torch.autograd.grad(loss, trained)
        one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
        # Float32 of micro-batches against one batch, and weights whose last bits differ from the first update on.
        assert (one - other).norm() <= 1e-4 * other.norm()
        clipped += int(((ratio - 1).abs() > CLIP).sum())
        for parameter, gradient in zip(trained, expected, strict=True):
            parameter.data -= lr * gradient
    assert len(gradients) == 2
    assert 0 < clipped < len(old)
