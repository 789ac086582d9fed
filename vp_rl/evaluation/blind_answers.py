"""What people answered on a blind page, with its key: wins, ties and losses of the tuned model, and who agrees.

Shares are of all answers, with Wilson's intervals for prompts as the sampling units (`visionprefer.estimates`): a
bootstrap of prompts would leave no doubt at all where a few prompts are answered alike. The people are taken as they
are: intervals say what other prompts would have done, not other people.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import krippendorff
import numpy as np

from vp_rl.evaluation.blind import Key
from vp_rl.visionprefer import agreement, estimates
from vp_rl.visionprefer.agreement import Accord
from vp_rl.visionprefer.estimates import Estimate
from vp_rl.visionprefer.votes import CHOICES, Vote, voter_is_named

_DAY = 86400.0
_FIELDS = {"left", "right", "aspect", "choice", "seconds"}


class Outcome(NamedTuple):
    """Of one aspect, or of one person's answers in it."""

    win: Estimate
    """Share of the answers that prefer the tuned model's image."""
    tie: Estimate
    loss: Estimate
    net: Estimate
    """Win less loss, in [-1, 1]."""


class Voter(NamedTuple):
    """What one person did."""

    answered: int
    left: Estimate
    """Share of the answers for the left one, of those that are no ties. Far from a half the person went by the side,
    since sides are fair."""
    seconds: float
    """Of an answer, the median."""
    outcomes: dict[str, Outcome]
    """By aspect."""


class Results(NamedTuple):
    """Of a study."""

    study: str
    pairs: int
    prompts: int
    asked: int
    """Of each person: every pair in every aspect."""
    outcomes: dict[str, Outcome]
    """By aspect."""
    voters: dict[str, Voter]
    people: dict[str, Accord]
    """How often two people give the same answer, by aspect; empty where nobody shares a question."""
    alpha: dict[str, float]
    """Krippendorff's, by aspect: 1 is perfect, 0 what chance would give; of people who answered the same questions."""
    judge: dict[str, Accord]
    """How often people prefer what the held-out judge rates higher, by aspect."""
    rival: str
    """What the tuned model is compared with."""


def read_answers(files: Iterable[Path], key: Key) -> list[Vote]:
    """What the files say, as votes on images by their names in the page.

    Raises:
        ValueError: one is damaged, is of another page, or answers twice or what was not asked; or two are one person's.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in key.pairs))}
    asked = {frozenset((pair.base, pair.tuned)): prompts[pair.prompt] for pair in key.pairs}
    votes: list[Vote] = []
    owners: dict[str, Path] = {}
    for file in files:
        own = _read(file, key, asked)
        voter = own[0].voter
        if voter in owners:
            raise ValueError(
                f"'{owners[voter]}' and '{file}' are both by {voter!r}: give the later one alone; "
                'or, of two people, change "voter" in one of them.'
            )
        owners[voter] = file
        votes += own
    if not votes:
        raise ValueError("There are no answers: name the files that people saved from the page.")
    return votes


def results(votes: Sequence[Vote], key: Key) -> Results:
    """Everything that the answers say."""
    tuned, voters = {pair.tuned for pair in key.pairs}, list(dict.fromkeys(vote.voter for vote in votes))
    given: dict[str, dict[str, list[Vote]]] = {voter: defaultdict(list) for voter in voters}
    for vote in votes:
        given[vote.voter][vote.aspect].append(vote)
    aspects = [aspect for aspect in key.aspects if any(own[aspect] for own in given.values())]
    ratings = {name: tuple(rated) for pair in key.pairs for name, rated in pair.judged.items()}
    people, judge = agreement.among_people(votes), agreement.with_people(votes, ratings)
    return Results(
        study=key.study,
        pairs=len(key.pairs),
        prompts=len({pair.prompt for pair in key.pairs}),
        asked=len(key.pairs) * len(key.aspects),
        outcomes={a: _outcome([vote for own in given.values() for vote in own[a]], tuned) for a in aspects},
        voters={voter: _voter([vote for each in own.values() for vote in each], tuned) for voter, own in given.items()},
        people={aspect: people[aspect] for aspect in aspects if aspect in people},
        alpha={a: _alpha([own[a] for own in given.values()], tuned) for a in aspects if a in people},
        judge={aspect: judge[aspect] for aspect in aspects if aspect in judge},
        rival=key.rival,
    )


def _read(file: Path, key: Key, asked: dict[frozenset[str], int]) -> list[Vote]:
    """One person's."""
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged ({error}): save the answers again from the page.") from error
    if not isinstance(said, dict) or not {"study", "voter", "answers"} <= said.keys():
        raise ValueError(f"'{file}' holds no answers of a blind page: name the files that people saved from it.")
    if said["study"] != key.study:
        raise ValueError(f"'{file}' answers another page ({said['study']!r}) than this key's ({key.study!r}).")
    voter, answers = said["voter"], said["answers"]
    if not isinstance(voter, str) or not voter_is_named(voter):
        raise ValueError(f"'{file}': {str(voter)[:80]!r} is no name of a person.")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"'{file}' has no answer in it: leave it out.")
    votes: dict[tuple, Vote] = {}
    for number, answer in enumerate(answers, start=1):
        vote = _vote(f"'{file}', answer {number}", answer, voter, key, asked)
        if vote.question in votes:
            raise ValueError(f"'{file}', answer {number}: this pair is answered twice in {vote.aspect}.")
        votes[vote.question] = vote
    return list(votes.values())


