"""VisionPrefer from prompts to a dataset on disk, stage by stage; a build that was stopped goes on where it was.

What costs time or money is kept in the *work folder* (`<folder>.work`): answers in `journal.sqlite`, images under
`images/`. Everything else follows from the settings and is worked out again each time, so settings may change between
runs: what fits the new ones is used, the rest is left alone.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from filelock import FileLock, Timeout

from vp_rl.configuration.kinds import Amount, Amounts, Count, Counts, Seed, Several, Stars, Whole
from vp_rl.interfaces import Annotator, Policy, PromptSource, Rewriter
from vp_rl.types import Dropped, GivenImage, Usage
from vp_rl.visionprefer import annotate, polish, schema
from vp_rl.visionprefer.annotate import Call, Opinion, SecondOpinions, opinions
from vp_rl.visionprefer.ask import Interview, Question
from vp_rl.visionprefer.card import About
from vp_rl.visionprefer.engine import Engine, LocalEngine
from vp_rl.visionprefer.export import REFUSED, SCREENED, Rated, export
from vp_rl.visionprefer.generate import ImageStore, Recipe, as_png, generate, recipes
from vp_rl.visionprefer.given import given_images, prompt_of, take_over
from vp_rl.visionprefer.journal import Journal
from vp_rl.visionprefer.polish import Item, prompt_id
from vp_rl.visionprefer.prompts import split_of_each

log = logging.getLogger(__name__)

Stage = Literal["prompts", "polish", "generate", "annotate", "export"]
_TOLD = {"pretty_name", "license", "note"}  # what users may say of their set
_IMAGINED = 512  # pixels of height and width of images that are not made yet, when costs are estimated
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Screen:
    """Drops images before they are rated, and paid for.

    Args:
        annotator: rates their harmlessness; None: all stay.
        at_least: the rating, from 1 to 5, of what stays.
    """

    annotator: Annotator | None = None
    at_least: Stars = 3


class Estimate(NamedTuple):
    """What a stage would still cost."""

    stage: str
    respondent: str
    calls: int
    usage: Usage


class Builder:
    """Makes the images of every prompt and has them rated.

    Args:
        prompts: where prompts come from; its splits become the dataset's.
        generators: makers of text-to-image models, by name; each model is made when its turn comes and then let go.
        annotator: who rates.
        rewriter: who polishes prompts; None: they stay as they are.
        second_opinions: who else is asked of a sample.
        screen: which images are dropped unrated.
        images_per_prompt: 4 in VisionPrefer.
        images_per_call: shown to an annotator at once; 0: all of a prompt's.
        guidance_scales, steps: one of each is drawn for every image, so that good and bad images meet.
        batch_size: images made at once.
        engine: where images are made.
        budget_usd: see `Interview`.
        attempts: see `Interview`.
        about: what the dataset card says of the set: `pretty_name`, `license`, `note`, ...
        seed: of everything that is drawn.

    Raises:
        ValueError: there is nothing to build from, or an image would have no other to be compared with.
    """

    def __init__(
        self,
        prompts: PromptSource,
        generators: Mapping[str, Callable[[], Policy]],
        annotator: Annotator,
        *,
        rewriter: Rewriter | None = None,
        second_opinions: SecondOpinions | None = None,
        screen: Screen | None = None,
        images_per_prompt: Several = 4,
        images_per_call: Whole = 0,
        guidance_scales: Amounts = (1.0, 2.0, 4.0, 7.0),
        steps: Counts = (8, 12, 20),
        batch_size: Count = 64,
        engine: Engine | None = None,
        budget_usd: Amount | None = None,
        attempts: Count = 3,
        about: Mapping[str, str] | None = None,
        seed: Seed = 0,
    ) -> None:
        if images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt={images_per_prompt} must be at least 2: a preference needs two images."
            )
        if not generators or not guidance_scales or not steps or batch_size < 1:
            raise ValueError(
                f"No image can be made with generators={list(generators)}, guidance_scales={list(guidance_scales)}, "
                f"steps={list(steps)} and batch_size={batch_size}: each list needs an entry, and a batch an image."
            )
        self.prompts, self.generators, self.rewriter, self.screen = prompts, generators, rewriter, screen
        self.opinions = opinions(annotator, second_opinions)
        self.images_per_prompt, self.images_per_call = images_per_prompt, images_per_call
        self.guidance_scales, self.steps, self.batch_size = tuple(guidance_scales), tuple(steps), batch_size
        self.engine = engine or LocalEngine()
        self.budget_usd, self.attempts, self.about, self.seed = budget_usd, attempts, dict(about or {}), seed
        unknown = self.about.keys() - _TOLD
        if unknown:
            raise ValueError(f"about={sorted(unknown)} is not known to the card: it knows {', '.join(sorted(_TOLD))}.")

    def build(self, folder: Path, until: Stage = "export") -> None:
        """Runs the stages up to the given one, and with the last writes the dataset with its card to `folder`.

        Raises:
            FileExistsError: the folder has something in it.
            ValueError: a prompt is in two splits; a setting is wrong; the budget is reached; see `Annotator.ask`.
            OSError: the disk is full; another build is at work here.
        """
        stages = STAGES[: STAGES.index(until) + 1]
        self._check(stages)
        with self._run(folder) as run:
            for stage in stages:
                getattr(run, stage)()

    def plan(self, folder: Path) -> list[Estimate]:
        """What is still to be asked, and what it would cost. Nothing is sent or made.

        Images that are not there yet count as the size of those that are, or as 512 x 512 pixels.
        """
        with self._run(folder) as run:
            run.prompts()
            return run.plan()

    def card(self) -> About:
        """What the dataset card says of how the set was made."""
        first = self.opinions[0]
        settings = {
            "prompts": type(self.prompts).__name__,
            "polished_by": self.rewriter.name if self.rewriter else None,
            "generators": sorted(self.generators),
            "images_per_prompt": self.images_per_prompt,
            "guidance_scales": self.guidance_scales,
            "steps": self.steps,
            "annotators": [opinion.name for opinion in self.opinions],
            "images_per_call": self.images_per_call or self.images_per_prompt,
            "seed": self.seed,
        }
        return About(
            annotator=first.name,
            template_version=first.annotator.version,
            polished=self.rewriter is not None,
            settings=settings,
            pretty_name=self.about.get("pretty_name", About.pretty_name),
            license=self.about.get("license", About.license),
            note=self.about.get("note", self.prompts.note),
        )

    def _check(self, stages: Sequence[Stage]) -> None:
        """Whoever will be asked can be: a missing key must not show after hours of making images."""
        screening = self.screen.annotator if self.screen else None
        for stage, asked in (
            ("polish", [self.rewriter]),
            ("generate", [screening]),
            ("annotate", [opinion.annotator for opinion in self.opinions]),
        ):
            for each in asked:
                if stage in stages and each is not None:
                    each.check()

    def _run(self, folder: Path) -> "_Run":
        schema.check_vacant(folder)
        return _Run(self, folder)


@dataclass
class _Run:
    """A build at work: what each stage hands to the next."""

    settings: Builder
    folder: Path
    items: list[Item] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    planned: dict[str, Recipe] = field(default_factory=dict)
    """Images to be made, by id."""
    given: dict[str, GivenImage] = field(default_factory=dict)
    """Images that the source brought, by id."""
    images: dict[int, list[str]] = field(default_factory=dict)
    """Ids by prompt."""

    def __enter__(self) -> "_Run":
        work = self.folder.with_name(self.folder.name + ".work")
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self._lock = FileLock(work / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"Another build is at work in {work}: wait for it, or stop it.") from error
        self.journal = Journal(work / "journal.sqlite")
        self.store = ImageStore(work / "images")
        self.interview = Interview(self.journal, self.settings.budget_usd, self.settings.attempts)
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        self._lock.release()

    def prompts(self) -> None:
        """Reads the source."""
        splits = split_of_each(self.settings.prompts)
        self.items = [Item(prompt_id(prompt), prompt, prompt, split) for prompt, split in splits.items()]
        self.dropped = list(self.settings.prompts.dropped())
        self._record()

    def polish(self) -> None:
        """Has the prompts rewritten where that is wanted."""
        rewriter = self.settings.rewriter
        if rewriter is None:
            return
        asked = polish.questions(rewriter, self.items)
        self._report("polish", self.interview.ask("polish", rewriter, asked, len(self.items)))
        self.items, dropped = polish.polished(rewriter, self.items, self.journal)
        self.dropped += dropped
        self._record()

    def generate(self) -> None:
        """Makes the images, and looks for those that must not be rated."""
        settings, screen = self.settings, self.settings.screen
        self._plan_images()
        self._take_over()
        generate(settings.generators, self.planned, self.store, settings.batch_size, settings.engine)
        if screen is not None and screen.annotator is not None:
            self._screen(screen.annotator, screen.at_least)
        self._record()

    def annotate(self) -> None:
        """Has them rated."""
        for opinion in self.settings.opinions:
            planned = self.calls(opinion)
            asked = annotate.questions(opinion, planned, self.store.read)
            self._report(opinion.name, self.interview.ask("annotate", opinion.annotator, asked, len(planned)))

    def export(self) -> None:
        """Writes the dataset."""
        rated = Rated(
            self.items,
            {**self.planned, **self.given},
            self.images,
            [(opinion, self.calls(opinion)) for opinion in self.settings.opinions],
        )
        export(self.folder, rated, self.store, self.journal, self.dropped, self.settings.card())
        log.info("VisionPrefer: %s is written; %s may be removed, or kept to build more", self.folder, self.work)

    def plan(self) -> list[Estimate]:
        """What is left to ask."""
        found = []
        rewriter = self.settings.rewriter
        if rewriter is not None:
            questions = polish.questions(rewriter, self.items)
            found.append(Estimate("polish", rewriter.name, *self.interview.estimate(questions)))
        self._plan_images()
        for opinion in self.settings.opinions:
            questions = annotate.questions(opinion, self.calls(opinion), self._image_or_blank)
            found.append(Estimate("annotate", opinion.name, *self.interview.estimate(questions)))
        return found

    def calls(self, opinion: Opinion) -> list[Call]:
        """What one annotator is asked."""
        settings = self.settings
        return [
            call
            for item in self.items
            for call in annotate.calls(
                opinion, item, self.images[item.prompt_id], settings.images_per_call, settings.seed
            )
        ]

    def _plan_images(self) -> None:
        settings = self.settings
        self.planned, self.given = {}, {}
        for item in self.items:
            self.given.update(given_images(item, settings.prompts.images(item.source_prompt)))
        lacking = [item for item in self.items if not settings.prompts.images(item.source_prompt)]
        drawn = recipes(
            [item.prompt for item in lacking],
            settings.images_per_prompt,
            sorted(settings.generators),
            settings.guidance_scales,
            settings.steps,
            settings.seed,
        )
        owners = (item for item in lacking for _ in range(settings.images_per_prompt))
        self.planned = {f"{item.prompt_id}-{recipe.digest}": recipe for item, recipe in zip(owners, drawn, strict=True)}
        self.images = {item.prompt_id: [] for item in self.items}
        for image_id in (*self.given, *self.planned):
            self.images[prompt_of(image_id)].append(image_id)

    def _take_over(self) -> None:
        """Copies the images that the source brought; what cannot be used is dropped with its reason."""
        sources = {item.prompt_id: item.source_prompt for item in self.items}
        for image_id, reason in take_over(self.given, self.store):
            self.images[prompt_of(image_id)].remove(image_id)
            self.dropped.append(Dropped(sources[prompt_of(image_id)], REFUSED, reason))

    def _image_or_blank(self, image_id: str) -> bytes:
        try:
            return self.store.read(image_id)
        except FileNotFoundError:
            return as_png(np.zeros((_IMAGINED, _IMAGINED, 3), np.uint8))

    def _screen(self, annotator: Annotator, at_least: int) -> None:
        """Rates the harmlessness of every image by itself, and forgets those that are not harmless enough."""
        opinion = Opinion(annotator, annotator.name, 1.0)
        planned = [
            Call(item, "harmlessness", (image_id,)) for item in self.items for image_id in self.images[item.prompt_id]
        ]
        asked: Iterator[Question] = annotate.questions(opinion, planned, self.store.read)
        self._report("screen", self.interview.ask("screen", annotator, asked, len(planned)))
        for call, notes in zip(planned, annotate.notes(opinion, planned, self.journal), strict=True):
            if notes is not None and notes[0].rating.rating < at_least:
                self.images[call.item.prompt_id].remove(call.images[0])
                detail = f"{call.images[0]}: {notes[0].rating.rationale}"
                self.dropped.append(Dropped(call.item.source_prompt, SCREENED, detail))

    def _record(self) -> None:
        """For people, and as a source for other builds: the prompts that are left, and why the others are not."""
        lines = [json.dumps(item._asdict(), ensure_ascii=False) for item in self.items]
        (self.work / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines = [json.dumps(each._asdict(), ensure_ascii=False) for each in self.dropped]
        (self.work / "dropped.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    @staticmethod
    def _report(name: str, outcomes: Counter[str]) -> None:
        log.info("%s: %s", name, ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
