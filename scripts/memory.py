"""Peak memory of the real model families, estimated without their weights and without a GPU.

    python scripts/memory.py                                             the table of docs/memory.md, in Markdown
    python scripts/memory.py sd15 flux                                   some of its columns
    python scripts/memory.py experiment=ddpo_vpscore_sd15                one experiment, by part
    python scripts/memory.py experiment=ddpo_vpscore_sdxl algorithm.train_batch=2 policy.economy.vae_batch=1

Models are built by their published configurations, without numbers, and handed to our own policies; their work is then
counted tensor by tensor (vp_rl/planning/memory.py). The reward is VP-Score at the published size.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import bitsandbytes
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.planning.estimate import Estimator
from vp_rl.planning.memory import Fakes, optimizer_bytes
from vp_rl.planning.plan import Planner
from vp_rl.planning.shown import memory_table, rows
from vp_rl.rewards import blip_sizes
from vp_rl.rewards.vp_score import VPScore
from vp_rl.scenes import tiny

CONF = Path(__file__).parents[1] / "conf"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BIG_CLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def clip(kind: type[nn.Module] = CLIPTextModel, **settings: Any) -> nn.Module:
    """CLIP ViT-L's text tower, or of another size."""
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return kind(CLIPTextConfig(**{**large, "projection_dim": 768, **settings}))


def t5() -> nn.Module:
    """T5 v1.1 XXL's encoder."""
    sizes = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))


def words() -> CLIPTokenizer:
    """Any one will do: only the number of tokens counts."""
    return CLIPTokenizer.from_pretrained(Path(tiny.resolve("tiny-sd")) / "tokenizer", model_max_length=77)


def letters() -> T5Tokenizer:
    """Likewise."""
    vocabulary = [(token, -3.0) for token in ("<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz")]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def vae(**settings: Any) -> AutoencoderKL:
    """Of all these models, but for the latents' channels and scale."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **settings,
    )


def sd15() -> StableDiffusionPipeline:
    """stable-diffusion-v1-5."""
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=vae(sample_size=512),
        text_encoder=clip(),
        tokenizer=words(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """stable-diffusion-xl-base-1.0."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    dtype = torch.get_default_dtype()
    if dtype == torch.float16:  # too narrow: our policy puts it in float32
        torch.set_default_dtype(torch.float32)
    decoder = vae(sample_size=1024, force_upcast=True, scaling_factor=0.13025)
    torch.set_default_dtype(dtype)
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=decoder,
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection, **BIG_CLIP, hidden_act="gelu", projection_dim=1280),
        tokenizer=words(),
        tokenizer_2=words(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """stable-diffusion-3.5-medium."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        vae=vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection, **BIG_CLIP, hidden_act="gelu", projection_dim=1280),
        text_encoder_3=t5(),
        tokenizer=words(),
        tokenizer_2=words(),
        tokenizer_3=letters(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> FluxPipeline:
    """FLUX.1-dev."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        vae=vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=words(),
        tokenizer_2=letters(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], str]] = {  # by conf/policy; and which module loads them
    "sd15": (sd15, "sd"),
    "sdxl": (sdxl, "sdxl"),
    "sd3": (sd3, "sd3"),
    "flux": (flux, "flux"),
}


def built(maker: Callable[[], Any], fakes: Fakes, dtype: torch.dtype = torch.float32) -> Any:
    """What a maker makes, with nothing in its tensors."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made = maker()
    finally:
        torch.set_default_dtype(torch.float32)
    for part in made.components.values() if isinstance(made, DiffusionPipeline) else (made,):
        if isinstance(part, nn.Module):
            fakes.fill(part.eval())
            part.to = lambda *_, part=part, **__: part  # fakes are nowhere: text encoders that visit the device stay
    if isinstance(made, DiffusionPipeline):  # its noise levels are numbers that are looked at
        made.scheduler = type(made.scheduler).from_config(made.scheduler.config)
    return made


def algorithm(config: DictConfig, family: str) -> tuple[PolicyTraining, Fakes]:
    """A run's algorithm with a policy of the family and VP-Score, both without numbers."""
    fakes, (maker, module) = Fakes(), FAMILIES[family]
    pipeline = built(maker, fakes, getattr(torch, config.policy.dtype))
    tokenizer = BertTokenizer.from_pretrained(tiny.resolve("tiny-vp-score"))
    reward = built(lambda: VPScore(*blip_sizes.published(), tokenizer), fakes)
    with mock.patch(f"vp_rl.policies.{module}.load_pipeline", return_value=pipeline):
        policy = instantiate(config.policy)
    node = {name: value for name, value in config.algorithm.items() if name not in ("policy", "reward")}
    rewarded = {"reward": reward.requires_grad_(False)} if "reward" in config.algorithm else {}
    return instantiate(node, policy=policy, **rewarded), fakes


