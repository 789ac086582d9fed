"""Policies on disk: the adapter alone trains, the reference is the untrained model, and images are diffusers' own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_pipelines
import torch
from families import PROMPTS, TIMESTEP, perturb, predict
from peft import LoraConfig

from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A pipeline's folder that a test may spoil."""
    return Path(shutil.copytree(families.folder("sd15"), tmp_path / "copied"))


def lora(rank: int = 4, alpha: int = 8, targets: tuple[str, ...] = ATTENTION) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))


def load(folder: Path | str = "sd15", **settings: Any) -> StableDiffusion:
    """From a folder, or from that of one of the cases."""
    path = families.folder(folder) if folder in families.CASES else folder
    return StableDiffusion(str(path), settings.pop("lora", None) or lora(), **settings)


# --- Stable Diffusion: numbers


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "a green star"])
def test_guidance_extrapolates_from_the_negative_prompt(negative: str) -> None:
    policy = load(negative_prompt=negative)
    perturb(policy)
    conditional, unconditional = predict(policy), predict(policy, [negative] * 2)
    assert (conditional - unconditional).abs().max() > 0.01
    latents = policy.noise(2, torch.Generator().manual_seed(3))
    direct = policy.unet(latents, TIMESTEP, policy.encode(PROMPTS)["text"]).sample
    assert torch.equal(conditional, direct)
    for guidance in (0.0, 1.0):
        assert torch.equal(predict(policy, guidance=guidance), direct)
    for guidance in (2.0, 5.0):
        expected = unconditional + guidance * (conditional - unconditional)
        # Matrices of another batch size round otherwise, by 1e-6; guidance 5 multiplies that by up to 9.
        torch.testing.assert_close(predict(policy, guidance=guidance), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "eta", "several"),
    [
        ("sd15", 0.0, False),
        ("sd15", 1.0, False),
        ("sd15", 1.0, True),
        ("sd21", 0.0, False),
        ("sd21", 1.0, False),
    ],
)
def test_images_are_those_of_diffusers_pipeline(source: str, eta: float, several: bool) -> None:
    policy = load(source, resolution=24, negative_prompt="a green star")

    def generator() -> Any:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)] if several else torch.manual_seed(5)

    latents = Sampler(steps=5, guidance=5.0, eta=eta).sample(policy, policy.encode(PROMPTS), generator())
    theirs = tiny_pipelines.load(families.folder(source))(
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
def test_diffusers_reads_an_adapter_of_any_layers(tmp_path: Path, targets: tuple[str, ...]) -> None:
    check_that_diffusers_reads(load(lora=lora(targets=targets)), families.folder("sd15"), tmp_path, 1e-4)


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


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pytorch_lora_weights\.safetensors in .*nowhere"):
        load().load_adapter(tmp_path / "nowhere")


def test_a_vae_in_float32_stays_so_under_an_autocast_to_float16() -> None:
    policy, generator = load("sd15"), torch.Generator().manual_seed(2)
    latents = policy.noise(2, generator)
    with torch.no_grad():
        expected = policy.decode(latents)
        encoded = policy.encode_images(expected)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(policy.decode(latents), expected)
            assert torch.equal(policy.encode_images(expected), encoded)
