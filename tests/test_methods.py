"""What the younger methods must satisfy exactly: DPO, DRaFT, DiffusionNFT, AWM, and a window of random steps."""

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from fakes import BlackBox, LinearPolicy, QuadraticReward, fit, write_dataset
from test_data_preferences import png, row
from torch import Tensor

from vp_rl.algorithms.awm import AdvantageWeightedMatching
from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.dpo import DiffusionDPO
from vp_rl.algorithms.draft import DRaFT
from vp_rl.algorithms.flow_bp import FlowBP
from vp_rl.algorithms.nft import DiffusionNFT
from vp_rl.algorithms.refl import ReFL
from vp_rl.algorithms.rounds import Batch
from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.functional import diffusion_dpo_loss, loser_bound, nft_loss, normalised_error
from vp_rl.processes.ddim import DDIM
from vp_rl.sampler import Sampler
from vp_rl.types import ASPECTS

STILL = Sampler(steps=5, guidance=1.0, eta=0.0)
TARGET = torch.tensor([0.5, -0.3, 0.2])


def adam(lr: float = 0.03) -> Any:
    return partial(torch.optim.Adam, lr=lr)


def nft(policy: LinearPolicy, lr: float = 0.03, **settings: Any) -> DiffusionNFT:
    return DiffusionNFT(policy, BlackBox(), STILL, adam(lr), **{"kl_weight": 0.0, "old_warmup": 0} | settings)


def awm(policy: LinearPolicy, lr: float = 0.03, **settings: Any) -> AdvantageWeightedMatching:
    defaults = {"kl_weight": 0.0, "anchor_weight": 0.0}
    return AdvantageWeightedMatching(policy, BlackBox(), STILL, adam(lr), **defaults | settings)


def draft(policy: LinearPolicy, lr: float = 0.03, **settings: Any) -> DRaFT:
    return DRaFT(policy, QuadraticReward(), STILL, adam(lr), **settings)


def flow_bp(policy: LinearPolicy, lr: float = 0.03, **settings: Any) -> FlowBP:
    return FlowBP(policy, QuadraticReward(), STILL, adam(lr), **{"active_steps": 2} | settings)


def whole_way() -> LinearPolicy:
    """Its last step ends at the image itself."""
    policy = LinearPolicy(gain=0.3)
    policy.process = DDIM(DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=True))
    policy.bias.data.fill_(0.1)
    return policy


def mean_image(policy: LinearPolicy) -> Tensor:
    latents = STILL.sample(policy, policy.encode(["a"] * 4096), torch.Generator().manual_seed(1))
    return latents.mean((0, 2, 3))


# --- every online and reward-gradient method

METHODS = {
    "nft": nft,
    "awm": awm,
    "awm, anchored": partial(awm, anchor_weight=0.1, kl_weight=1e-3),
    "draft": draft,
    "draft, all steps": partial(draft, last_steps=None),
    "draft, re-noised": partial(draft, renoise=2),
    "flow_bp": flow_bp,
}


