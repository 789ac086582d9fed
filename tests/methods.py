"""Every way of training a policy on the embedded models: what the tests of all of them share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig

from vp_rl.algorithms.awm import AdvantageWeightedMatching
from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining
from vp_rl.algorithms.branch_ddpo import BranchDDPO
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.dpo import DiffusionDPO
from vp_rl.algorithms.draft import DRaFT
from vp_rl.algorithms.flow_bp import FlowBP
from vp_rl.algorithms.nft import DiffusionNFT
from vp_rl.algorithms.refl import ReFL
from vp_rl.interfaces import Policy, Reward
from vp_rl.policies.sd import StableDiffusion
from vp_rl.rewards.vp_score import VPScore
from vp_rl.sampler import Sampler

ADAM = partial(torch.optim.AdamW, lr=1e-3)
NOISY, STILL = (Sampler(steps=4, guidance=3.0, eta=eta) for eta in (1.0, 0.0))
Make = Callable[..., PolicyTraining]


def tiny_sd(**settings: Any) -> StableDiffusion:
    """The embedded Stable Diffusion with a small LoRA."""
    targets = {"to_q", "to_k", "to_v", "conv1"}
    lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
    return StableDiffusion("tiny-sd", lora, **settings)


def rewarded(
    kind: type,
    sampler: Sampler,
    policy: Policy | None = None,
    reward: Reward | None = None,
    optimizer: MakeOptimizer = ADAM,
    **settings: Any,
) -> PolicyTraining:
    """Against the tiny VP-Score, or another reward."""
    return kind(policy or tiny_sd(), reward or VPScore.load("tiny-vp-score"), sampler, optimizer, **settings)


def paired(
    policy: Policy | None = None, reward: Reward | None = None, optimizer: MakeOptimizer = ADAM, **settings: Any
) -> PolicyTraining:
    """On pairs, whatever the reward."""
    return DiffusionDPO(policy or tiny_sd(), optimizer, **settings)


METHODS: dict[str, Make] = {
    "ddpo": partial(rewarded, DDPO, NOISY),
    "branch_ddpo": partial(rewarded, BranchDDPO, NOISY),
    "nft": partial(rewarded, DiffusionNFT, STILL),
    "awm": partial(rewarded, AdvantageWeightedMatching, STILL),
    "refl": partial(rewarded, ReFL, STILL),
    "draft": partial(rewarded, DRaFT, STILL, last_steps=2),
    "draft_lv": partial(rewarded, DRaFT, STILL, renoise=2),
    "flow_bp": partial(rewarded, FlowBP, STILL, active_steps=2),
    "dpo": paired,
}
