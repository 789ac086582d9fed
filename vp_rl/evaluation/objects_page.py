"""What `evaluate.py objects` leaves: a table, the failures with what is wrong in words, and every single verdict."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vp_rl.evaluation.categories import in_turn
from vp_rl.evaluation.geneval import Found
from vp_rl.evaluation.objects import OVERALL, Checked, Score
from vp_rl.evaluation.report import PAGES, Row, embed, row
from vp_rl.evaluation.settings import without_secrets
from vp_rl.secrets import mask
from vp_rl.visionprefer.estimates import without_nan
from vp_rl.visionprefer.markdown import Markdown, escape, table

_CARDS = 12  # images of each kind in the page
_SMALL = 128  # pixels: less is drawn larger, without smoothing
_HEAD = ("task", "base", "adapter", "change", "95% interval", "prompts")
TASK_NAMES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colours of two objects",
    OVERALL: "overall: the mean of the tasks",
}


def write(
    folder: Path, base: Checked, tuned: Checked, scores: Mapping[str, Score], *, about: Sequence[str], command: str = ""
) -> Path:
    """Writes `objects.html`, its table as `.md`, the scores as `.json`, images as `.jsonl`; returns the page's path.

    Args:
        folder: is made where it is missing.
        base, tuned: the same prompts and seeds before and after.
        scores: their comparison.
        about: what readers must know of the numbers, a sentence each.
        command: that made them, fit to be passed on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(scores)
    numbers = {name: asdict(score.change) | {"prompts": score.prompts} for name, score in scores.items()}
    told = {"scores": numbers, "images": len(tuned.prompts), "about": list(about)}
    summary = json.dumps(without_nan(told), indent=2, allow_nan=False)
    (folder / "objects.json").write_text(mask(summary) + "\n", encoding="utf-8")
    (folder / "objects.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _lines(base, tuned)), "utf-8")
    parts = ["# Objects that were asked for", *map(escape, about), as_markdown(scores)]
    (folder / "objects.md").write_text(mask("\n\n".join(parts)) + "\n", encoding="utf-8")
    page = PAGES.get_template("objects.html").render(
        title=folder.resolve().parent.name,
        prompts=len(set(base.prompts)),
        images=len(base.prompts),
        about=about,
        rows=rows,
        counts={name: score.prompts for name, score in scores.items()},
        galleries=_galleries(base, tuned),
        command=without_secrets(command),
    )
    (folder / "objects.html").write_text(mask(page), encoding="utf-8")
    return folder / "objects.html"


def as_markdown(scores: Mapping[str, Score]) -> Markdown:
    """The table, for a terminal too."""
    rows = _rows(scores)
    return table(
        _HEAD,
        [
            [each.label, each.base, each.tuned, Markdown(each.change), Markdown(each.interval), scores[name].prompts]
            for name, each in rows.items()
        ],
    )


def _rows(scores: Mapping[str, Score]) -> dict[str, Row]:
    """In bars of one scale."""
    peers = [score.change for score in scores.values()]
    return {name: row("correct", score.change, peers, TASK_NAMES[name]) for name, score in scores.items()}


def _lines(base: Checked, tuned: Checked) -> Iterator[dict[str, Any]]:
    """Every verdict, as GenEval's own results file has them."""
    for side, checked in (("base", base), ("adapter", tuned)):
        for place, verdict in enumerate(checked.verdicts):
            yield {
                "model": side,
                "tag": checked.wanted[place].task,
                "prompt": checked.prompts[place],
                "seed": checked.seeds[place],
                "correct": verdict.correct,
                "reason": verdict.reason,
                "found": [each._asdict() for each in checked.found[place]],
            }


def _galleries(base: Checked, tuned: Checked) -> dict[str, list[dict[str, Any]]]:
    """What went wrong first; tasks in turn, so that none fills a gallery alone."""
    tasks = [wanted.task for wanted in base.wanted]
    was, now = base.correct == 1, tuned.correct == 1
    kinds = {
        "Right before, wrong now": was & ~now,
        "Wrong before and now": ~was & ~now,
        "Wrong before, right now": ~was & now,
    }
    return {
        f"{title}: {int(chosen.sum())} of {len(chosen)} images": [
            _card(base, tuned, place) for place in in_turn(np.flatnonzero(chosen).tolist(), tasks)[:_CARDS]
        ]
        for title, chosen in kinds.items()
    }


def _card(base: Checked, tuned: Checked, place: int) -> dict[str, Any]:
    sides = [
        {
            "image": embed(Image.fromarray(side.images[place])),
            "correct": side.verdicts[place].correct,
            "reason": side.verdicts[place].reason,
            "seen": _seen(side.found[place]),
        }
        for side in (base, tuned)
    ]
    return {
        "prompt": base.prompts[place],
        "task": TASK_NAMES[base.wanted[place].task],
        "seed": base.seeds[place],
        "sides": dict(zip(("base", "adapter"), sides, strict=True)),
        "small": max(base.images.shape[1:3]) < _SMALL,
    }


def _seen(found: Sequence[Found]) -> str:
    """Such as `2 x red circle, 1 x square`."""
    counts = Counter(f"{each.color} {each.name}".strip() for each in found)
    return ", ".join(f"{number} x {name}" for name, number in counts.items()) or "nothing that was looked for"
