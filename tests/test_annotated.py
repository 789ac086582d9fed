"""An annotator's ratings as a reward: what is asked, what a score is, and answers that are none."""

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, rating_of
from chatting import chat, prepare
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.annotators.scene import SceneAnnotator
from vp_rl.interfaces import Annotator, Unanswered
from vp_rl.rewards.annotated import AnnotatedReward
from vp_rl.types import ASPECTS, Answer, Aspect, Images, Rating

ROOT = Path(__file__).parents[1]


class Scripted(Annotator):
    """Rates by the red of an image's first pixel (0 to 255), and by aspect; answers otherwise first, if told so."""

    name, version, concurrency = "scripted", "1", 3

    def __init__(self, *first: Answer | Exception) -> None:
        self.first = list(first)
        self.asked: list[tuple[str, Aspect]] = []
        self.inside = self.most = 0

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        self.asked.append((prompt, aspect))
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        if self.first:
            answer = self.first.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        red = Image.open(io.BytesIO(images[0])).tobytes()[0]
        return Answer(write_ratings([Rating(1 + (red + ASPECTS.index(aspect)) % 5, "so")] * len(images)))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


def images(*reds: int) -> Images:
    return (torch.tensor(reds).float() / 255)[:, None, None, None].expand(-1, 3, 16, 16)


# --- scores


def test_a_score_is_the_mean_of_the_ratings_by_aspect() -> None:
    # 10: 1, 2, 3, 4 for the four aspects; 13: 4, 5, 1, 2.
    found = AnnotatedReward(Scripted())(images(10, 13), ["a", "b"])
    assert found.tolist() == [2.5, 3.0]
    assert found.dtype == torch.float32


def test_weights_choose_what_is_asked_and_how_much_it_counts() -> None:
    annotator = Scripted()
    reward = AnnotatedReward(annotator, {"harmlessness": 1.0, "prompt_following": 3.0, "fidelity": 0.0})
    assert reward(images(10), ["a"]).tolist() == [(3 * 1 + 1 * 4) / 4]
    assert annotator.asked == [("a", "prompt_following"), ("a", "harmlessness")]


def test_rows_do_not_depend_on_each_other_and_no_images_ask_nothing() -> None:
    annotator = Scripted()
    reward = AnnotatedReward(annotator)
    seen, prompts = images(*range(7)), [str(number) for number in range(7)]
    whole = reward(seen, prompts)
    assert torch.equal(torch.cat([reward(seen[i : i + 1], prompts[i : i + 1]) for i in range(7)]), whole)
    number = len(annotator.asked)
    assert reward(seen[:0], []).shape == (0,)
    assert len(annotator.asked) == number == 2 * 7 * 4


@pytest.mark.parametrize(("concurrency", "most"), [(None, 3), (1, 1), (5, 5)])
def test_only_so_many_questions_are_asked_at_once(concurrency: int | None, most: int) -> None:
    annotator = Scripted()
    AnnotatedReward(annotator, concurrency=concurrency)(images(*range(4)), ["a"] * 4)
    assert annotator.most == most


def test_values_out_of_range_and_gradients_are_no_obstacle() -> None:
    seen = torch.tensor([1.2, -0.1])[:, None, None, None].expand(-1, 3, 16, 16).clone().requires_grad_()
    found = AnnotatedReward(Scripted())(seen, ["a", "b"])
    assert torch.equal(found, AnnotatedReward(Scripted())(images(255, 0), ["a", "b"]))
    assert not found.requires_grad
    assert not AnnotatedReward.differentiable


def test_it_works_inside_a_running_event_loop() -> None:
    async def main() -> list[float]:
        return AnnotatedReward(Scripted())(images(10), ["a"]).tolist()

    assert asyncio.run(main()) == [2.5]


def test_a_chat_model_behind_a_server_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    with ChatServer(tmp_path / "log.jsonl", script=["429", "500", "malformed"]) as server:
        reward = AnnotatedReward(OpenAIChatAnnotator(chat(server.url)), {"aesthetic": 1.0})
        found = [reward(images(red), [prompt]).item() for red, prompt in [(9, "a cat"), (200, "a dog")]]
    buffers = []
    for red in (9, 200):
        buffers.append(io.BytesIO())
        Image.new("RGB", (16, 16), (red,) * 3).save(buffers[-1], format="png")
    expected = [
        rating_of(prompt, buffer.getvalue(), "aesthetic")
        for prompt, buffer in zip(["a cat", "a dog"], buffers, strict=True)
    ]
    assert found == expected


# --- answers that are none

REFUSAL = Answer("I cannot look at this.", refused=True)
NONSENSE = Answer("Lovely!")


def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    annotator = Scripted(NONSENSE, NONSENSE)
    assert AnnotatedReward(annotator, {"prompt_following": 1.0})(images(10), ["a"]).tolist() == [1.0]
    assert len(annotator.asked) == 3


@pytest.mark.parametrize(("answers", "times"), [([REFUSAL], 1), ([NONSENSE] * 3, 3)])
def test_an_image_without_a_rating_ends_the_run_or_gets_the_rating_for_those(answers: list[Answer], times: int) -> None:
    weights = {"prompt_following": 1.0}
    with pytest.raises(ValueError, match="scripted, asked for prompt_following of an image of 'a'.*reward.unrated"):
        AnnotatedReward(Scripted(*answers), weights)(images(14), ["a"])
    annotator = Scripted(*answers)
    assert AnnotatedReward(annotator, weights, unrated=1.5)(images(14), ["a"]).tolist() == [1.5]
    assert len(annotator.asked) == times


def test_an_annotator_that_is_down_or_refuses_everything_ends_the_run_in_words() -> None:
    with pytest.raises(ConnectionError, match="annotator scripted did not answer: busy.*resume=auto"):
        AnnotatedReward(Scripted(Unanswered("busy")), unrated=1.0)(images(1, 2), ["a", "b"])
    with pytest.raises(ValueError, match="^no such model$"):
        AnnotatedReward(Scripted(ValueError("no such model")), unrated=1.0)(images(1, 2), ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": {"beauty": 1.0}}, "reward.weights has 'beauty', which is no aspect: choose from prompt_following"),
        ({"weights": {"aesthetic": -1.0}}, "reward.weights.aesthetic=-1.0"),
        ({"weights": {"aesthetic": 0.0}}, "All of reward.weights are 0"),
        ({"concurrency": 0}, "reward.concurrency=0"),
        ({"unrated": 0.0}, "reward.unrated=0.0 must be a rating"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AnnotatedReward(Scripted(), **settings)


def test_the_yaml_has_an_annotator_of_its_own_and_a_missing_key_shows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        paid = compose("train", ["reward=annotated"])
        free = compose(
            "train", ["reward=annotated", "annotator@reward.annotator=scene", "reward.weights={fidelity: 1}"]
        )
    assert paid.annotator._target_ != paid.reward.annotator._target_
    with pytest.raises(Exception, match="OPENAI_API_KEY"):
        instantiate(paid.reward)
    reward = instantiate(free.reward)
    assert reward(torch.rand(2, 3, 64, 64), ["a red circle"] * 2).shape == (2,)
    assert isinstance(reward._annotator, SceneAnnotator)
