"""A local page on which people compare two images blind, one question at a time.

Pairs come in an order and on sides that are drawn for each voter, so that neither tells anything, and no address says
what an image is. The page has no passwords: it is for people at the machine it runs on, and refuses requests that came
through another site's page or under another site's name.
"""

import asyncio
import hashlib
import logging
import math
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import jinja2
from aiohttp import web
from markdown_it import MarkdownIt

from vp_rl.files import parquet
from vp_rl.visionprefer.ratings import shards
from vp_rl.visionprefer.votes import CHOICES, OVERALL, Choice, Vote, Votes, voter_is_named

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SIDES = ("left", "right")
_CHOICES: dict[str, Choice] = {choice: choice for choice in CHOICES}
_TOKEN = 16  # digits
_GROUP_ROWS = 8  # at least so many prompts of a row group, as all of its images are read
_HOST = re.compile(r":\d+$|[\[\]]")  # what a host's name is without
_FORMATS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("vp_rl.visionprefer", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


@dataclass(frozen=True)
class Pair:
    """Two images to be compared, of whatever kind: from a dataset, or from a base model and a tuned one."""

    prompt_id: int
    images: tuple[str, str]
    """Their names in the votes."""
    prompt: str
    aspect: str
    """What is asked; its name in the votes."""
    read: Callable[[str], bytes]
    """The file of the image that is so named."""

    @property
    def question(self) -> tuple[int, frozenset[str], str]:
        """As in `Vote`."""
        return self.prompt_id, frozenset(self.images), self.aspect

    @property
    def key(self) -> str:
        """Stands for the pair in addresses."""
        return _digest(self.prompt_id, *sorted(self.images), self.aspect)


class Labeler:
    """The page.

    Args:
        pairs: what is asked; all questions in one aspect come in a row.
        guidelines: Markdown to show, by aspect.
        votes: where the answers go, and who has answered what already.
        seed: of the order and the sides, together with the voter's name.

    Raises:
        ValueError: a pair is there twice, or its aspect has no guideline.
    """

    def __init__(self, pairs: Sequence[Pair], guidelines: Mapping[str, str], votes: Votes, *, seed: int = 0) -> None:
        self._pairs = {pair.key: pair for pair in pairs}
        if len(self._pairs) < len(pairs):
            raise ValueError("Two images are to be compared twice in the same aspect.")
        self._aspects = list(dict.fromkeys(pair.aspect for pair in pairs))
        missing = [aspect for aspect in self._aspects if aspect not in guidelines]
        if missing:
            raise ValueError(f"There is no guideline for {', '.join(missing)}.")
        markdown = MarkdownIt("commonmark", {"html": False})
        self._guidelines = {aspect: markdown.render(guidelines[aspect]) for aspect in self._aspects}
        self._votes, self._seed = votes, seed
        self._done: dict[str, set[str]] = {}
        self._skipped: dict[str, set[str]] = {}
        keys = {pair.question: key for key, pair in self._pairs.items()}
        for vote in votes.read():
            if vote.question in keys:
                self._done.setdefault(vote.voter, set()).add(keys[vote.question])

    def application(self, hosts: Collection[str] = LOOPBACK) -> web.Application:
        """The page as a web application.

        Args:
            hosts: names under which it may be asked for; with any other allowed, a site whose name is made to lead here
                could read and vote.
        """
        application = web.Application(middlewares=[_guard(frozenset(hosts))], client_max_size=2**14)
        application.add_routes(
            [
                web.get("/", self._page),
                web.get("/image/{key}/{side}", self._image),
                web.post("/vote", self._vote),
                web.post("/again", self._again),
            ]
        )
        return application

    async def _page(self, request: web.Request) -> web.Response:
        voter = _voter(request.query) if request.query.get("voter") else ""
        done, skipped = self._done.get(voter, set()), self._skipped.get(voter, set())
        waiting = [key for key in self._order(voter) if key not in done | skipped] if voter else []
        if "pair" in request.query:  # one to be answered again
            waiting.insert(0, self._pair(request.query["pair"]).key)
        shown = [{"key": key, "pair": self._pairs[key], "images": self._addresses(voter, key)} for key in waiting[:2]]
        nonce = secrets.token_urlsafe(16)
        text = _PAGES.get_template("label.html").render(
            nonce=nonce,
            overall=OVERALL,
            voter=voter,
            shown=shown,
            token=self._draw(voter, waiting[0])[:_TOKEN] if shown else "",
            guideline=self._guidelines[shown[0]["pair"].aspect] if shown else "",
            last=request.query.get("last") if request.query.get("last") in self._pairs else None,
            done=len(done),
            skipped=len(skipped),
            total=len(self._pairs),
        )
        policy = (
            f"default-src 'none'; img-src 'self' data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def _image(self, request: web.Request) -> web.Response:
        pair, side = self._pair(request.match_info["key"]), request.match_info["side"]
        if side not in _SIDES:
            raise web.HTTPNotFound
        data = pair.read(self._sides(_voter(request.query), pair)[_SIDES.index(side)])
        kind = next((kind for start, kind in _FORMATS.items() if data.startswith(start)), "application/octet-stream")
        return web.Response(body=data, content_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def _vote(self, request: web.Request) -> web.Response:
        form = await request.post()
        voter, pair = _voter(form), self._pair(form.get("key"))
        if form.get("token") != self._draw(voter, pair.key)[:_TOKEN]:
            raise web.HTTPConflict(text="This page is of an earlier run of the program: load it again.")
        if form.get("choice") == "skip":
            self._skipped.setdefault(voter, set()).add(pair.key)
            raise web.HTTPSeeOther("/?" + urlencode({"voter": voter}))
        choice = _CHOICES.get(str(form.get("choice")))
        if choice is None:
            raise web.HTTPBadRequest(text="There is no such choice.")
        try:
            seconds = float(str(form.get("seconds", "")))
            vote = Vote(voter, pair.prompt_id, *self._sides(voter, pair), pair.aspect, choice, seconds)
            await asyncio.to_thread(self._votes.add, vote)  # another program may hold the file: others go on meanwhile
        except ValueError as error:
            raise web.HTTPBadRequest(text="A vote takes from no seconds to a day.") from error
        except OSError as error:
            log.warning("A vote was not kept: %s", error)
            raise web.HTTPInsufficientStorage(
                text=f"This vote was not kept. {error} Then go back and vote again."
            ) from error
        self._done.setdefault(voter, set()).add(pair.key)
        raise web.HTTPSeeOther("/?" + urlencode({"voter": voter, "last": pair.key}))

    async def _again(self, request: web.Request) -> web.Response:
        voter = _voter(await request.post())
        self._skipped.pop(voter, None)
        raise web.HTTPSeeOther("/?" + urlencode({"voter": voter}))

    def _order(self, voter: str) -> list[str]:
        """All pairs as this voter meets them: aspect by aspect, shuffled within."""
        place = {aspect: index for index, aspect in enumerate(self._aspects)}
        return sorted(self._pairs, key=lambda key: (place[self._pairs[key].aspect], self._draw(voter, key)))

    def _sides(self, voter: str, pair: Pair) -> tuple[str, str]:
        """The image shown on the left and that on the right."""
        first, second = pair.images
        return (first, second) if int(self._draw(voter, pair.key)[-1], 16) % 2 else (second, first)

    def _addresses(self, voter: str, key: str) -> list[str]:
        return [f"/image/{key}/{side}?" + urlencode({"voter": voter}) for side in _SIDES]

    def _draw(self, voter: str, key: str) -> str:
        """Digits that look random: they order the pairs, choose sides, and show that a form is of this page."""
        return _digest(self._seed, voter, key)

    def _pair(self, key: object) -> Pair:
        if not isinstance(key, str) or key not in self._pairs:
            raise web.HTTPNotFound(text="There is no such pair.")
        return self._pairs[key]


def serve(labeler: Labeler, *, host: str = "127.0.0.1", port: int = 8780) -> None:
    """Serves the page until it is interrupted.

    Args:
        labeler: the page.
        host: the address or name it is served under. Whoever can reach it can vote under any name, so keep to this
            machine, and let people come through `ssh -L`.
        port: of that address.

    Raises:
        ValueError: the host stands for every address, or there is no such port.
        OSError: the port is taken.
    """
    if not 0 < port < 2**16:
        raise ValueError(f"port={port} must be a number from 1 to {2**16 - 1}.")
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(f"host={host!r} would serve the page to every network: name the one address that is meant.")
    if host not in LOOPBACK:
        log.warning("Whoever can reach %s can see the images and vote under any name", host)
    log.info("Label images on http://%s:%d (interrupt to stop)", f"[{host}]" if ":" in host else host, port)
    web.run_app(labeler.application({*LOOPBACK, host}), host=host, port=port, print=None, access_log=None)


def dataset_pairs(folder: Path, split: str, aspects: Sequence[str], prompts: int, seed: int = 0) -> list[Pair]:
    """Two random images of each of some random prompts, to be compared in every one of these aspects.

    Prompts come from few row groups, several from each, since all images of a group are read. Those chosen stay in
    memory.

    Args:
        folder: of the dataset.
        split: whose prompts.
        aspects: what is asked of each two images.
        prompts: how many; fewer if there are not so many with two images.
        seed: of the choice.

    Raises:
        ValueError: the dataset has no such split.
    """
    rng = random.Random(seed)
    files = shards(folder).get(split)
    if not files:
        raise ValueError(f"'{folder}' has no {split} split in data/{split}-*.parquet.")
    groups = [(file, group) for file in files for group in range(parquet.metadata(file).num_row_groups)]
    rng.shuffle(groups)
    each, found = max(_GROUP_ROWS, math.ceil(prompts / max(len(groups), 1))), []
    for file, group in groups:
        rows = parquet.row_group(file, group, ["prompt_id", "prompt", "images"])
        enough = [row for row in rng.sample(range(len(rows)), len(rows)) if len(rows["images"][row]) > 1]
        for row in enough[: min(each, prompts - len(found))]:
            [chosen] = parquet.values(file, rows.slice(row, 1))
            images = {image["image_id"]: image["image"]["bytes"] for image in rng.sample(chosen["images"], 2)}
            found.append((chosen["prompt_id"], tuple(images), chosen["prompt"], images.__getitem__))
        if len(found) == prompts:
            break
    return [Pair(number, names, prompt, aspect, read) for aspect in aspects for number, names, prompt, read in found]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def _voter(fields: Mapping[str, object]) -> str:
    name = fields.get("voter")
    if not isinstance(name, str) or not voter_is_named(name.strip()):
        raise web.HTTPBadRequest(text="A voter needs a name of printable characters, not too many.")
    return name.strip()


def _guard(hosts: frozenset[str]) -> Callable:
    """Refuses what another site had a browser send, and marks every answer as not to be reused elsewhere."""

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if _HOST.sub("", request.host) not in hosts:
            raise web.HTTPForbidden(text="This page is not served under that name.")
        origin = request.headers.get("Origin")
        if request.method == "POST" and origin not in (None, f"http://{request.host}"):
            raise web.HTTPForbidden(text="This came from another site.")
        try:
            response = await handler(request)
        except web.HTTPException as answer:
            answer.headers.update(_HEADERS)
            raise
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.update(_HEADERS)
        return response

    return guard


_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
