"""The embedded world's judge behind the interface that vision-language models have."""

import random
import zlib
from collections.abc import Sequence

import numpy as np
from PIL.Image import Resampling

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.configuration.kinds import Seed, Share
from vp_rl.files import images as image_files
from vp_rl.interfaces import Annotator
from vp_rl.scenes.judge import Verdict, judge
from vp_rl.scenes.render import SIZE
from vp_rl.types import Answer, Aspect, Rating

_REMEMBERED = 1024  # the judge sees all four aspects at once; they are asked for one by one


class SceneAnnotator(Annotator):
    """Rates images of the embedded world from pixels and prompt alone.

    Args:
        noise: probability in [0, 1] that a rating is replaced by another within two of it, as a careless annotator's.
        seed: of that noise, which depends on the image, prompt and aspect and not on the order of calls.
    """

    version = "1"
    concurrency = 64  # it never waits itself, but that many answers share the journal's wait for the disk

    def __init__(self, noise: Share = 0.0, seed: Seed = 0) -> None:
        self.name = "scene" if noise == 0 else f"scene-noise-{noise}-seed-{seed}"
        if not 0 <= noise <= 1:
            raise ValueError(f"annotator.noise={noise} must be a probability between 0 and 1.")
        self._noise, self._seed = noise, seed
        self._verdicts: dict[tuple[str, bytes], dict[str, Verdict]] = {}

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """One rating for each image.

        Raises:
            ValueError: the prompt is not of the embedded world's grammar.
        """
        return Answer(write_ratings([self._rate(prompt, image, aspect) for image in images]))

    def read(self, answer: str, images: int) -> list[Rating]:
        """See `read_ratings`."""
        return read_ratings(answer, images)

    def _rate(self, prompt: str, encoded: bytes, aspect: Aspect) -> Rating:
        image = image_files.rgb(encoded)
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Resampling.BICUBIC)
        pixels = np.asarray(image)
        key = (prompt, pixels.tobytes())
        if key not in self._verdicts:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            self._verdicts[key] = judge(pixels, prompt)
        verdict = self._verdicts[key][aspect]
        rng = random.Random(zlib.crc32(f"{self._seed}|{aspect}|{prompt}|".encode() + key[1]))
        if rng.random() >= self._noise:
            return Rating(verdict.rating, verdict.rationale)
        others = [r for r in range(1, 6) if 1 <= abs(r - verdict.rating) <= 2]
        return Rating(rng.choice(others), verdict.rationale)
