"""Where one aspect was bought with another: the mean rating rises, and what was asked for is not drawn any more."""

from collections.abc import Mapping, Sequence

from vp_rl.evaluation.compare import Change
from vp_rl.evaluation.signs import Sign
from vp_rl.evaluation.verdict import interval, label, number
from vp_rl.types import ASPECTS


def trades(categories: Mapping[str, Mapping[str, Change]], prompts: Mapping[str, Sequence[str]]) -> list[Sign]:
    """A sign for each category whose mean rating rises while it loses something else.

    That is an aspect, or the share of fully correct images, which clearly falls (a warning), or that share becoming
    nothing (a note: of few prompts it may be chance). What rises and falls must be outside its own 95% interval;
    `claims.TRADES` leaves room for how often that is chance.

    Args:
        categories: the comparison within each; "" is that of all prompts.
        prompts: of each.
    """
    found = []
    for category, own in categories.items():
        rating, correct = own["mean_rating"], own["correct"]
        if not rating.low > 0:
            continue
        fell = [name for name in (*ASPECTS, "correct") if own[name].high < 0]
        gone = correct.base > 0 and correct.tuned == 0
        if fell or (gone and category):
            words = _words(category, own, fell, len(prompts.get(category, ())))
            found.append(Sign(words, None, "warning" if fell else "note", list(prompts.get(category, ()))))
    return found


def _words(category: str, own: Mapping[str, Change], fell: Sequence[str], prompts: int) -> str:
    rating, correct = own["mean_rating"], own["correct"]
    gained = max(ASPECTS, key=lambda name: own[name].difference)
    lost = [f"{label(name).lower()} fell by {_by(own[name], name)}" for name in fell]
    if correct.base > 0 and correct.tuned == 0:
        lost.append(f"no image is fully correct any more ({number(correct.base, correct, 'correct')} before)")
    worst = min(ASPECTS, key=lambda name: own[name].difference)
    if not fell and own[worst].difference < 0:
        moved = number(own[worst].difference, own[worst], worst, signed=True)
        lost.append(f"{label(worst).lower()} went {moved} {interval(own[worst], worst)}")
    where = f"In “{category}” ({prompts} prompts)" if category else "Over all prompts"
    return (
        f"{where} the judge's mean rating rose by {_by(rating, 'mean_rating')} although {' and '.join(lost)}: "
        f"{label(gained).lower()}, {number(own[gained].difference, own[gained], gained, signed=True)}, pays for it."
    )


def _by(change: Change, name: str) -> str:
    unit = " points" if name == "correct" else ""
    return f"{number(abs(change.difference), change, name).rstrip('%')}{unit} {interval(change, name)}"
