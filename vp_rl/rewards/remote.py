"""A reward that another process or machine computes: `python scripts/serve_reward.py reward=NAME` serves one.

A request is one safetensors file with `images` (floats as they are: a local reward would see the same bits) and
`prompts` (a JSON list as UTF-8 bytes), an answer one with `scores`. Nothing in it can run code.
"""

import asyncio
import json
import logging
import re
import time

import httpx2
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vp_rl.configuration.kinds import Amount, Count, Seconds, Url
from vp_rl.interfaces import Reward
from vp_rl.secrets import mask, read, register_address
from vp_rl.types import Images, Scores
from vp_rl.waiting import wait

log = logging.getLogger(__name__)

TOKEN = "VP_RL_REWARD_TOKEN"
"""The environment variable with the secret that server and client share, if they do."""
SERVED = "X-Reward"
"""The header of answers that says which reward computed them."""

_PASSING = (429, 502, 503, 504)  # the server is busy, or a proxy waits for it to start
_WAITS = (0.25, 5.0)  # seconds between attempts: at first, and at most; each is twice the one before
_CONNECT_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def encode(images: Images, prompts: list[str]) -> bytes:
    """A request's body."""
    text = bytearray(json.dumps(prompts).encode())
    return save({"images": images.detach().cpu().contiguous(), "prompts": torch.frombuffer(text, dtype=torch.uint8)})


