"""Any number of images through a reward, in bounded memory, and nothing scored twice.

Files are read one after the other, decoded in threads while the reward works, and put into batches of images of one
size, so that nothing resizes them but the reward's own preprocessing. Scores are kept on disk while they come.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from jaxtyping import UInt8
from pyarrow.parquet import write_table
from tqdm import tqdm

from vp_rl.data.sets.base import HumanSet, Judged
from vp_rl.files import images as image_files
from vp_rl.files import parquet
from vp_rl.interfaces import Reward

_WAITING = 4  # batches' worth of images that wait for others of their size
_ROWS, _SECONDS = 10_000, 30.0  # scores that a crash may cost
_SCHEMA = pyarrow.schema({"image": pyarrow.string(), "prompt": pyarrow.string(), "score": pyarrow.float32()})

Pixels = UInt8[np.ndarray, "height width 3"]


class Score(NamedTuple):
    """What a reward gives one image for one prompt."""

    image: str
    """Its name in the set."""
    prompt: str
    score: float


class Scores(NamedTuple):
    """A whole set's."""

    by_image: dict[tuple[str, str], float]
    """By name and prompt."""
    unreadable: dict[str, str]
    """Images that are no images, and what is wrong with them."""


class Scorer:
    """Scores images in batches.

    Args:
        reward: put on the device and into evaluation mode.
        batch_size: images at once.
        device: `auto`: a GPU if there is one.
        threads: that decode images.

    Raises:
        ValueError: a setting makes no sense.
    """

    def __init__(self, reward: Reward, batch_size: int = 32, device: str = "auto", threads: int = 2) -> None:
        if batch_size < 1 or threads < 1:
            raise ValueError(f"batch_size={batch_size} and threads={threads} must be at least 1.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._device = torch.device(device)
            self._reward = reward.to(self._device).eval()
        except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
            raise ValueError(f"device={device!r} cannot be used, give auto, cpu or cuda: {error}") from error
        self._batch_size, self._threads = batch_size, threads

    def settle(self, human: HumanSet, judged: Sequence[Judged], file: Path) -> None:
        """Fixes what a reward still takes of the images that it sees, as `weighted` does its statistics.

        They are taken of the set's first images, whose scores are thrown away, and kept in the file: all scores are
        on one scale, and those of an evaluation that was stopped and goes on too.

        Raises:
            ValueError: the set has too few images for it.
        """
        before = _memory(self._reward)
        if not before:
            return
        if file.is_file():
            self._reward.load_state_dict({**self._reward.state_dict(), **json.loads(file.read_text())})
            return
        prompts = wanted(judged)
        for _ in self.score(human.read(prompts.keys()), prompts, {}):
            before, previous = _memory(self._reward), before
            if before == previous:
                break
        else:
            raise ValueError(
                f"{human.title} has too few images for {type(self._reward).__name__} to take statistics of: name a "
                "larger set first, lower its warmup, or give it statistics."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(before))
        os.replace(unfinished, file)

    def score(
        self, files: Iterable[tuple[str, bytes]], prompts: Mapping[str, Sequence[str]], unreadable: dict[str, str]
    ) -> Iterator[list[Score]]:
        """A batch's scores at a time, in no promised order.

        Args:
            files: names and contents.
            prompts: what each image is scored for.
            unreadable: gets those that cannot be decoded.

        Raises:
            ValueError: the reward gave something that is no score.
        """
        waiting: dict[tuple[int, ...], deque[tuple[str, str, Pixels]]] = {}
        number = 0
        for name, pixels in self.decoded(files):
            if isinstance(pixels, str):
                unreadable[name] = pixels
                continue
            line = waiting.setdefault(pixels.shape, deque())
            line.extend((name, prompt, pixels) for prompt in prompts[name])
            number += len(prompts[name])
            while len(line) >= self._batch_size or number > _WAITING * self._batch_size:
                fullest = max(waiting.values(), key=len)
                batch = [fullest.popleft() for _ in range(min(self._batch_size, len(fullest)))]
                number -= len(batch)
                yield self._batch(batch)
        for line in waiting.values():
            while line:
                yield self._batch([line.popleft() for _ in range(min(self._batch_size, len(line)))])

    def decoded(self, files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Pixels | str]]:
        """In the order of the files; threads are at most a batch ahead."""
        line: deque[tuple[str, Future[Pixels | str]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for name, data in files:
                line.append((name, pool.submit(decode, data)))
                if len(line) > self._batch_size:
                    first, future = line.popleft()
                    yield first, future.result()
            while line:
                first, future = line.popleft()
                yield first, future.result()

    @torch.inference_mode()
    def _batch(self, batch: Sequence[tuple[str, str, Pixels]]) -> list[Score]:
        names, prompts, pixels = zip(*batch, strict=True)
        images = torch.from_numpy(np.stack(pixels)).to(self._device).permute(0, 3, 1, 2).float() / 255
        scores = self._reward(images, list(prompts)).float().cpu()
        who = type(self._reward).__name__
        if scores.shape != (len(batch),):
            raise ValueError(f"{who} gave scores of shape {tuple(scores.shape)} for {len(batch)} images.")
        finite = torch.isfinite(scores)
        if not finite.all():
            bad = int((~finite).int().argmax())
            raise ValueError(
                f"{who} gave {scores[bad].item()} for image '{names[bad]}' of the prompt {prompts[bad][:200]!r}: no "
                "accuracy can be worked out. Its weights may be damaged, or its precision too low."
            )
        return [Score(*row) for row in zip(names, prompts, scores.tolist(), strict=True)]


def _memory(reward: Reward) -> dict[str, Any]:
    """What a reward's state has beside its weights."""
    return {name: value for name, value in reward.state_dict().items() if not isinstance(value, torch.Tensor)}


def decode(data: bytes) -> Pixels | str:
    """The picture as people saw it, upright and on white; or what is wrong with it.

    The published evaluations apply no EXIF rotation and show what is hidden behind transparency. Of their own sets'
    images, which have neither, they read the same.
    """
    try:
        return image_files.pixels(data)
    except ValueError as error:
        return str(error)


def wanted(judged: Sequence[Judged]) -> dict[str, list[str]]:
    """The prompts that each image of a set is scored for; nearly always one."""
    found: dict[str, dict[str, None]] = {}
    for each in judged:
        for name in each.images:
            found.setdefault(name, {})[each.prompt] = None
    return {name: list(prompts) for name, prompts in found.items()}


def score_set(scorer: Scorer, human: HumanSet, judged: Sequence[Judged], kept: Path) -> Scores:
    """Scores what has not been scored before.

    Args:
        judged: what `human.load()` gave.
        kept: folder of the scores that are there, where new ones are put while they come. It must be one for this
            reward and this set only: see `fingerprint`.

    Raises:
        ValueError: see `Scorer.score`.
    """
    scores = load(kept)
    prompts = wanted(judged)
    left = {
        name: missing
        for name, own in prompts.items()
        if (missing := [prompt for prompt in own if (name, prompt) not in scores])
    }
    unreadable: dict[str, str] = {}
    total = sum(map(len, left.values()))
    bar = tqdm(
        total=total,
        desc=human.title,
        unit="image",
        dynamic_ncols=True,
        disable=not total,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar, Keeper(kept) as keeper:
        for batch in scorer.score(human.read(left.keys()), left, unreadable):
            scores |= {(row.image, row.prompt): row.score for row in batch}
            keeper.add(batch)
            bar.update(len(batch))
    return Scores(scores, unreadable)


class Keeper:
    """Writes scores to a folder, a file now and then; used in a `with` statement, which writes the rest."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows, self._written = folder, list[Score](), time.monotonic()

    def __enter__(self) -> "Keeper":
        return self

    def add(self, rows: Sequence[Score]) -> None:
        """Some more."""
        self._rows += rows
        if len(self._rows) >= _ROWS or time.monotonic() - self._written > _SECONDS:
            self._write()

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._write()

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{time.time_ns()}.parquet"
        unfinished = file.with_suffix(".unfinished")
        columns = dict(zip(Score._fields, map(list, zip(*self._rows, strict=True)), strict=True))
        write_table(pyarrow.table(columns, _SCHEMA), unfinished)
        os.replace(unfinished, file)
        self._rows, self._written = [], time.monotonic()


def load(folder: Path) -> dict[tuple[str, str], float]:
    """All scores that a `Keeper` wrote there; none where there is no such folder."""
    found: dict[tuple[str, str], float] = {}
    for file in sorted(folder.glob("*.parquet")):
        columns = parquet.read(file).to_pydict()
        found |= dict(zip(zip(columns["image"], columns["prompt"], strict=True), columns["score"], strict=True))
    return found


def fingerprint(settings: str, *more: str, reward: Reward | None = None) -> str:
    """Twelve characters that change with the settings and with the reward's weights, if it has any."""
    digest = hashlib.blake2b("\n".join((settings, *more)).encode(), digest_size=6)
    for name, tensor in ({} if reward is None else reward.state_dict()).items():
        if not isinstance(tensor, torch.Tensor):  # what it has seen, see `Scorer.settle`
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
