"""What the denoiser and its text encoders are told is what diffusers' pipeline tells them, in unusual models too."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_pipelines
import torch
from diffusers import UNet2DConditionModel
from hydra.utils import get_object
from safetensors.torch import save_file
from torch import nn

from vp_rl.sampler import Sampler

PROMPTS = ["a <toy> above a red circle", "two blue squares"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def load(case: str, folder: Path, **settings: Any) -> Any:
    kind = get_object(families.read_yaml(case)._target_)
    own = {"resolution": 16} | ({"t5_tokens": 24} if case in ("sd3", "flux") else {})
    return kind(str(folder), None, **(own | settings))


@torch.no_grad()
def check_images(case: str, folder: Path, guidance: float = 4.0, **settings: Any) -> torch.Tensor:
    """Returns the policy's images, which are those of the untouched pipeline."""
    policy = load(case, folder, **settings)
    latents = Sampler(3, guidance, 0.0).sample(policy, policy.encode(PROMPTS), torch.manual_seed(5))
    images = policy.decode(latents)
    call = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": guidance, "output_type": "pt"}
    call |= {"max_sequence_length": 24} if case in ("sd3", "flux") else {}
    if (negative := settings.get("negative_prompt")) is not None:
        call["negative_prompt"] = [negative] * 2
    theirs = tiny_pipelines.load(folder)(PROMPTS, generator=torch.manual_seed(5), **call).images
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)
    return images


def edited(case: str, file: str, settings: dict[str, Any], folder: Path) -> Path:
    """The model of a case with other settings in one of its JSON files."""
    shutil.copytree(families.folder(case), folder, copy_function=os.link)
    content = json.loads((folder / file).read_text()) | settings
    (folder / file).unlink()  # a link
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", families.FAMILIES)
def test_a_textual_inversion_of_several_vectors_is_read_as_the_pipeline_reads_it(case: str, tmp_path: Path) -> None:
    """Saved with it; SD 3's pipeline does not put the vectors in, and so its policy does not."""
    pipeline = tiny_pipelines.load(families.folder(case))
    if case == "sd3":
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
            encoder.resize_token_embeddings(len(tokenizer))
    else:
        width = pipeline.text_encoder.config.hidden_size
        pipeline.load_textual_inversion(
            {"<toy>": 2 * torch.randn(4, width)}, "<toy>", pipeline.tokenizer, pipeline.text_encoder
        )
        if case == "sdxl":
            pipeline.load_textual_inversion(
                {"<toy>": torch.randn(4, 24)}, "<toy>", pipeline.tokenizer_2, pipeline.text_encoder_2
            )
    pipeline.save_pretrained(tmp_path)
    check_images(case, tmp_path, **({} if case == "flux" else {"negative_prompt": "a <toy>"}))
    words = load(case, tmp_path).tokenize(["a <toy>"])[0]
    added = load(case, tmp_path).tokenizer.added_tokens_encoder
    assert sum(added[name] in words[0].tolist() for name in added if "toy" in name) == (1 if case == "sd3" else 4)


@pytest.mark.parametrize("negative", ["", "a green star"])
def test_an_encoder_with_an_attention_mask_gets_it(negative: str, tmp_path: Path) -> None:
    folder = edited("sd15", "text_encoder/config.json", {"use_attention_mask": True}, tmp_path / "model")
    masked = check_images("sd15", folder, negative_prompt=negative)
    plain = check_images("sd15", Path(families.folder("sd15")), negative_prompt=negative)
    assert (masked - plain).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 8.0])
@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_a_u_net_that_was_distilled_with_guidance_is_told_the_scale_and_called_once(
    case: str, guidance: float, tmp_path: Path
) -> None:
    folder = edited(case, "unet/config.json", {"time_cond_proj_dim": 9}, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config({key: value for key, value in config.items() if key[0] != "_"})
    unet.time_embedding.cond_proj = nn.Linear(9, unet.time_embedding.cond_proj.out_features, bias=False)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    check_images(case, folder, guidance)
    policy, batches = load(case, folder), []
    policy.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    Sampler(1, guidance, 0.0).sample(policy, policy.encode(PROMPTS), torch.manual_seed(5))
    assert batches == [2]


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_a_shift_that_a_u_nets_vae_says_is_ignored_as_by_its_pipeline(case: str, tmp_path: Path) -> None:
    folder = edited(case, "vae/config.json", {"shift_factor": 0.5}, tmp_path / "model")
    check_images(case, folder)
    policy, images = load(case, folder), torch.rand(1, 3, 16, 16)
    expected = policy.vae.encode(images * 2 - 1).latent_dist.mean * policy.vae.config.scaling_factor
    torch.testing.assert_close(policy.encode_images(images), expected)


@pytest.mark.parametrize(("zeros", "negative"), [(True, ""), (True, None), (False, None)])
def test_sdxl_points_away_from_what_its_pipeline_does(zeros: bool, negative: str | None, tmp_path: Path) -> None:
    folder = edited("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": zeros}, tmp_path / "model")
    check_images("sdxl", folder, negative_prompt=negative)


@pytest.mark.parametrize("case", [*families.FAMILIES, "flux_schnell"])
def test_a_guidance_of_0_is_what_it_is_in_diffusers(case: str) -> None:
    check_images(case.partition("_")[0], Path(families.folder(case)), guidance=0.0)
