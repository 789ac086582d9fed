"""A build is killed again and again, in every stage, against a server that misbehaves: it ends as if nothing was."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import HOSTILE, KEY
from fakes import read_dataset

from vp_rl.visionprefer.polish import prompt_id
from vp_rl.visionprefer.prompts import ScenePrompts
from vp_rl.visionprefer.schema import SPLITS

ROOT = Path(__file__).parents[1]
STAGES = ("start", "polish", "generate", "annotate", "export")
# A refusal is final and follows from what is asked; drawn anew for each request it could not end alike twice.
FAULTS = {name: share for name, share in HOSTILE.items() if name != "refusal"}


class Server:
    """`chat_server.py` in a process of its own, which the builds' deaths do not touch."""

    def __init__(self, log: Path, seed: int) -> None:
        faults = ",".join(f"{name}={share}" for name, share in FAULTS.items())
        options = ["--log", str(log), "--faults", faults, "--seed", str(seed), "--latency", "0.2"]
        options += ["--retry-after", "0.2", "--seconds", "1800", "--at-most", "20000"]
        self._process = subprocess.Popen(
            [sys.executable, "tests/chat_server.py", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def build(folder: Path, prompts: Path, url: str) -> subprocess.Popen:
    """A build of all of a file's prompts, at work; its stderr goes to `<folder>.log`."""
    command = [sys.executable, "scripts/build_visionprefer.py", f"folder={folder}", "prompts=file", "seed=3"]
    command += [f"prompts.path={prompts}", "prompts.validation=10", "prompts.test=10"]
    for who in ("annotator", "polish"):
        command += [f"{who}=openai_chat", f"{who}.chat.model=test", f"{who}.chat.base_url={url}"]
        command += [f"{who}.chat.timeout=1", f"{who}.chat.concurrency=16"]
    command += [
        "prompts.cleaner.near_duplicates=null",
        "builder.steps=[3]",
        "builder.attempts=8",
        f"hydra.run.dir={folder}.run",
    ]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with Path(f"{folder}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def stage_of(folder: Path) -> int:
    """How far the running build has come, by what its bars say."""
    text = Path(f"{folder}.log").read_text(errors="replace")
    return max(number for number, stage in enumerate(STAGES) if number == 0 or f"{stage}:" in text)


def kill_in(stage: int, process: subprocess.Popen, folder: Path, rng: random.Random) -> str | None:
    """Kills a build at a random moment of a stage, or of a later one where it was quick: which; None: too late."""
    while process.poll() is None and stage_of(folder) < stage:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, (4, 1.5, 5, 4, 0.8)[stage]))
    if process.poll() is not None:
        return None
    reached = STAGES[stage_of(folder)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    return reached


def content(folder: Path) -> dict[str, list[dict]]:
    return {split: read_dataset(folder, split) for split in SPLITS}


def asked_after_accepted(folder: Path, log: Path) -> list[tuple]:
    """Questions that the server was sent after the journal had their answer."""
    requests: dict[tuple, list[float]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        requests.setdefault((entry["kind"], entry["prompt"], entry["aspect"]), []).append(entry["time"])
    prompts = {row["prompt_id"]: row["prompt"] for rows in content(folder).values() for row in rows}
    twice = []
    query = "SELECT stage, subject, created FROM answers WHERE outcome = 'accepted'"
    with sqlite3.connect(folder.with_name(folder.name + ".work") / "journal.sqlite") as journal:
        for stage, subject, created in journal.execute(query):
            if stage == "polish":
                question = ("polish", subject, "")
            else:
                aspect, _, images = subject.partition(" of ")
                question = ("annotate", prompts[int(images.partition("-")[0])], aspect)
            assert question in requests
            twice += [question for sent in requests[question] if sent > created]
    return twice


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kills"), [(40, 10), (300, 30)])
def test_a_build_that_is_killed_again_and_again_ends_as_one_that_never_was(
    tmp_path: Path, number: int, kills: int
) -> None:
    prompts, rng = tmp_path / "prompts.txt", random.Random(number)
    scenes = ScenePrompts(number, 0, 0).split("train")
    prompts.write_text(
        "\n".join(f"{scene}, trending on artstation" if rng.random() < 0.3 else scene for scene in scenes)
    )
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    with Server(tmp_path / "calm.jsonl", 1) as server:
        assert build(calm, prompts, server.url).wait() == 0, Path(f"{calm}.log").read_text()[-2000:]
    killed: Counter[str] = Counter()
    with Server(tmp_path / "hurt.jsonl", 2) as server:
        for kill in range(kills):
            reached = kill_in(len(STAGES) * kill // kills, build(hurt, prompts, server.url), hurt, rng)
            killed[reached or "too late"] += 1
            if reached is None:  # it was done; what is killed next is another export
                hurt.rename(tmp_path / f"done-{kill}")
        assert build(hurt, prompts, server.url).wait() == 0, Path(f"{hurt}.log").read_text()[-2000:]
    print(dict(killed))
    assert all(killed[stage] for stage in STAGES), killed
    assert content(calm) == content(hurt)
    rows = [row for rows in content(calm).values() for row in rows]
    assert len(rows) == number
    assert {row["prompt_id"] for row in rows} == {prompt_id(line) for line in prompts.read_text().splitlines()}
    assert any(row["prompt"] != row["source_prompt"] for row in rows)
    assert asked_after_accepted(hurt, tmp_path / "hurt.jsonl") == []
