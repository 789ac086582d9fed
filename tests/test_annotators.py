"""The scene judge against the renderer's ground truth, the annotator around it, and asking annotators for much."""

import asyncio
import io
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vp_rl.annotators import scene as annotator_module
from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.annotators.scene import SceneAnnotator
from vp_rl.interfaces import Annotator
from vp_rl.scenes.grammar import CATEGORIES, COLORS, COUNTS, RELATIONS, SHAPES, SIZES, UNSAFE_SHAPE, Scene, Thing
from vp_rl.scenes.grammar import scenes as draw_scenes
from vp_rl.scenes.judge import judge
from vp_rl.scenes.render import SIZE, render
from vp_rl.types import ASPECTS, Answer, Aspect, Rating
from vp_rl.visionprefer.annotate import rate_all


@cache
def drawn(number: int = 250) -> tuple[tuple[Scene, Image.Image], ...]:
    rng = random.Random(0)
    return tuple((scene, Image.fromarray(render(scene, rng))) for scene in draw_scenes("train", number))


def rate(annotator: SceneAnnotator, prompt: str, image: Image.Image, aspect: Aspect = "prompt_following") -> Rating:
    return asyncio.run(annotator.annotate(prompt, [png(image)], aspect))[0]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_clean_drawing_follows_its_own_prompt(category: str) -> None:
    chosen = [(scene, image) for scene, image in drawn() if scene.category == category]
    right = [judge(np.asarray(image), scene.prompt)["prompt_following"].rating == 5 for scene, image in chosen]
    assert len(right) >= 50
    assert np.mean(right) >= 0.99


def altered(scene: Scene, attribute: str, rng: random.Random) -> Scene | None:
    """The scene with one attribute of the first thing, or the relation, changed; None: it says nothing of it."""
    first, *others = scene.things
    options = {"color": list(COLORS), "shape": list(SHAPES), "count": list(COUNTS), "size": list(SIZES)}
    if attribute == "relation":
        elsewhere = [relation for relation in RELATIONS if relation != scene.relation]
        return replace(scene, relation=rng.choice(elsewhere)) if scene.relation else None
    if attribute == "size" and first.size is None:
        return None
    value = rng.choice([option for option in options[attribute] if option != getattr(first, attribute)])
    first = replace(first, **{attribute: value})
    if any((first.color, first.shape) == (other.color, other.shape) for other in others):
        return None  # "a red star and a red star": no prompt of the grammar
    return replace(scene, things=(first, *others))


@pytest.mark.parametrize("attribute", ["color", "shape", "count", "size", "relation"])
def test_a_drawing_of_something_else_does_not_follow_the_prompt(attribute: str) -> None:
    rng = random.Random(attribute)
    others = [(altered(scene, attribute, rng), image) for scene, image in drawn()]
    low = [judge(np.asarray(image), s.prompt)["prompt_following"].rating < 5 for s, image in others if s is not None]
    assert len(low) >= 50
    assert np.mean(low) >= 0.99


def test_blur_lowers_fidelity_on_the_whole() -> None:
    annotator, drops = SceneAnnotator(), []
    for scene, image in drawn():
        blurred = image.filter(ImageFilter.GaussianBlur(3))
        before, after = (rate(annotator, scene.prompt, each, "fidelity").rating for each in (image, blurred))
        drops.append(before - after)
    assert np.mean(drops) > 4 * np.std(drops) / len(drops) ** 0.5  # standard errors


def test_only_the_unsafe_kind_is_harmful() -> None:
    annotator = SceneAnnotator()
    for scene, image in drawn():
        safe = all(thing.shape != UNSAFE_SHAPE for thing in scene.things)
        rating = rate(annotator, scene.prompt, image, "harmlessness").rating
        assert rating == 5 if safe else rating <= 2


@pytest.mark.parametrize("aspect", ["prompt_following", "aesthetic", "fidelity"])
def test_an_empty_image_is_rated_lowest(aspect: Aspect) -> None:
    empty = Image.new("RGB", (SIZE, SIZE), (240, 240, 240))
    assert rate(SceneAnnotator(), "a red circle and a blue square", empty, aspect).rating == 1


@pytest.mark.parametrize("aspect", ASPECTS)
def test_without_noise_the_annotator_says_what_the_judge_says_in_the_order_of_the_images(aspect: Aspect) -> None:
    prompt, images = drawn()[0][0].prompt, [image for _, image in drawn()[:6]]
    given = asyncio.run(SceneAnnotator().annotate(prompt, [png(image) for image in images], aspect))
    verdicts = [judge(np.asarray(image), prompt)[aspect] for image in images]
    assert given == [Rating(verdict.rating, verdict.rationale) for verdict in verdicts]


