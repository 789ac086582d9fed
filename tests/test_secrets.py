"""No secret leaves the process: whatever wraps it, whoever writes."""

import asyncio
import base64
import csv
import html
import io
import json
import logging
import os
import random
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import torch
import yaml
from aiohttp import web
from chatting import KEY_NAME, chat
from test_visionprefer import Lists, builder

from vp_rl import secrets
from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.rewards.remote import TOKEN, RemoteReward
from vp_rl.secrets import guard, mask, masked, register

ROOT = Path(__file__).parents[1]
ODD = (
    "plain-0123456789abcdef",
    "with 'single' and \"double\" quotes",
    "back\\slash\\\\and/slash",
    "100%+per%20cent&amp;=?#<tag>",
    ".*[regex](group)|{2}^$",
    "düsen-schlüssel-日本語-🔑",
    "two lines\nof a secret",
    "plain-0123456789",  # a part of the first one
    "tab\tand\rreturn",
)

Wrap = Callable[[str], str]


def _csv(text: str) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(["a", text])
    return out.getvalue()


WRAPS: dict[str, Wrap] = {
    "as it is": str,
    "repr": repr,
    "ascii": ascii,
    "bytes": lambda text: repr(text.encode()),
    "header": lambda text: repr(f"Bearer {text}".encode()),
    "JSON": json.dumps,
    "JSON, readable": lambda text: json.dumps(text, ensure_ascii=False),
    "JSON in JSON": lambda text: json.dumps({"body": json.dumps({"key": text})}),
    "repr of JSON": lambda text: repr(json.dumps(text)),
    "repr of repr of bytes": lambda text: repr(repr(text.encode())),
    "URL": quote,
    "URL, all": lambda text: quote(text, safe=""),
    "URL, lower case": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "form": quote_plus,
    "URL twice": lambda text: quote(quote(text, safe=""), safe=""),
    "HTML": html.escape,
    "HTML twice": lambda text: html.escape(html.escape(text)),
    "XML": lambda text: text.encode("ascii", "xmlcharrefreplace").decode(),
    "shell": shlex.quote,
    "YAML": lambda text: yaml.safe_dump({"key": text}, width=10_000),
    "CSV": _csv,
    "SQL": lambda text: text.replace("'", "''"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of Basic": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
    "base64, within": lambda text: base64.urlsafe_b64encode(f"ab{text}cd".encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "wrong encoding": lambda text: text.encode().decode("latin-1"),
    "ASCII at most": lambda text: text.encode("ascii", "replace").decode(),
    "error": lambda text: repr(ValueError(f"Illegal header value {f'Bearer {text}'.encode()!r}")),
}


def shown(secret: str, text: str) -> bool:
    """Whether eight characters of it in a row are to be read in a text, in any of its wrappings."""
    parts = [part for part in secret.split() if len(part) >= 8] or [secret]
    forms = {wrap(part).strip("'\"b\n") for part in parts for wrap in WRAPS.values()}
    return any(form in text for form in forms if len(form) >= 8)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("secret", ODD)
def test_a_secret_is_masked_in_whatever_wraps_it_and_what_stands_around_it_stays(secret: str, wrap: str) -> None:
    for each in ODD:
        register(each)
    wrapped = WRAPS[wrap](secret)
    found = mask(f"before {wrapped} after {wrapped}, the end")
    assert not shown(secret, found)
    assert "***" in found
    assert found.startswith("before ")
    assert found.endswith(", the end")
    assert " after " in found


def test_secrets_of_any_characters_are_masked_in_all_wrappings() -> None:
    letters = [*"aZ09'\"\\%+/=&<>#?.*[](){}|^$-_~`,;:!@", "ä", "日", "🔑", " "]
    rng = random.Random(0)
    for _ in range(60):
        secret = "".join(rng.choices(letters, k=rng.randint(8, 40)))
        if len(secret.strip()) < 8:
            continue
        register(secret)
        for name, wrap in WRAPS.items():
            wrapped = wrap(secret.strip())
            left = mask(f"x {wrapped} y")
            assert wrapped not in left, (name, secret)
            assert len(left.replace("***", "")) < 8 + len(wrapped) - len(secret.strip()) // 2, (name, secret, left)
        secrets._known.clear()


def test_texts_without_secrets_stay_as_they_are() -> None:
    for each in ODD:
        register(each)
    for text in ("", "a plain-looking red circle", "100%", json.dumps({"ratings": [{"rating": 4}]}), "\\\\\\'\"%20"):
        assert mask(text) == text


def test_a_short_secret_is_masked_as_a_word_only_and_a_placeholder_not_at_all() -> None:
    for each in ("cat4", "ab", "none", "EMPTY"):
        register(each)
    assert mask("key 'cat4' of the cat42, ab, none, EMPTY") == "key '***' of the cat42, ab, none, EMPTY"
    assert mask("Authorization: Bearer ab") == "Authorization: Bearer ***"


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("WANDB_API_KEY", True), ("HF_TOKEN", True), ("SOME_PASSWORD", True), ("AWS_SECRET_ACCESS_KEY", True)]
    + [("TOKENIZERS_PARALLELISM", False), ("KEYBOARD", False), ("PWD", False)],
)
def test_what_the_environment_calls_a_secret_is_one(name: str, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "planted-value")
    assert (mask("it is planted-value here") == "it is *** here") is hidden


