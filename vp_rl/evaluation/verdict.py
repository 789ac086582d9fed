"""A run's outcome in three sentences: did it improve, what got worse, was the reward over-optimised."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vp_rl.evaluation.compare import BASE, Change, Rival
from vp_rl.evaluation.duel import Duel
from vp_rl.evaluation.signs import Sign
from vp_rl.types import ASPECTS

LABELS = {
    "reward": "Reward (trained for)",
    "prompt_following": "Prompt following",
    "aesthetic": "Aesthetic",
    "fidelity": "Fidelity",
    "harmlessness": "Harmlessness",
    "mean_rating": "Mean of the four",
    "correct": "Fully correct images",
    "look/colour": "Colourfulness",
    "look/diversity": "Diversity within a prompt",
    "look/repetition": "Repetition within an image",
    "look/spread": "Spread over prompts",
    "look/distance": "Distance between the two images",
}
PANEL, LOOK = "panel/", "look/"  # other rewards; what images look like, which is neither good nor bad
_RATED = (*ASPECTS, "mean_rating")


class Verdict(NamedTuple):
    """A question that every reader has, and its answer."""

    question: str
    answer: str
    sentence: str
    mood: Literal["up", "down", "even"]


def label(name: str) -> str:
    """What readers call a metric; other rewards have their names from the settings."""
    if name.startswith(PANEL):
        return name.removeprefix(PANEL)
    return LABELS.get(name, name.removeprefix(LOOK).replace("_", " ").capitalize())


def number(value: float, change: Change, name: str, signed: bool = False) -> str:
    """With as many digits as its interval makes sense of."""
    if name == "correct":
        value, digits, unit = 100 * value, 0, "" if signed else "%"
    else:
        width = max(abs(change.low), abs(change.high), abs(change.difference))
        order = int(f"{width:e}".split("e")[1])
        digits, unit = 2 if name in _RATED or not width else min(max(2, 1 - order), 4), ""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")) + unit


def interval(change: Change, name: str) -> str:
    """95%, in brackets."""
    return f"[{number(change.low, change, name, signed=True)}, {number(change.high, change, name, signed=True)}]"


def direction(change: Change) -> Literal["up", "down", "even"]:
    """Where the whole interval lies."""
    return "even" if not change.significant else "up" if change.low > 0 else "down"


def verdicts(
    changes: Mapping[str, Change],
    prompts: int,
    signs: Sequence[Sign] = (),
    categories: Mapping[str, Mapping[str, Change]] | None = None,
    pair: Duel | None = None,
    rival: Rival = BASE,
) -> list[Verdict]:
    """One sentence to each question, in words that the intervals allow; another where the judge saw whole pairs."""
    return [
        _improved(changes["mean_rating"], changes["correct"], prompts, pair, rival),
        _worse(changes, categories or {}, rival),
        _over_optimised(changes["reward"], changes["mean_rating"], signs, rival),
    ]


def _improved(rating: Change, correct: Change, prompts: int, pair: Duel | None, rival: Rival) -> Verdict:
    mood = direction(rating)
    was, now = (number(value, correct, "correct") for value in (correct.base, correct.tuned))
    moved = _moved(correct, "correct")
    if rival is BASE:
        question, no = "Did it improve?", "No, it got worse"
        share = f"fully correct images went from {was} to {now} ({moved})"
    else:
        question, no = "Is it better?", "No, it is worse"
        share = f"{now} of its images are fully correct, of {rival.name}'s {was} ({moved})"
    plural = "prompts" if prompts != 1 else "prompt"
    sentence = (
        f"By the held-out judge, which was not trained against, the mean rating of four aspects on a scale from 1 to 5 "
        f"{_went(rating, 'mean_rating', rival)} on {prompts} unseen {plural}, and {share}."
    )
    if pair is not None:
        sentence += f" Shown both images at once, it prefers the trained model's in {pair.win:.0%} of the pairs, "
        sentence += f"{rival.name}'s in {pair.loss:.0%}."
    return Verdict(question, {"up": "Yes", "down": no, "even": "Not clearly"}[mood], sentence, mood)


def _worse(changes: Mapping[str, Change], categories: Mapping[str, Mapping[str, Change]], rival: Rival) -> Verdict:
    question = "Did anything get worse?" if rival is BASE else "Is anything worse?"
    judged = [name for name in changes if not name.startswith(LOOK)]
    fell = [
        f"{_named(name)} {_went(changes[name], name, rival)}" for name in judged if direction(changes[name]) == "down"
    ]
    fell += [
        f"the judge's mean rating in “{name}” {_went(own['mean_rating'], 'mean_rating', rival)}"
        for name, own in categories.items()
        if "mean_rating" in own and direction(own["mean_rating"]) == "down"
    ]
    rating, lower = changes["mean_rating"], "clearly fell" if rival is BASE else "is clearly lower"
    images = f"{rating.loss:.0%} of the images are rated lower than {rival.name}'s, {rating.win:.0%} higher"
    if fell:
        words = "; ".join([*fell, images])
        return Verdict(question, "Yes", f"{words[0].upper()}{words[1:]}.", "down")
    still = f"No measure {lower}; still, " if rating.loss else f"No measure {lower}: "
    return Verdict(question, "Not clearly", f"{still}{images}.", "even")


def _over_optimised(reward: Change, rating: Change, signs: Sequence[Sign], rival: Rival) -> Verdict:
    question, rose = "Over-optimised?", direction(reward)
    warnings = [sign for sign in signs if sign.severity == "warning"]
    if warnings:
        more = f" ({len(warnings) - 1} more below.)" if len(warnings) > 1 else ""
        return Verdict(question, "There are signs of it", f"{warnings[0].words.rstrip('.')}.{more}", "down")
    trained = f"The reward it was trained for {_went(reward, 'reward', rival)}"
    if rose == "up" and direction(rating) != "up":
        fate = f"the judge's rating {_went(rating, 'mean_rating', rival)}"
        look = "look for reward hacking in the images below before you use this adapter"
        return Verdict(question, "Possibly", f"{trained}, and {fate}: {look}.", "down")
    if rose == "up":
        return Verdict(question, "No sign of it", f"{trained}, and the judge's rating with it.", "up")
    hint = ": nothing has been optimised yet, so nothing over-optimised. Longer training may help"
    return Verdict(question, "No sign of it", f"{trained}{hint if rose == 'even' and rival is BASE else ''}.", "even")


def _named(name: str) -> str:
    """A metric within a sentence."""
    others = {"reward": "the reward it was trained for", "mean_rating": "the judge's mean rating"}
    return f"the reward {label(name)}" if name.startswith(PANEL) else others.get(name, label(name).lower())


def _went(change: Change, name: str, rival: Rival) -> str:
    """`rose by 0.50 [+0.21, +0.79]`."""
    if not change.significant:
        return f"{rival.same} ({_moved(change, name)})"
    by = number(abs(change.difference), change, name).rstrip("%")
    unit = " points" if name == "correct" else ""
    return f"{rival.rose if change.low > 0 else rival.fell} {by}{unit} {interval(change, name)}"


def _moved(change: Change, name: str) -> str:
    unit = " points" if name == "correct" else ""
    return f"{number(change.difference, change, name, signed=True)}{unit} {interval(change, name)}"
