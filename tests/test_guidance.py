"""What the negative half of guidance may be while training, and scales of a prompt's own."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fakes import BlackBox, LinearPolicy, QuadraticReward, fit
from families import PROMPTS, TIMESTEP, adapter, make, perturb, predict
from torch import Tensor

from vp_rl.algorithms.awm import AdvantageWeightedMatching
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.draft import DRaFT
from vp_rl.algorithms.flow_bp import FlowBP
from vp_rl.algorithms.nft import DiffusionNFT
from vp_rl.algorithms.online_dpo import OnlineDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.types import SCALE, Negative

SCALES = [1.0, 2.0, 3.5, 7.5]
FAMILIES = ["tiny_sd", "sdxl", "sd3"]


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> StableDiffusion:
    made = make(request.param)
    perturb(made)
    return made


def output(policy: Any, scale: float, negative: Negative = "train") -> Tensor:
    return predict(policy, guidance=scale, negative=negative)


def slopes(policy: Any, predicted: Tensor, by: Tensor) -> dict[str, Tensor]:
    """The adapter's gradients of <by, predicted>."""
    policy.zero_grad()
    (predicted * by).sum().backward()
    return {name: parameter.grad for name, parameter in adapter(policy).items() if parameter.grad is not None}


def close(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding of sums that batches and orders change."""
    found, expected = found.detach(), expected.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("negative", ["train", "detach", "base"])
def test_at_scale_one_there_is_no_negative_half(policy: StableDiffusion, negative: Negative) -> None:
    assert torch.equal(output(policy, 1.0, negative), output(policy, 1.0))


def test_a_detached_negative_half_changes_gradients_alone(policy: StableDiffusion) -> None:
    close(output(policy, 3.0, "detach"), output(policy, 3.0))


def test_the_gradient_with_a_detached_half_is_scale_times_that_of_the_half_for_the_prompt(
    policy: StableDiffusion,
) -> None:
    guided = output(policy, 3.0, "detach")
    by = torch.randn(guided.shape, generator=torch.Generator().manual_seed(4))
    found = slopes(policy, guided, by)
    for name, slope in slopes(policy, output(policy, 1.0), by).items():
        close(found[name], 3.0 * slope)


def test_the_base_models_negative_half_is_that_of_the_adapter_switched_off(policy: StableDiffusion) -> None:
    with torch.no_grad():
        with policy.reference():
            latents = policy.noise(len(PROMPTS), torch.Generator().manual_seed(3))
            without = policy.predict(latents, TIMESTEP, policy.encode([""] * len(PROMPTS)), 1.0)
        if type(policy).__name__ == "StableDiffusionXL":
            pytest.skip("its negative half is zeros, which no prompt is")
        expected = without + 3.0 * (output(policy, 1.0) - without)
        close(output(policy, 3.0, "base"), expected)
        assert (output(policy, 3.0) - expected).abs().max() > 1e-3, "the adapter must matter to it"


@pytest.mark.parametrize("negative", ["train", "detach", "base"])
def test_merged_and_unmerged_give_the_same(policy: StableDiffusion, negative: Negative) -> None:
    with torch.no_grad():
        plain = output(policy, 3.0, negative)
        with policy.merged():
            close(output(policy, 3.0, negative), plain)
            with policy.reference():
                off = output(policy, 1.0)
        with policy.reference():
            assert torch.equal(off, output(policy, 1.0)), "also while merged, the reference has no adapter"
        assert torch.equal(output(policy, 3.0, negative), plain), "merging leaves the weights as they were"


def test_rows_have_scales_of_their_own(policy: StableDiffusion) -> None:
    told = policy.encode(PROMPTS)
    latents = policy.noise(len(PROMPTS), torch.Generator().manual_seed(3))
    found = policy.predict(latents, TIMESTEP, {**told, SCALE: torch.tensor([1.0, 4.0])}, 2.0)
    for row, scale in enumerate((1.0, 4.0)):
        close(found[row], output(policy, scale)[row])


def test_scales_are_drawn_for_each_prompt_and_reach_the_sampler() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    sampler = Sampler(steps=3, scales=SCALES)
    drawn = sampler.with_scales({"prompt": torch.zeros(4000, 1)}, generators)[SCALE]
    counts = torch.stack([(drawn == scale).sum() for scale in SCALES])
    assert int(counts.sum()) == 4000
    # Binomial: 1000 with a standard deviation of 27.4; four of them leave five of those.
    assert (counts - 1000).abs().max() < 137
    assert SCALE not in Sampler(steps=3).with_scales({"prompt": torch.zeros(4, 1)}, generators[:4])


class Recorded(LinearPolicy):
    """Keeps what its denoiser is asked for while gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, float, str]] = []

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Any,
        guidance: float,
        negative: Negative = "train",
    ) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append((SCALE in conditioning, guidance, negative))
        return super().predict(latents, timestep, conditioning, guidance)


SCALED = Sampler(steps=4, guidance=3.0, negative="detach", scales=[2.0, 4.0])


@pytest.mark.parametrize("method", [DiffusionNFT, AdvantageWeightedMatching, OnlineDPO])
def test_forward_process_methods_learn_the_half_for_the_prompt_whatever_it_was_sampled_with(method: Any) -> None:
    policy = Recorded()
    fit(method(policy, BlackBox(), SCALED, partial(torch.optim.Adam, lr=0.01), images_per_prompt=4), epochs=1)
    assert set(policy.asked) == {(False, 1.0, "train")}


@pytest.mark.parametrize("method", [DDPO, ReFL, DRaFT, FlowBP])
def test_the_others_learn_at_the_samplers_guidance(method: Any) -> None:
    policy, settings = Recorded(), {"images_per_prompt": 4} if method is DDPO else {}
    sampler = replace(SCALED, eta=1.0) if method is DDPO else SCALED
    reward = BlackBox() if method is DDPO else QuadraticReward()
    fit(method(policy, reward, sampler, partial(torch.optim.Adam, lr=0.01), **settings), epochs=1)
    assert set(policy.asked) == {(True, 4.0, "detach")}  # the largest, where a row has none of its own


def test_a_policy_that_knows_no_negative_half_is_asked_for_none() -> None:
    policy = LinearPolicy()
    Sampler(steps=3, guidance=2.0).sample(policy, policy.encode(["a"]))


@pytest.mark.parametrize("settings", [{"scales": []}, {"scales": [0.5, 2.0]}])
def test_what_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sampler.{next(iter(settings))}"):
        Sampler(**settings)
