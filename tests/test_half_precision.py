"""What is learned in bfloat16 is what is learned in float32."""

import csv
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from fakes import Words, fit, write_dataset
from methods import METHODS
from tensor_cores import TensorCores
from test_data_preferences import row
from test_ddpo_pytorch import tiny_sd
from test_train import ROOT, train
from torch import nn
from torch.nn import functional

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.data.prompts import PromptDataModule
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.generate import as_png

SEEDS = range(3)
SHORT = (  # a reward that is learnt in 30 rounds
    "reward=compressibility",
    "trainer=cpu",
    "trainer.max_epochs=6",
    "data.batches_per_epoch=5",
    "data.batch_size=4",
    "algorithm.decay=false",
    "callbacks.held_out=null",
)


def test_products_on_tensor_cores_are_those_of_the_processor_up_to_rounding() -> None:
    """Convolution, linear layer and attention, and their gradients, by whose means training is then imitated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1))
    images, tokens = torch.randn(2, 8, 16, 16), torch.randn(2, 4, 64, 32, requires_grad=True)
    weights = torch.randn(16, 64, requires_grad=True)
    learned = [*net.parameters(), tokens, weights]

    def computed() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            drawn = net(images)
            read = functional.linear(drawn.flatten(1)[:, :64], weights)
            attended = functional.scaled_dot_product_attention(*[tokens.bfloat16()] * 3)
        loss = sum(part.float().square().mean() for part in (drawn, read, attended))
        return [drawn, read, attended, *torch.autograd.grad(loss, learned)]

    plain = computed()
    with TensorCores():
        imitated = computed()
    for one, other in zip(plain, imitated, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 2**-6 * one.float().norm()  # some roundings of 2^-9 each


class First(lightning.Callback):
    """The first update's gradient, and what the adapter is in."""

    def on_train_batch_end(self, trainer: lightning.Trainer, module: PolicyTraining, *_: Any) -> None:
        if trainer.global_step == 1:
            trained = [p for p in module.policy.parameters() if p.requires_grad]
            self.gradient = torch.cat([p.grad.flatten().clone() for p in trained if p.grad is not None])
            self.dtypes = {p.dtype for p in trained}


def first_gradient(name: str, pairs: Path, precision: str, seed: int = 0) -> torch.Tensor:
    """Of a run of the embedded Stable Diffusion with an adapter that has moved."""
    settings: dict[str, Any] = {"beta": 100.0} if name == "dpo" else {}  # 5000 times rounding errors is far more
    if name in ("ddpo", "branch_ddpo", "nft", "awm"):
        settings = {"images_per_prompt": 4, "train_batch": 2 if name == "branch_ddpo" else 16}
    optimizer, first = partial(torch.optim.SGD, lr=1.0), First()
    algorithm = METHODS[name](policy=tiny_sd(), optimizer=optimizer, seed=seed, **settings)
    of_prompts = PromptDataModule(Words(), 2 if settings else 8)
    data = PreferenceDataModule(str(pairs), 4, "mean") if name == "dpo" else of_prompts
    fit(algorithm, data=data, precision=precision, callbacks=[first], limit_val_batches=0)
    assert first.dtypes == {torch.float32}
    return first.gradient


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts with two images of noise."""
    folder = tmp_path_factory.mktemp("pairs") / "set"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    images = [as_png(each) for each in pixels]
    rated = [row(n, "train", {aspect: [1, 5] for aspect in ASPECTS}, images[2 * n : 2 * n + 2]) for n in range(4)]
    write_dataset({"train": rated, "validation": rated[:1], "test": []}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_update_in_bfloat16_is_float32s(name: str, pairs: Path) -> None:
    """Far nearer to it than another seed's is; an update and no more, as images then part."""
    exact, half, other = (
        first_gradient(name, pairs, *given) for given in (("32-true",), ("bf16-mixed",), ("32-true", 1))
    )
    near, far = (torch.nn.functional.cosine_similarity(each, exact, 0).item() for each in (half, other))
    assert half.isfinite().all()
    assert near > 0.9 > far
    assert 0.5 < half.norm() / exact.norm() < 2


@pytest.mark.slow
def test_ddpo_in_bfloat16_reaches_the_reward_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds each, tiny SD: the means differ by less than float32's seeds do, and the ratio stays at 1."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    last: dict[str, list[float]] = {}
    for precision, more in {
        "32-true": (),
        "bf16-mixed": ("+callbacks.products._target_=tensor_cores.OnTensorCores",),
    }.items():
        for seed in SEEDS:
            folder = tmp_path / f"{precision}-{seed}"
            train(folder, "experiment=ddpo_vpscore", f"seed={seed}", f"trainer.precision={precision}", *SHORT, *more)
            with (folder / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            rewards = [float(row["train/reward"]) for row in rows if row.get("train/reward")]
            drifts = [float(row["train/log_prob_drift"]) for row in rows if row.get("train/log_prob_drift")]
            assert max(drifts) < 1e-2
            last.setdefault(precision, []).append(rewards[-1])
            print(precision, seed, f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}, drift {max(drifts):.1e}", flush=True)
            assert rewards[-1] > rewards[0] + 0.2  # kilobytes; or there would be nothing to compare
    exact, half = last["32-true"], last["bf16-mixed"]
    assert abs(mean(half) - mean(exact)) <= max(exact) - min(exact)
