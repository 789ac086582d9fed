"""The page on which people compare images, driven over HTTP on this machine."""

import asyncio
import html
import io
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from vp_rl.visionprefer import schema
from vp_rl.visionprefer.label import LOOPBACK, Labeler, Pair, dataset_pairs, serve
from vp_rl.visionprefer.votes import OVERALL, Vote, Votes

GUIDELINES = {"fidelity": "# Look\n\n- at *hands* <b>only</b>", "aesthetic": "Beauty.", OVERALL: "All."}
Play = Callable[["Player"], Awaitable[None]]


def png(name: str) -> bytes:
    """A picture that tells which it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="png")
    return buffer.getvalue() + name.encode()


def pairs(count: int = 6, aspects: tuple[str, ...] = ("fidelity", "aesthetic"), prompt: str = "prompt") -> list[Pair]:
    return [
        Pair(number, (f"{number}-a", f"{number}-b"), f"{prompt} {number}", aspect, png)
        for aspect in aspects
        for number in range(count)
    ]


class Player:
    """A person at the page."""

    def __init__(self, client: TestClient, voter: str = "ann") -> None:
        self.client, self.voter = client, voter

    async def get(self, path: str, **parameters: str) -> ClientResponse:
        return await self.client.get(path, params=parameters, allow_redirects=False)

    async def see(self, **parameters: str) -> dict[str, str]:
        """The form of the next question, with everything it says; empty where there is none."""
        response = await self.get("/", voter=self.voter, **parameters)
        assert response.status == 200
        text = await response.text()
        fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', text))
        images = [html.unescape(address) for address in re.findall(r'<img src="([^"]+)"', text)]
        asked = re.findall(r"<strong>([^<]+)</strong>", text)
        return (
            {**fields, "page": text, "left": images[0], "right": images[1], "aspect": asked[0]}
            if "key" in fields
            else {}
        )

    async def names(self, seen: dict[str, str]) -> tuple[str, str]:
        """Which images are on the left and on the right."""
        read = [await (await self.client.get(seen[side])).read() for side in ("left", "right")]
        return read[0][len(png("")) :].decode(), read[1][len(png("")) :].decode()

    async def vote(
        self, choice: str, seen: dict[str, str] | None = None, headers: dict | None = None, **changes: str
    ) -> ClientResponse:
        fields = {name: (seen or await self.see())[name] for name in ("voter", "key", "token", "seconds")}
        data = {**fields, "choice": choice, **changes}
        return await self.client.post("/vote", data=data, headers=headers, allow_redirects=False)


def play(folder: Path, *scenes: Play, asked: list[Pair] | None = None, hosts: tuple[str, ...] = LOOPBACK) -> list[Vote]:
    """Serves the page while each scene is played, one after the other, and gives the votes."""
    votes = Votes(folder / "journal.sqlite")

    async def run() -> None:
        labeler = Labeler(pairs() if asked is None else asked, GUIDELINES, votes)
        async with TestClient(TestServer(labeler.application(hosts))) as client:
            for scene in scenes:
                await scene(Player(client))

    asyncio.run(run())
    found = votes.read()
    votes.close()
    return found


def test_a_person_gets_through_all_pairs_once_and_every_vote_is_kept(tmp_path: Path) -> None:
    shown = []

    async def scene(ann: Player) -> None:
        while seen := await ann.see():
            shown.append((seen["aspect"], await ann.names(seen)))
            assert f"{len(shown) - 1} of 12" in seen["page"]
            response = await ann.vote("left", seen, seconds="1.5")
            assert (response.status, response.headers["Location"]) == (303, f"/?voter=ann&last={seen['key']}")
        page = await (await ann.get("/", voter="ann")).text()
        assert "Thank you!" in page
        assert "12 of 12" in page

    votes = play(tmp_path, scene)
    assert [(vote.aspect, (vote.left, vote.right)) for vote in votes] == shown
    assert {(vote.prompt_id, vote.aspect) for vote in votes} == {(pair.prompt_id, pair.aspect) for pair in pairs()}
    assert {(vote.voter, vote.choice, vote.seconds) for vote in votes} == {("ann", "left", 1.5)}
    assert {frozenset((vote.left, vote.right)) for vote in votes} == {frozenset(pair.images) for pair in pairs()}


def test_a_vote_names_the_image_that_was_seen_on_that_side(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        while seen := await ann.see():
            await ann.vote("left" if (await ann.names(seen))[0].endswith("b") else "right", seen)

    votes = play(tmp_path, scene)
    assert all(getattr(vote, vote.choice).endswith("b") for vote in votes)
    assert 0 < sum(vote.choice == "left" for vote in votes) < 12


def test_aspects_come_one_at_a_time_with_their_guideline(tmp_path: Path) -> None:
    aspects = []

    async def scene(ann: Player) -> None:
        while seen := await ann.see():
            aspects.append(seen["aspect"])
            assert ("Beauty." in seen["page"]) == (seen["aspect"] == "aesthetic")
            assert ("<em>hands</em> &lt;b&gt;only&lt;/b&gt;" in seen["page"]) == (seen["aspect"] == "fidelity")
            await ann.vote("tie", seen)

    play(tmp_path, scene)
    assert aspects == ["fidelity"] * 6 + ["aesthetic"] * 6


def test_order_and_sides_are_each_voters_own_and_fair(tmp_path: Path) -> None:
    orders: dict[str, list[tuple[str, str]]] = {}

    async def scene(ann: Player) -> None:
        for voter in ("ann", "bob", "eve"):
            person = Player(ann.client, voter)
            orders[voter] = []
            while seen := await person.see():
                orders[voter].append(await person.names(seen))
                await person.vote("tie", seen)

    play(tmp_path, scene, asked=pairs(40, ("fidelity",)))
    assert len({tuple(tuple(sorted(sides)) for sides in order) for order in orders.values()}) == 3
    lefts = Counter(left[-1] for order in orders.values() for left, _ in order)
    assert abs(lefts["a"] - 60) < 4 * (120 / 4) ** 0.5  # 4 standard deviations


def test_nothing_on_the_page_tells_which_image_is_which(tmp_path: Path) -> None:
    asked = [
        Pair(1, ("base/1", "tuned/1"), "a cat", OVERALL, png),
        Pair(2, ("base/2", "tuned/2"), "a dog", OVERALL, png),
    ]

    async def scene(ann: Player) -> None:
        for _ in range(2):
            seen = await ann.see()
            assert "all in all" in seen["page"]
            assert not re.search("base|tuned", seen["page"].split("</style>")[1])
            for side in ("left", "right"):
                response = await ann.client.get(seen[side])
                assert not re.search("base|tuned", str(response.headers) + seen[side])
            await ann.vote("tie", seen)

    votes = play(tmp_path, scene, asked=asked)
    assert {vote.aspect for vote in votes} == {OVERALL}


def test_a_new_start_goes_on_where_it_was_left(tmp_path: Path) -> None:
    seen = []

    async def some(ann: Player) -> None:
        for _ in range(5):
            seen.append((await ann.see())["key"])
            await ann.vote("right")

    async def another(ann: Player) -> None:
        assert "0 of 12" in (await Player(ann.client, "bob").see())["page"]

    play(tmp_path, some)
    votes = play(tmp_path, some, another)
    assert len(votes) == len(set(seen)) == 10


def test_skipped_pairs_come_again_at_the_end_and_are_no_votes(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        first = await ann.see()
        await ann.vote("skip", first)
        assert (await ann.see())["key"] != first["key"]
        assert "1 skipped" in (await ann.see())["page"]
        while await ann.see():
            await ann.vote("tie")
        page = await (await ann.get("/", voter="ann")).text()
        assert "All others are answered." in page
        assert (await ann.client.post("/again", data={"voter": "ann"}, allow_redirects=False)).status == 303
        assert (await ann.see())["key"] == first["key"]

    assert len(play(tmp_path, scene)) == 11


def test_the_last_answer_can_be_changed_and_the_new_one_holds(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        first = await ann.see()
        await ann.vote("left", first)
        after = await ann.see(last=first["key"])
        assert f"pair={first['key']}" in html.unescape(after["page"])
        again = await ann.see(pair=first["key"])
        assert [again[side] for side in ("key", "left", "right")] == [first[side] for side in ("key", "left", "right")]
        await ann.vote("right", again)
        assert (await ann.see())["key"] == after["key"]

    [vote] = play(tmp_path, scene)
    assert vote.choice == "right"
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        assert [row[0] for row in database.execute("SELECT choice FROM votes")] == ["left", "right"]  # nothing is lost


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"choice": "both"}, 400),
        ({"choice": ""}, 400),
        ({"seconds": "nan"}, 400),
        ({"seconds": "-1"}, 400),
        ({"seconds": "1e9"}, 400),
        ({"seconds": "soon"}, 400),
        ({"voter": ""}, 400),
        ({"voter": "x" * 201}, 400),
        ({"voter": "a\x00b"}, 400),
        ({"voter": "bob"}, 409),  # another voter's sides may be others
        ({"token": "0" * 16}, 409),
        ({"key": "0" * 40}, 404),
        ({"key": "../../etc/passwd"}, 404),
        ({"voter": "y" * 20_000}, 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_votes_that_cannot_be_are_refused_and_leave_no_trace(tmp_path: Path, changes: dict, status: int) -> None:
    async def scene(ann: Player) -> None:
        response = await ann.vote(**{"choice": "left", **changes})
        assert response.status == status
        assert len(await response.text()) < 200
        assert "0 of 12" in (await ann.see())["page"]

    assert play(tmp_path, scene) == []


@pytest.mark.parametrize("missing", ["voter", "key", "token", "seconds", "choice"])
def test_a_vote_without_one_of_its_parts_is_refused(tmp_path: Path, missing: str) -> None:
    async def scene(ann: Player) -> None:
        seen = await ann.see()
        fields = {"choice": "left", **{name: seen[name] for name in ("voter", "key", "token", "seconds")}}
        del fields[missing]
        for data in (fields, {**fields, missing: io.BytesIO(b"a file")}):
            assert (await ann.client.post("/vote", data=data)).status in (400, 404, 409)

    assert play(tmp_path, scene) == []


# --- safety


def test_a_prompt_is_shown_as_text(tmp_path: Path) -> None:
    hostile = """<script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7*7 }}' </h1>"""

    async def scene(ann: Player) -> None:
        page = (await ann.see())["page"]
        assert "<script>alert" not in page
        assert page.count("<img ") == 2
        title = re.findall(r"<h1>(.*?)</h1>", page)[0]
        assert html.unescape(title) == f"{hostile} 0"

    play(tmp_path, scene, asked=pairs(1, ("fidelity",), hostile))


