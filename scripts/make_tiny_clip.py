"""Trains the tiny CLIP: the embedded world's weaker reward, by CLIP's own contrastive loss on rendered scenes.

    python scripts/make_tiny.py clip

It sees the image and the prompt apart and compares them by one cosine, as CLIP does, and is asked only which prompt of
a batch is an image's own; so it knows colours and shapes well, and what belongs to what, how many and where, less. No
prompt of the validation or test split is used.
"""

import random
import time
from pathlib import Path

import torch
from make_tiny_blip import ALTERATIONS, altered, images_of
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from vp_rl.scenes.grammar import scenes
from vp_rl.scenes.render import SIZE

WIDTH, PATCH, BATCH, RATE = 96, 8, 128, 1e-3


def train_clip(out: Path, tokenizer: CLIPTokenizer, tokens: int, seed: int = 0, steps: int = 1200) -> None:
    """Ten minutes on one CPU core.

    Args:
        out: the folder that it is saved in, in half precision.
        tokenizer: the tiny Stable Diffusion's, which is CLIP's.
        tokens: that a prompt is padded to.
        seed: of the weights and the scenes.
        steps: updates, of `BATCH` images each.
    """
    torch.manual_seed(seed)
    model, pool, rng = make_clip(tokenizer, tokens), scenes("train", 30_000, seed + 5), random.Random(seed + 5)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    hits, started = 0.0, time.monotonic()
    for step in range(steps):
        drawn = list({scene.prompt: scene for scene in rng.choices(pool, k=BATCH)}.values())
        cosines = compare(model, tokenizer, images_of(drawn, rng), [scene.prompt for scene in drawn])
        logits, own = cosines * model.logit_scale.exp(), torch.arange(len(drawn))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # 100, as CLIP holds it
        hits += (logits.argmax(1) == own).float().mean().item()
        if step % 100 == 99:
            print(f"clip {step + 1}: {hits / 100:.3f} right of {BATCH}, {time.monotonic() - started:.0f} s", flush=True)
            hits = 0.0
    save(model, tokenizer, out)
    rates = held_out_accuracy(model, tokenizer)
    print("  " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)


def make_clip(tokenizer: CLIPTokenizer, tokens: int) -> CLIPModel:
    """Three vision and two text layers of width 96."""
    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    start, end = (tokenizer.convert_tokens_to_ids(str(t)) for t in (tokenizer.bos_token, tokenizer.eos_token))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=tokens,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        **size,
    )
    vision = CLIPVisionConfig(num_hidden_layers=3, image_size=SIZE, patch_size=PATCH, **size)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def compare(model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine of each image (row) with each prompt (column)."""
    read = tokenizer(prompts, padding=True, return_tensors="pt")
    # The mask changes nothing before the end of a prompt, where its embedding is taken (attention is causal).
    text = model.text_projection(model.text_model(input_ids=read.input_ids).pooler_output)
    seen = model.visual_projection(model.vision_model(pixel_values=images * 2 - 1).pooler_output)
    return F.normalize(seen, dim=1) @ F.normalize(text, dim=1).T


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """As the real CLIP is stored: weights, tokenizer, preprocessing."""
    model.half().save_pretrained(out)
    model.float()
    tokenizer.save_pretrained(out)
    half, crop = [0.5, 0.5, 0.5], {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=crop, image_mean=half, image_std=half
    ).save_pretrained(out)


@torch.no_grad()
def held_out_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, number: int = 400) -> dict[str, float]:
    """By respect: how often the true prompt of a validation scene beats one altered in it. Chance is 0.5."""
    rng = random.Random(9)
    drawn = scenes("validation", number)
    images, rates = images_of(drawn, rng), {}
    for respect in ALTERATIONS:
        wrong = [altered(scene, respect, rng) for scene in drawn]
        hits = [
            bool(torch.sub(*compare(model, tokenizer, images[row, None], [drawn[row].prompt, scene.prompt])[0]) > 0)
            for row, scene in enumerate(wrong)
            if scene is not None
        ]
        rates[respect] = sum(hits) / len(hits)
    return rates
