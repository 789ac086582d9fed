"""The DDIM transition against diffusers' own scheduler, at every step."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from vp_rl.processes.ddim import DDIM
from vp_rl.sampler import Sampler

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "extra", [{}, {"set_alpha_to_one": True}, {"clip_sample": True}, {"timestep_spacing": "trailing"}]
)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_every_step_is_diffusers_step(eta: float, prediction: str, extra: dict, steps: int) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction, **extra}
    process, scheduler = DDIM(DDIMScheduler(**config)), DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        output, noise = torch.randn(2, 2, 4, 8, 8, generator=generator).unbind()
        theirs = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
        ours = process.transition(output, latents, torch.full((2,), step), steps, eta)
        ours_next = ours.mean + ours.std.reshape(2, 1, 1, 1) * noise
        torch.testing.assert_close(ours_next, theirs.prev_sample, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=1e-5, atol=2e-5)
        latents = theirs.prev_sample
    assert torch.equal(process.timesteps(steps).long(), scheduler.timesteps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_noise_added_to_eulers_steps_is_that_of_its_ancestral_sampler(spacing: str) -> None:
    """With eta 1: the same mean and deviation, in latents that are divided by the signal's length."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": spacing}
    process, ancestral = DDIM(EulerDiscreteScheduler(**settings)), EulerAncestralDiscreteScheduler(**settings)
    ancestral.set_timesteps(6)
    assert process.start(6) == pytest.approx(
        float(ancestral.init_noise_sigma / (ancestral.sigmas[0] ** 2 + 1) ** 0.5), rel=1e-6
    )
    wide = ancestral.init_noise_sigma * torch.randn(2, 4, 8, 8)
    for step, timestep in enumerate(ancestral.timesteps):
        output = torch.randn_like(wide)
        narrow = ancestral.scale_model_input(wide, timestep)
        ours = process.transition(output, narrow, torch.full((2,), step), 6, 1.0)
        noise = torch.randn(wide.shape, generator=torch.Generator().manual_seed(step))
        wide = ancestral.step(output, timestep, wide, generator=torch.Generator().manual_seed(step)).prev_sample
        length = (ancestral.sigmas[step + 1] ** 2 + 1) ** 0.5
        # Float32 of numbers up to 15 times 4, which the signal's share of 0.07 has been taken out of.
        ours_next = ours.mean + ours.std.reshape(2, 1, 1, 1) * noise
        torch.testing.assert_close(ours_next, wide / length, rtol=1e-4, atol=1e-4)


def test_rows_may_be_at_different_steps() -> None:
    process = DDIM(DDIMScheduler(**STABLE_DIFFUSION))
    output, latents, steps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([9, 0, 4])
    together = process.transition(output, latents, steps, 10, 1.0)
    for row in range(3):
        alone = process.transition(output[row : row + 1], latents[row : row + 1], steps[row : row + 1], 10, 1.0)
        torch.testing.assert_close(together.mean[row : row + 1], alone.mean)
        torch.testing.assert_close(together.std[row : row + 1], alone.std)


def test_the_transition_is_float32_whatever_the_network_is() -> None:
    transition = DDIM(DDIMScheduler(**STABLE_DIFFUSION)).transition(
        torch.randn(1, 4, dtype=torch.bfloat16), torch.randn(1, 4), torch.tensor([0]), 10, 1.0
    )
    assert {tensor.dtype for tensor in transition} == {torch.float32}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_back_the_clean_latents(prediction: str) -> None:
    process = DDIM(DDIMScheduler(**{**STABLE_DIFFUSION, "prediction_type": prediction}))
    x0, noise = torch.randn(2, 5, 4, 2, 2).unbind()
    steps = torch.tensor([0, 2, 4, 6, 9])
    timestep = process.timesteps(10)[steps]
    noised = process.add_noise(x0, noise, timestep)
    transition = process.transition(process.target(x0, noise, timestep), noised, steps, 10, 0.0)
    # float32 over the signal's share: dividing by sqrt(alpha) of 0.08 at the first step
    torch.testing.assert_close(transition.x0, x0, rtol=1e-4, atol=2e-5)


def test_steps_out_of_range_and_unknown_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        DDIM(DDIMScheduler(**STABLE_DIFFUSION)).timesteps(1001)
    with pytest.raises(ValueError, match="steps=1000 does not fit .* from timestep 1000 of 1000"):
        DDIM(DDIMScheduler(**STABLE_DIFFUSION)).timesteps(1000)
    with pytest.raises(ValueError, match="thresholding"):
        DDIM(DDIMScheduler(**STABLE_DIFFUSION, thresholding=True))
    with pytest.raises(ValueError, match="eta"):
        Sampler(eta=-1.0)
