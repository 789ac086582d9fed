"""The server that the paid annotator is tested against keeps its own promises."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import HOSTILE, KEY, ChatServer, parse_faults

SERVER = Path(__file__).parent / "chat_server.py"
BODY = {"model": "m", "messages": [{"role": "user", "content": '<prompt>\n"a cat, 8k"\n</prompt>'}]}
CLIENT = """
import sys, urllib.request
while True:
    request = urllib.request.Request(sys.argv[1] + "/chat/completions", sys.argv[2].encode())
    request.add_header("Authorization", "Bearer " + sys.argv[3])
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request).read()
"""


def post(url: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "Idempotency-Key": "k"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(BODY).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def test_faults_have_their_shares_and_depend_on_seed_and_number_only(tmp_path: Path) -> None:
    number = 20_000
    server, same, other = (
        ChatServer(tmp_path / f"{i}.jsonl", faults=HOSTILE, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    try:
        faults = [server.fault(n, "annotate") for n in range(number)]
        assert faults == [same.fault(n, "annotate") for n in reversed(range(number))][::-1]
        assert faults != [other.fault(n, "annotate") for n in range(number)]
    finally:
        for each in (server, same, other):
            each.close()
    seen = Counter(faults)
    kinds = {"malformed": ["malformed", "truncated"], "wrong": ["out_of_range", "wrong_number"]}
    for outcome, share in HOSTILE.items():
        found = sum(seen[kind] for kind in kinds.get(outcome, [outcome])) / number
        assert abs(found - share) < 4 * (share * (1 - share) / number) ** 0.5  # standard deviations of a share


def test_the_log_has_every_answered_request_after_the_client_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, str(SERVER), "--log", str(log), "--seconds", "60", "--latency", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            client = subprocess.Popen([sys.executable, "-c", CLIENT, url, json.dumps(BODY), KEY])
            deadline = time.monotonic() + 20
            while log.read_text().count("\n") < 20 and time.monotonic() < deadline:
                time.sleep(0.05)
            client.send_signal(signal.SIGKILL)
            client.wait()
            time.sleep(0.2)
            before = log.read_text().splitlines()
            assert json.loads(post(url)["choices"][0]["message"]["content"]) == {"prompt": "a cat"}
        finally:
            process.send_signal(signal.SIGKILL)  # the log does not depend on a good end of the server either
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == len(before) + 1 > 20
    numbers = [line["number"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] + 1 - len(numbers) in (0, 1)  # the request whose client died before it was answered
    last = lines[-1]
    assert (last["key"], last["kind"], last["outcome"], last["prompt"]) == ("k", "polish", "ok", "a cat, 8k")
    assert abs(last["time"] - time.time()) < 60
    assert KEY not in log.read_text()


def test_it_takes_so_many_requests_and_no_more(tmp_path: Path) -> None:
    with ChatServer(tmp_path / "log.jsonl", at_most=2) as server:
        for _ in range(2):
            post(server.url)
        with pytest.raises(urllib.error.HTTPError) as error:
            post(server.url)
        error.value.close()
    assert error.value.code == 503
    assert server.outcomes() == ["ok", "ok", "503"]


def test_it_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(SERVER), "--log", str(tmp_path / "log.jsonl"), "--seconds", "0.1"]
    assert subprocess.run(command, capture_output=True, timeout=30, env={**os.environ}).returncode == 0


def test_faults_are_named_on_the_command_line() -> None:
    assert parse_faults("none") == {}
    assert parse_faults("hostile") == HOSTILE
    assert parse_faults("429=0.5,hang=0.25") == {"429": 0.5, "hang": 0.25}
    assert sum(HOSTILE.values()) == pytest.approx(0.31)
