"""A reward in another process: the same numbers, however the server is overrun, killed, or not one at all."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
import lightning
import pytest
import torch
from aiohttp import web
from fakes import BlackBox, LinearPolicy, fit
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import save

from scripts.serve_reward import RewardServer
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.interfaces import Reward
from vp_rl.rewards.remote import SERVED, TOKEN, RemoteReward, decode, encode
from vp_rl.rewards.vp_score import VPScore
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Scores

ROOT = Path(__file__).parents[1]
SECRET = "s3cret-9f"
PROMPTS = ["a red circle", "a blue square", 'quotes " and Ünïcode 🎨', "", "\ud800 alone"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


class Serving:
    """An application on loopback, in a thread."""

    def __init__(self, application: web.Application, port: int = 0) -> None:
        self._application, self._socket = application, socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        ready = threading.Event()

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            runner = web.AppRunner(self._application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            await web.SockSite(runner, self._socket).start()
            ready.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._socket.close()


def serving(reward: Reward, name: str = "fake", **settings: object) -> Serving:
    return Serving(RewardServer(reward, name, **settings).application())


def answering(handler: Handler) -> Serving:
    """A server of its own mind."""
    application = web.Application(client_max_size=2**28)
    application.add_routes([web.post("/score", handler)])
    return Serving(application)


def images(number: int = 5, side: int = 40) -> Images:
    return torch.rand(number, 3, side, side + 8, generator=torch.Generator().manual_seed(number))


class Gated(Reward):
    """Counts its calls, and answers when it may."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inside, self.may = 0, 0, threading.Event()
        self.entered = threading.Event()

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        self.calls += 1
        self.inside += 1
        assert self.inside == 1, "one request after the other"
        self.entered.set()
        assert self.may.wait(20)
        self.inside -= 1
        return images.mean((1, 2, 3))


# --- the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_sent_is_what_arrives(dtype: torch.dtype) -> None:
    sent = images().to(dtype)
    received, prompts = decode(encode(sent, PROMPTS))
    assert received.dtype == dtype
    assert torch.equal(received, sent)
    assert prompts == PROMPTS


@pytest.mark.parametrize("batch_size", [2, 16])
def test_scores_are_those_of_the_local_reward_bit_for_bit(batch_size: int) -> None:
    local, seen, prompts = VPScore.load("tiny-vp-score"), images(), PROMPTS[:4] + ["a red square"]
    parts = [slice(start, start + batch_size) for start in range(0, 5, batch_size)]
    with serving(local) as server:
        found = RemoteReward(server.url, batch_size=batch_size)(seen, prompts)
    expected = torch.cat([local(seen[part], prompts[part]) for part in parts])
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


def test_no_images_are_no_request() -> None:
    assert RemoteReward("http://127.0.0.1:9")(torch.zeros(0, 3, 8, 8), []).shape == (0,)


def test_gradients_do_not_flow_and_are_no_obstacle() -> None:
    with serving(BlackBox()) as server:
        found = RemoteReward(server.url)(images().requires_grad_(), PROMPTS)
    assert not found.requires_grad
    assert not RemoteReward.differentiable


def test_many_clients_get_their_own_scores_and_the_reward_one_request_at_a_time() -> None:
    reward = Gated()
    reward.may.set()
    batches = [images(number) for number in range(1, 9)]
    with serving(reward, queue=2) as server, ThreadPoolExecutor(8) as pool:
        remote = RemoteReward(server.url, batch_size=3)
        found = list(pool.map(lambda batch: remote(batch, ["a"] * len(batch)), batches))
    for batch, scores in zip(batches, found, strict=True):
        assert torch.equal(scores, torch.cat([part.mean((1, 2, 3)) for part in batch.split(3)]))


def test_it_works_inside_a_running_event_loop() -> None:
    async def main(url: str) -> Scores:
        return RemoteReward(url)(images(), PROMPTS)

    with serving(BlackBox()) as server:
        assert torch.equal(asyncio.run(main(server.url)), BlackBox()(images(), PROMPTS))


