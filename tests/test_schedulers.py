"""A policy samples what an untouched pipeline of its folder samples; or it warns, naming both samplers, or refuses.

The other side is always the pipeline's own call, loaded by diffusers from the folder, with the folder's own scheduler.
"""

import inspect
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import families
import pytest
import tiny_pipelines
import torch
from diffusers import SchedulerMixin
from hydra.utils import get_object

from vp_rl.interfaces import Policy
from vp_rl.sampler import Sampler

PROMPTS = ["a red circle", "two blue squares"]
REQUIRED = {
    "num_vec_classes": 9,
    "mask_token_id": 0,
    "schedule_mode": "log",
    "noise_mode": "tan",
    "tsr_k": 1,
    "tsr_sigma": 1,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOWS = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
U_NETS, TRANSFORMERS = ["sd15", "sdxl"], ["sd3", "flux"]
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and not name.startswith(("Flax", "Score"))
    and inspect.isclass(getattr(diffusers, name))
)
SAME = {"DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"}
COMMON = ["EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler", "LCMScheduler"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, which mends old configurations as it loads
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of some of its schedulers
]


def folder_with(case: str, config: dict[str, Any], target: Path) -> Path:
    """The model of a case with another scheduler: its class is in `config`."""
    shutil.copytree(families.folder(case), target, copy_function=os.link)
    index = json.loads((target / "model_index.json").read_text())
    for file, content in (
        (target / "model_index.json", {**index, "scheduler": ["diffusers", config["_class_name"]]}),
        (target / "scheduler" / "scheduler_config.json", config),
    ):
        file.unlink()  # a link
        file.write_text(json.dumps(content))
    return target


def config_of(name: str, **settings: Any) -> dict[str, Any]:
    """As that class saves itself, with those of the settings that it has."""
    known = inspect.signature(getattr(diffusers, name)).parameters
    given = {key: value for key, value in settings.items() if key in known}
    if name == "UnCLIPScheduler":
        given.pop("beta_schedule", None)
    given |= {key: value for key, value in REQUIRED.items() if key in known}
    return {**getattr(diffusers, name)(**given).config, "_class_name": name}


def load(case: str, folder: Path, **settings: Any) -> Policy:
    kind = get_object(families.read_yaml(case)._target_)
    own = {"resolution": 16} | ({"t5_tokens": 24} if case in TRANSFORMERS else {})
    return kind(str(folder), None, **(own | settings))


