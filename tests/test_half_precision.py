"""What is learned in bfloat16 is what is learned in float32."""

import csv
from pathlib import Path
from statistics import mean

import pytest
import torch
from tensor_cores import TensorCores
from test_train import ROOT, train
from torch import nn
from torch.nn import functional

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
