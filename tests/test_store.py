"""What is kept between evaluations is what would be made again, and nothing else."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_evaluation import Bright, Brightness, BrightnessJudge, Prompts, evaluator, shifted

from vp_rl.callbacks.held_out_images import interleave
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.store import Kept, Store, fingerprint, pack_row, unpack_rows
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.types import Answer, Aspect


class Counted(Sampler):
    """Remembers how many images it made."""

    def sample(self, policy, conditioning, generator=None, until=None):  # noqa: ANN001, ANN201
        MADE.append(len(generator))
        return super().sample(policy, conditioning, generator, until)


class CountedJudge(BrightnessJudge):
    async def ask(self, prompt: str, images: list[bytes], aspect: Aspect) -> Answer:  # type: ignore[override]
        ASKED.append(prompt)
        return await super().ask(prompt, images, aspect)


MADE: list[int] = []
ASKED: list[str] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    MADE.clear()
    ASKED.clear()


def tool(prompts: int = 6, steps: int = 3, **settings: object) -> Evaluator:
    return Evaluator(Prompts(prompts), CountedJudge(), Counted(steps, 1.0, 1.0), seeds=(0, 1), **settings)


def same(one: Evaluation, other: Evaluation) -> None:
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)  # float32 means of other batches
    np.testing.assert_array_equal(one.ratings, other.ratings)
    assert one.rationales == other.rationales
    assert one.panel.keys() == other.panel.keys()


def kept(file: Path, reward: str = "r", policy: str = "base") -> Kept:
    return Kept(Store(file), policy, "text", {"reward": reward, "half": "h"})


def test_what_was_made_is_not_made_again_and_is_the_same(tmp_path: Path) -> None:
    plain = tool().evaluate(Bright(), Brightness())
    first = tool().evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s"))
    made, asked, policy = sum(MADE), len(ASKED), Bright()
    again = tool().evaluate(policy, Brightness(), kept=kept(tmp_path / "s"))
    same(plain, first)
    same(first, again)
    assert (sum(MADE), len(ASKED)) == (made, asked)
    assert policy.encoded == []


def test_more_prompts_need_only_the_new_ones(tmp_path: Path) -> None:
    tool(4).evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s"))
    MADE.clear()
    more = tool(6).evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s"))
    assert sum(MADE) == 4
    same(more, tool(6).evaluate(Bright(), Brightness()))


@pytest.mark.parametrize("change", ["policy", "sampler", "reward"])
def test_another_policy_sampler_or_reward_is_not_mixed_up(tmp_path: Path, change: str) -> None:
    class Double(Brightness):
        def forward(self, images, prompts):  # noqa: ANN001, ANN202
            return 2 * images.mean((1, 2, 3))

    tool().evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s"))
    policy = shifted(0.5) if change == "policy" else Bright()
    reward = Double() if change == "reward" else Brightness()
    it = tool(steps=4 if change == "sampler" else 3)
    names = kept(tmp_path / "s", "d" if change == "reward" else "r", "tuned" if change == "policy" else "base")
    same(it.evaluate(policy, reward, kept=names), it.evaluate(policy, reward))


def test_a_panel_is_scored_beside_the_reward_and_kept(tmp_path: Path) -> None:
    class Half(Brightness):
        def forward(self, images, prompts):  # noqa: ANN001, ANN202
            return images.mean((1, 2, 3)) / 2

    done = tool(panel={"half": Half()}).evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s"))
    assert done.scores is not None
    np.testing.assert_allclose(done.panel["half"], done.scores / 2, rtol=1e-6)
    np.testing.assert_allclose(done.metrics()["panel/half"], done.scores / 2, rtol=1e-6)
    same(done, tool(panel={"half": Half()}).evaluate(Bright(), Brightness(), kept=kept(tmp_path / "s")))
    with pytest.raises(ValueError, match="panel.reward"):
        tool(panel={"reward": Half()})


def test_what_was_written_before_a_crash_is_there_and_nothing_half(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.put([("a", b"1")])

    def crashing():  # noqa: ANN202
        yield "b", b"2"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(crashing())
    with pytest.raises(sqlite3.Error):
        store.put(iter([("c", b"3"), (object(), b"4")]))  # type: ignore[list-item]
    assert Store(tmp_path / "s").get(["a", "b", "c"]) == {"a": b"1"}
    assert Store(None).get(["a"]) == {}


def test_many_keys_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    items = {f"{number}": str(number).encode() for number in range(1234)}
    store.put(items.items())
    assert store.get([*items, "else"]) == items


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("this is no database, but it is long enough to be looked at" * 20)
    with pytest.raises(OSError, match="not a cache of evaluations"):
        Store(tmp_path / "s")


def test_encodings_come_back_as_they_were() -> None:
    conditioning = {"text": torch.randn(3, 4, 5), "mask": torch.ones(3, 4, dtype=torch.bfloat16)}
    back = unpack_rows([pack_row(conditioning, row) for row in (2, 0)], torch.device("cpu"))
    for name, tensor in conditioning.items():
        assert torch.equal(back[name], tensor[[2, 0]])
        assert back[name].dtype == tensor.dtype


def test_a_frozen_model_is_the_same_whatever_is_to_be_trained_on_it() -> None:
    def made(targets: list[str]) -> StableDiffusion:
        return StableDiffusion("tiny-sd", LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))

    one, other = made(["to_q", "to_k"]), made(["to_v"])
    assert fingerprint(one, "s", trained=False) == fingerprint(other, "s", trained=False)
    assert fingerprint(one, "s") != fingerprint(other, "s")
    assert fingerprint(one, "t", trained=False) != fingerprint(one, "s", trained=False)
    before = fingerprint(one, "s"), fingerprint(one, "s", trained=False)
    with torch.no_grad():
        next(each for each in one.parameters() if each.requires_grad).add_(1)
    assert fingerprint(one, "s") != before[0]
    assert fingerprint(one, "s", trained=False) == before[1]
    one.vae.decoder.conv_in.bias.data.add_(1)
    assert fingerprint(one, "s", trained=False) != before[1]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_of_several_processes_are_the_whole(processes: int) -> None:
    it = evaluator(Prompts(5), seeds=(0, 7), batch_size=3)
    whole = it.make(Bright(), it.prompts)
    shares = [it.make(Bright(), it.prompts, share=(number, processes)) for number in range(processes)]
    np.testing.assert_array_equal(interleave(shares, 2), whole)
