"""Policies on disk: the adapter alone trains, the reference is the untrained model, and images are diffusers' own."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from peft import LoraConfig

from vp_rl.interfaces import Policy
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler

YAMLS = sorted((Path(__file__).parents[1] / "conf" / "policy").glob("*.yaml"))
PREDICTIONS = ["epsilon", "v_prediction"]
PROMPTS = ["a red circle", "two blue squares"]
TIMESTEP = torch.tensor([500.0, 20.0])
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random pipeline's folder for each prediction type."""
    home = tmp_path_factory.mktemp("pipelines")
    return {"epsilon": tiny_pipelines.save("sd15", home), "v_prediction": tiny_pipelines.save("sd21", home)}


@pytest.fixture
def folder(pipelines: dict[str, Path]) -> Path:
    return pipelines["epsilon"]


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A pipeline's folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def lora(rank: int = 4, alpha: int = 8, targets: tuple[str, ...] = ATTENTION) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))


def load(folder: Path, **settings: Any) -> StableDiffusion:
    return StableDiffusion(str(folder), settings.pop("lora", None) or lora(), **settings)


def adapter(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def perturb(policy: Policy) -> None:
    """An adapter that is far from the identity that it begins as, and the same one every time."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter(policy).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def predict(policy: Policy, prompts: list[str] = PROMPTS, guidance: float = 1.0) -> torch.Tensor:
    latents = policy.noise(len(prompts), torch.Generator().manual_seed(3))
    return policy.predict(latents, TIMESTEP[: len(prompts)], policy.encode(prompts), guidance)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Of the adapter, by a loss on one prediction."""
    policy.zero_grad()
    predict(policy).square().mean().backward()
    return {name: parameter.grad for name, parameter in adapter(policy).items() if parameter.grad is not None}


# --- Stable Diffusion: numbers


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "a green star"])
def test_guidance_extrapolates_from_the_negative_prompt(folder: Path, negative: str) -> None:
    policy = load(folder, negative_prompt=negative)
    perturb(policy)
    conditional, unconditional = predict(policy), predict(policy, [negative] * 2)
    assert (conditional - unconditional).abs().max() > 0.01
    latents = policy.noise(2, torch.Generator().manual_seed(3))
    direct = policy.unet(latents, TIMESTEP, policy.encode(PROMPTS)["text"]).sample
    assert torch.equal(conditional, direct)
    for guidance in (0.0, 0.5, 5.0):
        expected = unconditional + guidance * (conditional - unconditional)
        # Matrices of another batch size round otherwise, by 1e-6; guidance 5 multiplies that by up to 9.
        torch.testing.assert_close(predict(policy, guidance=guidance), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("prediction", "eta", "several"),
    [
        ("epsilon", 0.0, False),
        ("epsilon", 1.0, False),
        ("epsilon", 1.0, True),
        ("v_prediction", 0.0, False),
        ("v_prediction", 1.0, False),
    ],
)
def test_images_are_those_of_diffusers_pipeline(
    pipelines: dict[str, Path], prediction: str, eta: float, several: bool
) -> None:
    policy = load(pipelines[prediction], resolution=24, negative_prompt="a green star")

    def generator() -> Any:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)] if several else torch.manual_seed(5)

    latents = Sampler(steps=5, guidance=5.0, eta=eta).sample(policy, policy.encode(PROMPTS), generator())
    theirs = tiny_pipelines.load(pipelines[prediction])(
        PROMPTS,
        negative_prompt=["a green star"] * 2,
        height=24,
        width=24,
        num_inference_steps=5,
        guidance_scale=5.0,
        eta=eta,
        generator=generator(),
        output_type="pt",
    ).images
    assert theirs.std() > 0.05
    # Each step rounds to 1e-7; the first divides by the square root of its signal, 0.07, and guidance multiplies by 9.
    torch.testing.assert_close(policy.decode(latents), theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_embedded_model_sees_its_own_world(tmp_path: Path) -> None:
    """Encoding and decoding are each other's inverse, scaling included, on an image like those it was trained on."""
    policy = load(Path("tiny-sd"))
    image = torch.full((1, 3, 64, 64), 0.9)
    image[:, :, 20:40, 20:40] = torch.tensor([220, 38, 38]).reshape(1, 3, 1, 1) / 255
    latents = policy.encode_images(image)
    # The square's rim is blurred by what the VAE leaves out; elsewhere it errs by a few of 255 levels.
    assert (policy.decode(latents) - image).abs().mean() < 0.02
    assert latents.std() == pytest.approx(1.0, abs=0.5)  # the denoiser's scale


def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradients(folder: Path) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        policy = load(folder, gradient_checkpointing=checkpointing)
        perturb(policy)
        count: list[int] = []
        # Before, not after: recomputation stops as soon as it has what the gradient needs.
        policy.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(gradients(policy))
        calls.append(len(count))
    assert calls == [1, 2]
    assert found[0].keys() == found[1].keys()
    for name, slope in found[0].items():
        torch.testing.assert_close(found[1][name], slope, rtol=1e-5, atol=1e-8)  # the same sums, in another order


# --- prompts


def test_a_very_long_prompt_is_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = load(folder)
    words = ["a", "red", "circle"] * 1700
    long, fits = " ".join(words), " ".join(words[: policy.tokenizer.model_max_length - 2])
    assert len(long) >= 10_000
    with caplog.at_level(logging.WARNING):
        expected = policy.encode([fits, "a red circle"])["text"]
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        text = policy.encode([long, "a red circle"])["text"]
    assert torch.equal(text, expected)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "vp_rl.policies.text"]
    assert "reads 20 tokens" in message
    assert "a red circle" in message
    assert len(message) < 200


