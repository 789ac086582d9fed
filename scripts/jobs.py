"""Commands of this project's own, run side by side, each of which leaves a file when it is done.

What is done is not done again, so that a list of jobs that was stopped goes on by the same command.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]

JUDGED_AT_THE_END = (
    "evaluation.curve=null",
    *(f"callbacks.held_out.{name}" for name in ("every=1000", "best=null", "patience=null")),
)
"""Settings of a run whose last adapter is judged once, at one guidance scale: the judge chooses nothing on the way."""


@dataclass(frozen=True)
class Job:
    """A command that leaves a file when it is done."""

    name: str
    command: tuple[str, ...]
    result: Path


def shown(stages: Sequence[Sequence[Job]]) -> str:
    """The jobs, and which of them are done."""
    return "\n".join(f"{'done' if job.result.exists() else 'to do':6} {job.name}" for stage in stages for job in stage)


def last_of_each(command: Sequence[str]) -> tuple[str, ...]:
    """Without settings that are given again later, which Hydra would refuse."""
    return tuple({argument.partition("=")[0]: argument for argument in command}.values())


class Runner:
    """Runs jobs, and shows how far they are; `with` it the bar is on the terminal.

    Args:
        title: of the bar.
        folder: where each job's output goes, as JOB.log.
        total: jobs in all.
        at_once: of one thread each, unless a stage has fewer.
    """

    def __init__(self, title: str, folder: Path, total: int, at_once: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress, self._folder, self._at_once = Progress(*columns), folder, at_once
        self._bar: TaskID = self._progress.add_task(title, total=total)

    def __enter__(self) -> "Runner":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def run(self, stage: Sequence[Job]) -> None:
        """Those that are not done yet; one that fails does not stop those beside it.

        Raises:
            SystemExit: a job failed; names its log.
        """
        threads = max(1, self._at_once // len(stage))
        with ThreadPoolExecutor(self._at_once) as pool:
            running = {job: pool.submit(do, job, self._folder, threads) for job in stage}
            for job, future in running.items():
                self._progress.update(self._bar, description=job.name)
                future.add_done_callback(lambda _: self._progress.advance(self._bar))
            try:
                failed = [job.name for job, future in running.items() if future.result()]
            except KeyboardInterrupt:  # or those that wait would still be begun
                pool.shutdown(cancel_futures=True)
                raise
        if failed:
            sys.exit(
                f"error: {', '.join(failed)} failed; why is at the end of {self._folder / failed[0]}.log. Everything "
                "that is done is kept: the same command goes on."
            )


def do(job: Job, folder: Path, threads: int = 1) -> int:
    """Runs one job, unless it is done; its exit code."""
    if job.result.exists():
        return 0
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (folder / f"{job.name}.log").open("w") as log:
        return subprocess.run(
            (sys.executable, *job.command), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
