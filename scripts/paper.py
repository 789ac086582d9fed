"""The paper's claims, tried in the embedded world: rewards, tuned models, ablations, and a page of what came out.

    make paper                              three seeds; 1.5 to 2.5 hours on two CPU cores
    python scripts/paper.py --seeds 0       one seed, a third of the time
    python scripts/paper.py --list          the jobs, and which of them are done

Stop it whenever you like: the same command goes on. Every job is a command of this project's own, its output is in
JOB.log of the folder, and what it left is used as it is for as long as it is there.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs import JUDGED_AT_THE_END, Job, Runner, last_of_each, shown
from paper_page import write_page

from vp_rl.types import ASPECTS

PROMPTS, IMAGES, EPOCHS = 900, 6, 3  # of training VP-Score: a tenth of what the shipped one has seen
EPOCHS_OF = {"refl_vpscore": 10, "ddpo_vpscore": 10}  # a third and a half of the experiments' own: 27 models are tuned
SHARES = {"1_8": 0.125, "1_4": 0.25, "1_2": 0.5}
NOISES = {"30": 0.3, "60": 0.6}
WITHOUT = {f"without_{aspect}": "+".join(other for other in ASPECTS if other != aspect) for aspect in ASPECTS}
ONLY = {f"only_{aspect}": aspect for aspect in ASPECTS[:2]}
JUDGED = ("all", *WITHOUT, *ONLY)
"""Rewards that a model is tuned against by ReFL, beside CLIP's cosine."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="at once; of one thread each, unless there are fewer"
    )
    parser.add_argument("--list", action="store_true", help="show the jobs and run none")
    parser.add_argument("--page", action="store_true", help="only write the page, of what there is")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.list:
        print(shown(stages(folder, given.seeds)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not given.page:
        run(folder, given.seeds, given.jobs)
    print(f"page: {write_page(folder, given.seeds)}")


def stages(folder: Path, seeds: Sequence[int]) -> list[list[Job]]:
    """All jobs; those of a stage need what the stages before it left."""
    rewards = [job for seed in seeds for job in reward_models(folder, seed)]
    # Models that are tuned for longest first, so that no worker is left with one at the end.
    tuned = sorted((job for seed in seeds for job in policies(folder, seed)), key=lambda job: "ddpo" not in job.name)
    return [[pictures(folder)], datasets(folder), rewards, [*tuned, *(accuracy(folder, seed) for seed in seeds)]]


def pictures(folder: Path) -> Job:
    """The images that all datasets are of; made, as far as they are missing, until the first dataset is there."""
    return Job("images", build(folder / "data", "until=generate"), dataset(folder))


def datasets(folder: Path) -> list[Job]:
    """One by the scene judge, and those of less careful annotators."""
    noisy = [
        Job(f"data-{name}", build(folder / f"data-{name}", f"annotator.noise={noise}"), dataset(folder, name))
        for name, noise in NOISES.items()
    ]
    return [Job("data", build(folder / "data"), dataset(folder)), *noisy]


def dataset(folder: Path, noise: str | None = None) -> Path:
    """The card, which is what a build writes last."""
    return folder / ("data" if noise is None else f"data-{noise}") / "README.md"


def build(folder: Path, *more: str) -> tuple[str, ...]:
    """The command that builds a dataset."""
    size = (f"prompts.train={PROMPTS}", "prompts.validation=50", "prompts.test=150")
    each = (f"builder.images_per_prompt={IMAGES}", f"hydra.run.dir={folder}.hydra")
    return ("scripts/build_visionprefer.py", f"folder={folder}", *size, *each, *more)


def reward_models(folder: Path, seed: int) -> Iterator[Job]:
    """VP-Scores of one seed, all with the same number of updates: of all data, of less, and of worse."""
    chosen: dict[str, tuple[str, ...]] = {"all": ()}
    chosen |= {name: (f"data.aspects={rule}",) for name, rule in (WITHOUT | ONLY).items()}
    chosen |= {
        f"share_{name}": (f"data.share={share}", f"trainer.max_epochs={round(EPOCHS / share)}")
        for name, share in SHARES.items()
    }
    chosen |= {f"noise_{name}": (f"data.folder={folder / f'data-{name}'}",) for name in NOISES}
    for name, settings in chosen.items():
        own = folder / f"reward-{name}-{seed}"
        common = (f"data.folder={folder / 'data'}", f"trainer.max_epochs={EPOCHS}", "callbacks.accuracy.noisy.seed=7")
        command = ("train.py", "experiment=vpscore", *common, *settings, f"seed={seed}", f"hydra.run.dir={own}")
        yield Job(own.name, last_of_each(command), own / "summary.json")


def policies(folder: Path, seed: int) -> Iterator[Job]:
    """Models of one seed, tuned against the rewards of that seed; nothing is chosen by the judge on the way."""
    checkpoint = "reward.checkpoint={}/reward-{}-{}/vp_score".format
    against = {f"refl-{name}": ("refl_vpscore", checkpoint(folder, name, seed)) for name in JUDGED}
    clip = ("reward=tiny_clip", "algorithm.target=1000")  # what target would be the same as VP-Score's, nobody knows
    against |= {"refl-clip": ("refl_vpscore", *clip), "ddpo-all": ("ddpo_vpscore", checkpoint(folder, "all", seed))}
    for name, (experiment, *settings) in against.items():
        own = folder / f"{name}-{seed}"
        judged = ("evaluation.seeds=[0,1]", *JUDGED_AT_THE_END)
        length = f"trainer.max_epochs={EPOCHS_OF[experiment]}"
        fixed = (length, f"seed={seed}", "resume=auto", f"hydra.run.dir={own}")
        command = ("train.py", f"experiment={experiment}", *settings, *judged, *fixed)
        yield Job(own.name, command, own / "summary.json")


def accuracy(folder: Path, seed: int) -> Job:
    """How often the rewards of one seed agree with the careful judge, on prompts that none was trained on."""
    own = folder / f"accuracy-{seed}"
    names = [job.name for job in reward_models(folder, seed)]
    nodes = [
        part
        for name in names
        for part in (f"+reward@rewards.{name}=vp_score", f"rewards.{name}.checkpoint={folder / name / 'vp_score'}")
    ]
    clip = ("+reward@rewards.clip=tiny_clip",)
    data = ("data=visionprefer", f"data.visionprefer.folder={folder / 'data'}", f"folder={own}")
    return Job(own.name, ("scripts/evaluate.py", "accuracy", *nodes, *clip, *data), own / "accuracy.json")


def run(folder: Path, seeds: Sequence[int], at_once: int) -> None:
    """Runs what is not done yet."""
    every = stages(folder, seeds)
    with Runner("paper", folder, sum(map(len, every)), at_once) as runner:
        for stage in every:
            if any(job.result.parent.name.startswith("data-") for job in stage):
                share_images(folder)
            runner.run(stage)


def share_images(folder: Path) -> None:
    """The same images for every annotator; nothing has been asked of them yet."""
    for noise in NOISES:
        work = folder / f"data-{noise}.work"
        if not work.exists():
            unfinished = work.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(folder / "data.work", unfinished)
            unfinished.rename(work)


if __name__ == "__main__":
    main()
