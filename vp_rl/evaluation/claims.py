"""What a page may call clear: all of its comparisons are counted together, and its text, colours and signs go by that.

A page looks at many numbers, and of twenty that do not change one looks as if it did. So where nothing has changed at
all, at most `ALPHA` of pages may say of anything that it did: `SIGNS` of it is for signs while training, which come
from other images, `TRADES` is left for aspects that were bought with others (`trades`), and the rest is for all
comparisons of the finished images (Holm's procedure, `estimates.holm`).
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from vp_rl.evaluation.compare import LEVELS, Change
from vp_rl.evaluation.duel import Duel
from vp_rl.visionprefer import estimates

ALPHA, SIGNS, TRADES = 0.05, 0.01, 0.025
FIRST = "mean_rating"
"""What a page is about: half of its share of chance is for this."""
BEST = "each at its best guidance"
"""Where each model is compared at the guidance scale that is best for it: what a page is about, if there is one."""
UNTESTED = ("look/distance",)
"""More than 0 by what it is, not by chance."""
_AT = "guidance: "  # no category is called so

Name = TypeVar("Name", bound=Hashable)
Either = TypeVar("Either", Change, Duel)


class Compared(NamedTuple):
    """All that a page compares, decided together."""

    changes: dict[str, Change]
    categories: dict[str, dict[str, Change]]
    pairs: dict[str, Duel]
    guided: dict[str, dict[str, Change]] = {}
    """At other guidance scales, by where that is in words; each model at its best one is called `BEST`."""

    @property
    def first(self) -> dict[str, Change]:
        """What a page is about: each model at its best guidance where that is known, else as it was evaluated."""
        return self.guided.get(BEST, self.changes)


def counted(
    changes: Mapping[str, Change],
    categories: Mapping[str, Mapping[str, Change]] | None = None,
    pairs: Mapping[str, Duel] | None = None,
    guided: Mapping[str, Mapping[str, Change]] | None = None,
) -> dict[tuple[str | None, str], float]:
    """The chance of every comparison that is counted, by category ("" is all prompts, None both at once) and metric.

    Categories are told apart by what the judge says alone. Guidance scales are named as categories are, behind `_AT`.
    """
    chances: dict[tuple[str | None, str], float] = {
        ("", name): each.chance for name, each in changes.items() if name not in UNTESTED
    }
    for part, own in (categories or {}).items():
        chances |= {(part, name): each.chance for name, each in own.items() if name in LEVELS}
    for where, own in (guided or {}).items():
        chances |= {(_AT + where, name): each.chance for name, each in own.items()}
    return chances | {(None, name): each.chance for name, each in (pairs or {}).items()}


def decide(
    changes: Mapping[str, Change],
    categories: Mapping[str, Mapping[str, Change]] | None = None,
    pairs: Mapping[str, Duel] | None = None,
    guided: Mapping[str, Mapping[str, Change]] | None = None,
) -> Compared:
    """Says of each comparison whether it is clear.

    Args:
        changes: of all prompts, by metric.
        categories: of each category's.
        pairs: by aspect.
        guided: at other guidance scales; see `Compared`.
    """
    first = (_AT + BEST, FIRST) if BEST in (guided or {}) else ("", FIRST)
    held = held_by(counted(changes, categories, pairs, guided), first, ALPHA - SIGNS - TRADES)

    def marked(part: str | None, own: Mapping[str, Either]) -> dict[str, Either]:
        return {name: mark(each, held.get((part, name), False)) for name, each in own.items()}

    parts = {part: marked(part, own) for part, own in (categories or {}).items()}
    scales = {where: marked(_AT + where, own) for where, own in (guided or {}).items()}
    return Compared(marked("", changes), parts, marked(None, pairs or {}), scales)


def held_by(chances: Mapping[Name, float], first: Name | None = None, alpha: float = ALPHA) -> dict[Name, bool]:
    """Which of these hold when all are counted."""
    return {name: each <= alpha for name, each in estimates.holm(chances, first).items()}


def mark(each: Either, held: bool) -> Either:
    """Clear is what holds, and whose own interval agrees."""
    return replace(each, clear=held and (each.low > 0 or each.high < 0))
