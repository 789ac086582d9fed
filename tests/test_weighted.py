"""Several rewards as one: what weights mean, how long statistics run, and that a resumed run has the same."""

import copy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import BlackBox, LinearPolicy, QuadraticReward, fit
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.interfaces import Reward
from vp_rl.rewards.weighted import Moments, WeightedReward
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Scores

ROOT = Path(__file__).parents[1]


class Channel(Reward):
    """`scale` times the mean of one colour, plus `shift`."""

    differentiable = True

    def __init__(self, colour: int, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.colour, self.scale, self.shift = colour, scale, shift

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return self.scale * images[:, self.colour].mean((1, 2)) + self.shift


def pixels(*colours: tuple[float, float, float]) -> Images:
    return torch.tensor(colours)[:, :, None, None]


def random_images(number: int, seed: int = 0) -> Images:
    return torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def two(scale: float = 1.0, shift: float = 0.0, **settings: object) -> WeightedReward:
    rewards = {"red": Channel(0), "green": Channel(1, scale, shift)}
    return WeightedReward(rewards, **{"weights": {"red": 1.0, "green": 0.5}, **settings})


def score(reward: Reward, images: Images) -> Scores:
    return reward(images, ["a"] * len(images))


# --- statistics


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_merged_batch_by_batch_are_those_of_all_numbers(offset: float) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1)).float() + offset
    moments = Moments()
    for batch in numbers.split([1, 2, 97, 900]):
        moments = moments.plus(batch)
    assert moments.count == 1000
    # Double precision: 1e-16 relative to the largest number, a few times over.
    assert moments.mean == pytest.approx(numbers.double().mean().item(), rel=1e-13)
    assert moments.std == pytest.approx(numbers.double().std().item(), rel=1e-9)


def test_scores_are_the_weighted_sum_of_standardised_parts() -> None:
    images = pixels((0.0, 0.2, 0.0), (0.2, 0.6, 0.0), (0.4, 0.4, 0.0))
    # red: mean 0.2, std 0.2, so -1, 0, 1; green: mean 0.4, std 0.2, so -1, 1, 0, times 0.5.
    torch.testing.assert_close(score(two(), images), torch.tensor([-1.5, 0.5, 1.0]), rtol=0, atol=1e-6)


def test_weights_mean_the_same_whatever_the_scales() -> None:
    images = random_images(80)
    plain, scaled = two(), two(scale=1000.0, shift=-300.0)
    # float32 numbers of 1000 are exact to 6e-5, and a standard deviation is 1000 times about 0.07.
    torch.testing.assert_close(score(scaled, images), score(plain, images), rtol=0, atol=1e-5)


def test_statistics_run_over_the_first_images_and_then_stay() -> None:
    reward = two(warmup=10)
    score(reward, random_images(6, 1))
    of_six = reward.statistics
    score(reward, random_images(6, 2))
    of_twelve = reward.statistics  # a batch is not split
    both = torch.cat([random_images(6, 1), random_images(6, 2)]).mean((2, 3))
    assert of_twelve["red"] == pytest.approx((both[:, 0].mean().item(), both[:, 0].std().item()), rel=1e-5)
    score(reward, random_images(50, 3))
    assert of_six != of_twelve == reward.statistics


def test_rows_do_not_depend_on_each_other_once_statistics_stay() -> None:
    reward, images = two(warmup=8), random_images(8, 1)
    score(reward, random_images(8))
    assert torch.equal(score(reward, images)[2:3], score(reward, images[2:3]))


def test_given_statistics_are_used_from_the_first_image_on() -> None:
    reward = two(statistics={"red": (0.5, 0.1), "green": (0.0, 2.0)})
    found = score(reward, pixels((0.7, 0.4, 0.0)))
    assert found.item() == pytest.approx((0.7 - 0.5) / 0.1 + 0.5 * 0.4 / 2.0, abs=1e-6)
    assert reward.statistics["green"] == pytest.approx((0.0, 2.0))


def test_looking_at_the_parts_changes_nothing() -> None:
    reward, images = two(), random_images(4)
    parts = reward.parts(images, ["a"] * 4)
    assert torch.equal(parts["green"], images[:, 1].mean((1, 2)))
    assert list(parts) == ["red", "green"]
    assert reward.statistics == {"red": (0.0, 0.0), "green": (0.0, 0.0)}


def test_statistics_keep_their_precision_when_the_module_is_cast() -> None:
    reward = two()
    score(reward, random_images(64))
    before = reward.statistics
    assert copy.deepcopy(reward).half().statistics == before
    assert list(reward.buffers()) == []


# --- gradients


def test_it_is_differentiable_if_all_parts_are() -> None:
    weights = {"a": 1.0, "b": 1.0}
    assert WeightedReward({"a": Channel(0), "b": QuadraticReward()}, weights).differentiable
    assert not WeightedReward({"a": Channel(0), "b": BlackBox()}, weights).differentiable


