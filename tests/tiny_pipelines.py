"""A random pipeline of each model family, some 100 k parameters, saved in diffusers' format: what tests load."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vp_rl.scenes import tiny

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
T5_WIDTH = 64  # not less than two CLIPs beside each other, as in Stable Diffusion 3


def sd(prediction: str = "epsilon") -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, or with `v_prediction` 2.1: 16 px, the VAE halves them."""
    tokenizer = clip_tokenizer()
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
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=2.0),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: 16 px; two text encoders of 32 and 24 channels."""
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,  # six sizes, and the second text encoder's summary
        norm_num_groups=2,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=2.0, force_upcast=True),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_size=24, projection_dim=16)),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd3(t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: 16 px in 2 x 2 patches; CLIPs of 32 and 24 channels, T5 of 64, or none."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 12,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=vae(scaling_factor=1.5, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, projection_dim=16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_size=24, projection_dim=12)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(tokenizer_3)) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1: dev with a guidance embedding and a shift by size, schnell without either."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        vae=vae(scaling_factor=1.5, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
    )


MAKERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": sd,
    "sd21": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3_without_t5": lambda: sd3(t5=False),
    "flux": flux,
    "flux_schnell": lambda: flux(guidance=False),
}
"""By the name of the yaml in conf/policy, where there is one."""


def save(name: str, folder: Path) -> Path:
    """The pipeline of that name, always of the same numbers, in a folder of its own there; made once."""
    target = folder / name
    if not target.exists():
        torch.manual_seed(1)
        MAKERS[name]().save_pretrained(target)
    return target


def load(folder: Path | str) -> Any:
    """Diffusers' own pipeline from such a folder, untouched, in evaluation mode: fresh T5s would drop out."""
    index = DiffusionPipeline.load_config(tiny.resolve(folder))
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(tiny.resolve(folder), dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipeline


def clip_tokenizer() -> CLIPTokenizer:
    """The embedded world's: words of its grammar, 20 tokens at most."""
    return CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "sd" / "tokenizer")


def clip_config(tokenizer: CLIPTokenizer, hidden_size: int = 32, projection_dim: int = 32) -> CLIPTextConfig:
    """Two layers for that tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=37,
        projection_dim=projection_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)


def t5_config(tokenizer: T5Tokenizer) -> T5Config:
    """Two layers for that tokenizer."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_ff=37,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )


def vae(**settings: Any) -> AutoencoderKL:
    """It halves an image's sides."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **settings,
    )
