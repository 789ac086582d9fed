"""What an evaluation of rewards leaves: `accuracy.md` and the page `accuracy.html`, published numbers included."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from vp_rl.evaluation.accuracy import Accuracy, Lead, lead
from vp_rl.evaluation.calibration import as_png, as_svg
from vp_rl.evaluation.compare import TOO_FEW
from vp_rl.evaluation.human_accuracy import Bin, Measured, Result
from vp_rl.evaluation.protocols import AVERAGED
from vp_rl.evaluation.published import Column, published
from vp_rl.evaluation.settings import without_secrets
from vp_rl.secrets import mask
from vp_rl.visionprefer.estimates import without_nan
from vp_rl.visionprefer.markdown import Markdown, escape, table

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("vp_rl.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
_NAMED = 20  # unreadable images

_Leads = Mapping[tuple[str, str], dict[str, Lead]]
"""Of each set and each reward but its first, by protocol."""


class Cell(NamedTuple):
    """A number of a table, formatted."""

    value: str = "–"
    interval: str = ""
    number: str = ""
    """What it is out of."""


class Line(NamedTuple):
    """A row of a table."""

    name: str
    cells: list[Cell]
    source: str = ""
    """Where it was published; empty for what was measured here."""


class Section(NamedTuple):
    """Everything about one set, formatted."""

    title: str
    about: str
    notes: list[str]
    protocols: list[str]
    lines: list[Line]
    """A reward a line, a protocol a column."""
    first: str
    """The reward that the others are compared with."""
    leads: list[Line]
    """What each of the others has over it, a protocol a column."""
    aspects: list[str]
    by_aspect: list[Line]
    generators: list[str]
    by_generator: list[Line]
    svg: str
    each: str
    """What a part of the calibration has."""


def write(results: Sequence[Result], folder: Path, command: str) -> Path:
    """Writes the report, `calibration-*.png`, `accuracy.json` with all numbers, and `by_prompt.csv`.

    The last has what every reward earned of what could be earned, by set, protocol and prompt.

    Args:
        results: of every reward on every set, one after the other.
        command: what made them, fit to be passed on.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    titles = list(dict.fromkeys(result.title for result in results))
    by_set = {title: [result for result in results if result.title == title] for title in titles}
    columns = [(title, m.outcome.protocol) for title, own in by_set.items() for m in own[0].measured]
    overview = [*_measured(results, columns), *_published(titles, columns)]
    ahead = {(r.title, r.reward): _more_than(r, own[0]) for own in by_set.values() for r in own[1:]}
    sections = [_section(title, own, ahead) for title, own in by_set.items()]
    pictures = {title: f"calibration-{number}.png" for number, title in enumerate(titles, start=1)}
    for title, own in by_set.items():
        as_png({result.reward: result.calibration for result in own}, folder / pictures[title])
    plain = without_nan([_plain(result, by_set[result.title][0].reward, ahead) for result in results])
    numbers = json.dumps(plain, indent=2, allow_nan=False)
    _write_by_prompt(results, folder / "by_prompt.csv")
    (folder / "accuracy.json").write_text(mask(numbers) + "\n", encoding="utf-8")
    (folder / "accuracy.md").write_text(mask(_markdown(columns, overview, sections, pictures)), "utf-8")
    page = _PAGES.get_template("accuracy.html").render(
        columns=columns, overview=overview, sections=sections, command=without_secrets(command)
    )
    (folder / "accuracy.html").write_text(mask(page), encoding="utf-8")
    return folder / "accuracy.html"


def console(results: Sequence[Result]) -> str:
    """A table for a terminal: a line for each reward, set and protocol."""
    rows = [
        (result.reward, result.title, m.outcome.protocol, _text(_of(m))) for result in results for m in result.measured
    ]
    return table(["reward", "set", "protocol", "%, 95% interval"], rows)


def _measured(results: Sequence[Result], columns: Sequence[Column]) -> list[Line]:
    lines = []
    for name in dict.fromkeys(result.reward for result in results):
        own = {(r.title, m.outcome.protocol): _of(m) for r in results if r.reward == name for m in r.measured}
        lines.append(Line(name, [own.get(column, Cell()) for column in columns]))
    return lines


def _published(titles: Sequence[str], columns: Sequence[Column]) -> list[Line]:
    lines = []
    for each in published(*titles):
        cells = [Cell(_digits(each.accuracy[column])) if column in each.accuracy else Cell() for column in columns]
        lines.append(Line(each.reward, cells, each.source))
    return lines


def _digits(value: float) -> str:
    """One digit, or as many as were published."""
    return max(f"{value:.1f}", f"{value:g}", key=len)


def _section(title: str, results: Sequence[Result], ahead: _Leads) -> Section:
    first = results[0]
    aspects = list(dict.fromkeys(name for result in results for name in result.aspects))
    generators = list(dict.fromkeys(name for result in results for name in result.generators))
    return Section(
        title=title,
        about=f"{first.prompts:,} prompts or pairs, {first.images:,} images",
        notes=_notes(results),
        protocols=[m.outcome.protocol for m in first.measured],
        lines=[Line(result.reward, list(map(_of, result.measured))) for result in results],
        first=first.reward,
        leads=[Line(each.reward, list(map(_lead, ahead[title, each.reward].values()))) for each in results[1:]],
        aspects=[name.replace("_", " ") for name in aspects],
        by_aspect=[Line(result.reward, [_cell(result.aspects[name]) for name in aspects]) for result in results],
        generators=generators,
        by_generator=_by_generator(results, generators),
        svg=as_svg({result.reward: result.calibration for result in results}),
        each=_parts(first.calibration),
    )