def test_passwords_in_addresses_are_masked_and_keys_as_providers_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr0xypass@proxy:3128")
    assert mask("at http://a:b@host/v1 and hf://datasets/x@y") == "at http://***@host/v1 and hf://datasets/x@y"
    assert "pr0xypass" not in mask("pr0xypass, " + base64.b64encode(b"me:pr0xypass").decode())
    assert mask("https://host/v1?api_key=abc&x=1") == "https://host/v1?api_key=***&x=1"
    assert mask("sk-abcdefghijklmnopqrst or hf_abcdefghijklmnopqrst") == "*** or ***"


def test_settings_hold_no_secrets_nested_or_by_their_names() -> None:
    register(ODD[1])
    given = {"note": [f"see {ODD[1]}"], "extra_body": {"api_key": "abc", "n": 3}, "api_key_env": "OPENAI_API_KEY"}
    wanted = {"note": ["see ***"], "extra_body": {"api_key": "***", "n": 3}, "api_key_env": "OPENAI_API_KEY"}
    assert masked(given) == wanted


# --- the process


PROGRAM = """
import logging, os, sys, threading, warnings
from vp_rl.secrets import guard
guard([])
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
secret = os.environ["SOME_TOKEN"]
log = logging.getLogger("any.library")
log.info("with %s", secret)
log.info(f"in it {secret!r}")
print(secret, file=sys.stdout)
print({"key": secret})
warnings.warn(secret)
def fail():
    try:
        raise KeyError(secret)
    except KeyError as error:
        raise ValueError(f"Bearer {secret}".encode()) from error
try:
    fail()
except ValueError:
    log.exception("failed")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
if sys.argv[1] == "exit":
    sys.exit(f"error: {secret}")
fail()
"""


@pytest.mark.parametrize("end", ["exit", "raise"])
@pytest.mark.parametrize("secret", [ODD[1], ODD[5]])
def test_nothing_that_is_logged_printed_or_raised_shows_a_secret(secret: str, end: str) -> None:
    environment = {**os.environ, "SOME_TOKEN": secret, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, end], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert said.count("***") >= 9, said
    assert not shown(secret, said), said
    assert "in fail" in said  # tracebacks are there


def test_a_key_given_literally_ends_the_program_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("SOME_TOKEN", "planted-value")
    guard(["annotator.chat.api_key_env=OPENAI_API_KEY", "reward.url=http://host:8000", "note=x", "a.api_key=null"])
    for given in (
        "annotator.chat.api_key_env=sk-live-0123",
        "annotator.chat.api_key_env=hf_abc",
        "+annotator.chat.extra_body.api_key=letmein",
        "hydra.job.env_set.OPENAI_API_KEY=letmein",
        "reward.url=http://me:letmein@host:8000",
        "callbacks.held_out.note=planted-value",
    ):
        with pytest.raises(SystemExit) as caught:
            guard(["seed=1", given])
        said = str(caught.value)
        assert given.partition("=")[0].lstrip("+") in said
        assert "environment variable" in said
        assert not any(each in said for each in ("sk-live", "hf_abc", "letmein", "planted"))


# --- whoever writes


