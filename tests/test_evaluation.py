"""Evaluation on a policy whose images are their latents, with a judge and a reward that see nothing but brightness."""

import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.evaluation.claims import decide
from vp_rl.evaluation.compare import LEVELS, as_dict, as_markdown, compare
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.interfaces import Annotator, Policy, PromptSource, Reward
from vp_rl.processes.ddim import DDIM
from vp_rl.sampler import Sampler
from vp_rl.types import Answer, Aspect, Conditioning, Images, Latents, Rating, Scores, Split
from vp_rl.visionprefer.estimates import paired


class Bright(Policy):
    """Grey noise of 16 x 16; each prompt has its own brightness, and the trainable shift is added to all."""

    def __init__(self) -> None:
        super().__init__()
        self.process = DDIM(DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=False))
        self.shift = nn.Parameter(torch.zeros(1))
        self.on = True
        self.encoded: list[str] = []

    def encode(self, prompts: list[str]) -> Conditioning:
        self.encoded += prompts
        return {"text": torch.tensor([[zlib.crc32(prompt.encode()) % 97 / 97] for prompt in prompts])}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        several = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor((batch, 3, 16, 16), several)

    def predict(self, latents: Latents, timestep: torch.Tensor, conditioning: Conditioning, guidance: float) -> Latents:
        level = conditioning["text"][:, :, None, None] - 0.5 + (self.shift if self.on else 0.0)
        return 0.2 * latents + level

    def decode(self, latents: Latents) -> Images:
        return (0.5 + 0.3 * latents).clamp(0, 1)

    def encode_images(self, images: Images) -> Latents:
        return (images - 0.5) / 0.3

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def save_adapter(self, directory: Path) -> None:
        torch.save(self.shift.detach(), directory / "shift.pt")

    def load_adapter(self, directory: Path) -> None:
        self.shift.data = torch.load(directory / "shift.pt", weights_only=True)


class Brightness(Reward):
    """The image's mean."""

    differentiable = True

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return images.mean((1, 2, 3))


class BrightnessJudge(Annotator):
    """1 for black to 5 for white, in every aspect."""

    name, version, concurrency = "brightness", "1", 4

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        means = [float(np.asarray(Image.open(io.BytesIO(image))).mean()) for image in images]
        ratings = [Rating(1 + min(4, int(mean / 51)), f"{aspect} of {prompt}: {mean:.0f}") for mean in means]
        return Answer(write_ratings(ratings))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


class Prompts(PromptSource):
    """`number` different prompts in every split."""

    def __init__(self, number: int = 12) -> None:
        self.number = number

    def split(self, name: Split) -> list[str]:
        return [f"{name} prompt {index}" for index in range(self.number)]


class Given(PromptSource):
    """These prompts."""

    def __init__(self, *prompts: str) -> None:
        self.prompts = list(prompts)

    def split(self, name: Split) -> list[str]:
        return self.prompts


SAMPLER = Sampler(steps=3, guidance=1.0, eta=1.0)


def evaluator(source: PromptSource | None = None, **settings: object) -> Evaluator:
    return Evaluator(source or Prompts(), BrightnessJudge(), SAMPLER, **settings)


def shifted(by: float) -> Bright:
    policy = Bright()
    policy.shift.data.fill_(by)
    return policy


def made_up(differences: np.ndarray, ratings: int = 3) -> tuple[Evaluation, Evaluation]:
    """Two evaluations whose rewards differ by `differences` (prompts, seeds)."""
    prompts, seeds = differences.shape
    names = [f"prompt {index}" for index in range(prompts) for _ in range(seeds)]
    images = np.zeros((len(names), 4, 4, 3), np.uint8)
    rated = np.full((len(names), 4), ratings)
    reasons = [("",) * 4] * len(names)
    base, tuned = (
        Evaluation(names, list(range(seeds)) * prompts, images, scores, rated.copy(), reasons)
        for scores in (np.zeros(len(names)), differences.flatten())
    )
    return base, tuned


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_images_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    whole = evaluator(seeds=(0, 7), batch_size=24).evaluate(Bright(), Brightness())
    other = evaluator(seeds=(0, 7), batch_size=batch_size).evaluate(Bright(), Brightness())
    assert len(whole.images) == 24
    np.testing.assert_array_equal(other.images, whole.images)
    np.testing.assert_allclose(other.scores, whole.scores, atol=1e-6)
    np.testing.assert_array_equal(other.ratings, whole.ratings)


