"""Where a policy got better and where worse: the comparison by category of prompts."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from vp_rl.evaluation.compare import Change, compare_metrics
from vp_rl.evaluation.images import Evaluation


def by_category(
    base: Evaluation, tuned: Evaluation, categories: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Change]]:
    """The comparison of each category's prompts alone, by its name.

    Small categories have wide intervals: what is sure of all prompts together is not sure of each.

    Args:
        base, tuned: the same prompts and seeds before and after.
        categories: the prompts of each.
    """
    rows = {name: [row for row, prompt in enumerate(base.prompts) if prompt in own] for name, own in categories.items()}
    return {name: compare_metrics(base.rows(own), tuned.rows(own)) for name, own in rows.items() if own}


def in_turn(places: Sequence[int], groups: Sequence[str]) -> list[int]:
    """One of each group, then another of each, and so on; else in the order that they come in.

    Args:
        places: in `groups`.
        groups: which one each place is of.
    """
    before: Counter[str] = Counter()
    turns = {}
    for place in places:
        turns[place] = before[groups[place]]
        before[groups[place]] += 1
    return sorted(places, key=turns.__getitem__)
