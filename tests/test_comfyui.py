"""What ComfyUI applies of an adapter's file, re-enacted from the names and the scale that it is known to read.

ComfyUI looks for names that it makes itself from a model's layers; a tensor of another name is left out with a line in
its log. It multiplies by alpha / rank where the file has NAME.alpha, and by 1 otherwise; it knows no header.
"""

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import perturb
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from vp_rl.policies import export
from vp_rl.policies.sd import StableDiffusion
from vp_rl.policies.sdxl import StableDiffusionXL

ROOT = Path(__file__).parents[1]
EVERYTHING = (
    r"time_embedding\.linear_[12]|"
    r".*\.(to_[qkv]|to_out\.0|proj_in|proj_out|conv1|conv2|conv|conv_shortcut|time_emb_proj|net\.0\.proj|net\.2)"
)
# The layers of diffusers' U-Net and transformers that ComfyUI has a counterpart of (comfy/utils.py), by name.
U_NET = (
    r"conv_(in|out)|(time|add)_embedding\.linear_[12]|"
    r"((down|up)_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|"
    r"(down|up)samplers\.0\.conv|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))))"
)
TRANSFORMER = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|"
    r"norm1(_context)?\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
)


def names_of_a_u_net(layer: str) -> list[str]:
    """Kohya's; and those of diffusers before PEFT."""
    old = layer.replace(".to_", ".processor.to_").removesuffix(".0")
    return [f"lora_unet_{layer.replace('.', '_')}", old, f"unet.{old}"]


def applied(file: Path, layers: list[str], names: Any) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What is added to each layer's weights, and the tensors that are left out."""
    state = load_file(file)
    added, left = {}, set(state)
    for layer in layers:
        for name in names(layer):
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{name}.{up}.weight" not in state:
                    continue
                second, first = state[f"{name}.{up}.weight"], state[f"{name}.{down}.weight"]
                alpha = state.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else alpha.item() / len(first)
                added[layer] = scale * second.flatten(1) @ first.flatten(1)
                left -= {f"{name}.{up}.weight", f"{name}.{down}.weight", f"{name}.alpha"}
    return added, left


def trained(policy: Any) -> dict[str, torch.Tensor]:
    """What the policy itself adds to each layer's weights."""
    modules = families.denoiser(policy).named_modules()
    return {
        name: module.get_delta_weight("default").flatten(1)
        for name, module in modules
        if hasattr(module, "get_delta_weight")
    }


def layers_of(policy: Any, known: str) -> list[str]:
    modules = families.denoiser(policy).named_modules()
    named = [name for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d) or hasattr(module, "lora_A")]
    return [name for name in named if re.fullmatch(known, name)]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}}], ids=str)
@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_of_a_u_net_kohyas_file_is_applied_whole(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=EVERYTHING, **settings)
    kind = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL}[case]
    policy = kind(str(families.folder(case)), lora, resolution=16)
    perturb(policy)
    policy.save_adapter(tmp_path)
    added, left = applied(export.to_kohya(tmp_path, tmp_path, {}), layers_of(policy, U_NET), names_of_a_u_net)
    assert not left
    expected = trained(policy)
    assert added.keys() == expected.keys()
    for layer, delta in expected.items():
        torch.testing.assert_close(added[layer], delta, rtol=1e-5, atol=1e-6)
    _, left = applied(tmp_path / "pytorch_lora_weights.safetensors", layers_of(policy, U_NET), names_of_a_u_net)
    assert any("attn1.to_q" in name for name in left), "PEFT's names of a U-Net's attention are none of its"


@torch.no_grad()
@pytest.mark.parametrize("case", ["sd3", "flux"])
def test_of_a_transformer_the_adapter_itself_is_applied_whole(case: str, tmp_path: Path) -> None:
    """With the yaml's own LoRA, whose alpha is twice its rank."""
    policy = families.make(case)
    perturb(policy)
    policy.save_adapter(tmp_path)
    file = export.to_diffusers(tmp_path, tmp_path / "out", {})
    added, left = applied(file, layers_of(policy, TRANSFORMER), lambda layer: [f"transformer.{layer}"])
    assert not left
    expected = trained(policy)
    assert added.keys() == expected.keys()
    for layer, delta in expected.items():
        torch.testing.assert_close(added[layer], delta, rtol=1e-5, atol=1e-6)


def test_the_guide_sends_adapters_of_u_nets_to_comfyui_in_kohyas_format_alone() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*$", (ROOT / "docs" / "your_model.md").read_text(), re.M)
    lines = {
        name: line
        for name in rows
        for line in (ROOT / "docs" / "your_model.md").read_text().splitlines()
        if line.startswith(f"| `{name}` |")
    }
    assert "ComfyUI" in lines["kohya"]
    assert "ComfyUI for SD 3 and FLUX, not for U-Nets" in lines["diffusers"]
