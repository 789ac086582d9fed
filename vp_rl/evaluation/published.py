"""Accuracies that others have published, to stand beside measured ones, each with where it was published.

Published tables disagree, since their protocols do. A number stands in the column of the protocol that its source uses;
where a source copied a number from elsewhere, it cannot be told.
"""

from collections.abc import Mapping
from typing import NamedTuple

from vp_rl.evaluation.protocols import INVERSIONS, POOLED, PROMPTS, TIES

Column = tuple[str, str]
"""A set's title and a protocol's name."""


class Published(NamedTuple):
    """One line of somebody's table."""

    reward: str
    source: str
    accuracy: Mapping[Column, float]
    """In percent."""


IMAGE_REWARD, HPD_V2, HPD_V3 = "ImageRewardDB", "HPD v2", "HPD v3"
PICK_A_PIC, PICK_A_PIC_V2 = "Pick-a-Pic", "Pick-a-Pic v2"

_TABLES: dict[str, tuple[tuple[Column, ...], dict[str, tuple[float, ...]]]] = {
    "ImageReward repository": (
        ((IMAGE_REWARD, POOLED),),
        {"CLIP ViT-L": (54.82,), "Aesthetic": (57.35,), "BLIP": (57.76,), "ImageReward": (65.14,)},
    ),
    "HPS v2 README": (
        ((IMAGE_REWARD, PROMPTS), (HPD_V2, INVERSIONS)),
        {
            "Aesthetic": (57.4, 76.8),
            "ImageReward": (65.1, 74.0),
            "HPS": (61.2, 77.6),
            "PickScore": (62.9, 79.8),
            "one human": (65.3, 78.1),
            "HPS v2": (65.7, 83.3),
            "HPS v2.1": (66.8, 84.1),
        },
    ),
    "HPS v2 paper": (
        ((IMAGE_REWARD, PROMPTS), (HPD_V2, INVERSIONS)),
        {"CLIP ViT-H": (57.1, 65.1), "one human, against averaged humans": (53.9, 85.0)},
    ),
    "HPS v3 README": (
        ((IMAGE_REWARD, PROMPTS), (PICK_A_PIC, TIES), (HPD_V2, INVERSIONS), (HPD_V3, POOLED)),
        {
            "CLIP ViT-H": (57.1, 60.8, 65.1, 48.6),
            "Aesthetic": (57.4, 56.8, 76.8, 59.9),
            "ImageReward": (65.1, 61.1, 74.0, 58.6),
            "PickScore": (61.6, 70.5, 79.8, 65.6),
            "HPS": (61.2, 66.7, 77.6, 63.8),
            "HPS v2": (65.7, 63.8, 83.3, 65.3),
            "MPS": (67.5, 63.1, 83.5, 64.3),
            "HPS v3": (66.8, 72.8, 85.4, 76.9),
        },
    ),
    "MPS README": (
        ((IMAGE_REWARD, PROMPTS), (HPD_V2, INVERSIONS)),
        {
            "CLIP": (54.3, 71.2),
            "Aesthetic": (57.4, 72.6),
            "ImageReward": (65.1, 70.6),
            "HPS": (61.2, 73.1),
            "PickScore": (62.9, 79.8),
            "HPS v2": (65.7, 83.3),
            "MPS": (67.5, 83.5),
        },
    ),
    "Pick-a-Pic leaderboard": (
        ((PICK_A_PIC, TIES),),
        {"PickScore": (70.2,), "one human, an expert": (68.0,)},
    ),
    "imscore bench": (
        ((HPD_V2, POOLED), (IMAGE_REWARD, POOLED), (PICK_A_PIC_V2, POOLED)),
        {
            "PickScore": (79.2, 66.7, 80.2),
            "HPS v2.1": (83.3, 67.5, 69.3),
            "MPS": (83.9, 67.8, 65.1),
            "ImageReward": (74.0, 65.8, 60.8),
            "Aesthetic": (73.6, 56.7, 55.2),
            "CLIP ViT-L": (62.6, 57.2, 60.6),
        },
    ),
}


def published(*titles: str) -> list[Published]:
    """The lines that have a number for one of these sets, with those numbers only."""
    found = []
    for source, (columns, lines) in _TABLES.items():
        for reward, values in lines.items():
            own = {column: value for column, value in zip(columns, values, strict=True) if column[0] in titles}
            if own:
                found.append(Published(reward, source, own))
    return found
