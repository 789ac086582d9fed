"""The client of chat servers: which failures pass, which do not, how much is in flight, and where the key is not."""

import asyncio
import gc
import logging
import math
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from chat_server import HOSTILE, KEY, UNREADABLE, ChatServer, rating_of
from chatting import IMAGES, KEY_NAME, ask, chat, prepare

from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.interfaces import Unanswered

PASSING = ["429", "500", "503", "hang", "reset", "trickle"]
WAITED_FOR = {"hang": 1.0, "trickle": 1.0}
"""Seconds until what never comes is given up: what does come may take a busy machine a good part of one."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


# --- failures that pass


@pytest.mark.parametrize("outcome", PASSING)
def test_what_passes_is_tried_again_under_the_same_key(log: Path, outcome: str) -> None:
    with ChatServer(log, script=[outcome, outcome, "ok"], hang=5) as server:
        assert ask(chat(server.url, timeout=WAITED_FOR.get(outcome, 20.0))).text
    assert server.outcomes() == [outcome, outcome, "ok"]
    assert [request["retry"] for request in server.requests] == [0, 1, 2]
    assert len({request["key"] for request in server.requests}) == 1
    assert server.requests[0]["key"]


@pytest.mark.parametrize("outcome", PASSING)
def test_what_does_not_pass_in_time_is_left_for_later(log: Path, outcome: str) -> None:
    with ChatServer(log, script=[outcome] * 9, hang=5) as server, pytest.raises(Unanswered, match=server.url):
        ask(chat(server.url, timeout=WAITED_FOR.get(outcome, 20.0)))
    assert server.outcomes() == [outcome] * 3


@pytest.mark.parametrize("outcome", ["error_200", "429_in_200", "error_in_choice"])
def test_an_error_that_calls_itself_a_success_is_one_that_passes(log: Path, outcome: str) -> None:
    with ChatServer(log, script=[outcome, outcome, "ok"]) as server:
        assert ask(chat(server.url)).text
    assert server.outcomes() == [outcome, outcome, "ok"]
    with ChatServer(log, script=[outcome] * 9) as server, pytest.raises(Unanswered, match="Upstream"):
        ask(chat(server.url))
    assert len(server.requests) == 3


def test_no_request_starts_while_a_retry_after_runs(log: Path) -> None:
    with ChatServer(log, script=["429"], retry_after=0.3) as server:
        annotator = OpenAIChatAnnotator(chat(server.url, concurrency=1))

        async def several() -> None:
            await asyncio.gather(*(annotator.ask(f"prompt {n}", IMAGES, "aesthetic") for n in range(5)))

        asyncio.run(several())
    first, *others = server.requests
    assert first["outcome"] == "429"
    assert len(others) == 5
    assert min(request["time"] for request in others) >= first["time"] + 0.3 - 0.01  # two clocks' resolution


def test_as_many_are_in_flight_as_allowed_and_no_more(log: Path) -> None:
    with ChatServer(log, latency=0.05) as server:
        annotator = OpenAIChatAnnotator(chat(server.url, concurrency=6))
        assert annotator.concurrency == 6

        async def several() -> None:
            await asyncio.gather(*(annotator.ask(f"prompt {n}", IMAGES, "aesthetic") for n in range(30)))

        asyncio.run(several())
    assert max(request["in_flight"] for request in server.requests) == 6


def test_a_server_that_takes_fewer_at_once_is_not_overrun(log: Path) -> None:
    with ChatServer(log, latency=0.02, concurrent=4, retry_after=None) as server:
        annotator = OpenAIChatAnnotator(chat(server.url, concurrency=32, retries=9))

        async def several() -> None:
            await asyncio.gather(*(annotator.ask(f"prompt {n}", IMAGES, "aesthetic") for n in range(150)))

        asyncio.run(several())
    outcomes = server.outcomes()
    assert outcomes.count("ok") == 150
    assert outcomes.count("429") < 0.4 * len(
        outcomes
    )  # 28 in the first burst alone; without a gate there are thousands


def test_a_hostile_server_changes_no_rating_and_loses_no_question(log: Path) -> None:
    """Each question ends by the last answer it got; those before it did not arrive, or were no answers."""
    rates = dict(HOSTILE)
    with ChatServer(log, faults=rates, retry_after=0.02, latency=0.01, hang=5) as server:
        annotator = OpenAIChatAnnotator(chat(server.url, retries=9, concurrency=16, timeout=0.4))

        async def one(number: int) -> str:
            prompt = f"prompt {number}"
            answer = await annotator.ask(prompt, IMAGES, "fidelity")
            if answer.refused:
                return "refused"
            try:
                given = annotator.read(answer.text, len(IMAGES))
            except ValueError:
                return "unreadable"
            assert [r.rating for r in given] == [rating_of(prompt, image, "fidelity") for image in IMAGES]
            return "rated"

        async def all_of_them() -> list[str]:
            gate = asyncio.Semaphore(annotator.concurrency)

            async def gated(number: int) -> str:
                async with gate:
                    return await one(number)

            return await asyncio.gather(*(gated(number) for number in range(150)))

        ended = {f"prompt {number}": end for number, end in enumerate(asyncio.run(all_of_them()))}
    # An answer may come too late on a busy machine, and is asked for again: how often it was sent says nothing.
    last = {request["prompt"]: request["outcome"] for request in sorted(server.requests, key=itemgetter("number"))}
    means = {"ok": "rated", "refusal": "refused"} | dict.fromkeys(UNREADABLE, "unreadable")
    assert ended == {prompt: means[outcome] for prompt, outcome in last.items()}
    assert Counter(ended.values()).keys() == {"rated", "refused", "unreadable"}


def test_told_to_stop_it_tries_nothing_again_and_finishes_what_is_under_way(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 60.0)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 60.0)  # seconds until the first question's next attempt

    async def both() -> None:
        first = asyncio.create_task(annotator.ask("a cat", IMAGES, "aesthetic"))
        while server.outcomes() != ["500"]:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(annotator.ask("a dog", IMAGES, "aesthetic"))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        annotator.stop_retrying()
        with pytest.raises(Unanswered, match="stopped before another attempt"):
            await asyncio.wait_for(first, 10)
        assert annotator.read((await second).text, 4)
        with pytest.raises(Unanswered, match="stopped"):
            await annotator.ask("a fox", IMAGES, "aesthetic")

    with ChatServer(log, script=["500", "ok"], latency=1.0) as server:
        annotator = OpenAIChatAnnotator(chat(server.url))
        asyncio.run(both())
    assert len(server.requests) == 2


# --- failures that do not pass


FATAL = [
    ("401", "refuses the key in the environment variable VP_RL_TEST_KEY"),
    ("403", "refuses the key .*Country"),
    ("404_model", "no model 'm'.*chat.model"),
    ("404_pull", "no model 'm'.*try pulling"),
    *[(outcome, "no model 'm'") for outcome in ("400_model", "404_code", "404_azure", "404_endpoints")],
    ("404_route", "no chat-completions API at .*chat.base_url.*/v1"),
    ("html", "no chat-completions API"),
    ("redirect", "no chat-completions API at .*302"),
    ("400_image", "'m' takes no images.*chat.model"),
    ("400_schema", "refuses the request.*structured=json_object"),
    ("400_temperature", "refuses the request.*chat.temperature=null"),
    ("402", "No quota.*Insufficient credits"),
    ("quota", "No quota.*Add credit"),
]


@pytest.mark.parametrize(("outcome", "said"), FATAL)
def test_what_will_never_pass_is_said_at_once_with_the_way_out(log: Path, outcome: str, said: str) -> None:
    with ChatServer(log, script=[outcome] * 9) as server, pytest.raises(ValueError, match=said) as caught:
        ask(chat(server.url))
    assert server.outcomes() == [outcome]
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_that_was_never_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"No server can be reached at {url}.*chat\.base_url"):
        ask(chat(url, retries=50, timeout=60))
    assert time.monotonic() - started < 5


def test_a_server_that_went_away_may_come_back(log: Path) -> None:
    async def both() -> None:
        annotator = OpenAIChatAnnotator(chat(server.url))
        await annotator.ask("a cat", IMAGES, "aesthetic")
        await asyncio.to_thread(server.__exit__, None, None, None)
        with pytest.raises(Unanswered, match="ConnectError"):
            await annotator.ask("a dog", IMAGES, "aesthetic")

    server = ChatServer(log)
    server.__enter__()
    asyncio.run(both())


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, f"set the environment variable {KEY_NAME}"), ("  ", f"set the environment variable {KEY_NAME}")]
    + [(value, f"{KEY_NAME} holds is no API key") for value in ("sk secret", "sk-secret\nsk-secret", "sk-secrét")],
)
def test_a_missing_or_garbled_key_is_told_by_its_variable_and_not_shown(
    log: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv(KEY_NAME)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    if value is not None:
        monkeypatch.setenv(KEY_NAME, value)
    with ChatServer(log) as server, pytest.raises(ValueError, match=said) as caught:
        ask(chat(server.url))
    assert not server.requests
    told = "".join(traceback.format_exception(caught.value))
    assert "sk-secr" not in told
    assert "sk secr" not in told


def test_a_key_may_end_in_a_line_break(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_NAME, f"{KEY}\n")
    with ChatServer(log) as server:
        assert ask(chat(server.url)).text


def test_a_server_without_keys_is_sent_none_of_ours(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(log) as server, pytest.raises(ValueError, match=r"wants a key .*chat\.api_key_env"):
        ask(chat(server.url, api_key_env=None))
    assert KEY not in str(server.requests[0]["headers"])


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error with all that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("outcome", [*PASSING, *[outcome for outcome, _ in FATAL], "refusal", "error_200", "ok"])
def test_the_key_is_in_no_error_no_log_and_no_representation(
    log: Path, caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    for name in (None, "openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)
    with ChatServer(log, script=[outcome] * 9, hang=5) as server:
        asked = chat(server.url, retries=1, timeout=0.4)
        annotator = OpenAIChatAnnotator(asked)
        try:
            said = str(asyncio.run(annotator.ask("a cat", IMAGES, "aesthetic")))
        except (ValueError, Unanswered) as error:
            said = "".join(traceback.format_exception(error))
            for each in chain(error):  # nor in what hangs on it, for tools that show local variables
                assert not isinstance(each, httpx2.RequestError | openai.APIError)  # they hold the request
                said += repr(vars(each))
    assert any(record.name.startswith(("openai", "httpx")) for record in caplog.records)
    assert KEY in server.requests[0]["headers"]["Authorization"]
    for text in (
        said,
        caplog.text,
        repr(asked),
        repr(vars(asked)),
        repr(annotator),
        repr(vars(annotator)),
        log.read_text(),
    ):
        assert KEY not in text


def test_requests_are_not_logged_unless_somebody_wants_it(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in ("openai", "httpx2"):
        caplog.set_level(logging.NOTSET, name)
    with ChatServer(log, script=["429", "ok", "ok"]) as server:
        ask(chat(server.url))
        assert not caplog.records
        caplog.set_level(logging.INFO, "httpx2")
        ask(chat(server.url))
    assert ["POST" in record.getMessage() for record in caplog.records] == [True]


# --- keys of requests, event loops, settings


def test_a_question_that_is_asked_again_has_another_key_and_another_client_begins_anew(log: Path) -> None:
    with ChatServer(log) as server:
        first = chat(server.url)
        for prompt in ("a cat", "a cat", "a dog", "a cat"):
            ask(first, prompt)
        ask(chat(server.url), "a cat")  # as after a crash: the server may still have the answer
    keys = [request["key"] for request in server.requests]
    assert len({*keys[:4]}) == 4
    assert keys[4] == keys[0]


def test_a_question_without_an_answer_keeps_its_key(log: Path) -> None:
    with ChatServer(log, script=["500"] * 3) as server:
        asked = chat(server.url)
        with pytest.raises(Unanswered):
            ask(asked)
        ask(asked)
    assert len({request["key"] for request in server.requests}) == 1


def test_what_is_remembered_of_questions_is_bounded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vp_rl.annotators.chat._REMEMBERED", 3)
    with ChatServer(log) as server:
        asked = chat(server.url)
        for number in range(6):
            ask(asked, f"prompt {number}")
            ask(asked, "a cat")  # asked again and again, it is never the oldest
    assert len(asked._answered) == 3
    assert len({request["key"] for request in server.requests}) == 12


def test_it_works_in_one_event_loop_after_another_and_leaves_nothing_open(log: Path) -> None:
    with ChatServer(log) as server:
        asked = chat(server.url)
        for _ in range(3):
            assert ask(asked).text
            assert not asked._clients
            gc.collect()  # an open connection would be warned of, which is an error here
    assert len(server.requests) == 3


def test_it_is_closed_after_an_error_too(log: Path) -> None:
    with ChatServer(log, script=["401"]) as server:
        asked = chat(server.url)
        with pytest.raises(ValueError, match="key"):
            ask(asked)
        assert not asked._clients
        gc.collect()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("concurrency", 0),
        ("timeout", -1.0),
        ("timeout", math.nan),
        ("retries", -1),
        ("temperature", -0.1),
        ("max_output_tokens", 0),
        ("usd_per_million_input", -1.0),
        ("usd_per_million_output", math.nan),
        ("base_url", "localhost:8000/v1"),
        ("base_url", "https://me:secret@example.org/v1"),
        ("base_url", "https://example.org/v1?key=secret"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"chat.{setting}=") as caught:
        Chat("m", **{setting: value})
    assert "me:secret" not in str(caught.value)