class Echo:
    """A chat server, and a reward's, that repeats the key in whatever it answers, wrapped in ever other ways."""

    def __init__(self, how: str) -> None:
        self.how, self.asked = how, 0

    def _key(self, request: web.Request) -> str:
        self.asked += 1
        return WRAPS[ECHOES[self.asked % len(ECHOES)]](request.headers["Authorization"].removeprefix("Bearer "))

    async def _chat(self, request: web.Request) -> web.Response:
        key = self._key(request)
        body = await request.json()
        images = sum(part["type"] == "image_url" for part in body["messages"][-1]["content"])
        ratings = json.dumps({"ratings": [{"rating": 4, "rationale": f"the key is {key}"}] * images})
        if self.how == "http 400":
            error = {"message": f"your key {key} is bad", "code": f"content_filter {key}"}
            return web.json_response({"error": error}, status=400)
        if self.how == "no completion":
            return web.json_response({"error": f"with {key}"})
        text = f"I may not say {key}" if self.how == "unreadable" else ratings
        message = {"content": text, "refusal": f"not with {key}" if self.how == "refusal" else None}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    async def _score(self, request: web.Request) -> web.Response:
        key = self._key(request)
        return web.Response(text=f"what is {key}?", status=500 if self.how == "http 500" else 200)

    async def run(self, ask: Callable[[str], Any]) -> Any:
        """What asking it at its address gives, asked from another thread."""
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._chat), web.post("/score", self._score)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await asyncio.to_thread(ask, f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()


SENT = "k'ey\"-\\with+odd%20/characters&<>"  # as a header takes it
ECHOES = ("as it is", "JSON in JSON", "URL, all", "HTML", "base64 of Basic", "repr")


@pytest.mark.parametrize("how", ["http 400", "no completion", "unreadable", "refusal", "accepted"])
def test_a_key_that_the_server_repeats_is_in_no_file_of_a_build_and_in_nothing_it_says(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(KEY_NAME, SENT)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def build(url: str) -> None:
        annotator = OpenAIChatAnnotator(chat(f"{url}/v1", retries=0))
        source = Lists(train=["a red circle"], validation=["a blue square"], test=["a green star"])
        builder(source, annotator, images_per_prompt=2).build(tmp_path / "set")

    server, said = Echo(how), ""
    try:
        asyncio.run(server.run(build))
    except (ValueError, OSError) as error:
        said = f"{error} {error!r} {error.__cause__!r} {error.__context__!r}"
    with sqlite3.connect(tmp_path / "set.work" / "journal.sqlite") as database:
        rows = database.execute("SELECT text, reason FROM answers").fetchall()
    assert server.asked >= len(ECHOES)
    assert said or len(rows) >= len(ECHOES)
    assert how != "accepted" or all(json.loads(text) for text, _ in rows), "what was paid is still readable"
    texts = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".png"]
    assert not [file for file in texts if shown(SENT, file.read_bytes().decode("latin-1"))]
    captured = capfd.readouterr()
    assert not shown(SENT, said + repr(rows) + captured.out + captured.err)


@pytest.mark.parametrize("how", ["http 500", "http 200"])
def test_a_token_that_the_rewards_server_repeats_is_not_said(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SENT)

    def score(url: str) -> str:
        said = ""
        for _ in ECHOES:
            with pytest.raises(ValueError, match=r"\*\*\*") as caught:
                RemoteReward(url, patience=0.0)(torch.zeros(1, 3, 8, 8), ["a"])
            said += f"{caught.value!r} {caught.value.__cause__!r}"
        return said

    assert not shown(SENT, asyncio.run(Echo(how).run(score)))


@pytest.mark.parametrize("secret", ["tok-SECRET\nmore-of-it", "düsen-schlüssel", "spaces are not sent"])
def test_a_token_that_no_header_takes_is_refused_at_once_and_not_shown(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, ask in (
        (TOKEN, lambda: RemoteReward("http://127.0.0.1:9", patience=60.0)(torch.zeros(1, 3, 8, 8), ["a"])),
        (KEY_NAME, lambda: Chat("m", api_key_env=KEY_NAME).check()),
    ):
        monkeypatch.setenv(name, secret)
        with pytest.raises(ValueError, match=name) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert not any(part in str(caught.value) for part in ("SECRET", "more-of", "schl", "sent are"))


def test_a_key_in_the_place_of_its_variables_name_is_refused_and_not_shown() -> None:
    for key in ("sk-live-0123", "hf_abc", "letmein"):
        with pytest.raises(ValueError, match="api_key_env") as caught:
            Chat("m", api_key_env=key)
        assert key not in str(caught.value)
