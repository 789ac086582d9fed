"""A run that cannot learn stops, or says so; one that can is left alone."""

import logging
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from fakes import LinearPolicy, QuadraticReward, Words
from peft import LoraConfig
from torch import nn

from vp_rl.algorithms.base import PolicyTraining, total_norm
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.guards import Guards
from vp_rl.data.prompts import PromptDataModule
from vp_rl.functional import differ, gaussian_log_prob
from vp_rl.interfaces import Reward
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler, log_prob_of
from vp_rl.types import Images, Latents, Scores

NOISY = Sampler(steps=3, guidance=1.0, eta=1.0)
BATCHES = 4


def ddpo(policy: Any, reward: Reward | None = None, lr: float = 0.05, **settings: Any) -> DDPO:
    settings = {"images_per_prompt": 4, "train_batch": 64, "clip_range": 0.2} | settings
    return DDPO(policy, reward or QuadraticReward(), NOISY, partial(torch.optim.AdamW, lr=lr), **settings)


def refl(policy: Any, reward: Reward | None = None, **settings: Any) -> ReFL:
    optimizer = partial(torch.optim.AdamW, lr=0.05)
    return ReFL(
        policy, reward or QuadraticReward(), NOISY, optimizer, **{"target": 0.0, "reward_weight": 1.0} | settings
    )


def fit(algorithm: PolicyTraining, *callbacks: lightning.Callback, **trainer: Any) -> lightning.Trainer:
    """One epoch of four batches of prompts."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 1, "enable_checkpointing": False, **quiet, **trainer}
    runner = lightning.Trainer(callbacks=list(callbacks), **settings)
    runner.fit(algorithm, PromptDataModule(Words(), batch_size=4, batches_per_epoch=BATCHES))
    return runner


class Watched(LinearPolicy):
    """Keeps how many states it was asked for at once, where gradients were wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def predict(self, latents: Latents, *rest: Any) -> Latents:
        if torch.is_grad_enabled():
            self.sizes.append(len(latents))
        return super().predict(latents, *rest)


class Scored(QuadraticReward):
    """Quadratic scores, of which some calls' are changed in place."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change, self.calls = change, 0

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        self.calls += 1
        return self.change(super().forward(images, prompts), self.calls)


def nan_in(call: int, row: int = 1) -> Scored:
    def change(scores: Scores, calls: int) -> Scores:
        return scores.index_fill(0, torch.tensor([row]), float("nan")) if calls == call else scores

    return Scored(change)


def alike(*calls: int) -> Scored:
    """In those calls every image has the score 0."""
    return Scored(lambda scores, call: scores * 0 if call in calls else scores)


# --- settings


def test_a_patience_that_is_none_is_refused() -> None:  # test_train.py has the other setting
    with pytest.raises(ValueError, match=r"callbacks\.guards\.patience=0 must be at least 1"):
        Guards(patience=0)


@pytest.mark.parametrize("make", [ddpo, refl])
def test_guards_change_nothing_in_a_run_that_learns(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    watched, alone = LinearPolicy(), LinearPolicy()
    fit(make(watched), Guards())
    fit(make(alone))
    assert torch.equal(watched.bias, alone.bias)
    assert not [record for record in caplog.records if record.name == "vp_rl.callbacks.guards" and record.levelno > 20]


# --- the self-test


class Shaky(LinearPolicy):
    """Predicts otherwise each time, as with dropout on."""

    def predict(self, latents: Latents, *rest: Any) -> Latents:
        return super().predict(latents, *rest) + 0.1 * torch.randn(latents.shape)


class Cut(QuadraticReward):
    """Says that it is differentiable, and is not."""

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return super().forward(images.detach(), prompts).requires_grad_()


class Steep(QuadraticReward):
    """Finite scores, whose gradient is not: the square root's at 0."""

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return super().forward(images, prompts) + (images.sum((1, 2, 3)) * 0).sqrt()


def test_a_policy_that_does_not_replay_its_own_steps_is_found_before_the_first_update() -> None:
    policy = Shaky()
    with pytest.raises(ValueError, match=r"^Before any update the policy gives its own steps log-prob.* differ by \d"):
        fit(ddpo(policy), Guards())
    assert not policy.bias.any()
    fit(ddpo(Shaky()), Guards(self_test=False))


@pytest.mark.parametrize(
    ("reward", "said"),
    [(Cut(), r"^No gradient of Cut reaches the adapter"), (Steep(), r"^The gradient of Steep .*not fi")],
)
def test_a_reward_whose_gradient_teaches_nothing_is_found_before_the_first_update(reward: Reward, said: str) -> None:
    policy = LinearPolicy()
    with pytest.raises(ValueError, match=said):
        fit(refl(policy, reward), Guards())
    assert not policy.bias.any()