def test_a_voters_name_is_shown_as_text(tmp_path: Path) -> None:
    name = """<b>"ann" & 'co'</b>"""

    async def scene(ann: Player) -> None:
        person = Player(ann.client, name)
        page = (await person.see())["page"]
        assert "<b>&" not in page.replace("&lt;b&gt;", "")
        assert name not in page
        seen = {field: html.unescape(value) for field, value in (await person.see()).items()}
        assert (await person.vote("left", seen)).status == 303

    [vote] = play(tmp_path, scene)
    assert vote.voter == name


@pytest.mark.parametrize(
    "path",
    [
        "../journal.sqlite",
        "..%2f..%2fjournal.sqlite",
        "%2e%2e/left",
        "0" * 40 + "/left",
        "{key}/up",
        "{key}/left/..",
        "{key}",
        "",
    ],
)
def test_no_address_leads_to_anything_but_the_images(tmp_path: Path, path: str) -> None:
    async def scene(ann: Player) -> None:
        key = (await ann.see())["key"]
        response = await ann.client.get(f"/image/{path.format(key=key)}", params={"voter": "ann"})
        assert response.status in (400, 404)
        assert not (await response.read()).startswith(b"SQLite")

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.com", 403),
        ("127.0.0.1.evil.com", 403),
        ("evil.com:8780", 403),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("[", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(tmp_path: Path, host: str, status: int) -> None:
    """Another name that was made to lead here could belong to a site that wants to read and vote."""

    async def scene(ann: Player) -> None:
        assert (await ann.client.get("/", headers={"Host": host})).status == status

    play(tmp_path, scene)


def test_a_name_that_was_asked_for_is_answered(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        assert (await ann.client.get("/", headers={"Host": "lab.example:80"})).status == 200

    play(tmp_path, scene, hosts=(*LOOPBACK, "lab.example"))


def test_another_sites_page_cannot_vote(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        own = f"http://{ann.client.host}:{ann.client.port}"
        for origin in ("https://evil.com", "null", own + "0", own.replace("http", "https")):
            assert (await ann.vote("left", headers={"Origin": origin})).status == 403
        assert (await ann.vote("left", headers={"Origin": own})).status == 303

    assert len(play(tmp_path, scene)) == 1


def test_no_other_site_can_frame_or_script_the_page(tmp_path: Path) -> None:
    async def scene(ann: Player) -> None:
        first, second = [await ann.get("/", voter="ann") for _ in range(2)]
        policy = first.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert policy != second.headers["Content-Security-Policy"]  # a nonce is used once
        assert "style=" not in await first.text()
        image = await ann.client.get((await ann.see())["left"])
        for response in (first, image, await ann.get("/nowhere"), await ann.vote("none")):
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert first.headers["Cache-Control"] == "no-store"
        assert image.headers["Content-Type"] == "image/png"

    play(tmp_path, scene)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_the_page_is_not_served_to_every_network(tmp_path: Path, host: str) -> None:
    labeler = Labeler(pairs(), GUIDELINES, Votes(tmp_path / "journal.sqlite"))
    with pytest.raises(ValueError, match="name the one address"):
        serve(labeler, host=host)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([*pairs(2), pairs(1)[0]], "twice"),
        ([pairs(1)[0], Pair(0, ("0-b", "0-a"), "prompt 0", "fidelity", png)], "twice"),
        (pairs(1, ("beauty",)), "no guideline for beauty"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(tmp_path: Path, asked: list[Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labeler(asked, GUIDELINES, Votes(tmp_path / "journal.sqlite"))


def test_a_vote_that_waits_for_another_program_keeps_nobody_else(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)

    async def scene(ann: Player) -> None:
        seen = await ann.see()
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(ann.vote("left", seen))
        await asyncio.sleep(0.2)
        page = await asyncio.wait_for(Player(ann.client, "bob").see(), 5)  # it took until the other program let go
        assert page
        assert not waiting.done()
        other.execute("ROLLBACK")
        assert (await waiting).status == 303

    assert len(play(tmp_path, scene)) == 1


def test_a_vote_that_cannot_be_kept_is_said_on_the_page_and_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Votes.add

    def full(self: Votes, vote: Vote) -> None:
        self._database.execute("PRAGMA max_page_count = 1")
        for _ in range(5000):
            kept(self, vote._replace(voter="somebody else"))

    async def scene(ann: Player) -> None:
        seen = await ann.see()
        monkeypatch.setattr(Votes, "add", full)
        response = await ann.vote("left", seen)
        assert response.status == 507
        assert re.fullmatch(
            r"This vote was not kept\. '.*journal\.sqlite' cannot be written, as the disk is full: make room.*",
            await response.text(),
        )
        monkeypatch.undo()
        asked = (await ann.see())["key"]
        assert asked == seen["key"]

    assert "ann" not in {vote.voter for vote in play(tmp_path, scene)}


@pytest.mark.parametrize("port", [0, -1, 65536, 99999])
def test_a_port_that_there_is_not_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(ValueError, match=rf"port={port} must be a number from 1 to 65535"):
        serve(Labeler(pairs(), GUIDELINES, Votes(tmp_path / "votes.sqlite")), port=port)


# --- votes


def test_a_vote_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from vp_rl.visionprefer.votes import Vote, Votes\n"
        "Votes(Path(sys.argv[1])).add(Vote('ann', 1, 'a', 'b', 'fidelity', 'tie', 2.0)); os.kill(os.getpid(), 9)"
    )
    file = tmp_path / "work" / "journal.sqlite"
    assert subprocess.run([sys.executable, "-c", program, str(file)], check=False).returncode == -9
    [vote] = Votes(file).read()
    assert vote._replace(created=0) == Vote("ann", 1, "a", "b", "fidelity", "tie", 2.0)
    assert vote.created > 1.6e9


def test_votes_are_added_beside_whatever_else_the_file_holds(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.sqlite") as builder:
        builder.execute("PRAGMA journal_mode=WAL")
        builder.execute("CREATE TABLE answers (text)")
        builder.execute("INSERT INTO answers VALUES ('kept')")
        builder.commit()
        reading = builder.execute("SELECT * FROM answers")  # a reader that does not finish
        votes = Votes(tmp_path / "journal.sqlite")
        votes.add(Vote("ann", 1, "a", "b", "fidelity", "left"))
        assert reading.fetchall() == [("kept",)]
        assert builder.execute("SELECT voter, choice FROM votes").fetchall() == [("ann", "left")]
        assert Votes(tmp_path / "journal.sqlite").read() == votes.read()


@pytest.mark.parametrize(
    "changes",
    [{"voter": " ann"}, {"voter": ""}, {"choice": "both"}, {"left": "b"}, {"seconds": -0.1}, {"seconds": float("nan")}],
    ids=str,
)
def test_a_vote_that_makes_no_sense_is_not_written(tmp_path: Path, changes: dict) -> None:
    votes = Votes(tmp_path / "journal.sqlite")
    with pytest.raises(ValueError, match="voter's name|No vote could be"):
        votes.add(Vote("ann", 1, "a", "b", "fidelity", "left")._replace(**changes))
    assert votes.read() == []


# --- pairs of a dataset


def dataset(folder: Path, prompts: int = 30) -> Path:
    (folder / "data").mkdir()
    rows = [
        {
            "prompt_id": number,
            "prompt": f"prompt {number}",
            "images": [
                {"image_id": f"{number}-{i}", "image": {"bytes": f"{number}-{i}".encode()}} for i in range(number % 5)
            ],
        }
        for number in range(prompts)
    ]
    table = pyarrow.Table.from_pylist(rows, schema=schema.FEATURES.arrow_schema)
    parquet.write_table(table, folder / "data" / "test-00000-of-00001.parquet", row_group_size=6)
    return folder


def test_pairs_are_two_images_of_a_prompt_in_every_aspect(tmp_path: Path) -> None:
    found = dataset_pairs(dataset(tmp_path), "test", ["fidelity", "aesthetic"], 12)
    assert len({pair.prompt_id for pair in found}) == 12
    assert {pair.question for pair in found[:12]} == {(*pair.question[:2], "fidelity") for pair in found[12:]}
    for pair in found:
        assert pair.prompt == f"prompt {pair.prompt_id}"
        assert len(set(pair.images)) == 2
        assert [pair.read(name).decode() for name in pair.images] == list(pair.images)
        assert {name.split("-")[0] for name in pair.images} == {str(pair.prompt_id)}


def test_the_seed_decides_which_pairs_are_asked(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    first, again, other = (
        [pair.question for pair in dataset_pairs(folder, "test", ["fidelity"], 10, seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_there_are_no_more_pairs_than_prompts_with_two_images(tmp_path: Path) -> None:
    found = dataset_pairs(dataset(tmp_path), "test", ["fidelity"], 100)
    assert sorted(pair.prompt_id for pair in found) == [number for number in range(30) if number % 5 > 1]
    with pytest.raises(ValueError, match="has no train split"):
        dataset_pairs(tmp_path, "train", ["fidelity"], 10)
