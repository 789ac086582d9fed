"""Policies on disk: the adapter alone trains, the reference is the untrained model, and images are diffusers' own."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vp_rl.interfaces import Policy
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny

YAMLS = sorted((Path(__file__).parents[1] / "conf" / "policy").glob("*.yaml"))
PREDICTIONS = ["epsilon", "v_prediction"]
PROMPTS = ["a red circle", "two blue squares"]
TIMESTEP = torch.tensor([500.0, 20.0])
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def save_random_pipeline(folder: Path, prediction: str) -> None:
    """A Stable Diffusion of 100 k random parameters for 16 px, with a scaling factor of 2 in its VAE."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "sd" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        scaling_factor=2.0,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random pipeline's folder for each prediction type."""
    folders = {prediction: tmp_path_factory.mktemp(prediction) for prediction in PREDICTIONS}
    for prediction, folder in folders.items():
        save_random_pipeline(folder, prediction)
    return folders


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


def untouched(policy: StableDiffusion, folder: Path | str) -> StableDiffusionPipeline:
    """Diffusers' own pipeline from the same files."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny.resolve(folder), dtype=policy.unet.dtype)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
    return pipeline


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


# --- what every policy of conf/policy promises


def is_here(node: DictConfig) -> bool:
    return Path(tiny.resolve(node.path)).is_dir()


def offline_yamls() -> Iterator[Path]:
    """Those whose model is in the package, and Stable Diffusions of the hub, which take a random model instead."""
    for file in YAMLS:
        node = OmegaConf.load(file)
        assert isinstance(node, DictConfig)
        if is_here(node) or get_object(node._target_) is StableDiffusion:
            yield file


def from_yaml(file: Path, random: Path) -> tuple[Policy, Path | str]:
    """The yaml's policy with its model's folder."""
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    if is_here(node):
        return instantiate(node), node.path
    return instantiate(node, path=str(random), variant=None, resolution=None), random


@pytest.fixture(params=["epsilon", *offline_yamls()], ids=lambda param: getattr(param, "stem", param))
def loaded(request: pytest.FixtureRequest, pipelines: dict[str, Path]) -> tuple[Policy, Path | str]:
    if request.param in pipelines:
        return load(pipelines[request.param]), pipelines[request.param]
    return from_yaml(request.param, pipelines["epsilon"])


@pytest.fixture
def policy(loaded: tuple[Policy, Path | str]) -> Policy:
    return loaded[0]


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_the_keys_of_every_yaml_are_its_policys_parameters(file: Path) -> None:
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    target = get_object(node._target_)
    assert issubclass(target, Policy)
    inspect.signature(target).bind(**{str(key): node[key] for key in node if key != "_target_"})


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(policy: Policy) -> None:
    with policy.reference():
        reference = predict(policy, guidance=3.0)
    assert torch.equal(predict(policy, guidance=3.0), reference)


def test_only_the_adapter_trains_and_is_float32(policy: Policy) -> None:
    assert adapter(policy)
    assert all("lora" in name for name in adapter(policy))
    assert {parameter.dtype for parameter in adapter(policy).values()} == {torch.float32}
    assert set(gradients(policy)) == set(adapter(policy))
    frozen = [parameter for name, parameter in policy.named_parameters() if name not in adapter(policy)]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


@torch.no_grad()
def test_the_reference_is_the_model_on_disk_whatever_the_adapter(loaded: tuple[StableDiffusion, Path | str]) -> None:
    policy, source = loaded
    model = untouched(policy, source)
    latents = policy.noise(2, torch.Generator().manual_seed(3))
    text = model.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    expected = model.unet(latents.to(model.unet.dtype), TIMESTEP, text).sample.float()
    perturb(policy)
    with policy.reference():
        assert torch.equal(predict(policy), expected)
    assert (predict(policy) - expected).abs().max() > 0.01


def test_the_adapter_is_back_on_after_the_reference(policy: Policy) -> None:
    perturb(policy)
    before, slopes = predict(policy), gradients(policy)
    with policy.reference():
        pass
    assert torch.equal(predict(policy), before)
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert torch.equal(predict(policy), before)
    after = gradients(policy)
    assert all(torch.equal(after[name], slope) for name, slope in slopes.items())
    assert set(after) == set(adapter(policy))


def test_a_merged_adapter_predicts_the_same_and_leaves_every_weight_as_it_was(policy: Policy) -> None:
    perturb(policy)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    plain = predict(policy)
    with policy.merged():
        merged = predict(policy)
    # Rounding alone: float32 sums of some hundred products, through some ten layers.
    assert torch.allclose(merged, plain, atol=1e-5 * plain.abs().max().item())
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    assert torch.equal(predict(policy), plain)
    with policy.reference():
        reference = predict(policy)
        with policy.merged():
            assert torch.equal(predict(policy), reference)
    assert not torch.allclose(reference, plain, atol=1e-3 * plain.abs().max().item())


def test_gradients_flow_through_what_was_computed_before_the_reference(policy: Policy) -> None:
    perturb(policy)
    expected = gradients(policy)
    policy.zero_grad()
    output = predict(policy)
    with torch.no_grad(), policy.reference():
        predict(policy)
    output.square().mean().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in adapter(policy).items())


def test_images_are_in_the_unit_range_and_pass_gradients_to_the_latents(policy: Policy) -> None:
    latents = (3 * policy.noise(2, torch.Generator().manual_seed(4))).requires_grad_()
    images = policy.decode(latents)
    assert images.shape[:2] == (2, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    (slope,) = torch.autograd.grad(images[0].sum(), latents)
    assert torch.isfinite(slope).all()
    assert slope[0].abs().sum() > 0
    assert not slope[1].any()


def test_training_mode_leaves_it_in_evaluation_mode(policy: Policy) -> None:
    policy.train()
    assert not any(module.training for module in policy.modules())


# --- Stable Diffusion: numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_of_the_frozen_weights_only(folder: Path, dtype: str) -> None:
    policy = load(folder, dtype=dtype)
    frozen = {parameter.dtype for name, parameter in policy.named_parameters() if name not in adapter(policy)}
    assert frozen == {getattr(torch, dtype)}
    assert {slope.dtype for slope in gradients(policy).values()} == {torch.float32}
    output = predict(policy, guidance=3.0)
    assert output.dtype == torch.float32
    # bfloat16 keeps 8 bits, and the guided output of order 1 has gone through a dozen layers.
    torch.testing.assert_close(output, predict(load(folder), guidance=3.0), rtol=0, atol=0.1)


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
    theirs = untouched(policy, pipelines[prediction])(
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


@torch.no_grad()
def test_encoding_images_is_the_scaled_mean_of_the_posterior(folder: Path) -> None:
    policy, image = load(folder), torch.rand(2, 3, 16, 16)
    mean = untouched(policy, folder).vae.encode(image * 2 - 1).latent_dist.mean
    # Two copies of the weights may lie differently in memory, which changes the order of sums.
    torch.testing.assert_close(policy.encode_images(image), 2.0 * mean, rtol=0, atol=1e-6)


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
    (message,) = [record.getMessage() for record in caplog.records if record.name == "vp_rl.policies.sd"]
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
    pipeline = untouched(policy, source)

    def theirs() -> torch.Tensor:
        settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
        return pipeline(PROMPTS, generator=torch.manual_seed(5), **settings).images.float()

    base = theirs()
    pipeline.load_lora_weights(saved)
    latents = Sampler(steps=4, guidance=5.0, eta=0.0).sample(policy, policy.encode(PROMPTS), torch.manual_seed(5))
    images = policy.decode(latents)
    assert (images - base).abs().max() > 0.01
    torch.testing.assert_close(images, theirs(), rtol=0, atol=tolerance)


def test_diffusers_makes_the_same_images_from_a_saved_adapter(
    loaded: tuple[StableDiffusion, Path | str], tmp_path: Path
) -> None:
    policy, source = loaded
    # A pipeline in half precision keeps 11 bits of its latents, where the policy keeps float32.
    check_that_diffusers_reads(policy, source, tmp_path, 1e-4 if policy.unet.dtype == torch.float32 else 0.02)


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


@torch.no_grad()
def test_an_adapter_is_loaded_as_it_was_saved(folder: Path, tmp_path: Path) -> None:
    first, second = load(folder), load(folder)
    perturb(first)
    first.save_adapter(tmp_path)
    second.load_adapter(tmp_path)
    assert adapter(first).keys() == adapter(second).keys()
    assert all(torch.equal(adapter(second)[name], tensor) for name, tensor in adapter(first).items())
    assert torch.equal(predict(second), predict(first))


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