@pytest.mark.parametrize("make", [ddpo, refl])
def test_the_self_test_says_what_it_found(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vp_rl"):
        fit(make(LinearPolicy()), Guards())
    assert len([said for said in caplog.messages if said.startswith("self-test: ")]) == 1


def test_ddpos_self_test_replays_as_many_states_as_are_trained_at_once_and_as_they_are_trained() -> None:
    policy = Watched()
    fit(ddpo(policy, train_batch=16), Guards())
    assert policy.sizes == [16] * (1 + 2 * BATCHES)  # 4 prompts x 4 images x 2 random steps a batch


# --- rewards that tell nothing apart


@pytest.mark.parametrize("make", [ddpo, refl])
def test_rounds_of_equal_scores_are_told_and_then_an_error(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(make(LinearPolicy(), alike(3)), Guards(self_test=False, patience=2))
    assert any("got the score 0 from Scored: nothing to learn from" in said for said in caplog.messages)
    fit(make(LinearPolicy(), alike(2, 4)), Guards(self_test=False, patience=2))  # not in a row
    with pytest.raises(
        ValueError, match=r"^2 rounds in a row, every image after \d updates got the score 0 from Scored"
    ):
        fit(make(LinearPolicy(), alike(2, 3)), Guards(self_test=False, patience=2))


def test_prompts_whose_images_score_alike_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    # Three of four prompts in each round: 4 images of each, scored in one call.
    reward = Scored(lambda scores, call: torch.cat([torch.arange(3.0).repeat_interleave(4), scores[12:]]))
    trainer = fit(ddpo(LinearPolicy(), reward), Guards())
    assert trainer.callback_metrics["train/zero_variance_groups"].item() == pytest.approx(0.75)
    assert any("75% of the round's prompts" in said for said in caplog.messages)


def test_scores_differ_by_more_than_rounding_or_not() -> None:
    scores = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 3e-7], [1000.0, 1000.0005], [0.0, 1e-5], [0.0, float("nan")]])
    assert differ(scores).tolist() == [False, False, False, True, False]


# --- numbers that are none


@pytest.mark.parametrize("make", [ddpo, refl])
def test_a_score_that_is_none_is_an_error_that_names_prompt_update_and_reward(make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^Scored gave nan for the image of 'train prompt \d+' after 1 updates"
    ) as said:
        fit(make(LinearPolicy(), nan_in(2)), Guards(self_test=False))
    assert "callbacks.guards.on_nonfinite=skip" in str(said.value)


def test_ddpo_leaves_out_the_prompt_and_learns_from_the_others() -> None:
    policy, reward = LinearPolicy(), nan_in(1, row=5)  # an image of the second prompt
    algorithm = ddpo(policy, reward, train_batch=1000)
    seen = []
    step = algorithm.training_step
    algorithm.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]  # type: ignore[method-assign]
    trainer = fit(algorithm, Guards(on_nonfinite="skip"))
    zero = {int(row) for row in seen[0].prompt.unique() if not seen[0].advantages[seen[0].prompt == row].any()}
    assert zero == {1}
    assert torch.isfinite(policy.bias).all()
    assert policy.bias.any()
    assert trainer.callback_metrics["train/skipped"].item() == 1
    assert torch.isfinite(trainer.callback_metrics["train/reward"])


def test_refl_leaves_out_the_update_as_if_it_had_not_been() -> None:
    """No momentum, no decay: the parameters after it are those before."""
    policy, biases = LinearPolicy(), []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            biases.append(policy.bias.detach().clone())

    trainer = fit(refl(policy, nan_in(2)), Guards(self_test=False, on_nonfinite="skip"), Watch())
    assert torch.equal(biases[1], biases[0])
    assert not torch.equal(biases[2], biases[1])
    assert trainer.callback_metrics["train/skipped"].item() == 2  # its prompt, and the update


