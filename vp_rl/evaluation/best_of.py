"""The best of several images by a reward: what a model gives without any training, for as many times the images."""

from math import comb

import numpy as np
from jaxtyping import Float

NUMBERS = (2, 4)
"""Of how many images the best is taken, where a prompt has as many."""


def expected_best(
    values: Float[np.ndarray, "prompts seeds"], scores: Float[np.ndarray, "prompts seeds"], number: int
) -> Float[np.ndarray, " prompts"]:
    """Each prompt's mean value of the image with the highest score, over all choices of `number` of its images.

    Of N images the one with the r-th lowest score is the best in comb(r - 1, number - 1) of the comb(N, number)
    choices, so that the mean over choices is a weighted one over ranks. It is unbiased, and less noisy than one choice.

    Args:
        values: what is averaged, such as the judge's ratings.
        scores: what is chosen by.
        number: of images that are chosen from; at most as many as there are.
    """
    seeds = values.shape[1]
    weights = np.array([comb(rank, number - 1) for rank in range(seeds)]) / comb(seeds, number)
    return np.take_along_axis(values, np.argsort(scores, axis=1, kind="stable"), 1) @ weights
