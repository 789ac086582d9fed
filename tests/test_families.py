"""What every policy of conf/policy promises, on a random model of its family and with its yaml's own LoRA."""

import inspect
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from fakes import fit
from families import (
    CASES,
    FAMILIES,
    PROMPTS,
    YAMLS,
    Redness,
    adapter,
    denoiser,
    folder,
    gradients,
    make,
    perturb,
    predict,
    read_yaml,
)
from hydra.utils import get_object

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.interfaces import Policy
from vp_rl.policies import settings as policy_settings
from vp_rl.sampler import Sampler, log_prob_of
from vp_rl.scenes import tiny
from vp_rl.types import take

GUIDED = ["sd15", "sdxl", "sd3"]  # by a negative prompt


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(case: str) -> Any:
    return make(case)


def untouched(source: Path | str) -> Any:
    """From the same files, with the scheduler that it has there."""
    return tiny_pipelines.load(source)


def their_images(pipeline: Any, case: str, guidance: float = 4.0, **settings: Any) -> torch.Tensor:
    """Of `PROMPTS`, in three steps, from a generator for each."""
    pixels = 64 if case == "tiny_sd" else 16
    size = {"height": pixels, "width": pixels, "num_inference_steps": 3, "guidance_scale": guidance}
    if "t5_tokens" in read_yaml(case):
        size["max_sequence_length"] = 24
    return pipeline(PROMPTS, generator=generators(), output_type="pt", **size, **settings).images


def our_images(policy: Policy, guidance: float = 4.0) -> torch.Tensor:
    latents = Sampler(steps=3, guidance=guidance, eta=0.0).sample(policy, policy.encode(PROMPTS), generators())
    return policy.decode(latents)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def scale(case: str) -> float:
    """Guidance of comparisons; schnell has none."""
    return 1.0 if case == "flux_schnell" else 4.0


@cache
def base_images(case: str) -> torch.Tensor:
    """The model's on disk."""
    with torch.no_grad():
        return their_images(untouched(folder(case)), case, scale(case))


# --- its yaml


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_the_keys_of_every_yaml_are_its_policys_parameters(file: Path) -> None:
    node = read_yaml(file.stem)
    target = get_object(node._target_)
    assert issubclass(target, Policy)
    inspect.signature(target).bind(**{str(key): node[key] for key in node if key != "_target_"})


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_every_yaml_has_a_model_that_tests_can_load(file: Path) -> None:
    assert file.stem in {*tiny_pipelines.MAKERS, "tiny_sd"}, "add a random pipeline to tests/tiny_pipelines.py"


# --- images


@torch.no_grad()
def test_images_are_those_of_diffusers_pipeline(policy: Any, case: str) -> None:
    images = base_images(case)
    assert (images[0] - images[1]).abs().mean() > 0.01
    # Each step rounds to 1e-7 of numbers up to 15 (the first divides by the signal's share, 0.07); guidance times 7.
    torch.testing.assert_close(our_images(policy, scale(case)), images, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "a green star"])
