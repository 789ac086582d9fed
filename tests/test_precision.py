"""Precisions that would round what is learned from are refused; the one that DeepSpeed is for rounds nothing."""

from typing import Any

import lightning
import pytest
import torch
from fakes import LinearPolicy, fit
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from test_checkpoint import Counting, ddpo, refl

from vp_rl.algorithms.base import PolicyTraining


class Engineless(DeepSpeedPrecision):
    """DeepSpeed's, without its engine, which needs a GPU."""

    backward = Precision.backward
    optimizer_step = Precision.optimizer_step
    clip_gradients = Precision.clip_gradients


def drift(**settings: Any) -> tuple[float, torch.Tensor]:
    """Largest difference between log-probabilities of sampling and those of training; what was learned."""
    policy = LinearPolicy()
    trainer = fit(ddpo(policy, Counting()), **settings)
    return trainer.callback_metrics["train/log_prob_drift"].item(), policy.bias.detach()


@pytest.mark.parametrize("make", [ddpo, refl])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_deepspeeds_half_precision_is_refused_with_what_to_set_instead(make: Any, precision: str) -> None:
    with pytest.raises(ValueError, match=r"with DeepSpeed rounds .*trainer\.precision=32-true policy\.dtype") as raised:
        fit(make(LinearPolicy(), Counting()), plugins=[Engineless(precision)])
    assert f"trainer.precision={precision} " in str(raised.value)
    assert "Or trainer.precision" not in str(raised.value)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_an_adapter_in_half_precision_is_refused_with_what_to_set_instead(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision={precision} rounds .*Or trainer\.precision=bf16-mixed"):
        fit(ddpo(LinearPolicy(), Counting()), precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precisions_that_keep_what_was_sampled_are_not_refused(precision: str) -> None:
    module = ddpo(LinearPolicy(), Counting())
    module.trainer = lightning.Trainer(accelerator="cpu", precision=precision, logger=False)
    module.setup("fit")


def test_deepspeeds_full_precision_trains_as_without_it() -> None:
    plain, learned = drift()
    found, same = drift(plugins=[Engineless("32-true")])
    assert plain == found < 1e-5
    assert torch.equal(learned, same)


def test_what_is_refused_would_round_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits of a density around 1 are 4e-3; the published clip range is 1e-4."""
    monkeypatch.setattr(PolicyTraining, "setup", lambda *_, **__: None)
    assert drift(plugins=[Engineless("bf16-mixed")])[0] > 1e-3
