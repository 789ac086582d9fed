"""A run's outcome in three sentences: did it improve, what got worse, was the reward over-optimised."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from vp_rl.evaluation.claims import Compared
from vp_rl.evaluation.compare import BASE, TOO_FEW, Change, Rival
from vp_rl.evaluation.duel import OVERALL
from vp_rl.evaluation.guidance_curve import GuidanceCurve
from vp_rl.evaluation.no_adapter import BELOW, beats
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
PANEL, OWN = "panel/", "metric/"  # other rewards; metrics of the user's own
LOOK = "look/"  # what images look like, which is neither good nor bad
ALIKE = ("look/diversity", "look/spread")
"""What images look like, of which less is worse: one image whatever the prompt or the noise."""
_RATED = (*ASPECTS, "mean_rating")
_NAMED = 4  # of what got worse


Mood = Literal["up", "down", "even", "mixed"]


class Verdict(NamedTuple):
    """A question that every reader has, and its answer."""

    question: str
    answer: str
    sentence: str
    mood: Mood


class Chosen(NamedTuple):
    """Which epoch's adapter is the run's result, by prompts that the result is not measured on."""

    metric: str
    epoch: int
    epochs: int
    """That were trained."""
    value: float
    base: float
    """The base model's, on the same prompts."""

    @property
    def beats_base(self) -> bool:
        """Whether any epoch did."""
        return beats(self.value, self.base)

    @property
    def words(self) -> str:
        """Which one it is, and why."""
        if not self.beats_base:
            return (
                f"none, since on validation no epoch beats the base model by {label(self.metric).lower()} "
                f"({self.value:.2f} at best, in epoch {self.epoch} of {self.epochs}; base {self.base:.2f})"
            )
        return (
            f"epoch {self.epoch} of {self.epochs}, best on validation by {label(self.metric).lower()} "
            f"({self.value:.2f}; base {self.base:.2f})"
        )

    @property
    def warning(self) -> str:
        """What is to be known where no epoch beats the base."""
        return (
            f"On validation no epoch beats the base model by {label(self.metric).lower()} ({self.value:.2f} at best, "
            f"base {self.base:.2f}): this run leaves no adapter. The best trained one, of epoch {self.epoch}, is "
            f"what is compared here, and lies in {BELOW}/."
        )


def label(name: str) -> str:
    """What readers call a metric; other rewards, and the user's own metrics, have their names from the settings."""
    if name.startswith((PANEL, OWN)):
        return name.partition("/")[2]
    return LABELS.get(name, name.removeprefix(LOOK).replace("_", " ").capitalize())


def number(value: float, change: Change, name: str, signed: bool = False) -> str:
    """With as many digits as its interval makes sense of."""
    if name == "correct":
        value, digits, unit = 100 * value, 0, "" if signed else "%"
    else:
        width = max(abs(each) for each in (change.low, change.high, change.difference) if not math.isnan(each))
        order = int(f"{width:e}".split("e")[1])
        digits, unit = 2 if name in _RATED or not width else min(max(2, 1 - order), 4), ""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")) + unit


def interval(change: Change, name: str) -> str:
    """95%, in brackets."""
    if change.few:
        return TOO_FEW
    return f"[{number(change.low, change, name, signed=True)}, {number(change.high, change, name, signed=True)}]"


def verdicts(
    found: Compared,
    prompts: int,
    signs: Sequence[Sign] = (),
    rival: Rival = BASE,
    chosen: Chosen | None = None,
    curve: GuidanceCurve | None = None,
) -> list[Verdict]:
    """One sentence to each question, in words that what is clear allows; another where the judge saw whole pairs.

    Args:
        found: everything that the page compares: the sentences and the page's tables go by the same list.
        prompts: how many.
        signs: of an exploited reward.
        rival: what is compared with.
        chosen: how the adapter was, where it was.
        curve: over guidance scales, decided: whether it improved is then said of each model at its best one.
    """
    return [
        _improved(found, prompts, rival, chosen, curve),
        _worse(found, rival),
        _over_optimised(found.first.get("reward"), found.first["mean_rating"], signs, rival),
    ]


def _improved(
    found: Compared, prompts: int, rival: Rival, chosen: Chosen | None, curve: GuidanceCurve | None
) -> Verdict:
    rating, correct, pair = found.first["mean_rating"], found.first["correct"], found.pairs.get(OVERALL)
    was, now = (number(value, correct, "correct") for value in (correct.base, correct.tuned))
    moved = _moved(correct, "correct")
    if rival is BASE:
        question, no = "Did it improve?", "No, it got worse"
        share = f"fully correct images went from {was} to {now} ({moved})"
    else:
        question, no = "Is it better?", "No, it is worse"
        share = f"{now} of its images are fully correct, of {rival.name}'s {was} ({moved})"
    plural = "prompts" if prompts != 1 else "prompt"
    where = "" if curve is None else f"with each model at its best guidance ({_scales(curve)}) "
    sentence = (
        f"By the held-out judge, which was not trained against, {where}the mean rating of four aspects on a scale from "
        f"1 to 5 {_went(rating, 'mean_rating', rival)} on {prompts} unseen {plural}, and {share}."
    )
    if curve is not None:
        sentence += f" {_at_same(curve, rival)}"
    if pair is not None:
        sentence += f" Shown both images at once, it prefers the trained model's in {pair.win:.0%} of the pairs, "
        sentence += f"{rival.name}'s in {pair.loss:.0%}."
    if chosen is not None and not chosen.beats_base:
        sentence += f" {chosen.warning}"
    even = "Too few prompts to say" if rating.few else "Not clearly"
    return Verdict(question, {"up": "Yes", "down": no, "even": even}[rating.direction], sentence, rating.direction)