def _parts(bins: Sequence[Bin]) -> str:
    least, most = (f"{choose(each.agree.count for each in bins):,}" for choose in (min, max))
    return f"{least} pairs" if least == most else f"{least} to {most} pairs"


def _more_than(result: Result, first: Result) -> dict[str, Lead]:
    """What a reward has over another on the same set, by protocol."""
    others = {m.outcome.protocol: m.outcome for m in first.measured}
    return {m.outcome.protocol: lead(m.outcome, others[m.outcome.protocol]) for m in result.measured}


def _by_generator(results: Sequence[Result], generators: Sequence[str]) -> list[Line]:
    """Accuracy of each reward, and what share of its pairs a generator wins by people and by each reward."""
    if not generators:
        return []
    lines = [Line("wins by people", [_share(results[0].generators[name].people) for name in generators])]
    for result in results:
        own = [result.generators[name] for name in generators]
        lines.append(Line(f"wins by {result.reward}", [_share(each.reward) for each in own]))
        lines.append(Line(f"accuracy of {result.reward}", [_cell(each.accuracy) for each in own]))
    return lines


def _notes(results: Sequence[Result]) -> list[str]:
    """What must be known of a set's numbers."""
    notes = [results[0].about] if results[0].about else []
    notes += [f"{result.reward}: {m.outcome.note}." for result in results for m in result.measured if m.outcome.note]
    unreadable = {name: problem for result in results for name, problem in result.unreadable.items()}
    if unreadable:
        named = [f"{name} ({problem})" for name, problem in list(unreadable.items())[:_NAMED]]
        more = [f"and {len(unreadable) - _NAMED} more"] if len(unreadable) > _NAMED else []
        notes.append(
            f"Images that could not be read and are left out, {len(unreadable)} in all: {', '.join(named + more)}."
        )
    return notes


def _cell(accuracy: Accuracy, unit: str = "pairs") -> Cell:
    if not accuracy.pairs:
        return Cell()
    number = f"of {accuracy.pairs:,} {unit if accuracy.pairs > 1 else unit.removesuffix('s')}"
    return Cell(f"{100 * accuracy.share:.1f}", _interval(accuracy), number)


def _of(measured: Measured) -> Cell:
    return _cell(measured.accuracy, "prompts" if measured.outcome.protocol in AVERAGED else "pairs")


def _lead(found: Lead) -> Cell:
    low, high = 100 * found.low, 100 * found.high
    if math.isnan(found.value):
        return Cell()
    return Cell(f"{100 * found.value:+.1f}", TOO_FEW if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]")


def _share(value: float) -> Cell:
    return Cell(f"{100 * value:.1f}")


def _interval(accuracy: Accuracy) -> str:
    return f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _markdown(
    columns: Sequence[Column], overview: Sequence[Line], sections: Sequence[Section], pictures: Mapping[str, str]
) -> str:
    head = ["reward", *[f"{title}: {protocol}" for title, protocol in columns], "published in"]
    rows = [[line.name, *map(_text, line.cells), line.source or "measured here"] for line in overview]
    parts = ["# Accuracy of rewards on human judgements", _INTRODUCTION, table(head, rows)]
    for section in sections:
        parts += [f"## {escape(section.title)}", f"{section.about}."]
        parts += [Markdown(f"- {escape(note)}") for note in section.notes]
        if section.leads:
            parts.append(f"More than {escape(section.first)}, prompt by prompt, in points, each interval by itself:")
            parts.append(
                table(["", *section.protocols], [[each.name, *map(_text, each.cells)] for each in section.leads])
            )
        for names, lines in ((section.aspects, section.by_aspect), (section.generators, section.by_generator)):
            if names:
                parts.append(table(["", *names], [[line.name, *map(_text, line.cells)] for line in lines]))
        parts.append(f"![Calibration]({pictures[section.title]})")
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "In percent, with Wilson's 95% intervals over prompts, and what each is out of. Published numbers are as their "
    "sources have them: a "
    "number in another column is by another protocol and cannot be compared."
)


def _text(cell: Cell) -> Markdown:
    return Markdown(" ".join(filter(None, cell)))


def _write_by_prompt(results: Sequence[Result], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["set", "protocol", "reward", "prompt", "earned", "possible"])
        for result in results:
            for earned, possible, prompts, protocol, _ in (m.outcome for m in result.measured):
                for row in zip(prompts, earned.tolist(), possible.tolist(), strict=True):
                    writer.writerow([result.title, protocol, result.reward, *row])


def _plain(result: Result, first: str, ahead: _Leads) -> dict[str, Any]:
    over = ahead.get((result.title, result.reward), {})
    return {
        "reward": result.reward,
        "set": result.title,
        "prompts": result.prompts,
        "images": result.images,
        "unreadable": result.unreadable,
        "accuracy": {m.outcome.protocol: {**vars(m.accuracy), "note": m.outcome.note} for m in result.measured},
        "more_than": {first: {name: each._asdict() for name, each in over.items()}} if over else {},
        "aspects": {name: vars(each) for name, each in result.aspects.items()},
        "generators": {
            name: {**vars(each.accuracy), "wins_by_people": each.people, "wins_by_reward": each.reward}
            for name, each in result.generators.items()
        },
        "calibration": [{"gap": each.gap, **each.agree._asdict()} for each in result.calibration],
    }