def test_an_image_is_looked_at_once_for_all_aspects(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(annotator_module, "judge", lambda image, prompt: looks.append(prompt) or judge(image, prompt))
    annotator, (scene, image), (_, other) = SceneAnnotator(), *drawn()[:2]
    for aspect in ASPECTS:
        rate(annotator, scene.prompt, image, aspect)
    assert len(looks) == 1
    rate(annotator, scene.prompt, other)
    rate(annotator, "a small red circle", image)
    assert len(looks) == 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotator_module, "_REMEMBERED", 5)
    annotator = SceneAnnotator()
    for scene, image in drawn()[:12]:
        rate(annotator, scene.prompt, image)
        assert len(annotator._verdicts) <= 5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_images_of_another_size_and_mode_are_read(mode: str) -> None:
    annotator, same = SceneAnnotator(), []
    for scene, image in drawn()[:20]:
        larger = image.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC).convert(mode)
        same.append(rate(annotator, scene.prompt, larger) == rate(annotator, scene.prompt, image))
    assert np.mean(same) >= 0.95


def test_a_prompt_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="an astronaut on a horse.*choose another annotator"):
        rate(SceneAnnotator(), "an astronaut on a horse", drawn()[0][1])


@pytest.mark.parametrize("noise", [-0.1, 1.1, float("nan")])
def test_noise_must_be_a_probability(noise: float) -> None:
    with pytest.raises(ValueError, match=str(noise)):
        SceneAnnotator(noise)


def all_ratings(annotator: SceneAnnotator) -> dict[tuple[int, Aspect], int]:
    return {
        (index, aspect): rate(annotator, scene.prompt, image, aspect).rating
        for index, (scene, image) in enumerate(drawn())
        for aspect in ASPECTS
    }


def test_noise_replaces_that_share_of_ratings_by_near_ones() -> None:
    clean, noisy = all_ratings(SceneAnnotator()), all_ratings(SceneAnnotator(noise=0.3))
    distances = np.array([abs(noisy[key] - clean[key]) for key in clean])
    assert set(noisy.values()) <= {1, 2, 3, 4, 5}
    assert set(distances.tolist()) == {0, 1, 2}
    assert abs((distances > 0).mean() - 0.3) < 4 * (0.3 * 0.7 / len(clean)) ** 0.5  # standard deviations of a share
    certain = all_ratings(SceneAnnotator(noise=1.0))
    assert all(certain[key] != clean[key] for key in clean)


def test_noise_in_one_aspect_says_nothing_of_another() -> None:
    clean, noisy = all_ratings(SceneAnnotator()), all_ratings(SceneAnnotator(noise=0.5))
    wrong = np.array([[noisy[i, aspect] != clean[i, aspect] for aspect in ASPECTS] for i in range(len(drawn()))])
    correlations = np.corrcoef(wrong.T)[np.triu_indices(len(ASPECTS), 1)]
    assert np.abs(correlations).max() < 4 / len(wrong) ** 0.5


def test_noise_depends_on_the_seed_and_not_on_the_order_of_calls() -> None:
    prompt, images = drawn()[0][0].prompt, [png(image) for _, image in drawn()[:40]]

    async def ratings(annotator: SceneAnnotator, pictures: list[bytes], *, first: Aspect) -> list[Rating]:
        await annotator.annotate(prompt, pictures, first)
        return await annotator.annotate(prompt, pictures, "aesthetic")

    forward = asyncio.run(ratings(SceneAnnotator(0.5, seed=3), images, first="fidelity"))
    backward = asyncio.run(ratings(SceneAnnotator(0.5, seed=3), images[::-1], first="aesthetic"))
    other = asyncio.run(ratings(SceneAnnotator(0.5, seed=4), images, first="fidelity"))
    assert forward == backward[::-1]
    assert forward != other


def test_a_size_that_is_not_asked_for_does_not_matter() -> None:
    rng = random.Random(1)
    for size in SIZES:
        image = Image.fromarray(render(Scene((Thing("red", "circle", size),)), rng))
        assert rate(SceneAnnotator(), "a red circle", image).rating == 5


# --- asking for many ratings


class Slow(Annotator):
    """Counts who is in flight; refuses a prompt."""

    name, version, concurrency = "slow", "1", 16

    def __init__(self, refused: str = "") -> None:
        self.now, self.most, self.refused = 0, 0, refused

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        if prompt == self.refused:
            raise ValueError(f"cannot read {prompt}")
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(random.random() / 1000)
        self.now -= 1
        ratings = [Rating(1 + (len(image) + len(aspect)) % 5, f"{prompt} {aspect}") for image in images]
        return Answer(write_ratings(ratings))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


def test_ratings_come_back_in_the_order_of_prompts_and_images_with_a_bounded_number_in_flight() -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    images = [[bytes(3 * i + j + 1) for j in range(3)] for i in range(50)]
    annotator = Slow()
    rated = asyncio.run(rate_all(annotator, prompts, images, quiet=True))
    assert 1 < annotator.most <= 16
    for prompt, pictures, ratings in zip(prompts, images, rated, strict=True):
        assert list(ratings) == list(ASPECTS)
        for aspect, given in ratings.items():
            assert [r.rating for r in given] == [1 + (len(picture) + len(aspect)) % 5 for picture in pictures]
            assert {r.rationale for r in given} == {f"{prompt} {aspect}"}


def test_an_annotators_error_reaches_the_caller_as_it_is() -> None:
    with pytest.raises(ValueError, match="cannot read prompt 1"):
        asyncio.run(
            rate_all(
                Slow(refused="prompt 1"),
                [f"prompt {i}" for i in range(7)],
                [[b"image"]] * 7,
                quiet=True,
            )
        )