def _scales(curve: GuidanceCurve) -> str:
    base, tuned = curve.chosen["base"], curve.chosen["tuned"]
    if base == tuned:
        return f"{base:g} for both, chosen on {curve.split} prompts"
    return f"base {base:g}, trained {tuned:g}, chosen on {curve.split} prompts"


def _at_same(curve: GuidanceCurve, rival: Rival) -> str:
    """Where the adapter is worse than the base at the same scale."""
    worse = curve.worse_at()
    scales = _listed([f"{scale:g}" for scale in worse or curve.scales])
    if worse:
        return f"At the same guidance as {rival.name} it is clearly worse at {scales}."
    return f"At the same guidance as {rival.name} it is clearly worse at none of {scales}."


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _worse(found: Compared, rival: Rival) -> Verdict:
    """All that is clearly worse, wherever on the page it stands; and images that became alike, which no judge rates."""
    question = "Did anything get worse?" if rival is BASE else "Is anything worse?"
    fell = [
        f"{_named(name)} {_went(each, name, rival)}"
        for name, each in found.changes.items()
        if each.direction == "down" and not name.startswith(LOOK)
    ]
    fell += [
        f"{_named(name)} in “{part}” {_went(each, name, rival)}"
        for part, own in found.categories.items()
        for name, each in own.items()
        if each.direction == "down"
    ]
    fell += [
        f"{_named(name)} {where} {_went(each, name, rival)}"
        for where, own in found.guided.items()
        for name, each in own.items()
        if each.direction == "down"
    ]
    fell += [
        f"of pairs, it prefers {rival.name}'s images{'' if name == OVERALL else f' in {label(name).lower()}'}"
        for name, each in found.pairs.items()
        if each.clear and each.difference < 0
    ]
    alike = [
        f"{label(name).lower()} {_went(each, name, rival)}"
        for name, each in found.changes.items()
        if name in ALIKE and each.direction == "down"
    ]
    rating, lower = found.first["mean_rating"], "clearly fell" if rival is BASE else "is clearly lower"
    images = f"{rating.loss:.0%} of the images are rated lower than {rival.name}'s, {rating.win:.0%} higher"
    more = [f"and {len(fell) - _NAMED} more below"] if len(fell) > _NAMED else []
    if fell:
        return Verdict(question, "Yes", _sentence("; ".join([*fell[:_NAMED], *more, *alike, images])), "down")
    no = f"No rating or reward {lower}, over all prompts or in a category"
    if alike:
        become = "Images became more alike" if rival is BASE else "Its images are more alike"
        return Verdict(question, become, f"{_sentence(' and '.join(alike))} {no}; {images}.", "mixed")
    if rating.few:
        no = "Of so few prompts nothing can be said"
    return Verdict(question, "Not clearly", f"{no}{'; still, ' if rating.loss else ': '}{images}.", "even")


def _over_optimised(reward: Change | None, rating: Change, signs: Sequence[Sign], rival: Rival) -> Verdict:
    question = "Over-optimised?"
    warnings = [sign for sign in signs if sign.severity == "warning"]
    if warnings:
        more = f" ({len(signs) - 1} more below.)" if len(signs) > 1 else ""
        return Verdict(question, "There are signs of it", f"{warnings[0].words.rstrip('.')}.{more}", "down")
    if reward is None:
        said = "It was trained on given images, without a reward that it could have found a way around."
        return _unwarned(question, said, "even", signs)
    rose = reward.direction
    trained = f"The reward it was trained for {_went(reward, 'reward', rival)}"
    if rose == "up" and rating.direction != "up":
        fate = f"the judge's rating {_went(rating, 'mean_rating', rival)}"
        look = "look for reward hacking in the images below before you use this adapter"
        return Verdict(question, "Possibly", f"{trained}, and {fate}: {look}.", "down")
    if rose == "up":
        said = f"{trained}, and the judge's rating with it."
    else:
        hint = ": nothing has been optimised yet, so nothing over-optimised. Longer training may help"
        said = f"{trained}{hint if rose == 'even' and rival is BASE else ''}."
    return _unwarned(question, said, "up" if rose == "up" else "even", signs)


def _unwarned(question: str, said: str, mood: Mood, notes: Sequence[Sign]) -> Verdict:
    if notes:
        number = f"{len(notes)} note{'s' if len(notes) > 1 else ''}"
        return Verdict(question, f"No warning; {number} below", f"{said} {notes[0].words}", "mixed")
    return Verdict(question, "No sign of it", said, mood)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _named(name: str) -> str:
    """A metric within a sentence."""
    others = {"reward": "the reward it was trained for", "mean_rating": "the judge's mean rating"}
    return f"the reward {label(name)}" if name.startswith(PANEL) else others.get(name, label(name).lower())


def _went(change: Change, name: str, rival: Rival) -> str:
    """`rose by 0.50 [+0.21, +0.79]`."""
    if not change.clear:
        return f"{rival.same} ({_moved(change, name)})"
    by = number(abs(change.difference), change, name).rstrip("%")
    unit = " points" if name == "correct" else ""
    return f"{rival.rose if change.difference > 0 else rival.fell} {by}{unit} {interval(change, name)}"


def _moved(change: Change, name: str) -> str:
    unit = " points" if name == "correct" else ""
    between = f", {TOO_FEW}" if change.few else f" {interval(change, name)}"
    return f"{number(change.difference, change, name, signed=True)}{unit}{between}"
