"""FlowBP: what an image is made of is known in closed form, and its gradient is that of the whole way's outputs."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from fakes import LinearPolicy, QuadraticReward
from torch import Tensor

from vp_rl.algorithms.flow_bp import FlowBP, coefficients
from vp_rl.functional import rows
from vp_rl.interfaces import Process
from vp_rl.processes.ddim import DDIM
from vp_rl.processes.flow import Flow
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents

STEPS = 6
GUIDED = Sampler(steps=STEPS, guidance=3.0, eta=0.0)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROCESSES = {
    "noise": lambda: DDIM(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)),
    "v": lambda: DDIM(DDIMScheduler(**SD, prediction_type="v_prediction", clip_sample=False)),
    "v from pure noise": lambda: DDIM(
        DDIMScheduler(**SD, prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True)
    ),
    "clean": lambda: DDIM(DDIMScheduler(**SD, prediction_type="sample", clip_sample=False, set_alpha_to_one=False)),
    "noise, by Euler": lambda: DDIM(EulerDiscreteScheduler(**SD, timestep_spacing="leading")),
    "flow": lambda: Flow(FlowMatchEulerDiscreteScheduler(shift=3.0), 64),
}


class Wavy(LinearPolicy):
    """With a denoiser that is not linear, and guidance."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.bias.data = torch.tensor([0.3, -0.2, 0.1]).reshape(3, 1, 1)

    def predict(self, latents: Latents, timestep: Tensor, conditioning: Conditioning, guidance: float) -> Latents:
        time = rows(timestep / 1000, latents)
        without = torch.cos(2 * latents + time)
        with_prompt = torch.sin(latents + 3 * time + self.bias) * (1 + self.bias)
        return without + guidance * (with_prompt - without)


def flow_bp(process: str, **settings: Any) -> FlowBP:
    settings = {"sampler": GUIDED, "active_steps": None} | settings
    optimizer = partial(torch.optim.Adam, lr=0.03)
    return FlowBP(Wavy(PROCESSES[process]()), QuadraticReward(), optimizer=optimizer, **settings)


def noise(number: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + row) for row in range(number)]


def text(number: int) -> Conditioning:
    return {"text": torch.zeros(number, 1)}


def way(algorithm: FlowBP, number: int = 5) -> Tensor:
    return algorithm.begin(STEPS, text(number), noise(number))


def gradient(algorithm: FlowBP, latents: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
    images = algorithm.finish(latents, STEPS, text(len(latents)), generators).images
    return torch.autograd.grad(algorithm.reward(images, ["a"] * len(images)).sum(), algorithm.policy.bias)[0]


def unrolled(algorithm: FlowBP, latents: Latents) -> tuple[Tensor, list[Tensor]]:
    """Finished latents by the sampler's own steps, whose network is given latents without gradients; its outputs."""
    process, outputs = algorithm.policy.process, []
    for step, timestep in enumerate(process.timesteps(STEPS)):
        told = timestep.expand(len(latents))
        outputs.append(algorithm.policy.predict(latents.detach(), told, text(len(latents)), GUIDED.guidance))
        at = torch.full((len(latents),), step)
        latents = process.transition(outputs[-1], latents, at, STEPS, 0.0).mean
    return latents, outputs


def close(found: Tensor, expected: Tensor) -> None:
    """To some roundings of float32 at each of the steps."""
    assert (found - expected).norm() <= 8 * STEPS * 2**-23 * expected.norm()


@pytest.mark.parametrize("process", PROCESSES)
def test_an_image_is_its_noise_and_its_outputs_by_the_coefficients(process: str) -> None:
    algorithm = flow_bp(process)
    of_noise, of_outputs = coefficients(algorithm.policy.process, STEPS)
    begun = algorithm.policy.noise(64, noise(64)) * algorithm.policy.process.start(STEPS)
    finished, outputs = unrolled(algorithm, begun)
    terms = [of_noise * begun, *(each * output for each, output in zip(of_outputs, outputs, strict=True))]
    # Where terms are large and cancel, what the sampler itself has rounded is of their size.
    size = sum(term.abs() for term in terms).max()
    assert (sum(terms) - finished).abs().max() <= 8 * STEPS * 2**-23 * size


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("active", [2, None])
def test_the_image_that_is_scored_is_the_samplers_to_the_bit(process: str, active: int | None) -> None:
    algorithm = flow_bp(process, active_steps=active)
    images = algorithm.finish(way(algorithm), STEPS, text(5), noise(5)).images
    assert torch.equal(images, algorithm.sampler.sample(algorithm.policy, text(5), noise(5)))
    assert images.std() > 0.1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("rescale", "checkpointed"), [(0.0, True), (0.5, False), (1.0, True)])