class Breaking(LinearPolicy):
    """Its parameter's gradient is infinite at a backward pass, though everything that is computed forward is finite."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.passes, self.number = 0, number
        self.bias.register_hook(self.spoil)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return gradient / 0 if self.passes >= self.number else gradient


def test_a_gradient_that_is_none_is_an_error_that_names_prompts_steps_update_and_reward() -> None:
    with pytest.raises(
        ValueError, match=r"^Update 2 is not of finite numbers \(loss .*, gradient norm (inf|nan)"
    ) as said:
        fit(ddpo(Breaking(2)), Guards())
    assert "QuadraticReward on sampling steps [" in str(said.value)
    assert "train prompt" in str(said.value)


def test_updates_cannot_all_be_skipped() -> None:
    with pytest.raises(ValueError, match=r"^Update \d is not of finite numbers .* So were the 2 before it\."):
        fit(ddpo(Breaking(2)), Guards(on_nonfinite="skip", patience=3))


def test_the_total_norm_is_that_of_all_gradients_together() -> None:
    assert total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == pytest.approx(5.0)
    assert total_norm([torch.tensor([float("inf")]), torch.tensor([1.0])]) == float("inf")


# --- precision


def test_the_drift_is_of_the_policy_that_sampled_whatever_updates_do_later() -> None:
    """Two passes at a high learning rate: the ratio moves, and the drift, of before the first update, does not."""
    trainer = fit(ddpo(LinearPolicy(), lr=0.5, inner_epochs=2), Guards())
    assert trainer.callback_metrics["train/ratio"].item() != pytest.approx(1.0, abs=1e-4)
    assert trainer.callback_metrics["train/log_prob_drift"].item() < 1e-6


def tiny_sd() -> StableDiffusion:
    """With an adapter that has moved: before, sampling with merged weights would be exact."""
    lora = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    policy, generator = StableDiffusion("tiny-sd", lora), torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


class Brightness(Reward):
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Buffer(torch.zeros(1))

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return images.mean((1, 2, 3)).float()


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-4), ("bf16-mixed", 1e-2)])
def test_the_drift_between_sampling_and_training_is_bounded(precision: str, bound: float) -> None:
    """By a default clip range in float32; by a hundredth of the ratio in bfloat16, which keeps 8 bits."""
    algorithm = DDPO(
        tiny_sd(),
        Brightness(),
        Sampler(steps=4, guidance=1.0, eta=1.0),
        partial(torch.optim.SGD, lr=0.0),
        images_per_prompt=2,
        train_batch=64,
    )
    trainer = fit(algorithm, Guards(), precision=precision, limit_train_batches=1)
    drift = trainer.callback_metrics["train/log_prob_drift"].item()
    assert drift < bound
    assert trainer.callback_metrics["train/ratio"].item() == pytest.approx(1.0, abs=bound)


def test_transitions_and_log_probabilities_are_float32_under_autocast() -> None:
    """The denoiser's output alone is rounded: given it, all is what it is without autocast."""
    policy, sampler = tiny_sd(), Sampler(steps=4, guidance=1.0, eta=1.0)
    outputs = []
    predict = policy.predict
    policy.predict = lambda *given: (outputs.append(predict(*given)), outputs[-1])[1]  # type: ignore[method-assign]
    latents, step = policy.noise(2, torch.Generator().manual_seed(1)), torch.tensor([0, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        transition = sampler.transition(policy, latents, step, policy.encode(["a", "b"]))
        log_prob = log_prob_of(latents, transition)
        trajectory = sampler.rollout(policy, policy.encode(["a", "b"]), torch.Generator().manual_seed(1))
    exact = policy.process.transition(outputs[0], latents, step, sampler.steps, sampler.eta)
    for found, expected in zip(transition, exact, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert torch.equal(log_prob, gaussian_log_prob(latents, exact.mean, exact.std))
    assert {log_prob.dtype, *(tensor.dtype for tensor in trajectory)} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_refl_reaches_the_adapter_in_any_precision(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_sd()
    algorithm = ReFL(policy, Brightness(), Sampler(steps=3, guidance=1.0), partial(torch.optim.SGD, lr=1.0))
    with caplog.at_level(logging.INFO, logger="vp_rl"):
        fit(algorithm, Guards(), precision=precision, limit_train_batches=1)
    assert any("self-test: the reward's gradient reaches the adapter" in said for said in caplog.messages)


def test_a_run_without_guards_still_stops_at_a_score_that_is_none() -> None:
    with pytest.raises(ValueError, match="Scored gave nan"):
        fit(refl(LinearPolicy(), nan_in(2)))


@pytest.mark.parametrize(
    ("dtype", "precision", "told"),
    [("float16", "32-true", True), ("float16", "bf16-mixed", True), ("bfloat16", "32-true", False)],
)
def test_float16_without_a_loss_scale_is_warned_of(
    dtype: str, precision: Any, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = StableDiffusion("tiny-sd", LoraConfig(r=2, target_modules=["to_q"]), dtype=dtype)
    trainer = lightning.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    Guards().on_fit_start(trainer, refl(policy, Brightness()))
    assert any("policy.dtype=bfloat16" in said for said in caplog.messages) == told


def test_the_smallest_gradients_live_in_bfloat16() -> None:
    """What an update's 800 micro-batches of 16,384 latent dimensions make of a loss of order 1 is 0 in float16."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        policy = StableDiffusion("tiny-sd", LoraConfig(r=2, target_modules=["to_q"]), dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        latents, step = policy.noise(1, torch.Generator().manual_seed(1)), torch.tensor([1])
        mean = NOISY.transition(policy, latents, step, policy.encode(["a red circle"])).mean
        (mean.sum() / (800 * 16_384)).backward()
        found[dtype] = torch.cat([parameter.grad.flatten() for parameter in trained])
    assert torch.cosine_similarity(found["float32"], found["bfloat16"], 0) > 0.99
    assert torch.cosine_similarity(found["float32"], found["float16"], 0) < 0.9


def test_an_update_that_is_skipped_may_have_been_cut_unevenly() -> None:
    class Diverged(LinearPolicy):
        def predict(self, latents: Any, *rest: Any) -> Any:
            found = super().predict(latents, *rest)
            return found * float("nan") if found.requires_grad else found

    algorithm = ddpo(Diverged(), train_batch=7)
    trainer = fit(algorithm, Guards(self_test=False, on_nonfinite="skip", patience=99), accumulate_grad_batches=3)
    assert trainer.callback_metrics["train/skipped"].item() > 0
    assert algorithm.policy.bias.tolist() == LinearPolicy().bias.tolist()