def test_gradients_are_those_of_the_parts_times_weight_over_standard_deviation() -> None:
    reward = two(warmup=4)
    score(reward, random_images(4))
    images = random_images(2, 1).requires_grad_()
    score(reward, images).sum().backward()
    assert images.grad is not None
    for colour, (name, weight) in enumerate({"red": 1.0, "green": 0.5}.items()):
        expected = torch.full((2, 4, 4), weight / reward.statistics[name][1] / 16)
        torch.testing.assert_close(images.grad[:, colour], expected)
    assert images.grad[:, 2].abs().max() == 0


# --- what goes wrong


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": {"red": 1.0, "grean": 1.0}}, r"weights has grean, and reward.rewards has red, green"),
        ({"weights": {"red": 1.0}}, r"rewards\.green has no weight: add \+reward\.weights\.green=1\.0"),
        ({"weights": {"red": 0.0, "green": 0.0}}, "All of reward.weights are 0"),
        ({"weights": {"red": float("nan"), "green": 1.0}}, r"weights\.red=nan must be a finite"),
        ({"warmup": 1}, "reward.warmup=1 must be at least 2"),
        ({"statistics": {"red": (0.0, 1.0)}}, "reward.statistics are of red, and"),
        ({"statistics": {"red": (0.0, 1.0), "green": (0.0, 0.0)}}, r"statistics\.green=\[0.0, 0.0\] must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        two(**settings)


def test_a_score_that_is_no_number_names_its_reward_and_prompt() -> None:
    images = pixels((0.1, 0.1, 0.1), (0.2, float("nan"), 0.2))
    with pytest.raises(ValueError, match=r"rewards\.green \(Channel\) gave nan for the image of 'b' \(1 of 2"):
        two()(images, ["a", "b"])


def test_a_part_without_a_scale_is_named_when_statistics_are_complete() -> None:
    reward = two(scale=0.0, warmup=8)
    assert torch.isfinite(score(reward, random_images(4))).all()  # it may yet vary
    with pytest.raises(ValueError, match=r"rewards\.green gave all of the first 8 images the score 0"):
        score(reward, random_images(4, 1))


# --- runs


def ddpo(policy: LinearPolicy, reward: Reward) -> DDPO:
    optimizer = partial(torch.optim.Adam, lr=0.03)
    return DDPO(policy, reward, Sampler(5, 1.0, 1.0), optimizer, images_per_prompt=16, train_batch=64, clip_range=0.2)


@pytest.mark.parametrize("warmup", [64, 300])  # complete at the checkpoint; not yet
def test_a_run_resumed_from_a_checkpoint_ends_where_an_unbroken_one_does(warmup: int, tmp_path: Path) -> None:
    def mixed() -> WeightedReward:
        rewards = {"near": BlackBox(), "red": Channel(0, 100.0)}
        return WeightedReward(rewards, {"near": 1.0, "red": -0.3}, warmup)

    whole, whole_reward = LinearPolicy(), mixed()
    fit(ddpo(whole, whole_reward), epochs=6)
    fit(ddpo(LinearPolicy(), mixed()), epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_reward = LinearPolicy(), mixed()
    fit(ddpo(resumed, resumed_reward), epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.bias, whole.bias)
    assert resumed_reward.statistics == whole_reward.statistics


def test_a_checkpoint_has_the_statistics_and_fits_no_other_reward(tmp_path: Path) -> None:
    fit(ddpo(LinearPolicy(), two())).save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"policy.bias", "reward._extra_state"}
    with pytest.raises(ValueError, match="of another reward: 1 tensors differ, 'reward._extra_state' first"):
        fit(ddpo(LinearPolicy(), BlackBox()), ckpt_path=tmp_path / "run.ckpt")
    other = WeightedReward({"blue": Channel(2)}, {"blue": 1.0})
    with pytest.raises(ValueError, match=r"statistics of red, green, and reward\.rewards are blue"):
        fit(ddpo(LinearPolicy(), other), ckpt_path=tmp_path / "run.ckpt")


def test_the_yaml_mixes_the_embedded_reward_with_another() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["reward=weighted", "reward.weights.compressibility=-1"])
    reward = instantiate(config.reward)
    assert reward.weights == {"vp_score": 1.0, "compressibility": -1.0}
    found = reward(torch.rand(4, 3, 32, 32), ["a red circle"] * 4)
    assert torch.isfinite(found).all()
    assert found.std() > 0


PROCESS = """
import sys, time, torch
from test_weighted import random_images, score, two
rank, address, warmup = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
two()  # another one: the second is not mistaken for it
reward = two(warmup=warmup)
try:
    if rank == 0:
        time.sleep(1)  # the other one is first
        score(reward, random_images(16, 100))  # alone, as the evaluation of the base model is
    for number in range(2):
        score(reward, random_images(8, 10 * rank + number))
    print(reward.statistics, score(reward, random_images(3, 7)).tolist())
except ValueError as error:
    print(error)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [16, 17])
def test_all_processes_have_the_main_ones_statistics(warmup: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, 'tests'){PROCESS}"]
    processes = [
        subprocess.Popen([*command, str(rank), address, str(warmup)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said[0] == said[1]
    if warmup == 17:
        assert "reward.warmup=17 images must come in the first batch, which has 16" in said[0]
        return
    alone = two(warmup=16)
    score(alone, random_images(16, 100))
    assert said[0] == f"{alone.statistics} {score(alone, random_images(3, 7)).tolist()}"