def composed(*overrides: str) -> DictConfig:
    """The run's configuration, without Hydra's own."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*overrides, "name=memory", "trainer.default_root_dir=."])


def one(overrides: list[str]) -> None:
    """An experiment's parts."""
    config = composed(*overrides, "trainer.accelerator=cpu", "reward=vp_score")
    family = next(name for name, (_, module) in FAMILIES.items() if f".{module}." in config.policy._target_)
    made, fakes = algorithm(config, family)
    trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False)
    settings = {name: OmegaConf.to_container(config[name]) for name in ("geometry", "algorithm", "data", "trainer")}
    planner = Planner(settings, made, trainer, instantiate(config.algorithm.optimizer), fakes=fakes)
    console = Console(width=120)
    for name, text in rows(planner).items():
        console.print(f"{name}: {text}", highlight=False)
    console.print(memory_table(planner.estimator.parts(planner.plan.load)))


def column(family: str) -> dict[str, str]:
    """What a family needs, in MiB, by part and option."""
    found: dict[str, int | None] = {}
    estimators: dict[bool, Estimator] = {}
    for checkpointing in (False, True):
        config = composed(f"policy={family}", f"policy.gradient_checkpointing={str(checkpointing).lower()}")
        made, fakes = algorithm(config, family)
        adam = partial(torch.optim.AdamW, lr=1e-4)
        estimators[checkpointing] = estimator = Estimator(made, adam, nullcontext, fakes)
        if not checkpointing:
            parts = {part.name.removeprefix("frozen weights: "): part.bytes for part in estimator.weights()}
            denoiser = made.policy.adapter.denoiser
            found |= {
                f"weights: {'denoiser' if n in ('unet', 'transformer') else n}": b
                for n, b in parts.items()
                if n != "guidance"
            }
            found |= quantised(denoiser)
            trained = sum(p.numel() for p in made.policy.parameters() if p.requires_grad)
            eight = optimizer_bytes(partial(bitsandbytes.optim.AdamW8bit, lr=1e-4))
            found["adapter, gradients, AdamW"] = int(trained * (8 + optimizer_bytes(adam)))
            found["adapter, gradients, AdamW8bit"] = int(trained * (8 + eight))
            found["a sampling step of 4 images"] = estimator.of("sampling", 4)
            for batch in (4, 1):
                found[f"VAE decode of {batch} at once"] = estimator.of("decoding", batch)
            found["reward of 4 images"] = estimator.of("reward", 4)
        for batch in (1, 4) if checkpointing else (1,):
            with_it = " with gradient checkpointing" if checkpointing else ""
            found[f"training, {batch} states{with_it}"] = estimator.of("training", batch)
    return {name: "" if size is None else f"{size / 2**20:,.0f}" for name, size in found.items()}


def quantised(denoiser: nn.Module) -> dict[str, int]:
    """Bytes with the linear layers in bitsandbytes' formats: 8 bit and a scale a row; 4 bit and one for 64 numbers."""
    linear = [part for name, part in denoiser.named_modules() if isinstance(part, nn.Linear) and "lora" not in name]
    numbers = sum(part.weight.numel() for part in linear)
    frozen = sum(p.numel() * p.element_size() for p in denoiser.parameters() if not p.requires_grad)
    rest = frozen - sum(part.weight.numel() * part.weight.element_size() for part in linear)
    scales = 4 * sum(part.out_features for part in linear)
    return {
        "weights: denoiser in 8 bit": rest + numbers + scales,
        "weights: denoiser in 4 bit": rest + numbers // 2 + 4 * numbers // 64,
    }


def main() -> None:
    """Reads the command line."""
    if any("=" in given for given in sys.argv[1:]):
        return one(sys.argv[1:])
    columns = {}
    for family in sys.argv[1:] or FAMILIES:
        columns[family] = column(family)
        print(f"{family} is counted", file=sys.stderr, flush=True)
    print("| MiB, estimated | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in dict.fromkeys(name for each in columns.values() for name in each):
        print(f"| {name} | " + " | ".join(each.get(name, "") for each in columns.values()) + " |")
    return None


if __name__ == "__main__":
    main()
