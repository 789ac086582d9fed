"""Whatever a server sends: each question comes to one end, nothing that was accepted is asked again, nothing hangs."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from chatting import KEY_NAME, picture, prepare
from random_server import RandomServer

from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.visionprefer.ask import Interview, Question
from vp_rl.visionprefer.journal import Journal, key_of

ROOT = Path(__file__).parents[1]
OUTCOMES = {"accepted", "refused", "unreadable", "unanswered"}
IMAGES = [picture(), picture(shade=9)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def run(journal: Path, url: str, number: int) -> Counter[str] | str:
    """One interview about so many prompts: how they ended, or why it stopped."""
    chat = Chat("m", base_url=url, api_key_env=KEY_NAME, timeout=20.0, retries=1, concurrency=16)
    annotator = OpenAIChatAnnotator(chat)
    questions = (
        Question(
            key_of(prompt),
            prompt,
            partial(annotator.ask, prompt, IMAGES, "fidelity"),
            partial(annotator.read, images=2),
            partial(annotator.estimate, prompt, IMAGES, "fidelity"),
            prompt,
        )
        for prompt in (f"prompt {each}" for each in range(number))
    )
    with Journal(journal) as opened:
        try:
            return Interview(opened).ask("annotate", annotator, questions, number)
        except (ValueError, OSError) as error:
            return str(error)


def ends(journal: Path) -> dict[str, list[str]]:
    """How the calls of each question ended, in their order."""
    found: dict[str, list[str]] = {}
    with sqlite3.connect(journal) as database:
        for prompt, outcome in database.execute("SELECT subject, outcome FROM answers ORDER BY id"):
            found.setdefault(prompt, []).append(outcome)
    database.close()
    return found


def check(journal: Path, log: Path, number: int, kills: int = 0) -> None:
    requests: dict[str, list[bool]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        requests.setdefault(entry["prompt"], []).append(entry["readable"])
    found = ends(journal)
    assert found.keys() == {f"prompt {each}" for each in range(number)}
    lost = 0
    for prompt, outcomes in found.items():
        assert set(outcomes) <= OUTCOMES
        assert "accepted" not in outcomes[:-1]
        assert "refused" not in outcomes[:-1]
        assert outcomes.count("unreadable") <= 3
        assert (outcomes[-1] == "accepted") == any(requests[prompt])  # what can be read is read
        lost += sum(requests[prompt]) - (outcomes[-1] == "accepted")  # and paid once
    assert lost <= 16 * kills  # in flight when it was killed


@pytest.mark.parametrize("seed", range(2))
def test_every_question_to_a_server_that_sends_anything_comes_to_one_end(tmp_path: Path, seed: int) -> None:
    log, journal, stops = tmp_path / "log.jsonl", tmp_path / "journal.sqlite", []
    with RandomServer(log, seed) as server:
        for _ in range(60):  # some errors end a run, and some questions were not answered in it
            started = time.monotonic()
            ended = run(journal, server.url, 100)
            assert time.monotonic() - started < 30
            if isinstance(ended, Counter) and not ended["unanswered"]:
                break
            stops.append(ended)
        else:
            pytest.fail(f"no end: {stops[-3:]}")
    check(journal, log, 100)
    assert Counter(each[-1] for each in ends(journal).values())["accepted"] > 40


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import openai._base_client
openai._base_client.INITIAL_RETRY_DELAY = 0.01
from test_random_server import run
ended = run(Path({journal!r}), {url!r}, {number})
sys.exit(3 if isinstance(ended, str) or ended["unanswered"] else 0)
"""


@pytest.mark.slow
def test_two_thousand_questions_and_kills_in_the_middle(tmp_path: Path) -> None:
    log, journal, rng = tmp_path / "log.jsonl", tmp_path / "journal.sqlite", random.Random(0)
    number, kills, code = 2000, 0, None
    serve = [sys.executable, str(ROOT / "tests" / "random_server.py"), str(log), "7"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            program = BUILD.format(tests=str(ROOT / "tests"), journal=str(journal), url=url, number=number)
            for _ in range(400):
                process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
                code = wait(process, log, rng.uniform(0.2, 2) if kills < 8 else None)
                if code == 0:
                    break
                assert code in (3, -signal.SIGKILL)
                kills += code == -signal.SIGKILL
        finally:
            server.kill()
    assert code == 0
    assert kills >= 5
    check(journal, log, number, kills)


def wait(process: subprocess.Popen, log: Path, seconds: float | None) -> int:
    """How it ended; it is killed so many seconds after its first request, and must not be without one for 30."""
    size, first = log.stat().st_size, None
    moved = time.monotonic() + 90  # until it is at work
    while process.poll() is None:
        now = time.monotonic()
        if log.stat().st_size != size:
            size, moved, first = log.stat().st_size, now, first or now
        if seconds is not None and first is not None and now - first > seconds:
            process.kill()
        if now - moved > 30:
            process.kill()
            pytest.fail("it hangs")
        time.sleep(0.05)
    return process.returncode