def test_health_says_which_reward_it_is_and_whether_it_takes_more() -> None:
    reward = Gated()
    with serving(reward, "gated-1", queue=1) as server, ThreadPoolExecutor(1) as pool:
        idle = httpx2.get(f"{server.url}/health", trust_env=False).json()
        waiting = pool.submit(RemoteReward(server.url), images(), PROMPTS)
        assert reward.entered.wait(10)
        busy = httpx2.get(f"{server.url}/health", trust_env=False).json()
        reward.may.set()
        waiting.result()
    assert idle == {"reward": "gated-1", "ready": True, "inside": 0, "queue": 1}
    assert busy == {"reward": "gated-1", "ready": False, "inside": 1, "queue": 1}


# --- a server that has too much to do, or is gone for a while


def test_a_full_server_says_so_before_it_reads_and_clients_come_back() -> None:
    reward = Gated()
    with serving(reward, queue=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(RemoteReward(server.url), images(1), ["a"])
        assert reward.entered.wait(10)
        refused = httpx2.post(f"{server.url}/score", content=encode(images(4, 800), ["a"] * 4), trust_env=False)
        second = pool.submit(RemoteReward(server.url), images(2), ["a"] * 2)
        time.sleep(0.5)
        assert not second.done()
        reward.may.set()
        assert torch.equal(second.result(), images(2).mean((1, 2, 3)))
        assert first.result().shape == (1,)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert reward.calls == 2


def test_nothing_is_computed_for_clients_that_left() -> None:
    reward = Gated()
    with serving(reward) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(RemoteReward(server.url), images(1), ["a"])
        assert reward.entered.wait(10)
        with pytest.raises(ConnectionError):
            RemoteReward(server.url, timeout=0.2, patience=0)(images(2), ["a"] * 2)
        time.sleep(1)  # until the server has noticed
        reward.may.set()
        first.result()
        assert RemoteReward(server.url)(images(3), ["a"] * 3).shape == (3,)
    assert reward.calls == 2


def test_a_server_that_breaks_off_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(await request.read())
        if len(asked) == 1:
            assert request.transport is not None
            request.transport.abort()
        if len(asked) == 2:
            return web.Response(status=502, text="<html>bad gateway")
        return web.Response(body=save({"scores": torch.tensor([1.5])}))

    with answering(handler) as server, caplog.at_level(logging.INFO):
        assert RemoteReward(server.url)(images(1), ["a"]).tolist() == [1.5]
    assert asked[0] == asked[1] == asked[2]
    assert [record.message for record in caplog.records if "waiting for the reward at" in record.message]


# --- clear errors in bounded time


def sent(**tensors: torch.Tensor) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(body=save(tensors))

    return handler


def said(status: int, text: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(status=status, text=text, content_type="text/html", headers={"Location": "/elsewhere"})

    return handler


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (said(200, "<html>Welcome to nginx!"), "are no scores, but b'<html>Welcome"),
        (said(200, ""), "are no scores, but b''"),
        (said(404, "Not Found"), "HTTP 404: 'Not Found'. Is reward.url the address"),
        (said(302, ""), "HTTP 302"),
        (said(500, "OutOfMemoryError: 3 GiB"), "HTTP 500: 'OutOfMemoryError: 3 GiB'. The reward failed there"),
        (sent(other=torch.zeros(2)), "are no scores"),
        (sent(scores=torch.zeros(3)), r"gave float32 of \(3,\) for 2 images"),
        (sent(scores=torch.zeros(2, 1)), r"gave float32 of \(2, 1\) for 2 images"),
        (sent(scores=torch.zeros(2).double()), r"gave float64 of \(2,\) for 2 images"),
        (sent(scores=torch.tensor([0.0, float("nan")])), r"gave nan for the image of 'b' \(1 of 2"),
        (sent(scores=torch.tensor([float("inf"), 0.0])), "gave inf for the image of 'a'"),
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(handler: Handler, words: str) -> None:
    started = time.monotonic()
    with answering(handler) as server, pytest.raises(ValueError, match=words) as error:
        RemoteReward(server.url)(images(2), ["a", "b"])
    assert server.url in str(error.value)
    assert time.monotonic() - started < 10


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def trickle(request: web.Request) -> web.StreamResponse:
    await request.read()
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("handler", [hang, trickle])
def test_a_server_that_is_too_slow_is_an_error_in_bounded_time(handler: Handler) -> None:
    started = time.monotonic()
    with answering(handler) as server, pytest.raises(ConnectionError, match=r"no answer within reward.timeout=0\.3 s"):
        RemoteReward(server.url, timeout=0.3, patience=0.5)(images(1), ["a"])
    assert 0.5 < time.monotonic() - started < 0.5 + 0.3 + 5  # a busy machine's slack


def test_a_server_that_is_gone_for_good_is_an_error_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{url} for reward.patience=0.5 s; .*ConnectError.*resume=auto"):
        RemoteReward(url, patience=0.5)(images(1), ["a"])
    assert 0.5 <= time.monotonic() - started < 5


def test_another_reward_in_mid_run_is_refused() -> None:
    names = iter(["vp_score-1", "vp_score-1", "vp_score-2"])

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(body=save({"scores": torch.zeros(1)}), headers={SERVED: next(names)})

    with answering(handler) as server:
        remote = RemoteReward(server.url)
        remote(images(1), ["a"])
        remote(images(1), ["a"])
        with pytest.raises(ValueError, match="now of the reward 'vp_score-2', and was of 'vp_score-1'"):
            remote(images(1), ["a"])


def test_a_reward_that_fails_is_told_and_the_server_goes_on() -> None:
    class Failing(Reward):
        differentiable = False

        def forward(self, images: Images, prompts: list[str]) -> Scores:
            if prompts == ["bad"]:
                raise RuntimeError("no such word")
            return torch.ones(len(prompts))

    with serving(Failing()) as server:
        with pytest.raises(ValueError, match="HTTP 500: 'RuntimeError: no such word'"):
            RemoteReward(server.url)(images(1), ["bad"])
        assert RemoteReward(server.url)(images(1), ["good"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 100, "no safetensors file"),
        (save({"images": torch.zeros(1, 3, 4, 4)}), "no safetensors file with images and prompts"),
        (save({"images": torch.zeros(1, 3, 4, 4), "prompts": torch.tensor(list(b"[1]")).byte()}), "list of strings"),
        (encode(torch.zeros(1, 3, 4, 4), ["a", "b"]), "1 images came with 2 prompts"),
        (save({"images": torch.zeros(3, 4, 4), "prompts": torch.tensor(list(b"[]")).byte()}), r"float32 of \(3, 4, 4"),
        (save({"images": torch.zeros(1, 3, 4, 4).byte(), "prompts": torch.tensor(list(b"[]")).byte()}), "uint8"),
    ],
)
def test_a_request_that_is_none_is_refused_in_words(body: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(body)
    with serving(BlackBox()) as server:
        assert httpx2.post(f"{server.url}/score", content=body, trust_env=False).status_code == 400


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused(value: float) -> None:
    """In 8 bits they are of one colour, which compresses best of all."""
    broken = images(2)
    broken[1, 2, 3, 3] = value
    with serving(BlackBox()) as server, pytest.raises(ValueError, match="HTTP 400.*must be finite.*diverged"):
        RemoteReward(server.url)(broken, ["a", "b"])


def test_prompts_nested_deeper_than_the_stack_are_a_bad_request() -> None:
    text = torch.frombuffer(bytearray(b"[" * 200_000), dtype=torch.uint8)
    body = save({"images": torch.rand(1, 3, 8, 8), "prompts": text})
    with serving(BlackBox()) as server:
        assert httpx2.post(f"{server.url}/score", content=body, trust_env=False).status_code == 400


def test_a_request_that_is_too_large_is_an_error_with_a_way_out() -> None:
    batch = images(2, 400)  # 4 MB: more than aiohttp takes by itself
    with serving(BlackBox(), max_body=2**22) as server:
        with pytest.raises(ValueError, match="HTTP 413.*Lower reward.batch_size, or raise the server's max_body_mb"):
            RemoteReward(server.url)(images(4, 400), ["a"] * 4)
        assert RemoteReward(server.url)(batch, ["a"] * 2).shape == (2,)


def test_the_token_must_be_right_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(BlackBox(), token=SECRET) as server:
        with pytest.raises(ValueError, match=f"HTTP 401.*Set the environment variable {TOKEN}"):
            RemoteReward(server.url)(images(1), ["a"])
        monkeypatch.setenv(TOKEN, "another")
        with pytest.raises(ValueError, match="HTTP 401"):
            RemoteReward(server.url)(images(1), ["a"])
        monkeypatch.setenv(TOKEN, SECRET)
        assert RemoteReward(server.url)(images(1), ["a"]).shape == (1,)
    echo = answering(said(403, f"Bearer {SECRET} is unknown"))
    with echo as server, pytest.raises(ValueError, match=r"Bearer \*\*\* is unknown"):
        RemoteReward(server.url)(images(1), ["a"])
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "reward.url='localhost:8000' must be"),
        ({"url": "http://me:pw@host"}, r"reward.url='http://\*\*\*@host' must be"),
        ({"batch_size": 0}, "reward.batch_size=0"),
        ({"concurrency": 0}, "reward.concurrency=0"),
        ({"timeout": 0.0}, "reward.timeout=0.0"),
        ({"patience": -1.0}, "reward.patience=-1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RemoteReward(**{"url": "http://127.0.0.1:8000", **settings})
    with pytest.raises(ValueError, match="queue=0"):
        RewardServer(BlackBox(), "fake", queue=0)


def test_both_yamls_compose_to_what_they_name() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert isinstance(instantiate(compose("train", ["reward=remote"]).reward), RemoteReward)
        served = compose("serve")
    assert isinstance(instantiate(served.reward), VPScore)


# --- a real server is killed in mid-run

FAKE = ("reward=compressibility", "~reward.incompressible", "reward._target_=fakes.BlackBox")


def started(port: int, folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "scripts/serve_reward.py", *settings, f"port={port}", f"hydra.run.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class KillAndRestart(lightning.Callback):
    """kill -9 in the second epoch, while requests are under way; a new server after a second."""

    def __init__(self, server: subprocess.Popen[bytes], start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.server, self._start, self.deaths = server, start, list[int]()

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.server.kill()
            self.deaths.append(self.server.wait())
            threading.Timer(1.0, self._restart).start()

    def _restart(self) -> None:
        self.server = self._start()


def ddpo(policy: LinearPolicy, reward: Reward) -> DDPO:
    optimizer = partial(torch.optim.Adam, lr=0.03)
    return DDPO(policy, reward, Sampler(5, 1.0, 1.0), optimizer, images_per_prompt=16, train_batch=64, clip_range=0.2)


@pytest.mark.slow
def test_training_waits_for_a_server_that_was_killed_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    undisturbed = LinearPolicy()
    fit(ddpo(undisturbed, BlackBox()), epochs=4)
    port, policy = free_port(), LinearPolicy()
    start = partial(started, port, tmp_path, *FAKE)
    chaos = KillAndRestart(start(), start)
    try:
        # Training begins before the server does. Its batch is the local reward's: 64 images.
        remote = RemoteReward(f"http://127.0.0.1:{port}", batch_size=64, patience=300)
        fit(ddpo(policy, remote), epochs=4, callbacks=[chaos])
    finally:
        chaos.server.kill()
        chaos.server.wait()
    assert chaos.deaths == [-signal.SIGKILL]
    assert torch.equal(policy.bias, undisturbed.bias)
    assert policy.bias.abs().sum() > 0


@pytest.mark.slow
def test_the_script_serves_the_embedded_reward_and_says_what_is_wrong(tmp_path: Path) -> None:
    port = free_port()
    server = started(port, tmp_path)
    try:
        found = RemoteReward(f"http://127.0.0.1:{port}", patience=300)(images(), ["a red circle"] * 5)
        health = httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()
        command = [sys.executable, "scripts/serve_reward.py", f"port={port}", f"hydra.run.dir={tmp_path}"]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    finally:
        server.terminate()
        code = server.wait(60)
    assert code == 0  # a clean end
    torch.testing.assert_close(found, VPScore.load("tiny-vp-score")(images(), ["a red circle"] * 5))
    assert health["reward"].startswith("vp_score-")
    assert second.returncode == 1
    assert "error: " in second.stderr
    assert "address already in use" in second.stderr
    assert "Traceback" not in second.stderr