def test_all_steps_are_the_gradient_of_the_unrolled_sampler(process: str, rescale: float, checkpointed: bool) -> None:
    algorithm = flow_bp(process, rescale=rescale, checkpoint_steps=checkpointed)
    latents = way(algorithm)
    finished, _ = unrolled(algorithm, latents[:, 0])
    [expected] = torch.autograd.grad(QuadraticReward()(finished, ["a"] * 5).sum(), algorithm.policy.bias)
    close(gradient(algorithm, latents), expected)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("rescale", [0.0, 0.5, 2.0])
def test_a_few_steps_are_their_part_of_it_scaled_up_as_published(process: str, rescale: float) -> None:
    """By autograd: each image's gradient in each output, and what each output is worth."""
    algorithm = flow_bp(process, active_steps=2, rescale=rescale)
    latents, steps = way(algorithm, 3), torch.tensor([[0, 4], [5, 1], [2, 3]])
    algorithm._drawn = lambda *_: steps  # type: ignore[method-assign]
    expected = torch.zeros(3, 1, 1)
    for row, active in enumerate(steps.tolist()):
        finished, outputs = unrolled(algorithm, latents[row : row + 1, 0])
        scored = QuadraticReward()(finished, ["a"]).sum()
        into = torch.autograd.grad(scored, outputs, retain_graph=True)
        worth = [torch.autograd.grad(finished.sum(), each, retain_graph=True)[0].mean().abs() for each in outputs]
        scale = 1 + rescale * (sum(worth) / sum(worth[step] for step in active) - 1)
        parts = (torch.autograd.grad(outputs[step], algorithm.policy.bias, into[step])[0] for step in active)
        expected = expected + scale * sum(parts)
    close(gradient(algorithm, latents), expected)


def test_steps_that_count_for_nothing_have_no_gradient() -> None:
    """Where the last step ends at its own prediction of the clean image, no other does."""
    policy = Wavy(DDIM(DDIMScheduler(**SD, prediction_type="sample", clip_sample=False, set_alpha_to_one=True)))
    algorithm = FlowBP(policy, QuadraticReward(), GUIDED, partial(torch.optim.Adam, lr=0.03), active_steps=2)
    latents = way(algorithm, 1)
    algorithm._drawn = lambda *_: torch.tensor([[0, 4]])  # type: ignore[method-assign]
    assert gradient(algorithm, latents).abs().max() == 0
    algorithm._drawn = lambda *_: torch.tensor([[0, 5]])  # type: ignore[method-assign]
    assert gradient(algorithm, latents).abs().max() > 0.1


def test_steps_are_drawn_by_their_weights_and_by_each_images_own_random_numbers() -> None:
    images = 4000
    first = flow_bp("flow", active_steps=1)._drawn(images, noise(images))
    expected = images * (torch.arange(STEPS) + 1.0) / 21
    deviation = (expected * (1 - expected / images)).sqrt()
    assert ((first[:, 0].bincount(minlength=STEPS) - expected).abs() <= 4 * deviation).all()
    several = flow_bp("flow", active_steps=3, late_bias=0.0)
    drawn = several._drawn(images, noise(images))
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    share = drawn.flatten().bincount(minlength=STEPS) / images
    assert ((share - 0.5).abs() <= 4 * (0.25 / images) ** 0.5).all()
    assert torch.equal(several._drawn(7, noise(7, first=5)), drawn[5:12])


def test_what_is_not_linear_or_not_deterministic_is_refused_with_the_way_out() -> None:
    clips = Wavy(DDIM(DDIMScheduler(**SD, clip_sample=True)))
    parts: dict[str, Any] = {"reward": QuadraticReward(), "optimizer": partial(torch.optim.Adam, lr=0.03)}
    with pytest.raises(ValueError, match=r"clips what is predicted \(clip_sample\).*algorithm=draft"):
        FlowBP(clips, sampler=GUIDED, **parts)
    clean = Wavy(DDIM(DDIMScheduler(**SD, prediction_type="sample", clip_sample=True, clip_sample_range=4.0)))
    with pytest.raises(ValueError, match=r"clip_sample"):
        FlowBP(clean, sampler=GUIDED, **parts)
    with pytest.raises(ValueError, match=r"set sampler\.eta=0 \(it is 1\.0\)"):
        flow_bp("flow", sampler=Sampler(STEPS, 3.0, 1.0))
    with pytest.raises(ValueError, match=r"active_steps=7 must be from 1 to sampler\.steps=6"):
        flow_bp("flow", active_steps=7)
    with pytest.raises(ValueError, match=r"late_bias=-1\.0"):
        flow_bp("flow", late_bias=-1.0)