@pytest.mark.parametrize("make", [nft, awm, draft, partial(draft, last_steps=3), partial(draft, renoise=2), flow_bp])
def test_the_optimum_of_a_linear_policy_is_found(make: Any) -> None:
    # The last step of LinearPolicy's own schedule changes nothing, so that DRaFT-1 has no gradient there.
    policy = LinearPolicy() if make in (nft, awm, flow_bp) else whole_way()
    fit(make(policy), epochs=120)
    # As for DDPO: what 64 images a round leave of the mean's noise at this learning rate.
    torch.testing.assert_close(mean_image(policy), TARGET, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_where_an_unbroken_one_does(name: str, tmp_path: Path) -> None:
    make, (whole, half, resumed) = METHODS[name], (LinearPolicy() for _ in range(3))
    fit(make(whole), epochs=6)
    fit(make(half), epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    fit(make(resumed), epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.bias, whole.bias)
    assert not torch.equal(half.bias, whole.bias)


@pytest.mark.parametrize("make", [nft, awm])
def test_what_holds_a_policy_at_the_model_without_its_adapter_does(make: Any) -> None:
    free, held = LinearPolicy(), LinearPolicy()
    moved = fit(make(free), epochs=30).callback_metrics["train/kl"]
    stayed = fit(make(held, kl_weight=100.0), epochs=30).callback_metrics["train/kl"]
    assert held.bias.norm() < 0.1 * free.bias.norm()
    assert stayed < 0.1 * moved


@pytest.mark.parametrize("make", [nft, awm])
def test_an_older_adapter_is_not_divided_among_devices(make: Any) -> None:
    algorithm = make(LinearPolicy())
    algorithm.configure_model()
    algorithm._device_mesh = object()  # as FSDP's strategy gives it
    with pytest.raises(ValueError, match=r"has an older adapter, which FSDP does not divide: use trainer=ddp"):
        algorithm.configure_model()


# --- DiffusionNFT


def test_nft_learns_nothing_from_images_that_are_neither_good_nor_bad() -> None:
    new = torch.randn(4, 3, 2, requires_grad=True)
    nft_loss(new, new.detach(), torch.randn(4, 3, 2), torch.full((4,), 0.5), 0.3).sum().backward()
    assert new.grad.abs().max() <= 1e-7


def test_nft_of_good_images_alone_is_self_normalised_denoising() -> None:
    new, target = torch.randn(4, 3, 2, requires_grad=True), torch.randn(4, 3, 2)
    loss = nft_loss(new, torch.randn(4, 3, 2), target, torch.ones(4), 1.0)
    torch.testing.assert_close(loss, normalised_error(new - target))
    [gradient] = torch.autograd.grad(loss.sum(), new)
    scale = (new - target).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, 2 * (new - target) / scale / 6)


def test_nft_is_the_published_arithmetic() -> None:
    """Written down again from the released training script's formulas, with the error in output space."""
    new, old, target = torch.randn(3, 5, 4)
    good, beta = torch.rand(5), 0.2
    positive, negative = beta * new + (1 - beta) * old, (1 + beta) * old - beta * new
    total = torch.zeros(5)
    for weight, prediction in ((good, positive), (1 - good, negative)):
        factor = (prediction - target).abs().mean(1).clamp(min=1e-5)
        total += weight * ((prediction - target) ** 2).mean(1) / factor / beta
    torch.testing.assert_close(nft_loss(new, old, target, good, beta), total)


def test_nfts_older_adapter_samples_and_moves_on_by_its_decay() -> None:
    policy = LinearPolicy()
    algorithm = nft(policy, old_decay=0.75, old_warmup=2)
    policy.bias.data.fill_(1.0)
    for number, expected in ((0, 0.0), (1, 1 - 0.375), (2, 1 - 0.375 * 0.75)):
        algorithm.before_round(number)
        torch.testing.assert_close(algorithm.older.weights["bias"], torch.full((3, 1, 1), expected))
    with policy.using(algorithm.older.weights):
        assert policy.bias.max() < 1
    assert policy.bias.min() == 1


def noised_by(algorithm: Any) -> list[Any]:
    """What it kept of a round's images, by the parts that it sampled them in."""
    collect, kept = algorithm.collect, []

    def collected(*given: Any) -> Any:
        finished, noised = collect(*given)
        kept.append(noised)
        return finished, noised

    algorithm.collect = collected
    fit(algorithm)
    return kept


@pytest.mark.parametrize("make", [nft, awm])
@pytest.mark.parametrize("batch", [64, 5])
def test_the_images_of_a_prompt_are_noised_alike_and_those_of_others_otherwise(make: Any, batch: int) -> None:
    algorithm = make(LinearPolicy(), images_per_prompt=4, sample_batch=batch, noise_levels=3)
    x0, noise, timestep = (torch.cat(parts) for parts in zip(*noised_by(algorithm), strict=True))
    by_prompt = noise.unflatten(0, (4, 4, 3))
    assert torch.equal(by_prompt, by_prompt[:, :1].expand_as(by_prompt))
    assert torch.equal(timestep.view(4, 4, 3), timestep.view(4, 4, 3)[:, :1].expand(4, 4, 3))
    assert len(by_prompt[:, 0].flatten(0, 1).flatten(1).unique(dim=0)) == 12, "each prompt and level has its own"
    assert len(x0.flatten(1).unique(dim=0)) == 16


def test_images_have_noise_of_their_own_where_that_is_wanted() -> None:
    [noised] = noised_by(nft(LinearPolicy(), images_per_prompt=4, shared_noise=False))
    assert len(noised.noise.flatten(1).unique(dim=0)) == len(noised.noise)


@pytest.mark.parametrize("make", [nft, awm])
def test_what_holds_the_policy_has_the_guidance_that_was_asked_for(make: Any) -> None:
    class Recorded(LinearPolicy):
        asked: ClassVar[set[tuple[bool, float]]] = set()

        def predict(self, latents: Tensor, timestep: Tensor, conditioning: Any, guidance: float) -> Tensor:
            self.asked.add((self.on, guidance))
            return super().predict(latents, timestep, conditioning, guidance)

    fit(make(Recorded(), kl_weight=0.1, reference_guidance=2.5))
    assert Recorded.asked == {(True, 1.0), (False, 2.5)}


# --- advantage-weighted matching


def noised(algorithm: Any, number: int = 8) -> tuple[Batch, dict[str, Tensor]]:
    policy = algorithm.policy
    examples = algorithm.made_up(policy.noise(number))._replace(timestep=torch.linspace(50, 900, number).round())
    return Batch(examples, torch.randn(number, 1), torch.zeros(number, dtype=torch.long)), policy.encode(["a"] * number)


def test_awm_on_policy_has_a_ratio_of_one_and_the_gradient_of_the_weighted_error() -> None:
    algorithm = awm(LinearPolicy())
    batch, conditioning = noised(algorithm)
    algorithm.on_policy = True
    loss, values = algorithm.loss(batch, conditioning)
    assert values["train/ratio"].tolist() == [1.0] * 8
    [gradient] = torch.autograd.grad(loss, algorithm.policy.bias)
    noise, process = batch.examples, algorithm.policy.process
    output = algorithm.policy.predict(
        process.add_noise(noise.x0, noise.noise, noise.timestep), noise.timestep, conditioning, 1.0
    )
    error = (output - noise.x0).square().flatten(1).mean(1)  # this policy predicts the image
    [expected] = torch.autograd.grad((batch.advantages[:, 0] * error).mean(), algorithm.policy.bias)
    torch.testing.assert_close(gradient, expected)


def test_awm_knows_the_adapter_that_sampled() -> None:
    algorithm = awm(LinearPolicy())
    batch, conditioning = noised(algorithm)
    algorithm.before_round(0)
    _, still = algorithm.loss(batch, conditioning)
    algorithm.policy.bias.data.add_(0.5)
    _, moved = algorithm.loss(batch, conditioning)
    torch.testing.assert_close(still["train/ratio"], torch.ones(8))
    assert (moved["train/ratio"] - 1).abs().max() > 1e-2


# --- DRaFT


def gradient_of(algorithm: Any, latents: Tensor, start: int) -> Tensor:
    images = algorithm.finish(latents, start, {"text": torch.zeros(len(latents), 1)}, None).images
    return torch.autograd.grad(algorithm.reward(images, ["a"] * len(images)).sum(), algorithm.policy.bias)[0]


def test_draft_of_one_step_is_refl_at_the_last_step() -> None:
    latents = torch.randn(6, 3, 1, 1)
    refl = ReFL(whole_way(), QuadraticReward(), STILL, adam(), window=(1.0, 1.0))
    torch.testing.assert_close(
        gradient_of(draft(whole_way()), latents, 4), gradient_of(refl, latents, refl.starts[0]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("checkpointed", [True, False])
def test_draft_of_all_steps_is_the_gradient_of_the_whole_sampler(checkpointed: bool) -> None:
    latents, algorithm = torch.randn(6, 3, 1, 1), draft(whole_way(), last_steps=None, checkpoint_steps=checkpointed)
    found = gradient_of(algorithm, latents, 0)
    policy = algorithm.policy
    images = STILL.walk(policy, latents, range(5), policy.encode(["a"] * 6))
    [expected] = torch.autograd.grad(QuadraticReward()(images, ["a"] * 6).sum(), policy.bias)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_draft_refuses_what_it_cannot_differentiate() -> None:
    with pytest.raises(ValueError, match=r"set sampler\.eta=0"):
        DRaFT(LinearPolicy(), QuadraticReward(), Sampler(5, 1.0, 1.0), adam())
    with pytest.raises(ValueError, match=r"last_steps=6 must be from 1 to sampler\.steps=5"):
        draft(LinearPolicy(), last_steps=6)
    with pytest.raises(ValueError, match=r"renoise=2 .* needs algorithm\.last_steps=1"):
        draft(LinearPolicy(), last_steps=2, renoise=2)


# --- Diffusion-DPO


def test_dpo_is_log_two_where_the_policy_is_the_reference_and_falls_with_the_winners_error() -> None:
    zeros = torch.zeros(2)
    assert diffusion_dpo_loss(zeros, zeros, 5000.0).tolist() == pytest.approx([math.log(2)] * 2)
    better, worse = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    diffusion_dpo_loss(better, worse, 2.0).sum().backward()
    assert (better.grad.item(), worse.grad.item()) == pytest.approx((0.5, -0.5))


def test_dpo_is_the_published_arithmetic() -> None:
    """-log sigmoid(-beta/2 [(model_w - model_l) - (ref_w - ref_l)]), as in the released training script."""
    model, reference = torch.rand(2, 4), torch.rand(2, 4)
    inside = -0.5 * 3.0 * ((model[0] - model[1]) - (reference[0] - reference[1]))
    expected = -torch.nn.functional.logsigmoid(inside)
    torch.testing.assert_close(diffusion_dpo_loss(model[0] - reference[0], model[1] - reference[1], 3.0), expected)


@pytest.mark.parametrize("slack", [0.0, 0.2, 0.9, 1.0])
def test_the_bound_leaves_the_winner_its_share_of_progress_and_takes_no_more_than_it_must(slack: float) -> None:
    """In output space the step is -g_w + kept * g_l: along g_w it must leave slack * |g_w|^2."""
    winner, loser = torch.randn(200, 6), 2 * torch.randn(200, 6)
    kept = loser_bound(winner, loser, slack)
    progress = winner.square().sum(1) - kept * (winner * loser).sum(1)
    assert (progress >= slack * winner.square().sum(1) - 1e-4).all()
    assert kept.min() >= 0
    assert kept.max() <= 1
    held = (kept < 1) & (kept > 0)
    torch.testing.assert_close(progress[held], (slack * winner.square().sum(1))[held], rtol=1e-4, atol=1e-4)
    assert (kept[(winner * loser).sum(1) <= 0] == 1).all()


def dpo(policy: LinearPolicy, **settings: Any) -> DiffusionDPO:
    return DiffusionDPO(policy, adam(), **settings)


def pair(algorithm: DiffusionDPO) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one pair: a bright image over a dark one."""
    x0 = torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    noise, timestep = torch.zeros(2, 3, 1, 1), torch.tensor([500.0, 500.0])
    return algorithm.loss(x0, noise, timestep, {"text": torch.zeros(2, 1)}, torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("bound", [None, 0.9])
def test_dpo_moves_the_policy_to_the_preferred_image(bound: float | None) -> None:
    algorithm = dpo(LinearPolicy(gain=0.0), bound=bound, beta=1.0)
    loss, values = pair(algorithm)
    assert loss.item() == pytest.approx(math.log(2))
    assert values["train/winner_error"].item() == values["train/loser_error"].item() == 0
    [gradient] = torch.autograd.grad(loss, algorithm.policy.bias)
    assert (gradient < 0).all()  # brighter
    algorithm.policy.bias.data -= gradient
    loss, values = pair(algorithm)
    assert loss < math.log(2)
    assert values["train/winner_error"] < 0 < values["train/loser_error"]
    assert values["train/accuracy"].item() == 1


# --- a window of random steps


def ddpo(policy: LinearPolicy, **settings: Any) -> DDPO:
    return DDPO(policy, BlackBox(), Sampler(5, 1.0, 1.0), adam(), clip_range=0.2, **settings)


def trained(algorithm: PolicyTraining) -> Tensor:
    fit(algorithm, epochs=3)
    return algorithm.policy.bias.detach()


def test_a_window_of_all_steps_is_no_window() -> None:
    plain = trained(ddpo(LinearPolicy()))
    assert torch.equal(trained(ddpo(LinearPolicy(), window=(0.0, 1.0))), plain)
    assert plain.norm() > 0


def test_only_the_windows_random_steps_are_random_and_trained() -> None:
    algorithm, seen = ddpo(LinearPolicy(), window=(0.2, 0.8), random_steps=2, train_batch=8), []
    step = algorithm.training_step
    algorithm.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]  # type: ignore[method-assign]
    fit(algorithm, epochs=8)
    assert {len(batch.examples.step.unique()) for batch in seen} <= {1, 2}
    assert set(torch.cat([batch.examples.step for batch in seen]).tolist()) == {1, 2, 3}
    path = Sampler(5, 1.0, 1.0).rollout(algorithm.policy, algorithm.policy.encode(["a"] * 3), None, {1, 3})
    assert (path.stds > 0).tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match=r"random_steps=4 must be from 1 to 3"):
        ddpo(LinearPolicy(), window=(0.2, 0.8), random_steps=4)


# --- Diffusion-DPO on a set of images


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven prompts with a dark and a bright image, the bright one rated higher."""
    folder = tmp_path_factory.mktemp("pairs") / "set"
    rated = [
        row(number, "train", {aspect: [1, 5] for aspect in ASPECTS}, [png(10 + number), png(200 + number)])
        for number in range(7)
    ]
    write_dataset({"train": rated, "validation": rated[:2], "test": []}, folder)
    return folder


def fitted(policy: LinearPolicy, folder: Path, **settings: Any) -> Any:
    data = PreferenceDataModule(str(folder), batch_size=settings.pop("batch_size", 3), aspects="mean")
    return fit(dpo(policy, beta=1.0), data=data, **settings)


def test_dpo_is_resumed_to_the_bit_and_learns_what_is_preferred(pairs: Path, tmp_path: Path) -> None:
    whole, half, resumed = (LinearPolicy(gain=0.0) for _ in range(3))
    metrics = fitted(whole, pairs, epochs=4).callback_metrics
    fitted(half, pairs, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fitted(resumed, pairs, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.bias, whole.bias)
    assert whole.bias.min() > half.bias.min() > 0  # brighter
    assert metrics["train/winner_error"] < 0 < metrics["train/loser_error"]
    assert metrics["val/accuracy"] == 1


def test_an_update_of_dpo_is_the_same_however_its_pairs_are_cut(pairs: Path) -> None:
    def moved(**settings: Any) -> Tensor:
        policy = LinearPolicy(gain=0.0)
        algorithm = dpo(policy, beta=1.0)
        algorithm._make_optimizer = partial(torch.optim.SGD, lr=1.0)
        data = PreferenceDataModule(str(pairs), batch_size=settings.pop("batch_size"), aspects="mean")
        assert fit(algorithm, data=data, **settings).global_step == 1
        return policy.bias.detach()

    whole = moved(batch_size=7)
    assert whole.norm() > 1e-3
    for batch_size, accumulate in ((3, 3), (2, 4), (4, 2), (1, 9)):
        cut = moved(batch_size=batch_size, accumulate_grad_batches=accumulate)
        assert (cut - whole).norm() <= 1e-6 * whole.norm()
