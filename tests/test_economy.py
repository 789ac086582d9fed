"""What saves memory and time gives the numbers of the policy without it, and does save."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from fakes import fit
from families import FAMILIES, PROMPTS, Redness, adapter, build, denoiser, gradients, make, perturb, predict
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.plugins.precision import MixedPrecision
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.policies.economy import Economy
from vp_rl.policies.lora import _Linear
from vp_rl.sampler import Sampler

CONF = Path(__file__).parents[1] / "conf"
OPTIMIZERS = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))


def latents_of(policy: Any, batch: int = 3) -> torch.Tensor:
    return 0.5 * policy.noise(batch, torch.Generator().manual_seed(4))


def decoded(policy: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the gradient of their redness on the latents."""
    latents = latents_of(policy).requires_grad_()
    images = policy.decode(latents)
    images.square().sum().backward()
    assert latents.grad is not None
    return images.detach(), latents.grad


def saved_bytes(policy: Any) -> int:
    """What the graph of a decoded batch keeps for the backward pass, each memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.decode(latents_of(policy).requires_grad_())
    return sum(kept.values())


# --- the VAE


@pytest.mark.parametrize("case", FAMILIES)
def test_decoding_some_at_once_gives_the_same_images_and_gradients(case: str) -> None:
    plain, chunked = make(case), make(case, economy={"vae_batch": 2})
    sizes: list[int] = []
    chunked.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images, slope = decoded(plain)
    again, slope_again = decoded(chunked)
    assert sizes == [2, 1]
    # Convolutions over other batches round otherwise.
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(slope_again, slope, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chunked.encode_images(images), plain.encode_images(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_gradient_checkpointing_keeps_less_of_the_vae_and_gives_the_same_gradients(case: str) -> None:
    plain, checkpointed = make(case, gradient_checkpointing=False), make(case, gradient_checkpointing=True)
    # Of each block of some ten layers the input alone.
    assert saved_bytes(checkpointed) < saved_bytes(plain) / 2
    for ours, theirs in zip(decoded(checkpointed), decoded(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_tiles_meet_without_seams_where_the_image_is_smooth_and_pass_gradients() -> None:
    """A VAE that decodes each pixel by itself decodes tiles as it decodes the whole."""
    plain, tiled = make("sd15", resolution=48), make("sd15", resolution=48, economy={"vae_tiling": True})
    for policy in (plain, tiled):
        policy.vae.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1))
        nn.init.constant_(policy.vae.decoder[1].weight, 0.1)
        nn.init.zeros_(policy.vae.decoder[1].bias)
    tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size = 8, 16
    calls: list[int] = []
    tiled.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(decoded(tiled), decoded(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == 16


# --- what autocast and PEFT do in vain


@pytest.mark.parametrize(("dtype", "cast"), [("bfloat16", False), ("float32", True)])
def test_norms_of_a_model_in_half_precision_are_left_in_it(
    dtype: str, cast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen, norm = build("sd15", dtype=dtype), set(), nn.functional.group_norm

    def spy(*args: Any) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return norm(*args)

    monkeypatch.setattr(nn.functional, "group_norm", spy)
    with torch.autocast("cpu", torch.bfloat16):  # on a CPU it leaves them alone itself
        predict(policy)
        policy.decode(latents_of(policy))
    assert seen == {cast}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of FLUX's norms in float32
@pytest.mark.parametrize("case", FAMILIES)
def test_lora_layers_compute_what_pefts_do(case: str) -> None:
    policy = make(case, lora={"r": 4, "lora_alpha": 8})
    perturb(policy)
    ours = [module for module in policy.modules() if type(module) is _Linear]
    assert ours
    predicted, slopes = predict(policy), gradients(policy)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(policy)
    for module in ours:
        module.__class__ = Linear
    torch.testing.assert_close(predicted, predict(policy), rtol=1e-5, atol=1e-6)
    for name, slope in gradients(policy).items():
        assert (slope - slopes[name]).norm() <= 1e-4 * slope.norm()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = predict(policy)
    # One rounding less, of the sum alone; half as much again for luck.
    assert (rounded - predicted).norm() <= 1.5 * (theirs - predicted).norm()


@pytest.mark.parametrize("case", FAMILIES)
def test_lora_layers_in_half_precision_have_gradients_in_float32_that_point_where_pefts_do(case: str) -> None:
    policy = make(case, dtype="bfloat16")
    perturb(policy)
    slopes = gradients(policy)
    for module in policy.modules():
        if type(module) is _Linear:
            module.__class__ = Linear
    theirs = gradients(policy)
    assert {slope.dtype for slope in slopes.values()} == {torch.float32}
    flat, other = (torch.cat([slope.flatten() for slope in each.values()]) for each in (slopes, theirs))
    assert nn.functional.cosine_similarity(flat, other, dim=0) > 0.99  # both are rounded to 8 bits in every layer


# --- memory format


@pytest.mark.parametrize("case", ["sd15", "sdxl", "flux"])
def test_channels_last_changes_the_order_in_memory_alone(case: str, tmp_path: Path) -> None:
    lora = {"target_modules": ["to_q", "conv1"]} if case != "flux" else {}
    plain, policy = make(case, lora=lora), make(case, lora=lora, economy={"channels_last": True})
    weights = [module.weight for module in policy.vae.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for each in (plain, policy):
        perturb(each)
    torch.testing.assert_close(predict(policy, guidance=3.0), predict(plain, guidance=3.0), rtol=1e-4, atol=1e-5)
    policy.save_adapter(tmp_path)
    plain.load_adapter(tmp_path)
    with policy.merged():
        torch.testing.assert_close(predict(policy), predict(plain), rtol=1e-4, atol=1e-5)


# --- quantised weights


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers quantises on the CPU, too, whose kernels bitsandbytes has: only its check for a GPU is left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    # Its kernels for processors with bfloat16 want layers of 32 numbers; these models have 16.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.usefixtures("quantized")
# Of the largest number: 8 bit are 256 levels a row, nf4 16, each through some ten layers. Measured 0.005 and 0.12.
@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.03), ("4bit", 0.3)])
@pytest.mark.parametrize("case", ["sd15", "sd3"])
def test_a_lora_trains_on_quantised_weights_that_nothing_is_merged_into(
    case: str, bits: str, error: float, tmp_path: Path
) -> None:
    plain, policy = make(case), make(case, economy={"quantize": bits})
    assert any(not parameter.is_floating_point() for parameter in denoiser(policy).parameters())
    assert not any(not parameter.is_floating_point() for parameter in policy.vae.parameters())
    difference = (predict(policy) - predict(plain)).abs().max() / predict(plain).abs().max()
    assert 1e-5 < difference < error
    perturb(policy)
    assert {slope.dtype for slope in gradients(policy).values()} == {torch.float32}
    assert gradients(policy).keys() == adapter(policy).keys() == adapter(plain).keys()
    before, weights = predict(policy), [parameter.clone() for parameter in policy.parameters()]
    with policy.merged():
        assert torch.equal(predict(policy), before)
        assert all(torch.equal(old, new) for old, new in zip(weights, policy.parameters(), strict=True))
    policy.save_adapter(tmp_path)
    plain.load_adapter(tmp_path)
    assert all(torch.equal(tensor, adapter(policy)[name]) for name, tensor in adapter(plain).items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("case", FAMILIES)
def test_quantising_without_a_gpu_is_told(case: str) -> None:
    with pytest.raises(Exception, match=r"policy\.economy\.quantize=4bit needs a GPU"):
        build(case, economy={"quantize": "4bit"})


# --- torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every tensor it is given
@pytest.mark.parametrize("case", FAMILIES)
def test_a_compiled_denoiser_computes_the_same_whatever_its_adapter(case: str, tmp_path: Path) -> None:
    plain = make(case)
    policy = build(case, economy={"compile": True})  # a copy would not be compiled
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in policy.named_parameters()] == names
    same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    torch._dynamo.utils.counters.clear()
    for each in (plain, policy):
        perturb(each)
    slopes = gradients(plain)
    for name, slope in gradients(policy).items():
        assert (slope - slopes[name]).norm() <= 1e-3 * slopes[name].norm()  # fused kernels add up in other orders
    with torch.no_grad():
        for guidance in (1.0, 3.0):
            same(predict(policy, guidance=guidance), predict(plain, guidance=guidance))
        with policy.reference(), plain.reference():
            same(predict(policy), predict(plain))
        with policy.merged(), plain.merged():
            same(predict(policy), predict(plain))
        same(predict(policy), predict(plain))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch.no_grad(), policy.eagerly():  # a batch of a size that nothing else has
        same(predict(policy, PROMPTS[:1]), predict(plain, PROMPTS[:1]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    policy.save_adapter(tmp_path)
    plain.load_adapter(tmp_path)
    assert all(torch.equal(tensor, adapter(policy)[name]) for name, tensor in adapter(plain).items())


# --- optimizers


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_a_lora(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"optimizer@algorithm.optimizer={name}"]).algorithm.optimizer
    lora = {"r": 128, "target_modules": ["to_k"]}  # 128 x 32: as many numbers as are kept in 8 bit
    policy = make("sd15", lora=lora)
    before = {key: tensor.clone() for key, tensor in adapter(policy).items()}
    algorithm = DDPO(
        policy, Redness(), Sampler(2, 1.0, 1.0), instantiate(node), images_per_prompt=4, sample_batch=8, train_batch=64
    )
    optimizer = fit(algorithm).optimizers[0]
    assert {"lr": optimizer.param_groups[0]["lr"], "weight_decay": optimizer.param_groups[0]["weight_decay"]} == {
        "lr": 3e-4,
        "weight_decay": 1e-4,
    }
    assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter(policy).items())
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    assert (torch.uint8 in kinds) == ("8bit" in name)


def fused(lr: float = 0.1) -> DDPO:
    policy = make("sd15")
    make_optimizer = partial(torch.optim.SGD, lr=lr, fused=True)
    return DDPO(
        policy, Redness(), Sampler(2, 1.0, 1.0), make_optimizer, images_per_prompt=4, sample_batch=8, train_batch=64
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimizers_gradients_are_clipped_where_there_is_no_loss_scale(precision: Any) -> None:
    algorithm = fused()
    before = {name: tensor.clone() for name, tensor in adapter(algorithm.policy).items()}
    fit(algorithm, precision=precision, gradient_clip_val=1e-3)
    moved = torch.stack([(tensor - before[name]).norm() for name, tensor in adapter(algorithm.policy).items()]).norm()
    assert moved.item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_a_fused_optimizer_with_a_loss_scale_is_told() -> None:
    with pytest.raises(ValueError, match=r"fused SGD cannot clip gradients under trainer\.precision=16-mixed: take"):
        fit(fused(), plugins=[MixedPrecision("16-mixed", "cpu")], gradient_clip_val=1.0)


# --- what a user can get wrong


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_encoders": "gpu"}, r"policy\.economy\.text_encoders='gpu' is unknown: choose from device, visit, cpu"),
        ({"quantize": "2bit"}, r"policy\.economy\.quantize='2bit' is unknown: choose from null, 8bit, 4bit"),
        ({"vae_batch": 0}, r"policy\.economy\.vae_batch=0 must be at least 1, or null"),
    ],
)
def test_a_setting_that_cannot_be_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        make("sd15", economy=settings)


def test_python_and_yaml_have_the_same_defaults() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert instantiate(compose("policy/sd15").policy.economy) == Economy()
