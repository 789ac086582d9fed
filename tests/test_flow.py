"""Rectified flow: diffusers' Euler step without noise, Flow-GRPO's with it, and the same marginals at any noise."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from vp_rl.processes.flow import Flow

CONFIGS = {
    "sd3": ({"shift": 3.0}, False),
    "dev": ({"shift": 3.0, "use_dynamic_shifting": True}, True),
    "schnell": ({"shift": 1.0}, True),
    "karras": ({"use_karras_sigmas": True}, False),
}


def flow(settings: dict[str, Any], tokens: int, even: bool = False) -> Flow:
    return Flow(FlowMatchEulerDiscreteScheduler(**settings), tokens, even)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_every_step_without_noise_is_diffusers_step(config: str, tokens: int, steps: int) -> None:
    settings, even = CONFIGS[config]
    process, scheduler = flow(settings, tokens, even), FlowMatchEulerDiscreteScheduler(**settings)
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist() if even else None
    scheduler.set_timesteps(steps, sigmas=times, mu=calculate_shift(tokens))
    assert torch.equal(process.timesteps(steps), scheduler.timesteps)
    latents = torch.randn(2, 4, 8, 8)
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 8, 8)
        ours = process.transition(output, latents, torch.full((2,), step), steps, 0.0)
        latents = scheduler.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(ours.mean, latents, rtol=0, atol=1e-6)
        assert not ours.std.any()


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_a_step_with_noise_is_the_papers(eta: float) -> None:
    """Equation 9: dx = (v + sigma^2 / 2t (x + (1 - t) v)) dt + sigma sqrt(-dt) z, sigma = eta sqrt(t / (1 - t))."""
    steps, process = 10, flow({"shift": 3.0}, 256)
    times = [*(process.timesteps(steps).double() / 1000).tolist(), 0.0]
    x, v = torch.randn(2, 3, 4)
    for step in range(steps - 1):
        t, dt = times[step], times[step + 1] - times[step]
        sigma = eta * (t / (1 - (times[1] if step == 0 else t))) ** 0.5  # Flow-GRPO's code at t = 1
        transition = process.transition(v[None], x[None], torch.tensor([step]), steps, eta)
        mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
        torch.testing.assert_close(transition.mean[0], mean, rtol=1e-5, atol=1e-5)
        assert transition.std.item() == pytest.approx(sigma * (-dt) ** 0.5, rel=1e-5)
        torch.testing.assert_close(transition.x0[0], x - t * v)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.5])
def test_the_last_step_has_no_noise_and_gives_the_predicted_image(eta: float) -> None:
    for steps in (1, 10):
        latents, output = torch.randn(2, 1, 4)
        last = flow({"shift": 3.0}, 256).transition(output, latents, torch.tensor([steps - 1]), steps, eta)
        assert last.std.item() == 0
        torch.testing.assert_close(last.mean, last.x0)


def gaussian_marginal(steps: int, eta: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and deviation of finished latents for images of N(mean, std^2), whose exact velocity is known.

    Every step is affine in the latents then, so that both follow without sampling: from noise of N(0, 1) on.
    """
    process = flow({}, 256, even=True)
    m, variance = 0.0, 1.0
    for step in range(steps):
        t = process.timesteps(steps)[step].item() / 1000
        x = torch.tensor([[0.0], [1.0]])
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        velocity = -mean + slope * (x - (1 - t) * mean)
        at = process.transition(velocity, x, torch.full((2,), step), steps, eta)
        offset, gain = at.mean[0].item(), (at.mean[1] - at.mean[0]).item()
        m, variance = offset + gain * m, gain**2 * variance + at.std[0].item() ** 2
    return m, variance**0.5


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_noise_leaves_the_marginals_as_they_are(eta: float) -> None:
    errors = [
        max(abs(m - 0.5), abs(std - 0.6)) for m, std in (gaussian_marginal(steps, eta, 0.5, 0.6) for steps in (50, 500))
    ]
    # Euler's error is of the order of a step. The first step, where sigma is that of the second, adds eta^4 / 4 to a
    # variance of 1, which the later ones take away as steps^(-eta^2).
    for steps, error in zip((50, 500), errors, strict=True):
        assert error < 1 / steps + 0.3 * eta**4 / 4 * steps ** -(eta**2)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sampled_latents_have_the_images_mean_and_deviation(eta: float) -> None:
    number, steps, process = 20_000, 100, flow({"shift": 3.0}, 256)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 1, generator=generator)
    for step in range(steps):
        t = process.timesteps(steps)[step].item() / 1000
        slope = (t - (1 - t) * 0.36) / ((1 - t) ** 2 * 0.36 + t**2)
        velocity = -0.5 + slope * (x - (1 - t) * 0.5)
        at = process.transition(velocity, x, torch.full((number,), step), steps, eta)
        x = at.mean + at.std[:, None] * torch.randn(x.shape, generator=generator)
    # Four standard errors of the mean and of the deviation, and Euler's error of a step's order.
    assert x.mean().item() == pytest.approx(0.5, abs=4 * 0.6 / number**0.5 + 2 / steps)
    assert x.std().item() == pytest.approx(0.6, abs=4 * 0.6 / (2 * number) ** 0.5 + 2 / steps)


def test_a_perfect_prediction_gives_back_the_clean_latents() -> None:
    process, steps = flow({"shift": 3.0}, 256), torch.tensor([0, 2, 4, 6, 9])
    x0, noise = torch.randn(2, 5, 4, 2, 2).unbind()
    timestep = process.timesteps(10)[steps]
    noised = process.add_noise(x0, noise, timestep)
    transition = process.transition(process.target(x0, noise, timestep), noised, steps, 10, 0.0)
    torch.testing.assert_close(transition.x0, x0, rtol=0, atol=2e-6)


def test_rows_may_be_at_different_steps_and_all_is_float32() -> None:
    process, steps = flow({"shift": 3.0}, 256), torch.tensor([9, 0, 4])
    output, latents = torch.randn(3, 4, 2, dtype=torch.bfloat16), torch.randn(3, 4, 2)
    together = process.transition(output, latents, steps, 10, 0.7)
    assert {tensor.dtype for tensor in together} == {torch.float32}
    for row in range(3):
        alone = process.transition(output[row : row + 1], latents[row : row + 1], steps[row : row + 1], 10, 0.7)
        assert torch.equal(together.mean[row : row + 1], alone.mean)
        assert torch.equal(together.std[row : row + 1], alone.std)


def test_steps_out_of_range_and_schedulers_without_a_density_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        flow({}, 256).timesteps(1001)
    for name in ("invert_sigmas", "stochastic_sampling"):
        with pytest.raises(ValueError, match=name):
            flow({name: True}, 256)