# --- adapters on disk


@torch.no_grad()
def check_that_diffusers_reads(policy: StableDiffusion, source: Path | str, saved: Path, tolerance: float) -> None:
    """An untouched pipeline with the saved adapter makes the policy's images, which are not the base model's."""
    perturb(policy)
    policy.save_adapter(saved)
    assert [file.name for file in saved.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = tiny_pipelines.load(source)

    def theirs() -> torch.Tensor:
        settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
        return pipeline(PROMPTS, generator=torch.manual_seed(5), **settings).images.float()

    base = theirs()
    pipeline.load_lora_weights(saved)
    latents = Sampler(steps=4, guidance=5.0, eta=0.0).sample(policy, policy.encode(PROMPTS), torch.manual_seed(5))
    images = policy.decode(latents)
    assert (images - base).abs().max() > 0.01
    torch.testing.assert_close(images, theirs(), rtol=0, atol=tolerance)


# The first layer of this U-Net is a convolution, which diffusers' old names and PEFT's call differently.
@pytest.mark.parametrize(
    "targets",
    [
        ATTENTION,
        ("to_q",),
        ("conv1",),
        ("conv1", *ATTENTION),
    ],
)
def test_diffusers_reads_an_adapter_of_any_layers(folder: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    check_that_diffusers_reads(load(folder, lora=lora(targets=targets)), folder, tmp_path, 1e-4)


def test_an_adapter_that_would_be_scaled_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    other = lora()
    other.lora_alpha *= 2
    load(folder, lora=other).save_adapter(tmp_path)
    with pytest.raises(ValueError, match=rf"count 0\.5 times.*policy\.lora\.lora_alpha={other.lora_alpha}"):
        load(folder).load_adapter(tmp_path)


@pytest.mark.parametrize("other", [lora(rank=8), lora(targets=("to_q",)), lora(targets=(*ATTENTION, "conv1"))])
def test_an_adapter_of_other_settings_is_refused(folder: Path, tmp_path: Path, other: LoraConfig) -> None:
    load(folder, lora=other).save_adapter(tmp_path)
    policy = load(folder)
    before = {name: tensor.clone() for name, tensor in adapter(policy).items()}
    with pytest.raises(ValueError, match=r"does not fit this policy's LoRA settings.*policy\.lora") as caught:
        policy.load_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(adapter(policy)[name], tensor) for name, tensor in before.items())


# --- what a user can get wrong


def rename_family(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))


def write_index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model_index.json").write_text(text)

    return spoil


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def remove_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def cut_text_encoder(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


CLEAR = (FileNotFoundError, ValueError)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (shutil.rmtree, FileNotFoundError, "neither a folder in diffusers' format nor a hub name"),
        (remove_all, FileNotFoundError, "could not be read as a diffusers pipeline.*model_index.json"),
        (write_index("{"), FileNotFoundError, "could not be read as a diffusers pipeline.*not a valid JSON"),
        (rename_family, ValueError, "holds a StableDiffusionXLPipeline; this policy reads Stable Diffusion 1.x and 2"),
        (write_index("[]"), CLEAR, "diffusers pipeline"),
        (remove_weights, CLEAR, "could not be loaded.*unet"),
        (remove_tokenizer, CLEAR, "no usable tokenizer"),
        (cut_text_encoder, CLEAR, "could not be loaded"),
    ],
)
def test_a_folder_that_is_no_stable_diffusion_is_told(
    copied: Path, spoil: Callable[[Path], None], error: type[Exception] | tuple[type[Exception], ...], said: str
) -> None:
    spoil(copied)
    with pytest.raises(error, match=said) as caught:
        load(copied)
    assert f"policy.path={str(copied)!r}" in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere", "./owner/model", "/nonexistent", "~/nonexistent"])
def test_a_path_that_is_nowhere_is_told_with_what_would_do(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="tiny-sd") as caught:
        StableDiffusion(path, lora())
    assert f"policy.path={path!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8"}, "policy.dtype='int8' is unknown: choose from float32, float16, bfloat16"),
        ({"resolution": 63}, "policy.resolution=63 must be a multiple of 2"),
        ({"resolution": 0}, "policy.resolution=0"),
        ({"resolution": -8}, "policy.resolution=-8"),
        ({"lora": lora(targets=("nothing",))}, "LoRA settings do not fit this U-Net.*nothing"),
    ],
)
def test_a_setting_that_cannot_be_is_told(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(folder, **settings)


def test_a_folder_without_an_adapter_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pytorch_lora_weights\.safetensors in .*nowhere"):
        load(folder).load_adapter(tmp_path / "nowhere")
