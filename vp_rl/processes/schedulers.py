"""Which sampler a pipeline's own scheduler is, as the processes here see it: the same, another one, or none of theirs.

What counts is the object that a loaded pipeline has: pipelines mend old configurations as they load, and the same
setting has other defaults in other classes, so that a configuration by itself does not say what is sampled.
"""

import inspect
import logging
from typing import Any

from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

log = logging.getLogger(__name__)

_STEPS_OF_DDIM = (DDIMScheduler, DDIMParallelScheduler, EulerDiscreteScheduler)
_OTHERS_FOR_DDIM = {  # by name, exactly: what is derived from one of them may do anything
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
_OTHERS_FOR_FLOW = {"FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_SPACING = ("timestep_spacing", "steps_offset", "prediction_type", "set_alpha_to_one")
_SHIFT = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
_NAMES = {"original_sample": "sample"}  # Euler's for DDIM's; what Euler calls `sample` it refuses itself
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def for_ddim(scheduler: SchedulerMixin) -> DDIMScheduler | DDIMParallelScheduler | EulerDiscreteScheduler:
    """That scheduler where its steps are DDIM's; of a sampler of another kind, DDIM in its place, with a warning.

    Euler's steps are DDIM's, divided by the length of the signal that DDIM keeps.

    Raises:
        ValueError: it is of no such model, or does what has no density; says which.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if type(scheduler) not in _STEPS_OF_DDIM and name not in _OTHERS_FOR_DDIM:
        raise ValueError(f"This model's scheduler is a {name}, {_REFUSED}")
    if config.get("use_flow_sigmas"):
        raise ValueError(f"This model's scheduler, a {name}, has use_flow_sigmas, {_REFUSED}")
    if config.get("thresholding"):
        raise ValueError("This scheduler uses dynamic thresholding, for which a step has no Gaussian density.")
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"This model's scheduler, a {name}, has timestep_type=continuous, {_REFUSED}")
    if (prediction := prediction_of(scheduler)) not in PREDICTIONS:
        raise ValueError(f"Unknown prediction type {config.get('prediction_type')!r} in the scheduler, a {name}.")
    own = scheduler if type(scheduler) in _STEPS_OF_DDIM else _ddim_like(scheduler)
    if prediction == "epsilon" and not own.alphas_cumprod.all():
        raise ValueError(
            "This scheduler predicts noise (prediction_type=epsilon) and begins without any signal "
            "(rescale_betas_zero_snr): from noise alone there is nothing to predict it from."
        )
    return own  # type: ignore[return-value]


def prediction_of(scheduler: SchedulerMixin) -> str:
    """What the denoiser predicts, in DDIM's words."""
    prediction = str(scheduler.config.get("prediction_type"))
    if type(scheduler) is EulerDiscreteScheduler:
        return _NAMES.get(prediction, "unknown" if prediction == "sample" else prediction)
    return prediction


def _ddim_like(scheduler: Any) -> DDIMScheduler:
    """DDIM with the noise that the model was trained with, where that sampler begins; it clips nothing."""
    config = scheduler.config
    alike = {name: config[name] for name in _SPACING if name in config}
    _say(scheduler, "DDIM", "with the noise levels of its training" + "".join(f", {k}={v}" for k, v in alike.items()))
    return DDIMScheduler(len(scheduler.betas), trained_betas=scheduler.betas.tolist(), clip_sample=False, **alike)


def for_flow(scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
    """That scheduler where its steps are Euler's on straight lines; of another kind, Euler's, with a warning.

    Raises:
        ValueError: it is of no such model, or does what has no density; says which.
    """
    name, config = type(scheduler).__name__, scheduler.config
    same = type(scheduler) is FlowMatchEulerDiscreteScheduler
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not (same or name in _OTHERS_FOR_FLOW or (flow and name in _OTHERS_FOR_DDIM)):
        raise ValueError(f"This model's scheduler is a {name}, and no rectified flow {_AS_IT_IS}: {_REFUSED}")
    for setting in ("invert_sigmas", "stochastic_sampling", "thresholding"):
        if config.get(setting):
            raise ValueError(f"This scheduler has {setting}, for which a step's density is unknown.")
    if same:
        return scheduler  # type: ignore[return-value]
    settings = {setting: config[setting] for setting in _SHIFT if setting in config}
    settings["shift"] = shift = config.get("flow_shift", config.get("shift", 1.0))
    settings["use_dynamic_shifting"] = bool(config.get("use_dynamic_shifting"))
    _say(scheduler, "Euler steps (FlowMatchEulerDiscreteScheduler)", f"with the same shift of {shift:g}")
    allowed = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    return FlowMatchEulerDiscreteScheduler(
        config["num_train_timesteps"], **{setting: value for setting, value in settings.items() if setting in allowed}
    )


_AS_IT_IS = "as it is configured (use_flow_sigmas with prediction_type=flow_prediction)"
_REFUSED = (
    "which this policy cannot sample with: put the scheduler that the model was trained for in its place "
    "(pipeline.scheduler = ...; pipeline.save_pretrained(FOLDER)), if it was for another."
)


def _say(scheduler: SchedulerMixin, ours: str, how: str) -> None:
    log.warning(
        "This model's own sampler, %s, is not what it is trained and sampled with here: that is %s, %s. "
        "So images are not quite those of its pipeline as it is.",
        type(scheduler).__name__,
        ours,
        how,
    )
