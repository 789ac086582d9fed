"""A reward over HTTP, for `reward=remote`: it may live on another GPU or another machine than the policy.

python scripts/serve_reward.py reward=vp_score port=8000
python scripts/serve_reward.py --help
"""

import asyncio
import hmac
import logging
import os
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
import torch
from aiohttp import web
from command_line import start  # it lies beside this file
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from run_settings import device_of  # it lies beside this file
from safetensors.torch import save

from vp_rl.configuration.check import check
from vp_rl.configuration.own import SERVE
from vp_rl.evaluation.terminal import quiet_libraries, stop
from vp_rl.interfaces import Reward
from vp_rl.rewards.remote import SERVED, TOKEN, decode
from vp_rl.secrets import mask, read

log = logging.getLogger("vp_rl")

_READ_SECONDS = 300  # for a request's body: whoever sends it more slowly would keep others out
_RETRY_SECONDS = "1"


class RewardServer:
    """Scores what it is sent, one request after the other, in a thread of its own.

    Requests are never merged: the last bits of a score depend on the batch it is computed in.

    Args:
        reward: on its device, in evaluation mode.
        name: told to clients, who refuse another one in mid-run.
        device: of the reward.
        queue: requests that are read, wait or are computed; further ones get HTTP 503 before their body is read.
        max_body: of a request, in bytes.
        token: what clients must show; empty: nothing.
    """

    def __init__(
        self, reward: Reward, name: str, *, device: str = "cpu", queue: int = 8, max_body: int = 2**29, token: str = ""
    ) -> None:
        if queue < 1 or max_body < 1:
            raise ValueError(f"queue={queue} and max_body_mb={max_body >> 20} must be at least 1.")
        self._reward, self._name, self._device = reward, name, device
        self._queue, self._max_body, self._token = queue, max_body, token
        self._inside = 0
        self._worker = ThreadPoolExecutor(1, "reward")

    def application(self) -> web.Application:
        """`POST /score` and `GET /health`. Serve it with `handler_cancellation`, or it works for clients that left."""
        application = web.Application(client_max_size=self._max_body, middlewares=[_plain_errors])
        application.add_routes([web.post("/score", self._score), web.get("/health", self._health)])
        application.on_cleanup.append(self._close)
        return application

    async def _health(self, request: web.Request) -> web.Response:
        ready = self._inside < self._queue
        return web.json_response({"reward": self._name, "ready": ready, "inside": self._inside, "queue": self._queue})

    async def _score(self, request: web.Request) -> web.Response:
        shown = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            raise web.HTTPUnauthorized(text=f"the token of {TOKEN} is missing or another")
        if self._inside >= self._queue:
            raise web.HTTPServiceUnavailable(text="the queue is full", headers={"Retry-After": _RETRY_SECONDS})
        self._inside += 1
        try:
            async with asyncio.timeout(_READ_SECONDS):
                body = await request.read()
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._answer, body)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"the body did not come within {_READ_SECONDS} s") from None
        finally:
            self._inside -= 1

    @torch.no_grad()
    def _answer(self, body: bytes) -> web.Response:
        try:
            images, prompts = decode(body)
            if not torch.isfinite(images).all():
                raise ValueError("Images must be finite numbers: a policy that makes others has diverged.")
        except (ValueError, RecursionError) as error:  # JSON may be nested deeper than Python's stack
            return web.Response(status=400, text=mask(str(error)))
        try:
            scores = self._reward(images.to(self._device), prompts)
        except Exception as error:  # whatever a reward raises, the next request may be a better one
            log.exception("the reward failed on %s images", tuple(images.shape))
            return web.Response(status=500, text=mask(f"{type(error).__name__}: {error}"))
        headers = {SERVED: self._name}
        return web.Response(body=save({"scores": scores.float().cpu().contiguous()}), headers=headers)

    async def _close(self, application: web.Application) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)


@web.middleware
async def _plain_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """One line of text for what goes wrong, instead of a page."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        return web.Response(status=413, text=error.text)


@hydra.main(version_base="1.3", config_path="../conf", config_name="serve")
def main(config: DictConfig) -> None:
    """Serves until it is stopped."""
    try:
        with quiet_libraries():
            serve(config)
    except InstantiationException as error:
        stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError | ImportError) else error)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        stop(error)


def serve(config: DictConfig) -> None:
    """Loads the reward, then listens.

    Raises:
        ValueError, OSError: a setting makes no sense, the reward cannot be loaded, or the port is taken.
    """
    asked: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    written: Any = OmegaConf.to_container(config)
    check(asked, SERVE, written=written, folder=Path(HydraConfig.get().runtime.output_dir))
    device = device_of(config.device)
    settings = str(OmegaConf.to_container(config.reward, resolve=True))
    name = f"{HydraConfig.get().runtime.choices.reward}-{zlib.crc32(settings.encode()):08x}"
    token = read(TOKEN)
    reward = instantiate(config.reward).requires_grad_(False).eval().to(device)
    server = RewardServer(
        reward, name, device=device, queue=config.queue, max_body=config.max_body_mb * 2**20, token=token
    )
    if not token and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("anybody who reaches %s can use this server: set %s", config.host, TOKEN)
    web.run_app(
        server.application(),
        host=config.host,
        port=config.port,
        print=lambda *_: log.info("serving %s at http://%s:%d on %s", name, config.host, config.port, device),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=5,
    )


if __name__ == "__main__":
    start(main, "serve")
