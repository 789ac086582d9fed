"""Devices that are asked for and not there: one message that names the settings and what there is."""

from typing import Any

import lightning
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hydra.utils import instantiate

from vp_rl.planning.devices import check_devices
from vp_rl.policies.pipelines import Source, load_pipeline


def check(**asked: Any) -> None:
    """As `train.py` does it, where Hydra wraps what Lightning says."""
    node = {"_target_": "lightning.Trainer", "logger": False, "enable_checkpointing": False, **asked}
    check_devices(asked, lambda: instantiate(node))


def gpus(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning sees so many of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


@pytest.mark.parametrize(
    ("number", "asked", "out"),
    [
        (0, {"accelerator": "gpu", "devices": 1}, r"No GPU is here that torch .* can use: trainer=cpu does without\."),
        (0, {"accelerator": "cuda", "devices": "auto"}, r"No GPU is here"),
        (1, {"accelerator": "auto", "devices": 2}, r"1 GPU is here: trainer\.devices=auto takes it, trainer=cpu none"),
        (1, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}, r"1 GPU is here"),
        (4, {"accelerator": "gpu", "devices": 8}, r"4 GPUs are here: trainer\.devices=auto takes all of them"),
        (2, {"accelerator": "auto", "devices": [0, 5]}, r"only has: \[0, 1\]\)\. 2 GPUs are here"),
        (0, {"accelerator": "cpu", "devices": 0}, r"not a valid input"),
    ],
)
def test_devices_that_are_not_here_are_named_with_those_that_are(
    number: int, asked: dict[str, Any], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(number, monkeypatch)
    with pytest.raises(ValueError, match=out) as raised:
        check(**asked)
    said = str(raised.value)
    assert said.startswith(f"trainer.accelerator={asked['accelerator']} trainer.devices={asked['devices']} cannot be")
    assert "\n" not in said


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_on_a_cpu_are_fine(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    check(accelerator="cpu", devices=3, strategy=strategy)
    check(accelerator="auto", devices=1)


def test_what_is_no_matter_of_devices_is_not_called_one() -> None:
    def make() -> lightning.Trainer:
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        check_devices({}, make)


def test_deepspeed_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without the package, which Lightning asks for first."""
    gpus(0, monkeypatch)
    with pytest.raises(ValueError, match=r"DeepSpeed.*No GPU is here"):
        check(accelerator="auto", devices=1, strategy="deepspeed_stage_2")


def test_quantised_weights_need_a_gpu_whatever_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is fetched, and without the model's name, which has no part in it."""
    gpus(0, monkeypatch)
    for bits in ("8bit", "4bit"):
        with pytest.raises(ValueError, match=rf"^policy\.economy\.quantize={bits} needs a GPU"):
            load_pipeline(Source("owner/absent", "float16", quantize=bits), StableDiffusionPipeline, "models")
