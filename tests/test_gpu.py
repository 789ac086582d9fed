"""What only a GPU can show: the same numbers as on the CPU, half precision, quantised weights, and whole runs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import fit
from families import FAMILIES, PROMPTS, TIMESTEP, Redness, adapter, build, gradients, make, perturb, predict
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.policies.adapted import AdaptedPolicy
from vp_rl.sampler import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]
ROOT = Path(__file__).parents[1]
DDPO_RUN = (
    "experiment=ddpo_vpscore",
    "trainer.accelerator=gpu",
    "algorithm.decay=false",
    "algorithm.images_per_prompt=4",
    "sampler.steps=3",
    "data.batch_size=2",
    "data.batches_per_epoch=2",
    "evaluation.limit=4",
    "evaluation.seeds=[0]",
    "callbacks.held_out.best=null",  # so short a run need not beat the base model, and leaves its last adapter
    "callbacks.held_out.patience=null",
    "reward.checkpoint=tiny-blip",
)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 as it is on a CPU: convolutions may otherwise round their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(policy: AdaptedPolicy) -> AdaptedPolicy:
    perturb(policy)
    return policy.to("cuda")


def latents(policy: AdaptedPolicy) -> torch.Tensor:
    """The same on every device: drawn on the CPU."""
    return policy.noise(len(PROMPTS), torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", FAMILIES)
def test_predictions_and_gradients_are_those_of_a_cpu(case: str) -> None:
    there, here = on_gpu(make(case)), make(case)
    perturb(here)
    slopes = gradients(here)
    for name, slope in gradients(there).items():
        assert (slope.cpu() - slopes[name]).norm() <= 1e-3 * slopes[name].norm()
    torch.testing.assert_close(predict(there, guidance=3.0).cpu(), predict(here, guidance=3.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", FAMILIES)
def test_images_of_the_same_seeds_are_those_of_a_cpu(case: str) -> None:
    there, here = on_gpu(make(case)), make(case)
    perturb(here)
    images = []
    for policy in (here, there):
        finished = Sampler(4, 2.0, 0.5).sample(
            policy, policy.encode(PROMPTS), [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        )
        images.append(policy.decode(finished).cpu())
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_autocast_changes_nothing_in_a_model_that_is_in_half_precision(case: str) -> None:
    policy = build(case, dtype="bfloat16").to("cuda")
    plain = policy.predict(latents(policy), TIMESTEP.cuda(), policy.encode(PROMPTS), 3.0)
    picture = policy.decode(latents(policy))
    with torch.autocast("cuda", torch.bfloat16), policy.reference():
        assert torch.equal(policy.predict(latents(policy), TIMESTEP.cuda(), policy.encode(PROMPTS), 3.0), plain)
        assert torch.equal(policy.decode(latents(policy)), picture)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast", "ignore:inner dimension")
# See test_economy.py for the bounds.
@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.03), ("4bit", 0.3)])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_lora_trains_on_quantised_weights(case: str, bits: str, error: float) -> None:
    plain, policy = make(case).to("cuda"), build(case, economy={"quantize": bits}).to("cuda")
    difference = (predict(policy) - predict(plain)).abs().max() / predict(plain).abs().max()
    assert 1e-5 < difference < error
    perturb(policy)
    found = gradients(policy)
    assert found.keys() == adapter(policy).keys()
    assert all(slope.dtype == torch.float32 and slope.abs().sum() > 0 for slope in found.values())


@pytest.mark.parametrize("case", FAMILIES)
def test_text_encoders_visit_the_gpu_and_leave_it(case: str) -> None:
    plain, policy = make(case).to("cuda"), build(case, economy={"text_encoders": "visit"}).to("cuda")
    told, visited = plain.encode(PROMPTS), policy.encode(PROMPTS)
    assert all(tensor.is_cuda for tensor in visited.values())
    torch.testing.assert_close(visited, told)
    assert next(policy.text_encoder.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_trains_there(name: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("train", [f"optimizer@algorithm.optimizer={name}"]).algorithm.optimizer
    policy = make("sd15", lora={"r": 128, "target_modules": ["to_k"]})
    before = {key: tensor.clone() for key, tensor in adapter(policy).items()}
    algorithm = DDPO(
        policy, Redness(), Sampler(2, 1.0, 1.0), instantiate(node), images_per_prompt=4, sample_batch=8, train_batch=64
    )
    fit(algorithm, accelerator="gpu", devices=1)
    assert any(not torch.equal(tensor.cpu(), before[key]) for key, tensor in adapter(policy).items())


def train(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "train.py", *DDPO_RUN, *arguments, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_whole_run_learns_and_replays_its_own_steps(precision: str, tmp_path: Path) -> None:
    train(tmp_path, f"trainer.precision={precision}", "trainer.max_epochs=2")
    state = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    moved = [tensor for name, tensor in state.items() if "lora_B" in name or "lora.up" in name]
    assert moved
    assert all(bool(tensor.abs().sum() > 0) for tensor in moved)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    drifts = [float(row["train/log_prob_drift"]) for row in rows if row["train/log_prob_drift"]]
    assert drifts
    assert max(drifts) < {"32-true": 1e-4}.get(precision, 1e-2)
    assert json.loads((tmp_path / "summary.json").read_text())


def test_a_resumed_run_goes_on_as_the_undisturbed_one(tmp_path: Path) -> None:
    """To rounding: a GPU adds up in an order that differs from run to run."""
    train(tmp_path / "whole", "trainer.max_epochs=2")
    train(tmp_path / "halves", "trainer.max_epochs=1")
    train(tmp_path / "halves", "trainer.max_epochs=2", "resume=auto")
    whole, halves = (
        load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("whole", "halves")
    )
    for name, tensor in whole.items():
        assert (halves[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-6


def test_auto_finds_what_fits(tmp_path: Path) -> None:
    said = train(
        tmp_path,
        "dry_run=true",
        "geometry.images_per_update=8",
        "algorithm.train_batch=auto",
        "algorithm.sample_batch=auto",
    )
    assert "images/s" in said
