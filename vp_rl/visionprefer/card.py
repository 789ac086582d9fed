"""The dataset card: a README.md for people and for the hub, with its pictures beside it in `card/`."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import DatasetCardData

from vp_rl.files import parquet
from vp_rl.secrets import mask
from vp_rl.visionprefer import agreement, plots, tables
from vp_rl.visionprefer.journal import Spent
from vp_rl.visionprefer.markdown import Markdown, code, escape, fenced
from vp_rl.visionprefer.ratings import REVERSED, batches, shards
from vp_rl.visionprefer.statistics import Statistics, measure
from vp_rl.visionprefer.votes import Vote

_SIZES = {"n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7}
_TAGS = ("preference", "reward-model", "rlhf", "text-to-image", "ai-feedback")
_SHOWN = 8  # images of a sample prompt at most
_LONGEST = 400  # characters of a sample prompt
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("vp_rl.visionprefer", "."),
    undefined=jinja2.StrictUndefined,
    finalize=escape,  # whatever is put in is text, unless it says that it is Markdown
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What the data themselves do not say.

    Args:
        annotator: whose ratings are the dataset's own.
        template_version: of its guidelines.
        pretty_name: the card's title.
        license: the set's, as the hub abbreviates it (`cc-by-4.0`, `other`, ...).
        note: shown at the top; says so if the set is of a toy world and no evidence about real images.
        polished: prompts were rewritten.
        settings: how it was made; whatever JSON can express.
        licences: of what it was made with, by name.
        limits: more sentences for the section on limits.
        dropped: Markdown that says what was left out, and why; whoever writes it escapes what is from outside.
        tags: for the hub, beside the usual ones.
    """

    annotator: str
    template_version: str = "1"
    pretty_name: str = "VisionPrefer (built by vp_rl)"
    license: str = "other"
    note: str = ""
    polished: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    limits: Sequence[str] = ()
    dropped: str = ""
    tags: Sequence[str] = ()


def write_card(
    folder: Path, about: About, *, spent: Sequence[Spent] = (), votes: Sequence[Vote] = (), samples: int = 3
) -> Path:
    """Reads the dataset's shards and writes `README.md` and `card/*.png` beside them.

    Args:
        folder: with the shards in `data/`.
        about: see there.
        spent: what it cost.
        votes: what people said of its images.
        samples: how many prompts are shown with their images.

    Raises:
        ValueError: there are no rows, or see `measure`.
    """
    files = shards(folder)
    counted = {split: sum(map(_rows, own)) for split, own in files.items()}
    splits = {split: rows for split, rows in counted.items() if rows}  # an empty one makes `load_dataset` fail
    if not splits:
        raise ValueError(f"'{folder}' has no rows in data/*.parquet, so there is nothing to write a card about.")
    statistics = measure(batches(folder), about.annotator)
    pictures = folder / "card"
    pictures.mkdir(exist_ok=True)
    plots.histograms(statistics.histogram, pictures / "ratings.png")
    plots.correlation(statistics.correlation, pictures / "correlation.png")
    varied = len(statistics.generators) > 1 or len(statistics.guidance) > 1
    if varied:
        plots.win_rates(statistics, pictures / "win_rates.png")
    text = _PAGES.get_template("card.md").render(
        about=about,
        statistics=statistics,
        splits=splits,
        varied=varied,
        tables=tables,
        code=code,
        markdown=Markdown,
        settings=fenced(yaml.safe_dump(_plain(about.settings), allow_unicode=True, sort_keys=False), "yaml"),
        samples=_samples(folder, about.annotator, files[next(iter(splits))], samples),
        reversed=about.annotator + REVERSED,
        agreements=_agreements(folder, about.annotator, statistics),
        people=_people(folder, about.annotator, votes),
        spent=spent,
    )
    head = _head(about, splits).to_yaml()
    (folder / "README.md").write_text(mask(f"---\n{head}\n---\n\n{text}"), encoding="utf-8")
    return folder / "README.md"


def _head(about: About, splits: Mapping[str, int]) -> DatasetCardData:
    """What the hub reads. The patterns name the splits' files, so that nothing else is taken for data."""
    rows = sum(splits.values())
    files = [{"split": split, "path": f"data/{split}-*-of-*.parquet"} for split in splits]
    return DatasetCardData(
        pretty_name=" ".join(about.pretty_name.split()),
        license=about.license,
        task_categories=["text-to-image"],
        size_categories=[next((name for name, most in _SIZES.items() if rows < most), "10M<n<100M")],
        tags=list(dict.fromkeys([*_TAGS, *about.tags])),
        configs=[{"config_name": "default", "data_files": files}],
    )


def _samples(folder: Path, annotator: str, files: Sequence[Path], number: int) -> list[dict[str, str]]:
    """Pictures of some prompts, drawn from these files; for each, a row group is read with its images."""
    places = [
        (file, group, row) for file in files for group, rows in enumerate(_group_rows(file)) for row in range(rows)
    ]
    shown = []
    for file, group, row in random.Random(0).sample(places, min(number, len(places))):
        columns = ["prompt", "images", "annotations"]
        [found] = parquet.values(file, parquet.row_group(file, group, columns).slice(row, 1))
        said: dict[str, dict[str, int]] = {image["image_id"]: {} for image in found["images"]}
        for note in found["annotations"]:
            if note["annotator"] == annotator:
                said[note["image_id"]][note["aspect"]] = note["rating"]
        name = f"card/sample-{len(shown) + 1}.png"
        images = [
            plots.Shown(image["image"]["bytes"], _caption(image), said[image["image_id"]])
            for image in found["images"][:_SHOWN]
        ]
        if images:
            plots.sample(images, folder / name)
            shown.append({"prompt": _cut(found["prompt"]), "file": Markdown(name)})
    return shown


def _caption(image: Mapping[str, Any]) -> str:
    name = plots.short(image["generator"])
    if image["steps"] is None:  # nobody knows how a given image was made
        return f"{name}\n"
    return f"{name}\nguidance {image['guidance_scale']:g}, {image['steps']} steps"


def _cut(prompt: str) -> str:
    return prompt if len(prompt) <= _LONGEST else prompt[:_LONGEST] + " …"


def _agreements(folder: Path, annotator: str, statistics: Statistics) -> Markdown | None:
    """The annotator against each that gave a second opinion."""
    others = [name for name in statistics.annotators if name != annotator and not name.endswith(REVERSED)]
    if not others:
        return None
    ratings = agreement.shared_ratings(batches(folder), [annotator, *others])
    return tables.agreements({other: agreement.agreement(ratings[[0, index]]) for index, other in enumerate(others, 1)})


def _people(folder: Path, annotator: str, votes: Sequence[Vote]) -> Markdown | None:
    """The annotator against people, and people among themselves."""
    if not votes:
        return None
    seen = {image for vote in votes for image in (vote.left, vote.right)}
    ratings = agreement.image_ratings(batches(folder), annotator, seen)
    return tables.people(
        {
            f"{annotator} and a person": agreement.with_people(votes, ratings),
            "two persons": agreement.among_people(votes),
        }
    )


def _plain(settings: Mapping[str, Any]) -> Any:
    """As YAML can write it: no tuples, paths or objects."""
    return json.loads(json.dumps(dict(settings), default=str))


def _group_rows(file: Path) -> list[int]:
    about = parquet.metadata(file)
    return [about.row_group(group).num_rows for group in range(about.num_row_groups)]


def _rows(file: Path) -> int:
    return parquet.metadata(file).num_rows
