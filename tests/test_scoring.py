"""Scoring streams: every image once, batches of one size, bounded memory, and nothing lost or done twice."""

import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vp_rl.data.sets.base import HumanSet, Judged, pair
from vp_rl.evaluation import scoring
from vp_rl.evaluation.protocols import pooled
from vp_rl.evaluation.scoring import Keeper, Score, Scorer, fingerprint, load, score_set, wanted
from vp_rl.interfaces import Reward
from vp_rl.types import Images, Scores


def png(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(buffer, format="png")
    return buffer.getvalue()


class Red(Reward):
    """The mean of red, with a memory of what it was shown; may fail at the n-th batch."""

    differentiable = True

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[tuple[int, int, int]] = []
        self.rows: list[tuple[float, str]] = []
        self._fail_at = fail_at

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        if len(self.batches) == self._fail_at:
            raise KeyboardInterrupt
        self.batches.append((len(images), images.shape[2], images.shape[3]))
        scores = self.weight * images[:, 0].mean((1, 2))
        self.rows += zip(scores.tolist(), prompts, strict=True)
        return scores


class Gives(Reward):
    """Always the same."""

    differentiable = False

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self._scores = scores

    def forward(self, images: Images, prompts: list[str]) -> torch.Tensor:
        return self._scores


class Files(HumanSet):
    """Images in memory; counts how often each was read."""

    def __init__(self, contents: Mapping[str, bytes], judged: list[Judged]) -> None:
        self.title, self.protocols = "files", [pooled]
        self.contents, self.judged, self.read_names = contents, judged, list[str]()

    def load(self) -> list[Judged]:
        return self.judged

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name, content in self.contents.items():
            if name in wanted:
                self.read_names.append(name)
                yield name, content

    def stamp(self) -> str:
        return "1"


def files(number: int = 10) -> Files:
    """Images 0, 1, ... of two sizes, each in a pair with the next one, all of one prompt."""
    contents = {f"{i}": png(8 * i, (8, 8) if i % 3 else (12, 10)) for i in range(number)}
    return Files(contents, [pair("p", (f"{i}", f"{i + 1}"), 1.0) for i in range(number - 1)])


def expected(number: int) -> list[float]:
    return [8 * i / 255 for i in range(number)]


def in_order(scores: scoring.Scores, number: int) -> list[float]:
    return [scores.by_image[f"{i}", "p"] for i in range(number)]


def test_every_image_is_read_and_scored_once_however_many_pairs_it_is_in(tmp_path: Path) -> None:
    it, reward = files(), Red()
    scores = score_set(Scorer(reward, batch_size=4), it, it.judged, tmp_path)
    assert in_order(scores, 10) == pytest.approx(expected(10), abs=1e-6)
    assert sorted(it.read_names) == sorted(it.contents)
    assert len(reward.rows) == 10


def test_a_batch_has_images_of_one_size_which_nothing_resizes(tmp_path: Path) -> None:
    it, reward = files(), Red()
    score_set(Scorer(reward, batch_size=4), it, it.judged, tmp_path)
    # 6 of 8 x 8, 4 of height 10 and width 12.
    assert sorted(reward.batches) == [(2, 8, 8), (4, 8, 8), (4, 10, 12)]


def test_an_image_of_two_prompts_is_decoded_once_and_scored_for_both(tmp_path: Path) -> None:
    judged = [pair("p", ("a", "b"), 1.0), pair("q", ("a", "c"), 0.0), pair("q", ("c", "a"), 0.5)]
    it, reward = Files({name: png(9) for name in "abc"}, judged), Red()
    assert wanted(judged) == {"a": ["p", "q"], "b": ["p"], "c": ["q"]}
    scores = score_set(Scorer(reward), it, judged, tmp_path)
    assert it.read_names == ["a", "b", "c"]
    assert set(scores.by_image) == {("a", "p"), ("a", "q"), ("b", "p"), ("c", "q")}
    assert len(reward.rows) == 4


def test_batching_changes_no_score(tmp_path: Path) -> None:
    it = files()
    one = score_set(Scorer(Red(), batch_size=1), it, it.judged, tmp_path / "one")
    many = score_set(Scorer(Red(), batch_size=64, threads=4), it, it.judged, tmp_path / "many")
    assert in_order(one, 10) == pytest.approx(in_order(many, 10), abs=1e-6)


def test_what_was_scored_before_a_stop_is_not_scored_again(tmp_path: Path) -> None:
    it, first = files(30), Red(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        score_set(Scorer(first, batch_size=4), it, it.judged, tmp_path)
    it.read_names.clear()
    second = Red()
    scores = score_set(Scorer(second, batch_size=4), it, it.judged, tmp_path)
    assert len(first.rows) == 12
    assert len(second.rows) == len(it.read_names) == 30 - 12
    assert in_order(scores, 30) == pytest.approx(expected(30), abs=1e-6)
    third = Red()
    assert score_set(Scorer(third), it, it.judged, tmp_path).by_image == scores.by_image
    assert third.rows == []


def test_scores_are_written_now_and_then_and_a_torn_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_ROWS", 3)
    with Keeper(tmp_path) as keeper:
        for number in range(4):
            keeper.add([Score(f"{number}", "p", number / 3)])
            assert len(load(tmp_path)) == (3 if number >= 2 else 0)
    (tmp_path / "4.unfinished").write_bytes(b"PAR1")
    assert load(tmp_path) == {(f"{i}", "p"): pytest.approx(np.float32(i / 3)) for i in range(4)}


def test_an_image_that_is_none_is_named_and_the_others_are_scored(tmp_path: Path) -> None:
    it = files()
    it.contents = {**it.contents, "3": b"no image", "4": png(1, (64, 64))[:80], "5": b""}
    scores = score_set(Scorer(Red()), it, it.judged, tmp_path)
    assert set(scores.unreadable) == {"3", "4", "5"}
    assert all(scores.unreadable.values())
    assert len(scores.by_image) == 7
    mended = files()
    assert len(score_set(Scorer(Red()), mended, mended.judged, tmp_path).by_image) == 10
    assert sorted(mended.read_names) == ["3", "4", "5"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused_with_its_image_and_prompt(tmp_path: Path, bad: float) -> None:
    it = files(2)
    it.contents = {"0": png(0), "1": png(1)}
    with pytest.raises(ValueError, match=r"Gives gave (nan|inf) for image '1' of the prompt 'p'"):
        score_set(Scorer(Gives(torch.tensor([1.0, bad]))), it, it.judged, tmp_path)
    assert load(tmp_path) == {}


def test_scores_of_another_shape_are_refused(tmp_path: Path) -> None:
    it = Files({"0": png(0), "1": png(1)}, files(2).judged)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 images"):
        score_set(Scorer(Gives(torch.zeros(3))), it, it.judged, tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"batch_size": 0}, "batch_size=0"), ({"threads": 0}, "threads=0"), ({"device": "gpu7"}, "device='gpu7'")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Scorer(Red(), **settings)


@pytest.mark.parametrize("sizes", [1, 1000])
def test_few_images_are_in_memory_at_once_however_many_there_are(sizes: int) -> None:
    """Also where no two are of one size, so that batches never fill."""
    read, most, scored = 0, 0, 0

    def stream() -> Iterator[tuple[str, bytes]]:
        nonlocal read, most
        for number in range(300):
            read += 1
            most = max(most, read - scored)
            yield f"{number}", png(1, (8 + number % sizes, 8))

    prompts = {f"{number}": ["p"] for number in range(300)}
    for batch in Scorer(Red(), batch_size=8).score(stream(), prompts, {}):
        scored += len(batch)
    assert scored == 300
    assert most <= 8 + 4 * 8 + 8 + 2  # decoded ahead, waiting for others of their size, in the batch, in hand


def test_pixels_are_as_the_file_has_them_in_rgb() -> None:
    grey = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(grey, format="png")
    pixels = scoring.decode(grey.getvalue())
    assert isinstance(pixels, np.ndarray)
    assert np.array_equal(pixels, np.arange(64, dtype=np.uint8).reshape(8, 8, 1).repeat(3, 2))


def test_the_fingerprint_changes_with_settings_and_weights() -> None:
    one, other = Red(), Red()
    assert fingerprint("a", reward=one) == fingerprint("a", reward=other)
    with torch.no_grad():
        other.weight += 1e-6
    half = Red().to(torch.bfloat16)
    found = {fingerprint("a"), fingerprint("b"), fingerprint("a", "b"), fingerprint("a", reward=one)}
    found |= {fingerprint("a", reward=other), fingerprint("a", reward=half)}
    assert len(found) == 6


class Remembering(Red):
    """Takes its zero from the first images that it sees, as `weighted` takes its statistics."""

    def __init__(self, warmup: int = 6) -> None:
        super().__init__()
        self.seen, self.zero, self._warmup = 0, 0.0, warmup

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        scores = super().forward(images, prompts)
        if self.seen < self._warmup:
            self.zero, self.seen = self.zero + float(scores.sum()), self.seen + len(scores)
        return scores - self.zero / self.seen

    def get_extra_state(self) -> tuple[int, float]:
        return self.seen, self.zero

    def set_extra_state(self, state: tuple[int, float]) -> None:
        self.seen, self.zero = state


def test_a_reward_that_remembers_scores_all_images_on_one_scale_and_a_resumed_evaluation_too(tmp_path: Path) -> None:
    images = {f"{shade}": png(shade) for shade in range(0, 120, 10)}
    them = [pair(f"p{n}", (f"{20 * n}", f"{20 * n + 10}"), 1.0) for n in range(6)]
    human = Files(images, them)
    one, file = Remembering(), tmp_path / "scores" / "statistics.json"
    before = fingerprint("a", reward=one)
    scorer = Scorer(one, 4)
    scorer.settle(human, them, file)
    assert fingerprint("a", reward=one) == before  # the scores are found again
    settled = one.get_extra_state()
    assert settled[0] == 8
    found = score_set(scorer, human, them, tmp_path / "kept").by_image
    gaps = np.diff([found[f"{shade}", f"p{shade // 20}"] for shade in range(0, 120, 10)])
    assert gaps.tolist() == pytest.approx([10 / 255] * 11, abs=1e-6)
    other = Remembering()
    Scorer(other, 4).settle(human, them[::-1], file)
    assert tuple(other.get_extra_state()) == settled
    with pytest.raises(ValueError, match="too few images for Remembering"):
        Scorer(Remembering(100), 4).settle(human, them, tmp_path / "other.json")
    Scorer(Red(), 4).settle(human, them, tmp_path / "none.json")
    assert list(tmp_path.rglob("*.json")) == [file]