def _vote(where: str, answer: Any, voter: str, key: Key, asked: dict[frozenset[str], int]) -> Vote:
    if not isinstance(answer, dict) or answer.keys() != _FIELDS:
        raise ValueError(f"{where} is damaged: it has other fields than {', '.join(sorted(_FIELDS))}.")
    left, right, aspect, choice, seconds = (answer[name] for name in ("left", "right", "aspect", "choice", "seconds"))
    if not isinstance(left, str) or not isinstance(right, str) or frozenset((left, right)) not in asked:
        raise ValueError(f"{where} is of no pair of this page: {left!r} and {right!r}.")
    if aspect not in key.aspects:
        raise ValueError(f"{where}: {aspect!r} was not asked; the page asks {', '.join(key.aspects)}.")
    if choice not in CHOICES:
        raise ValueError(f"{where}: {choice!r} is no answer; answers are {', '.join(CHOICES)}.")
    if not isinstance(seconds, int | float) or not 0 <= seconds <= _DAY:
        raise ValueError(f"{where}: an answer takes from no seconds to a day, not {seconds!r}.")
    return Vote(voter, asked[frozenset((left, right))], left, right, aspect, choice, float(seconds))


def _sign(vote: Vote, tuned: set[str]) -> int:
    """1 for the tuned model's image, -1 for the base's, 0 for a tie."""
    return 0 if vote.choice == "tie" else 1 if (vote.left in tuned) == (vote.choice == "left") else -1


def _outcome(votes: Sequence[Vote], tuned: set[str]) -> Outcome:
    prompts = np.unique([vote.prompt_id for vote in votes], return_inverse=True)[1]
    signs = np.array([_sign(vote, tuned) for vote in votes])
    number = np.bincount(prompts)
    counts = {sign: np.bincount(prompts, signs == sign) for sign in (1, 0, -1)}
    win, tie, loss = (estimates.share(estimates.sums(each, number)) for each in counts.values())
    net = estimates.bounded(estimates.sums(counts[1] - counts[-1], number), -1.0, 1.0)
    return Outcome(win, tie, loss, net)


def _voter(votes: Sequence[Vote], tuned: set[str]) -> Voter:
    aspects = dict.fromkeys(vote.aspect for vote in votes)
    decided = [vote for vote in votes if vote.choice != "tie"]
    prompts = np.array([vote.prompt_id for vote in decided], int)
    left = np.bincount(prompts, np.array([vote.choice == "left" for vote in decided], float))
    return Voter(
        answered=len(votes),
        left=estimates.share(estimates.sums(left, np.bincount(prompts))),
        seconds=median(vote.seconds for vote in votes),
        outcomes={aspect: _outcome([vote for vote in votes if vote.aspect == aspect], tuned) for aspect in aspects},
    )


def _alpha(given: Sequence[Sequence[Vote]], tuned: set[str]) -> float:
    """Of wins, ties and losses in this order; not a number where all answers are the same."""
    column = {question: at for at, question in enumerate({vote.question for own in given for vote in own})}
    table = np.full((len(given), len(column)), np.nan)
    for row, own in enumerate(given):
        for vote in own:
            table[row, column[vote.question]] = _sign(vote, tuned)
    shared = table[:, (~np.isnan(table)).sum(0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="ordinal"))
