"""The journal, and the interviews that are written into it: nothing paid is asked twice, and nothing is lost."""

import asyncio
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from vp_rl.interfaces import Annotator, Rejected, Unanswered
from vp_rl.types import Answer, Aspect, GivenImage, Rating, Usage
from vp_rl.visionprefer import annotate
from vp_rl.visionprefer import journal as journal_module
from vp_rl.visionprefer.annotate import Call, Opinion
from vp_rl.visionprefer.ask import BudgetReached, Interview, Question
from vp_rl.visionprefer.faults import Systematic
from vp_rl.visionprefer.given import given_images
from vp_rl.visionprefer.journal import Entry, Journal, key_of
from vp_rl.visionprefer.polish import Item

ROOT = Path(__file__).parents[1]


def entry(number: int, outcome: str = "accepted", text: str = "yes", usd: float = 0.0) -> Entry:
    usage = Usage(10, 1, usd)
    return Entry(key_of(number), "stage", f"question {number}", "who", "1", outcome, text, "", usage, 0.5)


async def write_all(journal: Journal, entries: Sequence[Entry]) -> None:
    async with asyncio.TaskGroup() as group:
        for each in entries:
            group.create_task(journal.write(each))


@pytest.fixture
def journal(tmp_path: Path):  # noqa: ANN201
    with Journal(tmp_path / "journal.sqlite") as opened:
        yield opened


# --- the journal