def test_an_image_depends_on_its_prompts_place_and_its_seed_alone() -> None:
    whole = evaluator(seeds=(3, 0)).evaluate(Bright(), Brightness())
    tool = evaluator(seeds=(0,))
    fewer = tool.evaluate(Bright(), Brightness(), tool.prompts[:4])
    np.testing.assert_array_equal(fewer.images, whole.images[1:8:2])
    assert fewer.prompts == whole.prompts[1:8:2]
    assert whole.seeds[:4] == [3, 0, 3, 0]
    assert len({image.tobytes() for image in whole.images}) == len(whole.images)


def test_scores_and_ratings_belong_to_the_image_beside_them() -> None:
    done = evaluator(seeds=(0, 1), batch_size=7).evaluate(Bright(), Brightness())
    means = done.images.mean((1, 2, 3))
    np.testing.assert_allclose(done.scores, means / 255, atol=1 / 255)
    np.testing.assert_array_equal(done.ratings[:, 2], 1 + np.minimum(4, (means / 51).astype(int)))
    assert done.rationales[5][1] == f"aesthetic of {done.prompts[5]}: {means[5]:.0f}"


def test_a_prompt_is_encoded_once_however_many_images_it_gets() -> None:
    policy = Bright()
    evaluator(seeds=(0, 1, 2), batch_size=5).evaluate(policy, Brightness())
    assert policy.encoded == Prompts().split("test")


def test_evaluating_draws_no_global_random_numbers_and_leaves_no_gradients() -> None:
    before, policy = torch.get_rng_state(), Bright()
    evaluator().evaluate(policy, Brightness())
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.shift.grad is None


def test_a_repeated_prompt_is_evaluated_once() -> None:
    assert evaluator(Given("a", "b", "a", "c"), limit=None).prompts == ["a", "b", "c"]
    assert evaluator(Given("a", "b", "a", "c"), limit=2).prompts == ["a", "b"]


@pytest.mark.parametrize("settings", [{"seeds": ()}, {"limit": 0}, {"batch_size": 0}])
def test_an_evaluation_without_images_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="evaluation.limit"):
        evaluator(**settings)


def test_correct_is_the_share_that_follows_the_prompt_fully() -> None:
    done = evaluator().evaluate(shifted(1.0), Brightness())
    share = (done.ratings[:, 0] == 5).mean()
    assert 0 < share < 1
    assert done.means()["correct"] == share
    assert done.means()["mean_rating"] == pytest.approx(done.ratings.mean())


def test_the_base_against_itself_has_not_changed_at_all() -> None:
    done = evaluator().evaluate(Bright(), Brightness())
    for name, change in decide(compare(done, done)).changes.items():
        assert change.difference == 0
        assert change.low <= 0 <= change.high
        assert change.low < 0 or name not in LEVELS, "that 12 prompts stayed does not mean that none would move"
        assert (change.win, change.tie, change.loss) == (0, 1, 0)
        assert not change.clear


def test_a_brighter_policy_wins() -> None:
    tool = evaluator(seeds=(0, 1))
    both = tool.evaluate(Bright(), Brightness()), tool.evaluate(shifted(0.8), Brightness())
    changes = decide(compare(*both)).changes
    assert changes["reward"].low > 0.1
    assert changes["reward"].win == 1
    assert changes["mean_rating"].direction == "up"
    assert changes["reward"].difference == pytest.approx(changes["reward"].tuned - changes["reward"].base)