def own_images(case: str, folder: Path, guidance: float = 4.0, steps: int = 3, **settings: Any) -> torch.Tensor:
    call = {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": guidance}
    call |= {"max_sequence_length": 24} if case in TRANSFORMERS else {}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pipeline = tiny_pipelines.load(folder)
    return pipeline(PROMPTS, generator=generators, output_type="pt", **(call | settings)).images


def images_of(policy: Any, guidance: float = 4.0, steps: int = 3) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    latents = Sampler(steps, guidance, 0.0).sample(policy, policy.encode(PROMPTS), generators)
    return policy.decode(latents)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vp_rl")]


@torch.no_grad()
def check_the_law(case: str, config: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture, **how: Any) -> str:
    """Returns `same`, `warned` or `refused`.

    Raises:
        AssertionError: none of them.
    """
    name = config["_class_name"]
    folder_with(case, config, folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            policy = load(case, folder)
        except ValueError as reason:
            return "refused" if "scheduler" in str(reason) else str(reason)
    ours = images_of(policy, **how)
    assert torch.isfinite(ours).all()
    if messages := warned(caplog):
        (message,) = messages
        assert name in message
        assert ("FlowMatchEuler" if case in TRANSFORMERS else "DDIM") in message
        return "warned"
    # Each step rounds to 1e-7 of numbers up to 15 (the first divides by the signal's share, 0.07); guidance times 7.
    torch.testing.assert_close(ours, own_images(case, folder, **how), rtol=0, atol=1e-4)
    return "same"


@pytest.mark.parametrize("case", U_NETS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in SCHEDULERS]
)
def test_a_u_net_samples_as_its_pipeline_does_or_says_that_it_does_not(
    case: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not issubclass(getattr(diffusers, name), SchedulerMixin):
        return
    outcome = check_the_law(case, config_of(name, **BETAS), tmp_path / "model", caplog)
    if name in SAME and not name.startswith("Flow"):
        assert outcome == "same"
    elif name == "EDMEulerScheduler" or "Flow" in name:
        assert outcome == "refused"
    elif name in COMMON:
        assert outcome == "warned"
    else:
        assert outcome != "same"


@pytest.mark.parametrize("case", TRANSFORMERS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("UniPCMultistepScheduler", "PNDMScheduler") else pytest.mark.slow)
        for name in SCHEDULERS
    ],
)
def test_a_flow_model_samples_as_its_pipeline_does_or_says_that_it_does_not(
    case: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not issubclass(getattr(diffusers, name), SchedulerMixin):
        return
    config = config_of(name, shift=3.0, **FLOWS)
    outcome = check_the_law(case, config, tmp_path / "model", caplog)
    if name == "FlowMatchEulerDiscreteScheduler":
        assert outcome == "same"
    elif config.get("use_flow_sigmas") and not name.endswith("InverseScheduler") and not name.startswith("Helios"):
        assert outcome == "warned"
        assert load(case, tmp_path / "model").process._scheduler.shift == 3.0
    elif name in ("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        assert outcome == "warned"
    else:
        assert outcome == "refused"


DDIM = "DDIMScheduler"
EULER = "EulerDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
V = {"prediction_type": "v_prediction"}
UNUSUAL = {
    "clip": ("sdxl", DDIM, {"clip_sample": True, "clip_sample_range": 2.0}, "same"),
    "clip_by_default": ("sd15", DDIM, {}, "same"),
    "threshold": ("sd15", DDIM, {"thresholding": True, "clip_sample": False}, "refused"),
    "offset": ("sdxl", DDIM, {"clip_sample": False, "steps_offset": 7}, "same"),
    "one": ("sd15", DDIM, {"set_alpha_to_one": False}, "same"),
    "ddim_linspace": ("sdxl", DDIM, {"clip_sample": False, "timestep_spacing": "linspace"}, "same"),
    "ddim_trailing": ("sd15", DDIM, {"timestep_spacing": "trailing"}, "same"),
    "ddim_sample": ("sd15", DDIM, {"prediction_type": "sample"}, "same"),
    "no_snr": ("sd15", DDIM, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}, "same"),
    "no_snr_epsilon": ("sd15", DDIM, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "refused"),
    "trained_betas": ("sd15", DDIM, {"trained_betas": [0.001 + 0.01 * i / 1000 for i in range(1000)]}, "same"),
    "euler_linspace": ("sdxl", EULER, {"timestep_spacing": "linspace"}, "same"),
    "euler_leading": ("sd15", EULER, {"timestep_spacing": "leading"}, "same"),
    "euler_trailing": ("sdxl", EULER, {"timestep_spacing": "trailing", **V}, "same"),
    "euler_karras": ("sdxl", EULER, {"use_karras_sigmas": True, "sigma_max": 9.0}, "same"),
    "euler_exponential": ("sdxl", EULER, {"use_exponential_sigmas": True, "timestep_spacing": "leading"}, "same"),
    "euler_minimum": ("sdxl", EULER, {"final_sigmas_type": "sigma_min"}, "same"),
    "euler_logarithms": ("sdxl", EULER, {"interpolation_type": "log_linear"}, "same"),
    "euler_no_snr": ("sdxl", EULER, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}, "same"),
    "euler_clean": ("sdxl", EULER, {"prediction_type": "original_sample"}, "same"),
    "euler_sample": ("sdxl", EULER, {"prediction_type": "sample"}, "refused"),
    "euler_continuous": ("sdxl", EULER, {"timestep_type": "continuous", **V}, "refused"),
    "flow_in_a_u_net": ("sd15", "UniPCMultistepScheduler", FLOWS, "refused"),
    "dpm_clips": ("sd15", "DPMSolverMultistepScheduler", {"thresholding": True}, "refused"),
    "dpm_of_noise_in_sd3": ("sd3", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "refused"),
    "shifted": ("sd3", FLOW, {"shift": 7.0}, "same"),
    "dynamic_sd3": ("sd3", FLOW, {"use_dynamic_shifting": True, "base_shift": 0.1, "max_shift": 3.0}, "same"),
    "dynamic_flux": ("flux", FLOW, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, "same"),
    "flow_karras": ("flux", FLOW, {"use_karras_sigmas": True}, "same"),
    "flow_exponential": ("sd3", FLOW, {"use_exponential_sigmas": True}, "same"),
    "terminal": ("flux", FLOW, {"shift_terminal": 0.1}, "same"),
    "inverted": ("sd3", FLOW, {"invert_sigmas": True}, "refused"),
    "stochastic": ("flux", FLOW, {"stochastic_sampling": True}, "refused"),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_schedules_are_the_pipelines_own(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, name, settings, outcome = UNUSUAL[what]
    betas = {} if "trained_betas" in settings else BETAS
    assert check_the_law(case, config_of(name, **betas, **settings), tmp_path / "model", caplog) == outcome


@pytest.mark.parametrize("lacking", ["clip_sample", "steps_offset", "set_alpha_to_one", "prediction_type", "all"])
@pytest.mark.parametrize("name", [DDIM, "PNDMScheduler"])
@pytest.mark.parametrize("case", U_NETS)
def test_configurations_of_old_versions_are_read_as_the_pipeline_mends_them(
    case: str, name: str, lacking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SD's pipeline changes clip_sample and steps_offset as it loads; SDXL's does not."""
    config = config_of(name, **BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    needed = {"_class_name", *BETAS, "num_train_timesteps"}
    kept = {key: value for key, value in config.items() if (key in needed if lacking == "all" else key != lacking)}
    kept["_diffusers_version"] = "0.2.2"
    outcome = check_the_law(case, kept, tmp_path / "model", caplog)
    assert outcome == ("same" if name == DDIM else "warned")
    assert load(case, tmp_path / "model").process._clip == (
        1.0 if case == "sdxl" and name == DDIM and lacking in ("clip_sample", "all") else None
    )
    if case == "sd15":
        assert load(case, tmp_path / "model").process.timesteps(20)[-1] == 1


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_eulers_steps_are_the_pipelines_at_any_number(
    spacing: str, steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(EULER, **BETAS, timestep_spacing=spacing)
    assert check_the_law("sdxl", config, tmp_path / "model", caplog, steps=steps) == "same"
