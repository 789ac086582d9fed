"""Every LoRA setting that a policy can be trained with can be taken away in every format; all others are refused."""

import json
import stat
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_pipelines
import torch
from families import PROMPTS, perturb
from peft import LoraConfig
from peft.tuners.lora import LoraRuntimeConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vp_rl.policies import export, lora_settings
from vp_rl.policies.pipelines import Source
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# By PEFT's field: settings that it is tried with, beside rank 4 and alpha 6 on attention.
ACCEPTED: dict[str, list[dict[str, Any]]] = {
    "r": [{"r": 3}],
    "lora_alpha": [{"lora_alpha": 9}, {"lora_alpha": 2.5}],
    "target_modules": [{"target_modules": r".*attn1\.to_[qv]"}, {"target_modules": ["to_q", "conv1", "proj_in"]}],
    "exclude_modules": [{"exclude_modules": ["to_k"]}, {"exclude_modules": r".*attn2.*"}],
    "layers_to_transform": [{"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}],
    "layers_pattern": [{"layers_to_transform": 0, "layers_pattern": ["transformer_blocks"]}],
    "rank_pattern": [{"rank_pattern": {"to_q": 2, r"attn2\.to_k": 7}}],
    "alpha_pattern": [{"alpha_pattern": {"to_q": 1, r"attn2\.to_k": 11}}, {"alpha_pattern": {"to_v": 3}, "r": 2}],
    "use_rslora": [{"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"to_v": 9}}],
    "use_dora": [{"use_dora": True}],
    "init_lora_weights": [{"init_lora_weights": init} for init in (True, False, "gaussian", "orthogonal")],
}
REFUSED: dict[str, list[Any]] = {
    "init_lora_weights": [
        "pissa",
        "pissa_niter_4",
        "olora",
        "loftq",
        "corda",
        "eva",
        "lora_ga",
        "mini",
        None,
        1,
    ],
    "task_type": ["CAUSAL_LM"],
    "peft_type": ["ADALORA"],
    "auto_mapping": [{"a": "b"}],
    "peft_version": ["0.1"],
    "base_model_name_or_path": ["a/b"],
    "revision": ["main"],
    "inference_mode": [True],
    "lora_dropout": [0.1],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["conv_in"]],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["other"],
    "trainable_token_indices": [[1, 2]],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [object()],
    "corda_config": [object()],
    "lora_ga_config": [object()],
    "velora_config": [{"rank": 1}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [object()],
    "layer_replication": [[(0, 1)]],
    "runtime_config": [LoraRuntimeConfig(ephemeral_gpu_offload=True)],
    "lora_bias": [True],
    "target_parameters": [["conv_in.weight"]],
    "use_bdlora": [object()],
    "arrow_config": [object()],
    "kasa_config": [object()],
    "ensure_weight_tying": [True],
}


def with_lora(**settings: Any) -> Any:
    """A policy on the tiny SD 1.5, whose adapter is far from the identity."""
    policy = fresh(**settings)
    perturb(policy)
    return policy


def fresh(**settings: Any) -> Any:
    return StableDiffusion(str(families.folder("sd15")), LoraConfig(**given(settings)), resolution=16)


@pytest.fixture
def pipeline() -> Any:
    """Diffusers' own."""
    return deepcopy(_untouched())


@cache
def _untouched() -> Any:
    return tiny_pipelines.load(families.folder("sd15"))


def adapted(pipeline: Any, file: Path) -> torch.Tensor:
    """Its images with an adapter."""
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    try:
        return theirs(pipeline)
    finally:
        pipeline.unload_lora_weights()


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "target_modules": ATTENTION, **settings}


def images_of(policy: Any) -> torch.Tensor:
    sampler = Sampler(3, 4.0, 0.0)
    return policy.decode(sampler.sample(policy, policy.encode(PROMPTS), torch.Generator().manual_seed(5)))


def theirs(pipeline: Any) -> torch.Tensor:
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    return pipeline(PROMPTS, generator=torch.Generator().manual_seed(5), **call).images


def test_every_field_of_peft_is_known_to_be_right_or_refused() -> None:
    """A new one fails here: try it, then put it into one of the two tables."""
    names = {field.name for field in fields(LoraConfig)}
    assert ACCEPTED.keys() | REFUSED.keys() == names
    assert ACCEPTED.keys() == lora_settings.FREE


def _name(value: Any) -> str:
    """The same in every process: an object's own words have its address in them."""
    return "object" if type(value) is object else str(value)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, each in REFUSED.items() for value in each], ids=_name
)
def test_what_could_not_be_taken_away_is_refused_before_training(field: str, value: Any) -> None:
    lora = LoraConfig(**given({}))
    setattr(lora, field, value)  # whatever PEFT itself asks of it
    with pytest.raises(ValueError, match=rf"policy\.lora\.{field}="):
        lora_settings.check(lora, families.denoiser(families.make("sd15")), "U-Net")


@pytest.mark.parametrize("setting", ["init_lora_weights=pissa", "modules_to_save", "lora_dropout"])
def test_a_policy_with_such_a_setting_is_not_made(setting: str) -> None:
    name, _, value = setting.partition("=")
    settings = {name: value or {"modules_to_save": ["conv_in"], "lora_dropout": 0.1}[name]}
    with pytest.raises(Exception, match=rf"policy\.lora\.{name}="):
        fresh(**settings)


TRIES = [each for tries in ACCEPTED.values() for each in tries]
TELLING = [
    {"target_modules": ["to_q", "conv1", "proj_in"]},
    {"exclude_modules": ["to_k"]},
    {"alpha_pattern": {"to_q": 1, r"attn2\.to_k": 11}},
    {"use_rslora": True, "rank_pattern": {"to_v": 9}},
    {"use_dora": True},
]


def _fast(which: list[dict[str, Any]]) -> list[Any]:
    """All of them, those of `which` in the default suite."""
    return [
        pytest.param(settings, id=str(settings), marks=[] if settings in which else pytest.mark.slow)
        for settings in TRIES
    ]


@torch.no_grad()
@pytest.mark.parametrize("settings", _fast(TELLING))
def test_what_is_accepted_makes_the_same_images_from_every_file(
    settings: dict[str, Any], pipeline: Any, tmp_path: Path
) -> None:
    policy, base = fresh(**settings), theirs(pipeline)
    if settings.get("init_lora_weights", True):
        torch.testing.assert_close(images_of(policy), base, rtol=0, atol=1e-4)  # begins as the model on disk
    perturb(policy)
    images, adapter = images_of(policy), tmp_path / "adapter"
    assert (images - base).abs().max() > 0.01
    adapter.mkdir()
    policy.save_adapter(adapter)
    files = [adapter / FILE, export.to_diffusers(adapter, tmp_path / "diffusers", {})]
    assert all(torch.equal(load_file(files[0])[key], tensor) for key, tensor in load_file(files[1]).items())
    if settings.get("use_dora"):
        with pytest.raises(ValueError, match=r"to=kohya has no DoRA.*to=diffusers or merged"):
            export.to_kohya(adapter, tmp_path / "kohya", {})
    else:
        files.append(export.to_kohya(adapter, tmp_path / "kohya", {}))
    for file in files[1:]:
        difference = (adapted(pipeline, file) - images).abs().max()
        assert difference <= 1e-4, file.name
    perturb(policy)
    for parameter in families.adapter(policy).values():
        parameter.zero_()
    policy.load_adapter(adapter)
    torch.testing.assert_close(images_of(policy), images, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", _fast(TELLING[3:]))
def test_what_is_accepted_is_merged_into_a_pipeline_that_makes_the_same_images(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    policy = with_lora(**settings)
    policy.save_adapter(tmp_path)
    source = Source(str(families.folder("sd15")), "float32")
    merged = tiny_pipelines.load(export.to_merged(tmp_path, source, None, tmp_path / "merged", {}))
    torch.testing.assert_close(theirs(merged), images_of(policy), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", families.FAMILIES)
def test_an_adapters_file_counts_the_same_without_its_header(case: str, tmp_path: Path) -> None:
    """ComfyUI reads tensors alone, and takes alpha for the rank where there is none."""
    policy = families.make(case, lora={"r": 4, "lora_alpha": 8})
    perturb(policy)
    policy.save_adapter(tmp_path)
    state = load_file(tmp_path / FILE)
    deltas = {
        name: module.get_delta_weight("default")
        for name, module in families.denoiser(policy).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(deltas) > 4
    component = "unet" if hasattr(policy, "unet") else "transformer"
    for name, delta in deltas.items():
        first, second = (state[f"{component}.{name}.lora_{matrix}.weight"] for matrix in "AB")
        torch.testing.assert_close(second @ first, delta, rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / FILE, framework="pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert said[f"{component}.lora_alpha"] == said[f"{component}.r"] == 4


def test_an_adapter_that_was_written_with_its_scale_in_the_header_is_exported_right(
    pipeline: Any, tmp_path: Path
) -> None:
    """As runs wrote them before, and as diffusers' scripts do."""
    policy = with_lora(alpha_pattern={"to_v": 3})
    (tmp_path / "adapter").mkdir()
    policy.save_adapter(tmp_path / "adapter")
    images, file = images_of(policy), tmp_path / "adapter" / FILE
    by, state = policy.adapter._scales(), load_file(file)
    for name, scale in by.items():
        state[f"unet.{name}.lora_B.weight"] /= scale
    raw = policy.unet.peft_config["default"].to_dict() | {"target_modules": ATTENTION}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in raw.items()})}
    save_file(state, file, metadata=header)
    again = with_lora()
    again.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(images_of(again), images, rtol=0, atol=1e-4)
    for to in (export.to_diffusers, export.to_kohya):
        written = to(tmp_path / "adapter", tmp_path / to.__name__, {})
        torch.testing.assert_close(adapted(pipeline, written), images, rtol=0, atol=1e-4)


def test_written_files_can_be_read_by_whom_their_folder_lets_in(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir(mode=0o750)
    with_lora().save_adapter(tmp_path / "adapter")
    export.to_diffusers(tmp_path / "adapter", tmp_path / "diffusers", {})
    export.to_kohya(tmp_path / "adapter", tmp_path / "kohya", {})
    export.to_merged(
        tmp_path / "adapter", Source(str(families.folder("sd15")), "float32"), None, tmp_path / "merged", {}
    )
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == file.parent.stat().st_mode & 0o666
    assert stat.S_IMODE((tmp_path / "adapter" / FILE).stat().st_mode) == 0o640


def test_a_pipeline_without_t5_is_merged(tmp_path: Path) -> None:
    policy = families.make("sd3_without_t5")
    perturb(policy)
    policy.save_adapter(tmp_path)
    source = Source(str(families.folder("sd3_without_t5")), "float32")
    merged = tiny_pipelines.load(export.to_merged(tmp_path, source, None, tmp_path / "merged", {}))
    assert merged.text_encoder_3 is None
    call = {"height": 16, "width": 16, "max_sequence_length": 24}
    images = merged(
        PROMPTS, generator=torch.manual_seed(5), num_inference_steps=3, guidance_scale=4.0, output_type="pt", **call
    ).images
    sampler = Sampler(3, 4.0, 0.0)
    ours = policy.decode(sampler.sample(policy, policy.encode(PROMPTS), torch.manual_seed(5)))
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-4)
