"""What the guidance curve is asked for: which scales, of how many prompts, and what a model's best is chosen from."""

from collections.abc import Sequence
from dataclasses import dataclass

from vp_rl.configuration.kinds import Amounts, Count


@dataclass(frozen=True)
class CurveSettings:
    """A base model and its adapter over guidance scales; each at its best one is compared with the other at its own.

    Attributes:
        scales: of the curve. None: 1, the scale trained at, the one evaluated at, each model's best, and 7.5, which
            pipelines take by default.
        candidates: each model's best scale is the one of these with the best images of validation prompts.
        choosing: validation prompts for that, at most; an image of each at each candidate, by both models.
        prompts: test prompts of the curve, at most; an image of each at each scale, by both models. What compares best
            with best has all prompts and seeds of the evaluation.
        etas: noise of the sampler's steps; a curve for each, of which the first is what the report's first sentence is
            about. None: as the evaluation samples.
    """

    scales: Amounts | None = None
    candidates: Amounts = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
    choosing: Count = 64
    prompts: Count = 128
    etas: Amounts | None = None

    def __post_init__(self) -> None:
        for name, scales in (("scales", self.scales), ("candidates", self.candidates)):
            wrong = [scale for scale in scales or () if scale < 1]
            if wrong:
                raise ValueError(
                    f"evaluation.curve.{name} has {wrong[0]}: a scale is 1, which is no guidance, or more."
                )
        if not self.candidates:
            raise ValueError("evaluation.curve.candidates is empty: a model's best scale is one of them.")
        if min(self.choosing, self.prompts) < 1:
            raise ValueError(
                f"evaluation.curve.choosing={self.choosing} and prompts={self.prompts} must be at least 1; "
                "evaluation.curve=null makes no curve."
            )

    def drawn(self, trained: float | None, evaluated: float, best: Sequence[float]) -> list[float]:
        """The scales of the curve, rising.

        Args:
            trained: the scale that was trained at; None: training had none.
            evaluated: the evaluation's own.
            best: each model's best.
        """
        known = {1.0, 7.5, *([] if trained is None else [trained]), evaluated}
        return sorted({max(1.0, float(scale)) for scale in {*(self.scales or known), *best}})  # 0 is none too, as 1 is

    def most_images(self, prompts: int, watched: int, seeds: int) -> int:
        """How many images the first curve takes at most, in both models; fewer where some are there already.

        Args:
            prompts: of the evaluation.
            watched: of the split that is chosen by.
            seeds: images of each prompt of the evaluation.
        """
        scales = len(self.scales) + 2 if self.scales else 6
        chosen = len(set(self.candidates)) * min(self.choosing, watched)
        return 2 * (chosen + prompts * seeds + scales * min(self.prompts, prompts))