@pytest.mark.parametrize(("prompts", "sure"), [(3, False), (5, False), (6, True), (9, True)])
def test_of_prompts_that_all_rose_alike_so_many_are_needed_as_for_the_sign_test(prompts: int, sure: bool) -> None:
    change = compare(*made_up(np.full((prompts, 2), 0.25)))["reward"]
    assert (change.low > 0) == sure == (2 * 0.5**prompts < 0.05)
    assert change.chance == pytest.approx(2 * 0.5**prompts)
    assert change.high == 0.25


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("moved", [-0.5, 0.0, 2.0])
def test_one_or_two_prompts_are_too_few_to_say_anything(prompts: int, moved: float) -> None:
    base, tuned = made_up(np.full((prompts, 3), moved))
    tuned.ratings[:] = 5
    found = decide(compare(base, tuned)).changes
    assert all(each.few and not each.clear and each.chance == 1 for each in found.values())
    assert found["mean_rating"].difference == 2
    assert "too few prompts" in as_markdown(found)


@pytest.mark.parametrize("values", [[0.0] * 31 + [1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
def test_one_image_that_rose_is_no_evidence(values: list[float]) -> None:
    low, high = paired(np.array(values))
    assert low <= 0 < high


def test_five_percent_of_runs_without_an_effect_look_significant() -> None:
    rng = np.random.default_rng(1)
    intervals = [paired(rng.normal(size=50)) for _ in range(200)]
    # Of 200 at 5%, 10 are expected with a standard deviation of 3.1.
    assert 3 <= sum(low > 0 or high < 0 for low, high in intervals) <= 14


def test_seeds_of_a_prompt_are_not_counted_as_independent() -> None:
    by_prompt = np.random.default_rng(0).normal(0.2, 1, size=(40, 1)).repeat(4, axis=1)
    change = compare(*made_up(by_prompt))["reward"]
    low, high = paired(by_prompt.flatten())
    # Four copies of each value would make the naive interval half as wide.
    assert (change.high - change.low) / (high - low) == pytest.approx(2.0, abs=0.25)


def test_rose_stayed_and_fell_add_up() -> None:
    change = compare(*made_up(np.array([[1.0, -1.0], [0.0, 0.0], [2.0, 0.0]])))["reward"]
    assert (change.win, change.tie, change.loss) == pytest.approx((2 / 6, 3 / 6, 1 / 6))


def test_evaluations_of_other_prompts_or_seeds_are_not_compared() -> None:
    base = evaluator().evaluate(Bright(), Brightness())
    for other in (evaluator(seeds=(1,)), evaluator(Given("else"))):
        with pytest.raises(ValueError, match="same prompts and seeds"):
            compare(base, other.evaluate(Bright(), Brightness()))


def test_the_comparison_as_table_and_as_json() -> None:
    changes = compare(*made_up(np.array([[0.5], [0.5], [0.5]])))
    assert as_dict(changes)["reward"]["difference"] == 0.5
    lines = as_markdown(changes).splitlines()
    assert "| reward | 0.000 | 0.500 | +0.500 | [-0.208, +0.500] | 100% | 0% |" in lines  # 0.5 (2 x 0.025^(1/3) - 1)
    assert len({line.count("|") for line in lines}) == 1


def contrast(images: np.ndarray, prompts: list[str]) -> list[float]:
    """Of each image; a metric of a user's own."""
    assert len(images) == len(prompts)
    return [float(image.std()) for image in images]


def test_metrics_of_ones_own_are_measured_compared_and_kept_with_their_rows() -> None:
    it = Evaluator(Prompts(), BrightnessJudge(), SAMPLER, seeds=(0, 1), metrics={"contrast": contrast})
    base, tuned = (it.evaluate(shifted(by), Brightness()) for by in (0.0, 2.0))
    expected = [image.std() for image in base.images]
    assert base.metrics()["metric/contrast"].tolist() == pytest.approx(expected)
    assert base.rows([3, 1]).metrics()["metric/contrast"].tolist() == pytest.approx([expected[3], expected[1]])
    found = compare(base, tuned)["metric/contrast"]
    gain = tuned.metrics()["metric/contrast"] - base.metrics()["metric/contrast"]
    assert found.difference == pytest.approx(gain.mean())
    assert found.low <= found.difference <= found.high
    for wrong in (lambda images, prompts: 1.0, lambda images, prompts: [float("nan")] * len(images)):
        bad = Evaluator(Prompts(), BrightnessJudge(), SAMPLER, metrics={"wrong": wrong})
        with pytest.raises(ValueError, match=r"evaluation\.metrics\.wrong gave .* a finite number for each"):
            bad.evaluate(shifted(0.0), Brightness())