def test_what_is_written_is_there_in_another_run(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal.sqlite"
    with Journal(file) as first:
        asyncio.run(write_all(first, [entry(0, text="ümlaut"), entry(1, "refused", usd=0.25), entry(2, "unreadable")]))
    with Journal(file) as second:
        assert second.accepted() == {key_of(0)}
        assert second.failures() == {key_of(1): [("refused", "yes")], key_of(2): [("unreadable", "yes")]}
        assert list(second.texts([key_of(1), key_of(0), key_of(9)])) == [None, "ümlaut", None]
        assert list(second.reasons([key_of(1), key_of(9)])) == ["refused: ", "never asked"]
        assert second.usd() == 0.25
        assert {(s.outcome, s.calls, s.usage.input_tokens) for s in second.spent()} == {
            ("accepted", 1, 10),
            ("refused", 1, 10),
            ("unreadable", 1, 10),
        }


def test_questions_differ_where_any_of_their_parts_does() -> None:
    parts = [("a", "b", 1), ("ab", "", 1), ("a", "b", 2), ("a", ["b", 1]), ("a", "b")]
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert key_of("a", "ü") == key_of("a", "ü")


def test_answers_that_arrive_together_share_a_commit(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, commit = [], journal._commit
    monkeypatch.setattr(journal, "_commit", lambda entries: (commits.append(len(entries)), commit(entries)))
    asyncio.run(write_all(journal, [entry(number) for number in range(200)]))
    assert sum(commits) == 200
    assert len(commits) <= 3
    assert len(journal.accepted()) == 200


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_ask import Journal, entry

async def main():
    journal = Journal(Path({file!r}))
    for number in range(10_000):
        await journal.write(entry(number))
        print(number, flush=True)

asyncio.run(main())
"""


def test_whatever_was_reported_written_survives_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    program = KILLED.format(tests=str(ROOT / "tests"), file=str(file))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        seen = [int(process.stdout.readline()) for _ in range(50)]
        process.kill()
        seen += [int(line) for line in process.stdout.read().split()]
    with Journal(file) as journal:
        assert {key_of(number) for number in seen} <= journal.accepted()


def test_a_full_disk_is_told_before_anything_is_asked(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**20))
    with pytest.raises(OSError, match="Only 1 MiB are free.*make room"):
        Interview(journal).ask("stage", Who(), [question(Who(), 0)], 1)


def test_a_commit_that_fails_is_told_by_the_files_name(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(entries: list[Entry]) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal, "_commit", full)
    with pytest.raises(OSError, match=r"journal.sqlite cannot be written.*disk is full"):
        asyncio.run(journal.write(entry(0)))


@pytest.mark.parametrize("error", [UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates"), OverflowError("too large")])
def test_whatever_fails_in_a_commit_reaches_all_who_wait_and_the_user(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(entries: list[Entry]) -> None:
        raise error

    monkeypatch.setattr(journal, "_commit", fail)

    async def several() -> list[object]:
        return await asyncio.gather(*(journal.write(entry(number)) for number in range(5)), return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(several(), 10))
    assert all(isinstance(each, OSError) and "journal.sqlite cannot be written" in str(each) for each in found)
    with pytest.raises(OSError, match="cannot be written"):
        interview(journal, Who(), 50)


def test_an_entry_that_cannot_be_written_takes_no_other_with_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = journal._commit

    def one_fails(entries: list[Entry]) -> None:
        if any(each.key == key_of(3) for each in entries):
            raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates")
        commit(entries)

    monkeypatch.setattr(journal, "_commit", one_fails)

    async def several() -> list[object]:
        return await asyncio.gather(*(journal.write(entry(number)) for number in range(6)), return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(several(), 10))
    assert [each is None for each in found] == [number != 3 for number in range(6)]
    assert journal.accepted() == {key_of(number) for number in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "half \ud83d", "reason": "\udc00", "subject": "nul \0", "respondent": "\ud83d"},
        {"usage": Usage(10**20, 10**30, 1e300)},
        {"usage": Usage(-5, 3, math.nan), "seconds": math.inf},
    ],
    ids=["texts", "huge", "no numbers"],
)
def test_whatever_stands_in_an_entry_is_made_storable(journal: Journal, changes: dict) -> None:
    asyncio.run(asyncio.wait_for(write_all(journal, [entry(0), entry(1)._replace(**changes), entry(2)]), 10))
    assert journal.accepted() == {key_of(number) for number in range(3)}
    (text,) = journal.texts([key_of(1)])
    assert text == text.encode().decode().replace("\0", "?")
    assert math.isfinite(journal.usd())
    assert sum(spent.calls for spent in journal.spent()) == 3


def test_another_program_that_holds_the_journal_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "_PATIENCE", 0.05)  # seconds; SQLite gives up then, and we go on
    with Journal(tmp_path / "journal.sqlite") as opened:
        other = sqlite3.connect(tmp_path / "journal.sqlite", check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.7, other.rollback).start()
        started = time.monotonic()
        assert interview(opened, Who(), 30) == {"accepted": 30}
        assert time.monotonic() - started > 0.6
        other.close()
    assert "is locked: waiting for the program" in caplog.text


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database " * 100)
    with pytest.raises(OSError, match=r"notes\.txt' is not a journal"):
        Journal(tmp_path / "notes.txt")


# --- interviews


class Who(Annotator):
    """Answers by what `script` says of a question's number and how often it was asked before; counts everything."""

    name, version = "who", "1"

    def __init__(self, script: Callable[[int, int], str] = lambda number, times: "yes", concurrency: int = 8) -> None:
        self.script, self.concurrency = script, concurrency
        self.asked: Counter[int] = Counter()
        self.now = self.most = 0
        self.usd = 0.0
        self.late: int | None = None
        """A question that ends after another one has: a new one is asked where one of those in flight has ended."""

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        number = int(prompt)
        what = self.script(number, self.asked[number])
        self.asked[number] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(random.random() / 500)
        while number == self.late and self.asked.total() <= self.concurrency:
            await asyncio.sleep(0.001)
        self.now -= 1
        if what == "fatal":
            raise ValueError("the key is refused")
        if what == "silence":
            raise Unanswered("503")
        if what in ("rejected", "no such field"):
            raise Rejected(f"400, {what}: change it", all=what == "no such field")
        if what == "too large":
            return Answer(what, refused=True, hint="make it smaller")
        return Answer(what, Usage(10, 1, self.usd), refused=what == "no", hint="raise the limit" * (what == "cut"))

    def read(self, answer: str, images: int) -> list[Rating]:
        if answer != "yes":
            raise ValueError(f"cannot read {answer}")
        return []

    def estimate(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Usage:
        return Usage(10, 1, self.usd)


def question(who: Who, number: int, read: Callable[[str], object] | None = None, prompts: int = 10**6) -> Question:
    asked = (str(number), [], "fidelity")
    reader = read or partial(who.read, images=0)
    ask, estimate = partial(who.ask, *asked), partial(who.estimate, *asked)
    return Question(key_of(number), str(number), ask, reader, estimate, f"prompt {number % prompts}")


def interview(journal: Journal, who: Who, number: int = 50, **settings: object) -> Counter[str]:
    return Interview(journal, **settings).ask("stage", who, (question(who, i) for i in range(number)), number)


def test_what_is_answered_is_never_asked_again(journal: Journal) -> None:
    who = Who()
    assert interview(journal, who, 30) == {"accepted": 30}
    assert interview(journal, who, 50) == {"answered before": 30, "accepted": 20}
    assert set(who.asked.values()) == {1}
    assert 1 < who.most <= 8


def test_an_unreadable_answer_is_asked_for_again_but_not_for_ever(journal: Journal) -> None:
    who = Who(lambda number, times: "yes" if times >= number else "???")
    assert interview(journal, who, 5, attempts=3) == {"accepted": 3, "unreadable": 2}
    assert list(who.asked.values()) == [1, 2, 3, 3, 3]
    assert interview(journal, who, 5, attempts=3) == {"answered before": 3, "unreadable": 2}
    assert sum(who.asked.values()) == 12
    assert interview(journal, who, 5, attempts=5) == {"answered before": 3, "accepted": 2}


def test_a_refusal_is_final_and_costs_one_call(journal: Journal) -> None:
    who = Who(lambda number, times: "no" if number % 2 else "yes")
    for _ in range(2):
        assert interview(journal, who, 10)["refused"] == 5
    assert set(who.asked.values()) == {1}
    assert list(journal.reasons([key_of(1)])) == ["refused: no (prompt: 'prompt 1')"]


def test_what_no_answer_came_to_is_asked_in_the_next_run(journal: Journal) -> None:
    who = Who(lambda number, times: "silence" if number == 3 and times == 0 else "yes")
    assert interview(journal, who, 5) == {"accepted": 4, "unanswered": 1}
    assert list(journal.reasons([key_of(3)])) == ["unanswered: 503"]
    assert interview(journal, who, 5) == {"answered before": 4, "accepted": 1}


def test_a_better_reader_reads_old_answers_without_asking(journal: Journal) -> None:
    who = Who(lambda number, times: "yes!")
    assert interview(journal, who, 4, attempts=2) == {"unreadable": 4}
    asked = who.asked.total()
    better = (question(who, number, read=lambda text: text.rstrip("!")) for number in range(4))
    assert Interview(journal).ask("stage", who, better, 4) == {"read anew": 4}
    assert who.asked.total() == asked
    assert set(journal.texts([key_of(number) for number in range(4)])) == {"yes!"}


@pytest.mark.parametrize("what", ["fatal", "silence"])
def test_an_end_for_all_lets_calls_in_flight_be_written_down(journal: Journal, what: str) -> None:
    who = Who(lambda number, times: what if number >= 20 else "yes")
    with pytest.raises(
        (ValueError, OSError), match="the key is refused|in a row without an answer, the last with: 503"
    ):
        interview(journal, who, 500)
    assert len(journal.accepted()) == 20
    assert who.asked.total() <= 20 + 20 + 8


def test_the_first_signal_lets_calls_in_flight_be_written_down(journal: Journal) -> None:
    def script(number: int, times: int) -> str:
        if number == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return "yes"

    who = Who(script)
    with pytest.raises(KeyboardInterrupt):
        interview(journal, who, 500)
    assert 21 <= who.asked.total() < 60
    assert len(journal.accepted()) == who.asked.total()


def test_the_budget_is_never_exceeded_and_all_of_it_is_kept(journal: Journal) -> None:
    who = Who()
    who.usd = 0.01
    with pytest.raises(BudgetReached, match=r"budget_usd=0.255 is reached: \$0.2500 are spent.*raise the budget"):
        interview(journal, who, 100, budget_usd=0.255)
    assert len(journal.accepted()) == who.asked.total() == 25
    with pytest.raises(BudgetReached):
        interview(journal, who, 100, budget_usd=0.255)
    assert who.asked.total() == 25
    assert interview(journal, who, 100, budget_usd=1.001) == {"answered before": 25, "accepted": 75}


def test_a_budget_that_allows_nothing_or_that_nothing_can_be_held_against_is_refused(journal: Journal) -> None:
    with pytest.raises(ValueError, match="budget_usd=0 allows no question"):
        Interview(journal, budget_usd=0)
    with pytest.raises(ValueError, match="budget_usd=5 needs prices, and who has none"):
        interview(journal, Who(), budget_usd=5)


def test_an_estimate_counts_what_is_left_and_asks_nothing(journal: Journal) -> None:
    who = Who(lambda number, times: "no" if number == 0 else "yes")
    who.usd = 0.5
    interview(journal, who, 3)
    calls, usage = Interview(journal).estimate(question(who, number) for number in range(10))
    assert (calls, usage) == (7, Usage(70, 7, 3.5))
    assert who.asked.total() == 3


# --- one question's fault, and that of all


@pytest.mark.parametrize("what", ["rejected", "too large", "no such field"])
@pytest.mark.parametrize("where", [0, 7, 29])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_question_that_is_not_taken_while_others_are_is_refused_and_the_rest_goes_on(
    journal: Journal, what: str, where: int, concurrency: int
) -> None:
    if what == "no such field" and where == 0:
        pytest.skip("the first of all questions has nothing to be compared with")
    who = Who(lambda number, times: what if number == where else "yes", concurrency)
    who.late = where if where else None  # it is to have something to be compared with
    assert interview(journal, who, 30) == {"accepted": 29, "refused": 1}
    (reason,) = journal.reasons([key_of(where)])
    assert what in reason
    assert f"prompt {where}" in reason
    assert interview(journal, who, 30) == {"answered before": 29, "refused": 1}
    assert set(who.asked.values()) == {1}


def test_questions_of_one_prompt_that_are_all_refused_do_not_end_the_build(journal: Journal) -> None:
    who = Who(lambda number, times: "too large" if number % 10 == 3 else "???" if number % 10 == 4 else "yes")
    asked = sorted(range(200), key=lambda number: number % 10)
    order = (question(who, number, prompts=10) for number in asked)
    found = Interview(journal).ask("stage", who, order, 200)
    assert found == {"accepted": 160, "refused": 20, "unreadable": 20}


@pytest.mark.parametrize(
    ("what", "most", "said", "outcome"),
    [
        ("rejected", 16, "took none of .* questions in a row.*400, rejected: change it", "unanswered"),
        ("too large", 16, "took none of .* questions in a row.*make it smaller", "unanswered"),
        ("no such field", 8, "400, no such field: change it", "unanswered"),
        ("cut", 16, "cannot be read, and no more are paid for.*raise the limit", "unreadable"),
        ("???", 16, "cannot be read, and no more are paid for", "unreadable"),
    ],
)
def test_what_all_questions_meet_ends_the_build_after_a_few_with_its_reason(
    journal: Journal, what: str, most: int, said: str, outcome: str
) -> None:
    who = Who(lambda number, times: what)
    with pytest.raises(Systematic, match=said):
        interview(journal, who, 500)
    assert who.asked.total() <= most  # 8 are enough to see it, and as many were in flight
    assert set(who.asked.values()) == {1}
    assert all(reason.startswith(outcome) for reason in journal.reasons(map(key_of, who.asked)))
    who.script = lambda number, times: "yes"  # put right: all that was asked is asked again
    assert interview(journal, who, 500) == {"accepted": 500}


def test_a_server_that_ceases_to_take_questions_is_not_asked_them_all(journal: Journal) -> None:
    who = Who(lambda number, times: "yes" if number < 100 else "rejected")
    with pytest.raises(Systematic, match="took none of"):
        interview(journal, who, 500)
    # Those that were under way when the last one was taken count from then on; and there are some when it stops.
    assert who.asked.total() <= 100 + 20 + 2 * who.concurrency
    assert len(journal.accepted()) == 100


def test_a_build_too_small_to_tell_says_why_nothing_was_taken(journal: Journal) -> None:
    with pytest.raises(Systematic, match="make it smaller"):
        interview(journal, Who(lambda number, times: "too large"), 3)


def test_a_reader_that_fails_in_its_own_way_loses_no_answer(journal: Journal) -> None:
    who = Who()

    def deep(text: str) -> object:
        raise RecursionError("maximum recursion depth exceeded")

    assert Interview(journal, attempts=1).ask("stage", who, [question(who, 0, deep)], 1) == {"unreadable": 1}
    assert interview(journal, who, 1) == {"read anew": 1}


def test_one_signal_ends_what_would_be_tried_again_and_keeps_what_is_under_way(journal: Journal) -> None:
    class Patient(Who):
        """Half of its questions wait for another attempt until they are told that there will be none."""

        async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
            if int(prompt) % 2:
                self.stopped = getattr(self, "stopped", None) or asyncio.Event()
                await self.stopped.wait()
                raise Unanswered("stopped before another attempt")
            if int(prompt) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return await super().ask(prompt, images, aspect)

        def stop_retrying(self) -> None:
            self.stopped.set()

    who = Patient()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interview(journal, who, 500)
    assert time.monotonic() - started < 10
    assert len(journal.accepted()) == who.asked.total() >= 4


def test_a_budget_holds_where_answers_cost_more_than_was_thought(journal: Journal) -> None:
    who = Who(concurrency=4)
    who.usd = 0.01
    who.estimate = lambda *asked: Usage(1, 1, 0.001)  # a tenth of the truth
    with pytest.raises(BudgetReached):
        interview(journal, who, 500, budget_usd=0.5)
    assert journal.usd() <= 0.5 + 4 * 0.01
    assert journal.usd() >= 0.4


# --- what later stages make of it


def test_an_accepted_answer_that_cannot_be_read_any_more_is_named_with_its_row(journal: Journal) -> None:
    who = Who()
    call = Call(Item(1, "a cat", "a cat", "train"), "fidelity", ("1-aa", "1-bb"))
    key = annotate.key(who, call)
    asyncio.run(journal.write(entry(0, text="by hand")._replace(key=key)))
    with pytest.raises(ValueError, match=f"fidelity of 1-aa, 1-bb.*cannot read by hand.*{key.hex().upper()}"):
        list(annotate.notes(Opinion(who, "who", 1.0), [call], journal))


def test_a_generators_name_can_be_written_into_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    image = GivenImage(tmp_path / "a.png", "my \ud83d model")
    (found,) = given_images(Item(1, "a cat", "a cat", "train"), [image]).values()
    assert found.generator == "my \ufffd model"