@pytest.mark.parametrize("case", GUIDED, indirect=True)
def test_guidance_points_away_from_the_negative_prompt_as_in_diffusers(case: str, negative: str) -> None:
    images = their_images(untouched(folder(case)), case, negative_prompt=[negative] * 2)
    torch.testing.assert_close(our_images(make(case, negative_prompt=negative)), images, rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_and_guidance_change_the_prediction(policy: Policy, case: str) -> None:
    base = predict(policy)
    assert (predict(policy, PROMPTS[::-1]) - base).abs().max() > 1e-4
    assert torch.equal(predict(policy, guidance=3.0), base) == (case == "flux_schnell")


@torch.no_grad()
def test_rows_do_not_depend_on_what_else_is_in_the_batch(policy: Policy) -> None:
    perturb(policy)
    conditioning, sampler = policy.encode([*PROMPTS, "a red circle"]), Sampler(steps=2, guidance=3.0, eta=0.7)

    def sample(rows: list[int]) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        return sampler.sample(policy, take(conditioning, torch.tensor(rows)), seeds)

    # Matrices of another batch size round otherwise, by 1e-7 of what goes through; DDIM's first step divides by 0.07.
    torch.testing.assert_close(sample([0, 1, 2])[1:], sample([1, 2]), rtol=1e-4, atol=1e-4)


def test_conditioning_has_the_batch_first_and_latents_are_float32(policy: Policy) -> None:
    assert {len(tensor) for tensor in policy.encode(PROMPTS * 2).values()} == {4}
    assert policy.noise(3).dtype == torch.float32
    assert len(policy.noise(3)) == 3


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


@torch.no_grad()
def test_encoding_images_is_the_scaled_mean_of_the_posterior(policy: Any) -> None:
    """Scaled as decoding takes it back: latents that decode to what the VAE makes of its own posterior's mean."""
    image = torch.rand(2, 3, *policy.decode(policy.noise(1)).shape[2:])
    mean = policy.vae.encode(image * 2 - 1).latent_dist.mean
    latents = policy.encode_images(image)
    assert latents.shape == policy.noise(2).shape
    expected = (policy.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(policy.decode(latents), expected, rtol=0, atol=1e-5)
    config = policy.vae.config
    # The order of packed numbers differs, not the numbers.
    scaled = ((mean - (config.shift_factor or 0.0)) * config.scaling_factor).flatten().sort().values
    torch.testing.assert_close(latents.flatten().sort().values, scaled)


# --- the adapter


def test_training_mode_leaves_it_in_evaluation_mode(policy: Policy) -> None:
    policy.train()
    assert not any(module.training for module in policy.modules())


def test_only_the_adapter_trains_and_is_float32(policy: Policy) -> None:
    assert adapter(policy)
    assert all("lora" in name for name in adapter(policy))
    assert {parameter.dtype for parameter in adapter(policy).values()} == {torch.float32}
    assert set(gradients(policy)) == set(adapter(policy))
    frozen = [parameter for name, parameter in policy.named_parameters() if name not in adapter(policy)]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(policy: Policy) -> None:
    with policy.reference():
        reference = predict(policy, guidance=3.0)
    assert torch.equal(predict(policy, guidance=3.0), reference)


@torch.no_grad()
def test_the_reference_is_the_model_on_disk_whatever_the_adapter(policy: Policy, case: str) -> None:
    images = base_images(case)
    perturb(policy)
    with policy.reference():
        torch.testing.assert_close(our_images(policy, scale(case)), images, rtol=0, atol=1e-4)
    assert (our_images(policy, scale(case)) - images).abs().max() > 0.01


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


@torch.no_grad()
def test_diffusers_makes_the_same_images_from_a_saved_adapter(policy: Policy, case: str, tmp_path: Path) -> None:
    theirs = untouched(folder(case))
    perturb(policy)
    policy.save_adapter(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    theirs.load_lora_weights(tmp_path)
    torch.testing.assert_close(
        our_images(policy, scale(case)), their_images(theirs, case, scale(case)), rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_an_adapter_is_loaded_as_it_was_saved(policy: Policy, case: str, tmp_path: Path) -> None:
    second = make(case)
    perturb(policy)
    policy.save_adapter(tmp_path)
    second.load_adapter(tmp_path)
    assert all(torch.equal(adapter(second)[name], tensor) for name, tensor in adapter(policy).items())
    assert torch.equal(predict(second), predict(policy))


# --- learning


@torch.no_grad()
def test_replayed_log_probabilities_are_the_sampled_ones(policy: Policy) -> None:
    """The policy-gradient ratio is 1 before the first update, in other micro-batches than were sampled, too."""
    perturb(policy)
    sampler, conditioning = Sampler(steps=4, guidance=3.0, eta=0.7), policy.encode(PROMPTS)
    trajectory = sampler.rollout(policy, conditioning, torch.Generator().manual_seed(0))
    random = [step for step in range(4) if trajectory.stds[step] > 0]
    assert len(random) >= 3
    for step in random:
        for row in range(2):
            alone = take(conditioning, torch.tensor([row]))
            latents = trajectory.latents[row : row + 1]
            transition = sampler.transition(policy, latents[:, step], torch.tensor([step]), alone)
            ratio = (log_prob_of(latents[:, step + 1], transition) - trajectory.log_probs[row, step]).exp()
            # Means of 64 numbers or more, each off by some 1e-5 of its deviation: the merged adapter rounds otherwise.
            torch.testing.assert_close(ratio, torch.ones(1), rtol=0, atol=2e-5)


def test_a_rewards_gradient_reaches_the_whole_adapter_and_nothing_else(policy: Any) -> None:
    perturb(policy)  # a fresh adapter's second matrices are 0, and so are the gradients of its first
    sampler, conditioning = Sampler(steps=4, guidance=1.0, eta=0.0), policy.encode(PROMPTS)
    latents = sampler.sample(policy, conditioning, torch.Generator().manual_seed(0), until=2)
    x0 = sampler.transition(policy, latents, torch.tensor([2, 2]), conditioning).x0
    # A tanh, for the decoder clips: images of random weights may be black all over.
    Redness()(policy.decode(x0.tanh()), PROMPTS).sum().backward()
    slopes = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert slopes.keys() == adapter(policy).keys()
    assert all(torch.isfinite(slope).all() for slope in slopes.values())
    silent = [name for name, slope in slopes.items() if not slope.any()]
    # What the last block of SD 3 would add to the text is dropped, and a softmax over one key has no gradient.
    assert len(silent) <= len(slopes) // 8, silent


@pytest.mark.parametrize("case", FAMILIES)
def test_ddpo_trains_every_family_from_a_ratio_of_one(case: str) -> None:
    policy = make(case)
    before = {name: tensor.clone() for name, tensor in adapter(policy).items()}
    sampler = Sampler(steps=3, guidance=1.0, eta=0.7)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    algorithm = DDPO(policy, Redness(), sampler, optimizer, images_per_prompt=4, sample_batch=8, train_batch=96)
    values = fit(algorithm).callback_metrics
    # One update of all states: each was sampled by the very policy that is updated.
    assert values["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert values["train/reward_std"] > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapter(policy).items())


# --- memory


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_half_precision_is_of_the_frozen_weights_only(case: str, dtype: str) -> None:
    policy, full = make(case, dtype=dtype), make(case)
    assert {parameter.dtype for parameter in adapter(policy).values()} == {torch.float32}
    half = getattr(torch, dtype)
    kept = {name for name, parameter in policy.named_parameters() if parameter.dtype != half} - adapter(policy).keys()
    # What overflows in float16: the VAE of SDXL, and a matrix of T5's that transformers keeps wide.
    assert all(dtype == "float16" and (name.startswith("vae.") or name.endswith(".wo.weight")) for name in kept)
    assert any(name.startswith("vae.") for name in kept) == (case == "sdxl" and dtype == "float16")
    assert {slope.dtype for slope in gradients(policy).values()} == {torch.float32}
    output = predict(policy, guidance=3.0)
    assert output.dtype == torch.float32
    # bfloat16 keeps 8 bits of numbers of order 1, which have gone through a dozen layers and guidance.
    torch.testing.assert_close(output, predict(full, guidance=3.0), rtol=0, atol=0.1)
    images = policy.decode(policy.noise(2, torch.Generator().manual_seed(4)))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, full.decode(full.noise(2, torch.Generator().manual_seed(4))), rtol=0, atol=0.05)


@pytest.mark.parametrize("case", FAMILIES)
def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradients(case: str) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        policy = make(case, gradient_checkpointing=checkpointing)
        perturb(policy)
        inner = [module for name, module in denoiser(policy).named_modules() if name.endswith(("attn", "attn1"))]
        count: list[int] = []
        # Before, not after: recomputation stops as soon as it has what the gradient needs.
        inner[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(gradients(policy))
        calls.append(len(count))
    assert calls == [1, 2]
    for name, slope in found[0].items():
        torch.testing.assert_close(found[1][name], slope, rtol=1e-5, atol=1e-8)  # the same sums, in another order


# --- prompts


@pytest.mark.parametrize(
    ("case", "tokens"),
    [("sd15", 20), ("sdxl", 20), ("sd3", 24), ("sd3_without_t5", 20), ("flux", 24), ("flux_schnell", 24)],
)
def test_a_long_prompt_is_cut_with_one_warning(case: str, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    policy = make(case)
    caplog.clear()  # of what saving the tiny pipeline says
    fits = {20: "a red circle " * 6, 24: "a red circle and some"}[tokens]
    with caplog.at_level(logging.WARNING):
        policy.encode([fits])
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        policy.encode(["a red circle " * 2000, "a red circle"])
    (message,) = caplog.messages
    assert f"reads {tokens} tokens" in message
    assert "a red circle" in message
    assert len(message) < 200


# --- what a user can get wrong


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("other", ["sdxl", "flux"])
def test_a_pipeline_of_another_family_is_named(case: str, other: str) -> None:
    if case == other:
        return
    name = {"sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}[other]
    with pytest.raises(Exception, match=rf"holds a {name}; this policy reads .*conf/policy"):
        make(case, path=str(folder(other)))


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("other", ["sd15", "sd3"])
def test_an_adapter_of_another_family_is_refused(case: str, other: str, tmp_path: Path) -> None:
    if case == other:
        return
    make(other).save_adapter(tmp_path)
    policy = make(case)
    before = {name: tensor.clone() for name, tensor in adapter(policy).items()}
    with pytest.raises(ValueError, match=r"another (family|model)") as caught:
        policy.load_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(adapter(policy)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("case", ["sdxl", "sd3"])  # a U-Net and a transformer; the code is one
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 3}, r"rank is 3, and policy\.lora\.r="),
        ({"use_dora": True}, r"tensors differ.*policy\.lora"),
        ({"target_modules": ["to_q"]}, r"tensors differ.*policy\.lora"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    case: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    make(case, lora=settings).save_adapter(tmp_path)
    with pytest.raises(ValueError, match=said):
        make(case).load_adapter(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("case", ["sdxl", "sd3"])
@pytest.mark.parametrize("settings", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 3}}])
def test_an_adapter_counts_as_much_whatever_alpha_it_is_read_with(
    case: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    first, second = make(case), make(case, lora=settings)
    perturb(first)
    for written, read in ((first, second), (second, first)):
        written.save_adapter(tmp_path)
        read.load_adapter(tmp_path)
        torch.testing.assert_close(predict(read), predict(written), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"r": 0}}, r"policy\.lora\.r=0 must be at least 1"),
        ({"lora": {"target_modules": ["to_q", "to_p"]}}, r"target_modules has 'to_p'.*some are .*to_q"),
        ({"resolution": 17}, r"policy\.resolution=17 must be a multiple of \d"),
        ({"resolution": 0}, r"policy\.resolution=0"),
        ({"resolution": 10**9}, r"policy\.resolution=1000000000 must be"),
        ({"lora": {"r": 4.5}}, r"policy\.lora\.r=4\.5 must be at least 1"),
        ({"lora": {"target_modules": None}}, r"policy\.lora\.target_modules"),
        ({"dtype": "int8"}, r"policy\.dtype='int8' is unknown"),
        ({"path": "nowhere"}, r"policy\.path='nowhere' is neither"),
    ],
)
def test_a_setting_that_cannot_be_is_told(case: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        make(case, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", [16, 24]),
        ("resolution", "16"),
        ("resolution", True),
        ("resolution", -8),
        ("dtype", None),
        ("path", 5),
        ("gradient_checkpointing", "yes"),
        ("variant", 16),
        ("t5_tokens", 0),
        ("t5", None),
        ("negative_prompt", ["a"]),
        ("lora", {"r": 4}),
        ("vae", False),
    ],
)
def test_a_setting_of_a_wrong_type_is_named(name: str, value: Any) -> None:
    """Every policy calls it first; while tests run, its own annotations are looked at before."""
    with pytest.raises(ValueError, match=rf"policy\.{name}=.* must be "):
        policy_settings.check(**{name: value})


def test_a_resolution_beyond_the_positions_of_stable_diffusion_3_is_told() -> None:
    with pytest.raises(Exception, match=r"policy\.resolution=64 is more than .* reach: 32"):
        make("sd3", resolution=64)


# --- one family's own


@torch.no_grad()
def test_the_embedded_t5_can_be_left_out() -> None:
    """Zeros in its place, as diffusers has it for a pipeline without one."""
    policy = make("sd3", t5=False)
    assert policy.text_encoder_3 is None
    text = policy.encode(PROMPTS)["text"]
    assert text.shape == (2, 20 + 24, tiny_pipelines.T5_WIDTH)
    assert not text[:, 20:].any()
    assert text[:, :20].any()


@torch.no_grad()
def test_sdxl_is_told_the_resolution_as_its_sizes() -> None:
    """Another resolution is another micro-conditioning: diffusers' own images again."""
    images = untouched(folder("sdxl"))(
        PROMPTS,
        height=24,
        width=24,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators(),
        output_type="pt",
    ).images
    torch.testing.assert_close(our_images(make("sdxl", resolution=24)), images, rtol=0, atol=1e-4)
    assert make("sdxl", resolution=24)._sizes.tolist() == [[24, 24, 0, 0, 24, 24]]


@torch.no_grad()
def test_sdxl_takes_another_vae_that_stays_in_half_precision(tmp_path: Path) -> None:
    tiny_pipelines.vae(scaling_factor=2.0, force_upcast=False).save_pretrained(tmp_path)
    policy = make("sdxl", vae=str(tmp_path), dtype="float16")
    assert policy.vae.dtype == torch.float16
    assert torch.isfinite(policy.decode(policy.noise(1))).all()
    with pytest.raises(Exception, match=r"policy\.vae='.*nowhere' could not be loaded"):
        make("sdxl", vae=str(tmp_path / "nowhere"))


def test_flux_schnell_warns_once_that_it_has_no_guidance(caplog: pytest.LogCaptureFixture) -> None:
    policy = make("flux_schnell")
    with caplog.at_level(logging.WARNING):
        predict(policy)
        assert not caplog.messages
        predict(policy, guidance=3.5)
        predict(policy, guidance=3.5)
    (message,) = caplog.messages
    assert "scale of 3.5 is ignored" in message


def test_the_embedded_model_is_where_its_yaml_says() -> None:
    assert Path(tiny.resolve(read_yaml("tiny_sd").path)).is_dir()
