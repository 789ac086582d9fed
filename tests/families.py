"""A policy of every model family on a tiny random model, with its yaml's own LoRA, and what tests do with one."""

import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from vp_rl.interfaces import Policy, Reward
from vp_rl.types import Images, Negative, Scores

YAMLS = sorted((Path(__file__).parents[1] / "conf" / "policy").glob("*.yaml"))
CASES = [*(file.stem for file in YAMLS), "sd3_without_t5", "flux_schnell"]
FAMILIES = ["sd15", "sdxl", "sd3", "flux"]
PROMPTS = ["a red circle", "two blue squares"]
TIMESTEP = torch.tensor([500.0, 20.0])

_home = tempfile.TemporaryDirectory(prefix="pipelines-")
_made: dict[str, Policy] = {}


class Redness(Reward):
    """Red over the other channels: a reward with a gradient."""

    differentiable = True

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def folder(case: str) -> Path | str:
    """Where the model of a case lies; made when it is first asked for."""
    return "tiny-sd" if case == "tiny_sd" else tiny_pipelines.save(case, Path(_home.name))


@cache
def read_yaml(case: str) -> DictConfig:
    """The policy's configuration as a run composes it."""
    conf = YAMLS[0].parents[1]
    name = case if (conf / "policy" / f"{case}.yaml").exists() else case.partition("_")[0]
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose(f"policy/{name}").policy


def make(case: str, **settings: Any) -> Any:
    """The policy of a case's yaml on its tiny model, with other settings where given; a copy of one loaded once."""
    key = f"{case} {settings}"
    if key not in _made:
        _made[key] = build(case, **settings)
    return deepcopy(_made[key])


def build(case: str, **settings: Any) -> Any:
    """The same, loaded for this call."""
    node = read_yaml(case)
    overrides: dict[str, Any] = {"path": str(folder(case))}
    if case != "tiny_sd":
        overrides |= {"variant": None, "resolution": 16, "dtype": "float32"}
    if "t5_tokens" in node:
        overrides["t5_tokens"] = 24
    return instantiate(node, **(overrides | settings))


def denoiser(policy: Any) -> nn.Module:
    """U-Net or transformer."""
    return policy.unet if hasattr(policy, "unet") else policy.transformer


def adapter(policy: Policy) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def perturb(policy: Policy) -> None:
    """An adapter that is far from the identity that it begins as, and the same one every time."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter(policy).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def predict(
    policy: Policy, prompts: list[str] = PROMPTS, guidance: float = 1.0, negative: Negative = "train"
) -> torch.Tensor:
    """From the same latents every time."""
    latents = policy.noise(len(prompts), torch.Generator().manual_seed(3))
    timestep = TIMESTEP[: len(prompts)].to(latents.device)
    return policy.predict(latents, timestep, policy.encode(prompts), guidance, negative)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Of the adapter, by a loss on one prediction."""
    policy.zero_grad()
    predict(policy).square().mean().backward()
    return {name: parameter.grad for name, parameter in adapter(policy).items() if parameter.grad is not None}
