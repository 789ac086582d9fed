"""TRL 0.23.1, the last release with a DDPO trainer, in a virtual environment and a process of its own.

It cannot share ours: it needs transformers 4 and an older diffusers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".bench" / "trl"
REQUIREMENTS = (
    "trl==0.23.1",
    "torch==2.13.0",
    "transformers==4.57.6",
    "diffusers==0.35.2",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "jaxtyping",  # what our VP-Score's annotations need
)


def prepare() -> Path:
    """The environment's interpreter; the environment is made if it is not there or is of other requirements."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"making the peer's environment in {ENVIRONMENT.relative_to(ROOT)} (minutes, once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return python


class Peer:
    """The running trainer; idle between calls, so that the two sides never compete for the processor.

    Args:
        log: where the peer's own messages go.
        settings: as `bench_ddpo_trl.build` takes them.
    """

    def __init__(self, log: Path, **settings: Any) -> None:
        self._log = log
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [prepare(), ROOT / "scripts" / "bench_ddpo_trl.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**environment, "OMP_NUM_THREADS": str(settings["threads"])},
            )
        self._ask(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.close()
        self._process.wait()

    def train(self, rounds: int) -> dict[str, float]:
        """Trains so many rounds; seconds in all and by phase."""
        return self._ask({"rounds": rounds})

    def save(self, folder: Path) -> None:
        """Writes the adapter."""
        self._ask({"save": str(folder)})

    def _ask(self, command: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None, "opened as a pipe"
        assert self._process.stdout is not None, "opened as a pipe"
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"TRL's process died:\n{self._log.read_text()[-3000:]}")
        return json.loads(answer)
