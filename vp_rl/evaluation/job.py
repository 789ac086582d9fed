"""A job of a sweep is done once: a sweep that was killed goes on where it stopped when it is started again."""

import json
import logging
import os
import secrets
from pathlib import Path
from types import TracebackType

from filelock import Timeout
from lightning.pytorch.utilities import rank_zero_only

from vp_rl.evaluation.lock import lock_of

log = logging.getLogger(__name__)


class Job:
    """One job, in its folder; inside `with` no other process does the same one.

    That matters where the sweep is killed and its workers live on: the job that is started again waits for them. Where
    torchrun or SLURM starts several processes for one job, the main one does all this, and no other waits for it here.

    Args:
        folder: the job's own, the same one each time the sweep is started.
        overrides: what makes it this job; `resume` does not.

    Raises:
        ValueError: on entering: the folder holds the result of another job.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self._overrides = sorted(given for given in overrides if not given.startswith("resume="))
        self._folder, self._lock = folder, lock_of(folder)
        self.finished = False
        """Whether it has been done."""
        self.objective: float | None = None
        """What the sweep judges it by; None of a job that has none, or that is not finished."""

    def __enter__(self) -> "Job":
        self._folder.mkdir(parents=True, exist_ok=True)
        if rank_zero_only.rank != 0:
            self._look()
            return self
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            log.info("job %s is being done by another process: waiting for it", self._folder.name)
            self._lock.acquire()
        try:
            self._look()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def finish(self, objective: float | None) -> None:
        """The last thing that a job does: from now on it is finished."""
        self.finished, self.objective = True, objective
        if rank_zero_only.rank != 0:
            return
        said = json.dumps({"overrides": self._overrides, "objective": objective}, indent=2)
        replace(self._folder / "job.json", said + "\n")

    def _look(self) -> None:
        file = self._folder / "job.json"
        if not file.is_file():
            return
        found = json.loads(file.read_text())
        if found["overrides"] != self._overrides:
            one, other = set(found["overrides"]), set(self._overrides)
            raise ValueError(
                f"{self._folder} holds the result of another job: it had {', '.join(sorted(one - other)) or 'less'}, "
                f"this one has {', '.join(sorted(other - one)) or 'less'}. Give the sweep a folder of its own: "
                "hydra.sweep.dir=..."
            )
        self.finished, self.objective = True, found["objective"]
        log.info("job %s is finished: its objective is %s", self._folder.name, self.objective)


def replace(path: Path, text: str) -> None:
    """Writes a file of a sweep's folder: readers, and other jobs that write too, see one whole text or another."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # jobs in containers may share a process id
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
