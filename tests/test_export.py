"""Exported adapters are read by untouched diffusers, and make the policy's images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.export_adapter import write
from vp_rl.policies.export import licence
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "a blue square above a green circle"]
STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision")

# All kinds of layers that Stable Diffusion's U-Net has: attention, feed-forward, convolutions, embeddings.
MODULES = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "conv1",
    "conv2",
    "time_emb_proj",
]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "target_modules": MODULES}


def make_run(folder: Path, **lora: Any) -> StableDiffusion:
    """A finished run's folder; its policy, whose adapter is far from the identity."""
    policy = StableDiffusion("tiny-sd", LoraConfig(**{**LORA, **lora}))
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    (folder / "adapter").mkdir(parents=True)
    policy.save_adapter(folder / "adapter")
    config = {
        "seed": 7,
        "policy": {"path": "tiny-sd", "dtype": "float32", "lora": {**LORA, **lora}},
        "reward": {"_target_": "vp_rl.rewards.vp_score.VPScore", "checkpoint": "tiny-vp-score", "api_key": "s3cret"},
        "algorithm": {"policy": "${policy}", "optimizer": {"lr": 1e-3}},
        "name": "${hydra:runtime.choices.experiment}",
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    return policy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run's folder, and its policy's images."""
    folder = tmp_path_factory.mktemp("run")
    return folder, images_of(make_run(folder))


def images_of(policy: StableDiffusion) -> torch.Tensor:
    sampler = Sampler(steps=STEPS, guidance=5.0, eta=0.0)
    return policy.decode(sampler.sample(policy, policy.encode(PROMPTS), torch.manual_seed(5)))


def theirs(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"}
    images = pipeline(PROMPTS, generator=torch.manual_seed(5), **settings).images
    assert isinstance(images, torch.Tensor)
    return images


def untouched(path: Path | str | None = None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        path or tiny.resolve("tiny-sd"), safety_checker=None, dtype=torch.float32
    )


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def check_facts(file: Path) -> None:
    facts = header(file)
    assert facts["vp_rl.base_model"] == "tiny-sd"
    assert facts["vp_rl.reward"] == "VPScore"
    assert facts["vp_rl.reward_checkpoint"] == "tiny-vp-score"
    assert facts["vp_rl.seed"] == "7"
    settings = json.loads(facts["vp_rl.settings"])
    assert settings["policy"]["lora"]["r"] == 4
    assert settings["algorithm"]["optimizer"]["lr"] == 1e-3
    assert "s3cret" not in str(facts)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_untouched_diffusers_makes_the_policys_images_from_the_adapter(
    to: str, run: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, images = run
    file = write(folder, to, tmp_path / "out")
    check_facts(file)
    pipeline = untouched()
    base = theirs(pipeline)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    assert (images - base).abs().max() > 0.01
    torch.testing.assert_close(theirs(pipeline), images, rtol=0, atol=1e-4)


def test_a_merged_pipeline_makes_the_policys_images_alone(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, images = run
    merged = write(folder, "merged", tmp_path / "out")
    check_facts(merged / "unet" / "diffusion_pytorch_model.safetensors")
    pipeline = untouched(merged)
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    torch.testing.assert_close(theirs(pipeline), images, rtol=0, atol=1e-4)


def test_kohyas_keys_are_those_that_its_readers_look_for(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    file = write(run[0], "kohya", tmp_path)
    state = load_file(file)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    names = {name for name in state if name.startswith(f"{layer}.")} or {name for name in state if "attn1_to_q" in name}
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") and name.count(".") <= 2 for name in state)
    assert {tensor.item() for name, tensor in state.items() if name.endswith(".alpha")} == {4.0}
    assert header(file)["ss_network_dim"] == "4"
    assert header(file)["ss_network_alpha"] == "4.0"


def test_a_rank_stabilised_adapter_keeps_its_scale_in_kohyas_format(tmp_path: Path) -> None:
    policy = make_run(tmp_path / "run", use_rslora=True)
    file = write(tmp_path / "run", "kohya", tmp_path / "out")
    pipeline = untouched()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    torch.testing.assert_close(theirs(pipeline), images_of(policy), rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_refused(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to='onnx' is unknown: choose from diffusers, kohya, merged"):
        write(run[0], "onnx", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no folder of a run"):
        write(tmp_path, "kohya", tmp_path)
    unfinished = tmp_path / "unfinished"
    (unfinished / ".hydra").mkdir(parents=True)
    (unfinished / ".hydra" / "config.yaml").write_bytes((run[0] / ".hydra" / "config.yaml").read_bytes())
    for to in ("diffusers", "kohya", "merged"):
        with pytest.raises(FileNotFoundError, match=r"There is no pytorch_lora_weights\.safetensors in .*adapter"):
            write(unfinished, to, tmp_path / "out")
    (unfinished / "adapter").mkdir()
    save_file(
        {"transformer.a.lora_A.weight": torch.ones(1, 1)}, unfinished / "adapter" / "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(ValueError, match=r"to=kohya is for adapters of a U-Net"):
        write(unfinished, "kohya", tmp_path / "out")
    (unfinished / ".hydra" / "config.yaml").write_text("reward: {}\n")
    with pytest.raises(ValueError, match=r"has no policy, so no adapter"):
        write(unfinished, "diffusers", tmp_path / "out")


def test_the_licence_of_a_base_is_what_its_folder_says(tmp_path: Path) -> None:
    assert licence(str(tmp_path)) is None
    assert licence("owner/name") is None
    (tmp_path / "LICENSE.md").write_text("\nCreativeML Open RAIL-M\n\nSection I\n")
    assert licence(str(tmp_path)) == "CreativeML Open RAIL-M"
    (tmp_path / "README.md").write_text("---\ntags:\n- a\nlicense: openrail++\n---\n# Model\n")
    assert licence(str(tmp_path)) == "openrail++"


@pytest.mark.slow
def test_the_script_exports_and_refuses_in_one_message(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "export_adapter.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    ran = script(f"run={run[0]}", "to=kohya", "folder=out")
    assert ran.returncode == 0, ran.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["lora.safetensors"]
    refused = script(f"run={tmp_path}", "folder=nothing")
    assert refused.returncode == 1
    assert refused.stderr.count("error: run=") == 1
    assert "Traceback" not in refused.stderr
