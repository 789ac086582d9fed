"""What a blind comparison leaves: `results.html`, with bars of win, tie and loss, and numbers in `results.json`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vp_rl.evaluation.blind_answers import Outcome, Results, Voter
from vp_rl.evaluation.report import PAGES
from vp_rl.secrets import mask
from vp_rl.visionprefer.agreement import Accord
from vp_rl.visionprefer.estimates import Estimate
from vp_rl.visionprefer.markdown import Markdown, table
from vp_rl.visionprefer.votes import OVERALL


class Bar(NamedTuple):
    """A line of the picture, formatted."""

    label: str
    widths: list[float]
    """Percent of win, tie and loss."""
    cells: list[tuple[str, str]]
    """Win, tie, loss and win less loss, each with its interval."""
    direction: str
    """`up` or `down` where the interval of win less loss excludes 0, else `even`."""
    answers: int


def write(results: Results, folder: Path, command: str) -> Path:
    """Writes both, and returns the page's path.

    Args:
        results: of the answers.
        folder: of the key.
        command: what made them, fit to be passed on.
    """
    numbers = json.dumps(_plain(results), indent=1, allow_nan=False)
    (folder / "results.json").write_text(mask(numbers) + "\n", encoding="utf-8")
    answers = sum(voter.answered for voter in results.voters.values())
    mood, headline, sentence = _verdict(results)
    page = PAGES.get_template("blind_results.html").render(
        results=results,
        answers=answers,
        mood=mood,
        headline=headline,
        sentence=sentence,
        bars=[_bar(_words(aspect), outcome) for aspect, outcome in results.outcomes.items()],
        voters={
            name: [_bar(_words(aspect), outcome) for aspect, outcome in voter.outcomes.items()]
            for name, voter in results.voters.items()
        },
        accords=_accords(results),
        share=_share,
        command=command,
    )
    (folder / "results.html").write_text(mask(page), encoding="utf-8")
    return folder / "results.html"


def console(results: Results) -> str:
    """A table for a terminal, and the verdict."""
    rows = [
        (bar.label, *(f"{value} {interval}" for value, interval in bar.cells), bar.answers)
        for bar in (_bar(_words(aspect), outcome) for aspect, outcome in results.outcomes.items())
    ]
    head = ["asked", "win", "tie", "loss", "win less loss", "answers"]
    return f"{table(head, [[*map(Markdown, map(str, row))] for row in rows])}\n\n{_verdict(results)[2]}"


def _verdict(results: Results) -> tuple[str, str, str]:
    """In the first aspect that was asked."""
    aspect, outcome = next(iter(results.outcomes.items()))
    bar, people = _bar("", outcome), len(results.voters)
    headline = {
        "up": "People prefer the tuned model",
        "down": f"People prefer {results.rival}",
        "even": "People do not clearly prefer either",
    }[bar.direction]
    sentence = (
        f"{_words(aspect)}, {people} {'people' if people > 1 else 'person'} preferred the tuned model's image in "
        f"{bar.cells[0][0]} of {bar.answers} answers and {results.rival}'s in {bar.cells[2][0]}, and found them "
        f"equal in {bar.cells[1][0]}. Win less loss is {bar.cells[3][0]} {bar.cells[3][1]}."
    )
    return bar.direction, headline, sentence


def _bar(label: str, outcome: Outcome) -> Bar:
    shares = (outcome.win, outcome.tie, outcome.loss)
    net = outcome.net
    cells = [(_percent(each.value), _interval(each)) for each in shares]
    return Bar(
        label=label,
        widths=[100 * each.value for each in shares],
        cells=[*cells, (_signed(net.value), _interval(net, signed=True))],
        direction="up" if net.low > 0 else "down" if net.high < 0 else "even",
        answers=net.count,
    )


def _accords(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Who, in what, alike where both decide, alike with ties, alpha."""
    rows = []
    for who, accords in (("two people", results.people), ("a person and the judge", results.judge)):
        for aspect, accord in accords.items():
            alpha = results.alpha[aspect] if who == "two people" else math.nan
            said = "–" if math.isnan(alpha) else f"{alpha:.2f}".replace("-", "−")
            rows.append((who, _words(aspect), _share(accord.decided), _share(accord.with_ties), said))
    return rows


def _share(estimate: Estimate) -> str:
    return f"{_percent(estimate.value)} {_interval(estimate)}" if estimate.count else "–"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _signed(value: float) -> str:
    text = f"{100 * value:+.0f}"
    return ("0" if float(text) == 0 else text.replace("-", "−")) + " points"


def _interval(estimate: Estimate, signed: bool = False) -> str:
    ends = [f"{100 * end:{'+' if signed else ''}.0f}".replace("-", "−") for end in (estimate.low, estimate.high)]
    return f"[{', '.join('0' if end in ('+0', '−0') else end for end in ends)}]"


def _words(aspect: str) -> str:
    return "All in all" if aspect == OVERALL else aspect.replace("_", " ").capitalize()


def _plain(value: Any) -> Any:
    """For JSON; what is not a number is null."""
    if isinstance(value, Results | Voter | Outcome | Accord | Estimate):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
