"""Images for held-out prompts with fixed seeds, scored by the reward and rated by the held-out judge."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from vp_rl.configuration.kinds import Count, Seeds
from vp_rl.evaluation import looks
from vp_rl.evaluation.asking import Asked, rate
from vp_rl.evaluation.curve_settings import CurveSettings
from vp_rl.evaluation.store import (
    NOTHING,
    Kept,
    key_of,
    pack_image,
    pack_row,
    same_pixels,
    unpack_image,
    unpack_rows,
)
from vp_rl.interfaces import Annotator, Policy, PromptSource, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import ASPECTS, Conditioning, Split, take
from vp_rl.visionprefer.generate import to_uint8

Pixels = UInt8[np.ndarray, "images height width 3"]
OnBatch = Callable[[int], object]


@dataclass(frozen=True)
class Evaluation:
    """What one policy made of the held-out prompts. A prompt's images, one for each seed, are next to each other."""

    prompts: list[str]
    """One for each image."""
    seeds: list[int]
    """One for each image."""
    images: Pixels
    scores: Float[np.ndarray, " images"] | None
    """By the reward that was trained for; None: what is trained has none."""
    ratings: Int[np.ndarray, "images aspects"]
    """By the judge, 1 to 5, in the order of `ASPECTS`."""
    rationales: list[tuple[str, ...]]
    """The judge's reasons for each image, in the order of `ASPECTS`."""
    panel: dict[str, Float[np.ndarray, " images"]] = field(default_factory=dict)
    """By other rewards, by their names."""
    asked: Asked = Asked()
    """What the ratings took."""
    own: dict[str, Float[np.ndarray, " images"]] = field(default_factory=dict)
    """By metrics of the user's own, by their names."""

    def metrics(self) -> dict[str, Float[np.ndarray, " images"]]:
        """Everything better or worse, by name, for each image; `correct` is 1 where prompt following is rated 5."""
        by_aspect = {aspect: self.ratings[:, index].astype(float) for index, aspect in enumerate(ASPECTS)}
        return {
            **({} if self.scores is None else {"reward": self.scores.astype(float)}),
            **by_aspect,
            "mean_rating": self.ratings.mean(1),
            "correct": (by_aspect["prompt_following"] == 5).astype(float),
            **{f"panel/{name}": scores.astype(float) for name, scores in self.panel.items()},
            **{f"metric/{name}": values for name, values in self.own.items()},
        }

    @cached_property
    def prompt(self) -> Int[np.ndarray, " images"]:
        """The number of each image's prompt."""
        return np.unique(self.prompts, return_inverse=True)[1]

    @cached_property
    def features(self) -> Float[np.ndarray, "images features"]:
        """Of each image: see `looks.coarse`."""
        return looks.coarse(self.images)

    @cached_property
    def looks(self) -> dict[str, Float[np.ndarray, " images"]]:
        """What the images look like, neither good nor bad; what takes several seeds or prompts is there with them."""
        several = {
            "diversity": looks.diversity(self.features, self.prompt),
            "spread": looks.spread(self.features, self.seeds),
        }
        found = looks.appearance(self.images) | {name: each for name, each in several.items() if each is not None}
        return {f"look/{name}": values for name, values in found.items()}

    def means(self) -> dict[str, float]:
        """The metrics averaged over images."""
        return {name: float(values.mean()) for name, values in self.metrics().items()}

    def of_first_seed(self) -> Int[np.ndarray, " prompts"]:
        """The place of one image of each prompt."""
        return np.flatnonzero(np.array(self.seeds) == self.seeds[0])

    def rows(self, chosen: Sequence[int] | Int[np.ndarray, " rows"]) -> "Evaluation":
        """Some of the images, in that order."""
        return Evaluation(
            [self.prompts[row] for row in chosen],
            [self.seeds[row] for row in chosen],
            self.images[chosen],
            None if self.scores is None else self.scores[chosen],
            self.ratings[chosen],
            [self.rationales[row] for row in chosen],
            {name: scores[chosen] for name, scores in self.panel.items()},
            own={name: values[chosen] for name, values in self.own.items()},
        )


def noise_seed(place: int, seed: int) -> int:
    """What an image's random numbers start from: its prompt's place in the evaluation and its seed, nothing else."""
    return 1_000_003 * seed + place


def _measured(
    name: str, metric: Callable[..., Any], pixels: Pixels, prompts: list[str]
) -> Float[np.ndarray, " images"]:
    """A metric of the user's own.

    Raises:
        ValueError: it gives something else than a number for each image.
    """
    values = np.asarray(metric(pixels, prompts), float)
    if values.shape != (len(pixels),) or not np.isfinite(values).all():
        raise ValueError(
            f"evaluation.metrics.{name} gave {values.shape or values} for {len(pixels)} images: it must give a finite "
            "number for each of them."
        )
    return values


