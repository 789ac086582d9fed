"""A policy begins with an adapter, of ours or of others: its images are those of who wrote it, and training goes on."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import fit
from families import FAMILIES, Redness, build, denoiser, folder, gradients, make, perturb, predict, read_yaml
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_families import our_images, their_images, untouched
from torch import Tensor

from scripts.run_settings import with_given
from vp_rl.algorithms.nft import DiffusionNFT
from vp_rl.algorithms.online_dpo import OnlineDPO
from vp_rl.policies.export import to_kohya
from vp_rl.policies.lora_file import FILE
from vp_rl.sampler import Sampler

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision")


@cache
def wrote(case: str) -> tuple[Any, Tensor]:
    """A policy with a trained adapter, and its images."""
    policy = make(case)
    perturb(policy)
    with torch.no_grad():
        return policy, our_images(policy)


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder that a trained adapter was written to."""
    wrote(request.param)[0].save_adapter(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    wrote("tiny_sd")[0].save_adapter(tmp_path)
    return tmp_path


def lora(**settings: Any) -> dict[str, Any]:
    """As a yaml has it."""
    return {"_target_": "peft.LoraConfig", "_convert_": "all", **settings}


def refused(**settings: Any) -> str:
    """What is said where a policy of these settings cannot be."""
    with pytest.raises(InstantiationException) as raised:
        build("tiny_sd", **settings)
    assert isinstance(raised.value.__cause__, ValueError | FileNotFoundError)
    return str(raised.value.__cause__)


@torch.no_grad()
@pytest.mark.parametrize(("case", "start"), [(case, case) for case in FAMILIES], indirect=["start"])
def test_a_policy_that_begins_with_an_adapter_makes_its_images(case: str, start: Path) -> None:
    images = wrote(case)[1]
    policy = build(case, start=str(start), reference="start")
    torch.testing.assert_close(our_images(policy), images, rtol=0, atol=1e-5)
    perturb(policy)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.5
    with policy.reference():  # whatever has been learned since
        torch.testing.assert_close(our_images(policy), images, rtol=0, atol=1e-5)
    with policy.base():
        base = our_images(policy)
    assert (base - images).abs().mean() > 1e-3
    torch.testing.assert_close(base, their_images(untouched(folder(case)), case), rtol=0, atol=1e-4)
    plain = build(case, start=str(start))
    with plain.reference():
        assert torch.equal(our_images(plain), base)


@torch.no_grad()
@pytest.mark.parametrize(("case", "start"), [(case, case) for case in ("sd15", "sdxl")], indirect=["start"])
def test_kohyas_format_is_begun_with_too(case: str, start: Path, tmp_path: Path) -> None:
    file = to_kohya(start, tmp_path / "kohya", {})
    policy = build(case, start=str(file))
    torch.testing.assert_close(our_images(policy), wrote(case)[1], rtol=0, atol=1e-5)
    (tmp_path / "again").mkdir()
    policy.save_adapter(tmp_path / "again")  # and plain diffusers has the same images from what is written then
    pipeline = untouched(folder(case))
    pipeline.load_lora_weights(tmp_path / "again")
    torch.testing.assert_close(their_images(pipeline, case), wrote(case)[1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_each_layer_of_kohyas_counts_by_its_own_alpha(tiny: Path, tmp_path: Path) -> None:
    """alpha / rank, layer by layer."""
    file = to_kohya(tiny, tmp_path / "kohya", {})
    state = load_file(file)
    chosen = sorted(key for key in state if key.endswith(".alpha"))[::2]
    for key in chosen:
        state[key] *= 0.25
    save_file(state, file)
    found, expected = build("tiny_sd", start=str(file)), make("tiny_sd", start=str(tiny))
    layers = {key.removeprefix("lora_unet_").removesuffix(".alpha") for key in chosen}
    lowered = 0
    for name, parameter in expected.unet.named_parameters():
        layer, lora, which = name.partition(".lora_")
        if lora and which.startswith("B") and layer.replace(".", "_") in layers:
            parameter *= 0.25
            lowered += 1
    assert lowered == len(chosen) > 0
    torch.testing.assert_close(predict(found), predict(expected), rtol=0, atol=1e-6)


@torch.no_grad()
def test_kohyas_flux_whose_layers_are_in_one_there_is_what_diffusers_reads_in_it(tmp_path: Path) -> None:
    config: Any = denoiser(make("flux")).config
    width = config.num_attention_heads * config.attention_head_dim
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{layer}.lora_down.weight": draw(4, width) / 4, f"{layer}.lora_up.weight": draw(3 * width, 4) / 4}
    save_file({**state, f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    targets = [f"transformer_blocks.0.attn.to_{which}" for which in "qkv"]
    policy = build(
        "flux", lora=lora(r=4, lora_alpha=4, target_modules=targets), start=str(tmp_path / "lora.safetensors")
    )
    pipeline = untouched(folder("flux"))
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    images = their_images(pipeline, "flux")
    assert (images - their_images(untouched(folder("flux")), "flux")).abs().mean() > 1e-4
    torch.testing.assert_close(our_images(policy), images, rtol=0, atol=1e-4)


# --- training goes on


def algorithm(policy: Any, kind: Any = OnlineDPO, **settings: Any) -> Any:
    optimizer = partial(torch.optim.SGD, lr=0.5)
    sizes = {"images_per_prompt": 2, "train_batch": 8, "noise_levels": 1} | (
        {"beta": 10.0} if kind is OnlineDPO else {}
    )
    return kind(policy, Redness(), Sampler(2, 1.0, 0.0), optimizer, **sizes | settings)


def trained(start: Path, reference: str, epochs: int = 1, **settings: Any) -> tuple[Any, Any]:
    policy = make("tiny_sd", start=str(start), reference=reference)
    return policy, fit(algorithm(policy), epochs=epochs, **settings)


@pytest.mark.parametrize("reference", ["base", "start"])
def test_training_goes_on_and_is_measured_from_the_reference(reference: str, tiny: Path, tmp_path: Path) -> None:
    policy, trainer = trained(tiny, reference)
    metrics = trainer.callback_metrics  # of the first round, before its one update
    assert (metrics["train/kl"].item() == 0) == (reference == "start")
    assert (metrics["train/loss"].item() == pytest.approx(0.693147, abs=1e-6)) == (reference == "start")
    before, after = make("tiny_sd", start=str(tiny)).adapter_weights(), policy.adapter_weights()
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    (tmp_path / "adapter").mkdir()
    policy.save_adapter(tmp_path / "adapter")
    pipeline = untouched("tiny-sd")
    pipeline.load_lora_weights(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(our_images(policy), their_images(pipeline, "tiny_sd"), rtol=0, atol=1e-4)


def test_looking_at_the_reference_leaves_gradients_as_they_are(tiny: Path) -> None:
    policy = make("tiny_sd", start=str(tiny), reference="start")
    expected = gradients(policy)
    policy.zero_grad()
    loss = predict(policy).square().mean()
    with torch.no_grad(), policy.reference():  # as NFT does, between a forward pass and its backward pass
        predict(policy)
    loss.backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert expected
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_resumed_run_has_its_own_adapter_and_reference_whatever_the_file_is_by_then(
    tiny: Path, tmp_path: Path
) -> None:
    whole, _ = trained(tiny, "start", epochs=2)
    _, half = trained(tiny, "start", epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    file = tiny / FILE
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file)
    other = build("tiny_sd", start=str(tiny), reference="start")
    fit(algorithm(other), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for name, weight in whole.adapter_weights().items():
        assert torch.equal(other.adapter_weights()[name], weight), name
    with torch.no_grad(), whole.reference(), other.reference():
        assert torch.equal(predict(whole), predict(other))


def test_nft_goes_on_too(tiny: Path) -> None:
    policy = make("tiny_sd", start=str(tiny), reference="start")
    before = policy.adapter_weights()
    metrics = fit(algorithm(policy, DiffusionNFT, kl_weight=0.1)).callback_metrics
    assert metrics["train/kl"].item() == 0
    assert any(not torch.equal(before[name], weight) for name, weight in policy.adapter_weights().items())


# --- what is refused


def test_an_adapter_of_other_layers_or_rank_is_refused_with_the_settings_that_would_do(tmp_path: Path) -> None:
    chosen = ["attn1.to_k", "ff.net.2", "conv1", "time_embedding.linear_1"]
    writer = build("tiny_sd", lora=lora(r=3, lora_alpha=3, target_modules=chosen))
    perturb(writer)
    writer.save_adapter(tmp_path)
    words = refused(start=str(tmp_path))
    assert "its rank is 3, and policy.lora.r=16" in words
    said = dict(word.rstrip(".").split("=") for word in words.split() if word.startswith("policy.lora."))
    targets = said["policy.lora.target_modules"].strip("[]").split(",")
    fitting = lora(r=int(said["policy.lora.r"]), lora_alpha=8, target_modules=targets)
    policy = build("tiny_sd", lora=fitting, start=str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(predict(policy), predict(writer), rtol=0, atol=1e-6)


def test_what_cannot_be_begun_with_is_told(tiny: Path, tmp_path: Path) -> None:
    assert f"no {FILE} in 'nowhere'" in refused(start="nowhere")
    assert "policy.reference=start needs policy.start" in refused(reference="start")
    assert "policy.reference='other' is unknown: choose from base, start" in refused(start=str(tiny), reference="other")
    assert "needs policy.lora" in refused(start=str(tiny), lora=None)
    state = load_file(tiny / FILE)
    more, file = tmp_path / "more.safetensors", tmp_path / "broken.safetensors"
    save_file({**state, "text_encoder.a.lora_A.weight": torch.ones(1, 1)}, more)
    words = refused(start=str(more))
    assert "adapts text_encoder too" in words
    assert "policy.path" in words
    file.write_bytes((tiny / FILE).read_bytes()[:-100])
    assert "is no whole safetensors file" in refused(start=str(file))
    save_file({"lora_unet_nothing.hada_w1_a": torch.ones(1, 1)}, file)
    assert "in a format that diffusers does not read" in refused(start=str(file))


def test_a_runs_folder_is_begun_with_and_evaluations_need_no_start(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (tiny / FILE).rename(run / "adapter" / FILE)
    with torch.no_grad():
        assert torch.equal(predict(build("tiny_sd", start=str(run))), predict(wrote("tiny_sd")[0]))
    saved = OmegaConf.create({"policy": {**read_yaml("tiny_sd"), "start": "gone", "reference": "start"}})
    node = with_given(saved, "policy", None, "run")
    assert (node.start, node.reference) == (None, "base")