def decode(body: bytes) -> tuple[Images, list[str]]:
    """What `encode` was given.

    Raises:
        ValueError: it is no such request; says what is wrong.
    """
    try:
        tensors = load(body)
        images, prompts = tensors["images"], _prompts(tensors["prompts"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"The request is no safetensors file with images and prompts: {error!r}") from error
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
        raise ValueError(f"Images must be floats of (batch, 3, height, width), not {_kind(images)}.")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts.")
    return images, prompts


class RemoteReward(Reward):
    """Asks a server for scores, and waits for one that is busy, slow, or being restarted.

    Repeating a request changes nothing, so a server may die at any moment. The numbers are those of the same reward
    here, to the bit on the same hardware, when it is given `batch_size` images at a time.

    No library among the dependencies repeats requests for a span of time rather than a number of times, so that is done
    here.

    Args:
        url: of the server, such as `http://gpu-box:8000`.
        batch_size: images in a request.
        concurrency: requests in flight: one computes while the next is on its way.
        timeout: seconds until an attempt is given up, waiting in the server's queue included.
        patience: seconds that attempts are repeated for; the end of a request comes after `patience + timeout` at most.

    Raises:
        ValueError: a setting that makes no sense.
    """

    differentiable = False
    elsewhere = True

    def __init__(
        self,
        url: Url,
        *,
        batch_size: Count = 16,
        concurrency: Count = 2,
        timeout: Seconds = 120.0,
        patience: Amount = 600.0,
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"https?://[^\s@?#/]+(/[^\s@?#]*)?", url):
            register_address(url)
            raise ValueError(
                f"reward.url={mask(url)!r} must be an http(s) address like http://localhost:8000, "
                f"without a password in it (the environment variable {TOKEN} is for that)."
            )
        for name, value in {"batch_size": batch_size, "concurrency": concurrency}.items():
            if value < 1:
                raise ValueError(f"reward.{name}={value} must be at least 1.")
        if not timeout > 0 or not patience >= 0:
            raise ValueError(f"reward.timeout={timeout} must be above 0, reward.patience={patience} not below.")
        self._url, self._batch_size, self._concurrency = url.rstrip("/"), batch_size, concurrency
        self._timeout, self._patience = timeout, patience
        self._served: str | None = None

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Scores on the images' device.

        Raises:
            ConnectionError: the server did not answer for `patience` seconds.
            ValueError: what it answered is no score for each image, or it refuses to.
        """
        if not prompts:
            return torch.zeros(0, device=images.device)
        return wait(self._ask_all(images, prompts)).to(images.device)

    async def _ask_all(self, images: Images, prompts: list[str]) -> Scores:
        gate, size, token = asyncio.Semaphore(self._concurrency), self._batch_size, read(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        local = httpx2.URL(self._url).host in _LOOPBACK  # a proxy in the environment is for other machines
        deadlines = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        _quieten()
        async with httpx2.AsyncClient(timeout=deadlines, headers=headers, trust_env=not local) as client:

            async def one(start: int) -> Scores:
                async with gate:
                    some = prompts[start : start + size]
                    response = await self._post(client, encode(images[start : start + size], some))
                    return self._read(response, some)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(start)) for start in range(0, len(prompts), size)]
            except ExceptionGroup as errors:  # callers tell users of a ValueError; they cannot see it in a group
                raise errors.exceptions[0] from None
        return torch.cat([task.result() for task in tasks])

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> httpx2.Response:
        """The first answer that is not of the kind that passes."""
        started, wait, told = time.monotonic(), _WAITS[0], False
        while True:
            asked = 0.0
            try:
                # The whole attempt has a deadline: those of single reads would not end a server that trickles.
                async with asyncio.timeout(self._timeout):
                    response = await client.post(f"{self._url}/score", content=body)
                if response.status_code not in _PASSING:
                    return response
                problem, asked = f"HTTP {response.status_code}", _retry_after(response)
            except TimeoutError:
                problem = f"no answer within reward.timeout={self._timeout:g} s"
            except httpx2.RequestError as error:
                problem = mask(f"{type(error).__name__}: {error}")
            left = self._patience - (time.monotonic() - started)
            if left <= 0:
                raise ConnectionError(
                    f"No scores from the reward at {self._url} for reward.patience={self._patience:g} s; the last "
                    f"attempt: {problem}. Is `python scripts/serve_reward.py` running there? Start it again with the "
                    "same reward, and go on from the last checkpoint (resume=auto). If it is too slow, lower "
                    "reward.batch_size or raise reward.timeout."
                )
            if not told:
                log.info("waiting for the reward at %s (%s), for up to %.0f s", self._url, problem, left)
                told = True
            await asyncio.sleep(min(left, max(wait, asked)))
            wait = min(2 * wait, _WAITS[1])

    def _read(self, response: httpx2.Response, prompts: list[str]) -> Scores:
        if response.status_code != 200:
            raise ValueError(self._refusal(response))
        try:
            scores = load(response.content)["scores"]
        except (SafetensorError, KeyError) as error:
            sent = mask(repr(response.content))[:80]
            raise ValueError(
                f"What {self._url} sent are no scores, but {sent}. Is reward.url the address of "
                "scripts/serve_reward.py?"
            ) from error
        if scores.dtype != torch.float32 or scores.shape != (len(prompts),):
            raise ValueError(
                f"The reward at {self._url} gave {_kind(scores)} for {len(prompts)} images, not one float32 each."
            )
        bad = ~torch.isfinite(scores)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"The reward at {self._url} gave {scores[row].item()} for the image of {prompts[row]!r} "
                f"({int(bad.sum())} of {len(scores)} scores are not finite). Look at that image, and at its precision."
            )
        served = mask(response.headers.get(SERVED, ""))
        if self._served not in (None, served):
            raise ValueError(
                f"The server at {self._url} is now of the reward {served!r}, and was of {self._served!r} when this run "
                "began. Start it again with the same settings, and go on from the last checkpoint (resume=auto)."
            )
        self._served = served
        return scores

    def _refusal(self, response: httpx2.Response) -> str:
        text = mask(response.text)[:500].strip()
        said = f"The reward at {self._url} answered HTTP {response.status_code}: {text!r}. "
        ways_out = {
            401: f"Set the environment variable {TOKEN} to the same secret here and there.",
            413: "Lower reward.batch_size, or raise the server's max_body_mb.",
            500: "The reward failed there; its log has the place.",
        }
        return said + ways_out.get(
            response.status_code, "Is reward.url the address of scripts/serve_reward.py, of the same version?"
        )


def _quieten() -> None:
    """The client logs every request at INFO: not unless somebody has set its level."""
    logger = logging.getLogger("httpx2")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def _prompts(tensor: UInt8[Tensor, " bytes"]) -> list[str]:
    prompts = json.loads(tensor.numpy().tobytes())
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are no JSON list of strings")
    return prompts


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _retry_after(response: httpx2.Response) -> float:
    """Seconds; the header's other form, a date, is not worth a clock that both sides agree on."""
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0
