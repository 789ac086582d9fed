"""Every method on the embedded world, for the same time each: one table, one plot.

    make compare                              three seeds; some two hours on two CPU cores
    python scripts/compare.py --seeds 0       one seed
    python scripts/compare.py --list          the jobs, and which of them are done

Each method first trains for one epoch, to see how many fit into `--minutes`. All models are then judged with the
guidance that people sample with, on the same held-out prompts and noise; nothing is chosen by the judge on the way.
Stop it whenever you like: the same command goes on.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from compare_page import METHODS, write_page
from jobs import JUDGED_AT_THE_END, Job, Runner, last_of_each, shown

PROMPTS, IMAGES = 900, 4  # of the pairs that DPO learns from
GUIDANCE = 2.0  # the base model's best: docs/log.md
_UNSEEN = ("evaluation.limit=1", "evaluation.seeds=[0]", "evaluation.sampler.steps=1", "callbacks.held_out.small=1")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, on one core, for each run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once, of one thread each")
    parser.add_argument("--list", action="store_true", help="show the jobs and run none")
    parser.add_argument("--page", action="store_true", help="only write the page, of what there is")
    given = parser.parse_args()
    folder = given.folder.resolve()
    first = [[dataset(folder)], [timing(folder, method) for method in given.methods]]
    if given.list:
        print(shown([*first, tuned(folder, given.methods, given.seeds, given.minutes)]))
        return
    if not given.page:
        jobs = sum(map(len, first)) + len(given.methods) * len(given.seeds)
        with Runner("compare", folder, jobs, given.jobs) as runner:
            for stage in first:
                runner.run(stage)
            runner.run(tuned(folder, given.methods, given.seeds, given.minutes))
    print(f"page: {write_page(folder, given.methods, given.seeds)}")


def dataset(folder: Path) -> Job:
    """The pairs that DPO learns from."""
    own = folder / "data"
    size = (
        f"prompts.train={PROMPTS}",
        "prompts.validation=50",
        "prompts.test=50",
        f"builder.images_per_prompt={IMAGES}",
    )
    command = ("scripts/build_visionprefer.py", f"folder={own}", *size, f"hydra.run.dir={own}.hydra")
    return Job("data", command, own / "README.md")


def timing(folder: Path, method: str) -> Job:
    """One epoch, judged by next to nothing: how long one takes."""
    own = folder / f"timing-{method}"
    settings = (*_UNSEEN, "trainer.max_epochs=1", "seed=0")
    return Job(own.name, command(folder, method, *settings, f"hydra.run.dir={own}"), own / "summary.json")


def tuned(folder: Path, methods: Sequence[str], seeds: Sequence[int], minutes: float) -> list[Job]:
    """The runs that are compared, of as many epochs as fit."""
    found = []
    for seed in seeds:
        for method in methods:
            own = folder / f"{method}-{seed}"
            settings = (f"trainer.max_epochs={epochs(folder, method, minutes)}", f"seed={seed}", "resume=auto")
            run = command(folder, method, *settings, f"hydra.run.dir={own}")
            found.append(Job(own.name, run, own / "summary.json"))
    return found


def epochs(folder: Path, method: str, minutes: float) -> int:
    """As many as fit into the time, at least one; 1 where nothing has been timed yet."""
    summary = folder / f"timing-{method}" / "summary.json"
    if not summary.is_file():
        return 1
    each = json.loads(summary.read_text(encoding="utf-8"))["training_seconds"]
    return max(1, round(60 * minutes / each))


def command(folder: Path, method: str, *more: str) -> tuple[str, ...]:
    """One training run."""
    judged = (f"evaluation.sampler.guidance={GUIDANCE}", *JUDGED_AT_THE_END)
    settings = [setting.format(data=folder / "data") for setting in METHODS[method].settings]
    return last_of_each(("train.py", f"experiment={METHODS[method].experiment}", *settings, *judged, *more))


if __name__ == "__main__":
    main()
