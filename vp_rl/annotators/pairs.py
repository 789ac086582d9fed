"""Annotators who only compare: two images of a prompt, and which of them is the better one."""

import asyncio
import itertools
import json
from abc import abstractmethod
from collections.abc import Sequence

from vp_rl.interfaces import Annotator
from vp_rl.types import Answer, Aspect, Rating


class PairAnnotator(Annotator):
    """Rates images that it is shown together by how often each is preferred to the others: a subclass compares two.

    Every pair is compared in both orders, as many favour a place: n (n - 1) comparisons for a question about n images.
    A rating is 1 + 4 times an image's share of them, rounded. It builds a VisionPrefer (`images_per_call: 0`, all of a
    prompt's images), and judges pairs (`duel.duels`: win rate); an image by itself it cannot rate.
    """

    @abstractmethod
    async def compare(self, prompt: str, first: bytes, second: bytes, aspect: Aspect) -> float:
        """How sure it is, from 0 to 1, that the first of two image files is the better one; 0.5: they are alike.

        Raises:
            Unanswered, Rejected, ValueError: see `Annotator.ask`.
        """

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """Each image's share of its comparisons.

        Raises:
            ValueError: there is one image, or a comparison is no number from 0 to 1; and as `compare` does.
        """
        if len(images) < 2:
            raise ValueError(
                f"{self.name} compares images, and was to rate one by itself: give builder.images_per_call=0 (all of a "
                "prompt's at once), and as a run's held-out judge another annotator."
            )
        orders = list(itertools.permutations(range(len(images)), 2))
        asked = (self.compare(prompt, images[first], images[second], aspect) for first, second in orders)
        won = [0.0] * len(images)
        for (first, second), sure in zip(orders, await asyncio.gather(*asked), strict=True):
            if not 0 <= sure <= 1:
                raise ValueError(f"{self.name} compared two images of {prompt[:200]!r} as {sure}: from 0 to 1.")
            won[first] += sure
            won[second] += 1 - sure
        each = 2 * (len(images) - 1)
        return Answer(json.dumps([share / each for share in won]))

    def read(self, answer: str, images: int) -> list[Rating]:
        """Ratings of those shares."""
        try:
            shares = [float(share) for share in json.loads(answer)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"no list of shares in {answer[:80]!r}: {error}") from error
        if len(shares) != images or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"{len(shares)} shares for {images} images, or some that are none: {answer[:80]!r}")
        return [Rating(1 + round(4 * share), f"Preferred in {share:.0%} of its comparisons.") for share in shares]