class _Row(NamedTuple):
    """An image to be made."""

    prompt: str
    seed: int
    noise: int


class Evaluator:
    """Makes and judges images of held-out prompts; the same noise for every policy that it evaluates.

    Args:
        prompts: where the prompts come from.
        annotator: the held-out judge.
        sampler: how users of the model sample, not how it is trained.
        split: which prompts.
        limit: how many of them at most; None is all.
        seeds: one image of each prompt for each seed.
        batch_size: images made at once; does not change them.
        watch: the split that is looked at while training, so that choosing by it leaves `split` for the end.
        panel: other rewards beside the trained one, by the names they get.
        metrics: of the user's own, by the names they get: given images in 8 bits a colour, (images, height, width, 3),
            and the prompt of each, a number for each image, where higher is better.
        curve: over guidance scales, when all is done; None: there is none.

    Raises:
        ValueError: there is no image to make.
    """

    def __init__(
        self,
        prompts: PromptSource,
        annotator: Annotator,
        sampler: Sampler,
        split: Split = "test",
        limit: Count | None = 128,
        seeds: Seeds = (0,),
        batch_size: Count = 64,
        watch: Split = "validation",
        panel: Mapping[str, Reward] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        curve: CurveSettings | None = None,
    ) -> None:
        for name, chosen in (("split", split), ("watch", watch)):
            if chosen not in get_args(Split):
                raise ValueError(f"evaluation.{name}={chosen!r} is unknown: choose from {', '.join(get_args(Split))}.")
        # Each prompt once: prompts are what intervals resample, so a repeated one would count as new evidence.
        self.prompts = list(dict.fromkeys(prompts.split(split)))[:limit]
        self.watched = list(dict.fromkeys(prompts.split(watch)))[:limit]
        self.seeds = tuple(seeds)
        if not self.prompts or not self.seeds or batch_size < 1:
            raise ValueError(
                f"The evaluation has no image to make: {len(self.prompts)} prompts in the {split} split, "
                f"evaluation.limit={limit}, evaluation.seeds={list(self.seeds)}, evaluation.batch_size={batch_size}."
            )
        if panel and "reward" in panel:
            raise ValueError("evaluation.panel.reward would be mixed up with the trained reward: call it otherwise.")
        self.watch, self.curve = watch, curve
        self._source = prompts
        self.sampler, self.annotator, self.panel = sampler, annotator, dict(panel or {})
        self._metrics, self._batch_size = dict(metrics or {}), batch_size

    def sampling(self, sampler: Sampler, seeds: Sequence[int], panel: Sequence[str] = ()) -> "Evaluator":
        """The same one with another sampler and other seeds: as far as these are the same, so is the noise.

        Args:
            sampler, seeds: the others.
            panel: the rewards beside the trained one that stay.
        """
        other = copy(self)
        other.sampler, other.seeds = sampler, tuple(seeds)
        other.panel = {name: self.panel[name] for name in panel}
        return other

    @cached_property
    def categories(self) -> dict[str, list[str]]:
        """The prompts of each category, of which a prompt may be in several."""
        found: dict[str, list[str]] = {}
        for prompt in self.prompts:
            for name in self._source.categories(prompt):
                found.setdefault(name, []).append(prompt)
        return dict(sorted(found.items()))

    def evaluate(
        self,
        policy: Policy,
        reward: Reward,
        prompts: Sequence[str] | None = None,
        on_batch: OnBatch = lambda images: None,
        kept: Kept = NOTHING,
    ) -> Evaluation:
        """Samples, scores and rates; see `make` and `judge`."""
        chosen = self.prompts if prompts is None else prompts
        pixels = self.make(policy, chosen, on_batch, kept=kept)
        return self.judge(pixels, reward, chosen, next(policy.parameters()).device, kept)

    @torch.no_grad()
    def make(
        self,
        policy: Policy,
        prompts: Sequence[str],
        on_batch: OnBatch = lambda images: None,
        *,
        share: tuple[int, int] = (0, 1),
        kept: Kept = NOTHING,
    ) -> Pixels:
        """The images, a prompt's next to each other. No global random numbers are drawn.

        Args:
            policy: what makes the images.
            prompts: what for.
            on_batch: called with the number of images that were just made, or found.
            share: (i, n): of n processes this is number i, which makes those of every n-th prompt from the i-th. There
                must be one; `callbacks.held_out_images.interleave` puts them together.
            kept: what was made before, and is not made again.
        """
        rows = self._rows(prompts, share)
        keys = [key_of("image", kept.policy, asdict(self.sampler), row.prompt, row.noise) for row in rows]
        made = {key: unpack_image(data) for key, data in kept.store.get(keys).items()}
        on_batch(len(made))
        missing = [number for number, key in enumerate(keys) if key not in made]
        different = list(dict.fromkeys(rows[number].prompt for number in missing))
        conditioning = self._encode(policy, different, kept) if different else {}
        for some in (missing[i : i + self._batch_size] for i in range(0, len(missing), self._batch_size)):
            device = next(iter(conditioning.values())).device
            places = torch.tensor([different.index(rows[number].prompt) for number in some], device=device)
            noise = [torch.Generator().manual_seed(rows[number].noise) for number in some]
            images = to_uint8(policy.decode(self.sampler.sample(policy, take(conditioning, places), noise)))
            new = dict(zip((keys[number] for number in some), images, strict=True))
            kept.store.put((key, pack_image(image)) for key, image in new.items())
            made |= new
            on_batch(len(some))
        return np.stack([made[key] for key in keys])

    @torch.no_grad()
    def judge(
        self, pixels: Pixels, reward: Reward | None, prompts: Sequence[str], device: torch.device, kept: Kept = NOTHING
    ) -> Evaluation:
        """Scores and rates what `make` made. Rewards see images in 8 bits a colour, as users do.

        Args:
            pixels: the images.
            reward: what scores them, beside the panel; None: the panel alone.
            prompts: theirs.
            device: where rewards work; the panel stays there.
            kept: what was rated before, and scored by those rewards that have a fingerprint, and is not again.
        """
        rows = self._rows(prompts)
        names = [same_pixels(image) for image in pixels]
        scores = {
            name: self._scores(each.to(device), pixels, rows, device, kept, name, names)
            for name, each in {"reward": reward, **self.panel}.items()
            if each is not None
        }
        ratings, rationales, asked = self._rate(prompts, pixels, kept)
        return Evaluation(
            [row.prompt for row in rows],
            [row.seed for row in rows],
            pixels,
            scores.pop("reward", None),
            ratings,
            rationales,
            scores,
            asked,
            {name: _measured(name, each, pixels, [row.prompt for row in rows]) for name, each in self._metrics.items()},
        )

    def _rows(self, prompts: Sequence[str], share: tuple[int, int] = (0, 1)) -> list[_Row]:
        places = list(enumerate(prompts))[share[0] :: share[1]]
        return [_Row(prompt, seed, noise_seed(place, seed)) for place, prompt in places for seed in self.seeds]

    def _encode(self, policy: Policy, prompts: list[str], kept: Kept) -> Conditioning:
        keys = [key_of("text", kept.text, prompt) for prompt in prompts]
        found = kept.store.get(keys)
        if len(found) == len(keys):
            return unpack_rows([found[key] for key in keys], next(policy.parameters()).device)
        conditioning = policy.encode(prompts)
        kept.store.put((key, pack_row(conditioning, row)) for row, key in enumerate(keys))
        return conditioning

    def _scores(
        self,
        reward: Reward,
        pixels: Pixels,
        rows: Sequence[_Row],
        device: torch.device,
        kept: Kept,
        name: str,
        names: Sequence[str],
    ) -> Float[np.ndarray, " images"]:
        who = kept.rewards.get(name)
        store = NOTHING.store if who is None else kept.store
        keys = [key_of("score", who, row.prompt, image) for row, image in zip(rows, names, strict=True)]
        found = {key: np.frombuffer(data, np.float32)[0] for key, data in store.get(keys).items()}
        missing = [number for number, key in enumerate(keys) if key not in found]
        for some in (missing[i : i + self._batch_size] for i in range(0, len(missing), self._batch_size)):
            images = torch.from_numpy(pixels[some]).to(device).permute(0, 3, 1, 2).float() / 255
            scores = reward(images, [rows[number].prompt for number in some]).float().cpu().numpy()
            new = {keys[number]: score for number, score in zip(some, scores, strict=True)}
            store.put((key, score.tobytes()) for key, score in new.items())
            found |= new
        return np.array([found[key] for key in keys], np.float32)

    def _rate(
        self, prompts: Sequence[str], pixels: Pixels, kept: Kept
    ) -> tuple[np.ndarray, list[tuple[str, ...]], Asked]:
        each = len(self.seeds)
        shown = [list(pixels[i * each : (i + 1) * each]) for i in range(len(prompts))]
        rated, asked = rate(self.annotator, prompts, shown, kept.store)
        by_image = [image for row in rated for image in row]
        ratings = np.array([[rating.rating for rating in image] for image in by_image])
        return ratings, [tuple(rating.rationale for rating in image) for image in by_image], asked
