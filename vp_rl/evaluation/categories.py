"""Where a policy got better and where worse: the comparison by category of prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vp_rl.evaluation.compare import Change, compare_metrics
from vp_rl.evaluation.images import Evaluation


def by_category(base: Evaluation, tuned: Evaluation, categories: Mapping[str, str]) -> dict[str, dict[str, Change]]:
    """The comparison of each category's prompts alone, by its name; nothing where no prompt has a category.

    Small categories have wide intervals, and of many categories some differ by chance: what is sure of all prompts
    together is not sure of each.

    Args:
        base, tuned: the same prompts and seeds before and after.
        categories: of the prompts; those without one are in none.
    """
    names = np.array([categories.get(prompt, "") for prompt in base.prompts])
    chosen = {str(name): np.flatnonzero(names == name) for name in dict.fromkeys(names) if name}
    return {name: compare_metrics(base.rows(rows), tuned.rows(rows)) for name, rows in sorted(chosen.items())}


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
