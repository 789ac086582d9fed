"""The builder as a whole: a paid annotator that fails in all ways, second opinions, screening, Ray, its script."""

import asyncio
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import HOSTILE, KEY, ChatServer
from fakes import read_dataset
from huggingface_hub import HfApi
from PIL import Image
from test_visionprefer import MAKERS, Lists, builder

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.annotators.polish import OpenAIChatRewriter
from vp_rl.annotators.ray_workers import RayAnnotator
from vp_rl.annotators.scene import SceneAnnotator
from vp_rl.interfaces import Annotator, Policy
from vp_rl.policies.sd import StableDiffusion
from vp_rl.types import ASPECTS, Answer, Aspect, Rating
from vp_rl.visionprefer.annotate import SecondOpinions
from vp_rl.visionprefer.ask import BudgetReached
from vp_rl.visionprefer.build import Builder, Screen
from vp_rl.visionprefer.engine import RayEngine
from vp_rl.visionprefer.export import push
from vp_rl.visionprefer.image_folder import ImageFolder
from vp_rl.visionprefer.journal import Journal
from vp_rl.visionprefer.prompts import ScenePrompts
from vp_rl.visionprefer.schema import SPLITS

ROOT = Path(__file__).parents[1]
PROMPTS = [f"prompt {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def prompts(number: int = 20) -> Lists:
    return Lists(train=PROMPTS[: number - 4], validation=PROMPTS[-4:-2], test=PROMPTS[-2:])


def chat(server: ChatServer, **settings: float) -> Chat:
    return Chat("test", base_url=server.url, **{"timeout": 0.5, "concurrency": 16, **settings})


def paid(server: ChatServer, source: Lists | None = None, **settings: object) -> Builder:
    return builder(source or prompts(), OpenAIChatAnnotator(chat(server)), **settings)


def rows(folder: Path) -> list[dict]:
    return [row for split in SPLITS for row in read_dataset(folder, split)]


@pytest.mark.parametrize("number", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_every_question_to_a_hostile_server_ends_as_a_rating_or_with_its_reason(tmp_path: Path, number: int) -> None:
    many = Lists(train=[f"prompt {each}" for each in range(number)], validation=[], test=[])
    with ChatServer(tmp_path / "log.jsonl", faults=HOSTILE, latency=0.01) as server:
        patient = OpenAIChatAnnotator(chat(server, timeout=2.0))  # on a busy machine answers would be given up at 0.5 s
        builder(many, patient, images_per_prompt=2).build(tmp_path / "set")
        sent = [json.loads(line)["outcome"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    with Journal(tmp_path / "set.work" / "journal.sqlite") as journal:
        ended = {(spent.outcome): spent.calls for spent in journal.spent()}
        assert len(journal.accepted()) == ended["accepted"] >= 0.9 * 4 * number
        failed = journal.failures().keys() - journal.accepted()
        assert len(journal.accepted()) + len(failed) == 4 * number
        assert all(reason.startswith(("refused: ", "unreadable: ")) for reason in journal.reasons(failed))
    # Paid for: every answer that came, readable or not; each is in the journal, and none came for nothing.
    outcomes = Counter(sent)
    readable_or_not = ("ok", "malformed", "truncated", "out_of_range", "wrong_number")
    answered = [outcome for outcome in sent if outcome in readable_or_not]
    assert ended["accepted"] == outcomes["ok"]
    assert ended["accepted"] + ended.get("unreadable", 0) == len(answered)
    assert ended["refused"] == outcomes["refusal"]
    kept = rows(tmp_path / "set")
    assert len(kept) < number
    assert f"{len(kept):,}" in (tmp_path / "set" / "README.md").read_text()
    assert "fewer than two rated images" in (tmp_path / "set" / "README.md").read_text()


def test_an_answer_that_cannot_be_read_any_more_is_named_with_its_row(tmp_path: Path) -> None:
    with ChatServer(tmp_path / "log.jsonl") as server:
        built = paid(server, Lists(train=["a cat", "a dog"], validation=[], test=[]), images_per_prompt=2)
        built.build(tmp_path / "set", "annotate")
        file = tmp_path / "set.work" / "journal.sqlite"
        with sqlite3.connect(file) as other:
            [(key,)] = other.execute("SELECT key FROM answers ORDER BY id LIMIT 1 OFFSET 5")
            other.execute("UPDATE answers SET text = '{\"ratings\": []}' WHERE key = ?", (key,))
        other.close()
        with pytest.raises(ValueError, match=r"accepted answer of \w+ .* to '.*, a (cat|dog)'") as found:
            built.build(tmp_path / "set", "export")
        with sqlite3.connect(file) as other:  # as it says
            other.execute(re.search(r"DELETE .*?'[0-9A-F]+'", str(found.value))[0])  # type: ignore[index]
        other.close()
        asked = len(server.requests)
        built.build(tmp_path / "set")
        assert len(server.requests) == asked + 1
    assert len(rows(tmp_path / "set")) == 2


def test_prompts_are_polished_with_the_original_beside_them_and_no_two_become_one(tmp_path: Path) -> None:
    raw = ["a cat, trending on artstation", "a cat", "a dog, 8k", "a boat"]
    with ChatServer(tmp_path / "log.jsonl") as server:
        rewriter = OpenAIChatRewriter(chat(server))
        paid(server, Lists(train=raw, validation=[], test=[]), rewriter=rewriter).build(tmp_path / "set")
    found = {row["source_prompt"]: row["prompt"] for row in rows(tmp_path / "set")}
    assert found == {"a cat, trending on artstation": "a cat", "a dog, 8k": "a dog", "a boat": "a boat"}
    dropped = [json.loads(line) for line in (tmp_path / "set.work" / "dropped.jsonl").read_text().splitlines()]
    assert dropped == [{"prompt": "a cat", "reason": "duplicate after polishing", "detail": raw[0]}]


def test_a_build_goes_on_after_its_budget_was_raised_and_asks_nothing_twice(tmp_path: Path) -> None:
    with ChatServer(tmp_path / "log.jsonl") as server:
        prices = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0}
        annotator = OpenAIChatAnnotator(chat(server, timeout=120.0, **prices))  # busy machines answer late
        with pytest.raises(BudgetReached):
            builder(prompts(), annotator, budget_usd=60.0).build(tmp_path / "set")
        asked = len(server.requests)
        assert 0 < asked < 80
        assert not (tmp_path / "set").exists()
        (estimate,) = builder(prompts(), annotator).plan(tmp_path / "set")
        assert estimate.calls == 80 - asked
        assert len(server.requests) == asked
        builder(prompts(), annotator, budget_usd=1000.0).build(tmp_path / "set")
        assert len(server.requests) == 80
    assert len(rows(tmp_path / "set")) == 20
    with Journal(tmp_path / "set.work" / "journal.sqlite") as journal:
        # The server counts 1,000 tokens, 100 an image and 50 for the answer.
        assert journal.usd() == pytest.approx(80 * 1450 * 1e-3)


def test_the_key_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    with ChatServer(tmp_path / "log.jsonl", faults={"refusal": 0.2, "malformed": 0.2}) as server:
        paid(server).build(tmp_path / "set")
        for script in ("401", "403"):
            server.script = [script] * (server.number + 1)
            with pytest.raises(ValueError, match="OPENAI_API_KEY"):
                paid(server, seed=5).build(tmp_path / script)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


class Fixed(Annotator):
    """Rates by the place of an image in its call: what position bias looks like."""

    version, concurrency = "1", 8

    def __init__(self, name: str) -> None:
        self.name = name

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        return Answer(write_ratings([Rating(1 + place, "first is worst") for place in range(len(images))]))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


def test_second_opinions_are_of_a_sample_and_the_datasets_own_ratings_are_the_first_annotators(tmp_path: Path) -> None:
    second = SecondOpinions(Fixed("other"), share=0.5, backwards=True)
    builder(prompts(), Fixed("own"), second_opinions=second).build(tmp_path / "set")
    found = rows(tmp_path / "set")
    counts = Counter(frozenset(note["annotator"] for note in row["annotations"]) for row in found)
    assert set(counts) == {frozenset(["own"]), frozenset(["own", "own/reversed", "other"])}
    assert min(counts.values()) >= 4  # of 20 at a half
    for row in found:
        by = {(n["annotator"], n["image_id"], n["aspect"]): n for n in row["annotations"]}
        for (name, image, aspect), note in by.items():
            assert note["rating"] == 1 + note["position"]
            if name == "own/reversed":
                assert note["position"] == 3 - by["own", image, aspect]["position"]
            if name == "other":
                assert note["position"] == by["own", image, aspect]["position"]
    about = json.loads((tmp_path / "set" / "schema.json").read_text())
    assert about["annotator"] == "own"
    card = (tmp_path / "set" / "README.md").read_text()
    assert "own/reversed" in card
    assert "Krippendorff" in card


def test_images_are_shown_in_an_order_of_their_own_for_each_aspect_and_prompt(tmp_path: Path) -> None:
    builder(prompts(), Fixed("own")).build(tmp_path / "set")
    orders = set()
    for row in rows(tmp_path / "set"):
        place = {image["image_id"]: number for number, image in enumerate(row["images"])}
        for aspect in ASPECTS:
            notes = sorted((n["position"], place[n["image_id"]]) for n in row["annotations"] if n["aspect"] == aspect)
            orders.add(tuple(number for _, number in notes))
    assert len(orders) >= 20  # of 24, in 80 draws: 22.9 are expected


@pytest.mark.parametrize(("per_call", "calls"), [(0, 80), (1, 320), (3, 160)])
def test_so_many_images_are_shown_at_once_as_are_wanted(tmp_path: Path, per_call: int, calls: int) -> None:
    seen = Counter()

    class Counting(Fixed):
        async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
            seen[len(images)] += 1
            return await super().ask(prompt, images, aspect)

    builder(prompts(), Counting("own"), images_per_call=per_call).build(tmp_path / "set")
    assert seen.total() == calls
    assert max(seen) == (per_call or 4)
    assert len(rows(tmp_path / "set")) == 20


def test_images_of_ones_own_are_rated_and_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    made = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)
    (tmp_path / "mine").mkdir()
    entries = []
    for number, pixels in enumerate(made):
        picture = Image.fromarray(pixels).convert("CMYK" if number == 5 else "RGB")
        name = f"{number}.{'jpg' if number == 5 else 'png'}"
        picture.save(tmp_path / "mine" / name)
        entries.append({"file": name, "prompt": f"prompt {number // 4}", "generator": f"model {number % 2}"})
    (tmp_path / "mine" / "0.png").write_bytes((tmp_path / "mine" / "0.png").read_bytes()[:200])
    frames = [Image.fromarray(pixels) for pixels in made[:2]]
    frames[0].save(tmp_path / "mine" / "1.png", format="gif", save_all=True, append_images=frames[1:])
    (tmp_path / "mine" / "9.png").write_bytes((tmp_path / "mine" / "8.png").read_bytes())  # the same picture again
    (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    source = ImageFolder(str(tmp_path / "mine"), validation=0, test=0)
    settings = {"generators": {"unused": unused}, "annotator": Fixed("own")}
    Builder(source, **settings).build(tmp_path / "set")
    found = {row["prompt"]: row["images"] for row in rows(tmp_path / "set")}
    assert {prompt: len(images) for prompt, images in found.items()} == {"prompt 0": 2, "prompt 1": 4, "prompt 2": 3}
    for images in found.values():
        assert all((image["width"], image["height"], image["steps"]) == (30, 20, None) for image in images)
    by_name = {image["image"]["bytes"]: image["generator"] for image in found["prompt 2"]}
    assert by_name[(tmp_path / "mine" / "10.png").read_bytes()] == "model 0"
    converted = Image.open(io.BytesIO(found["prompt 1"][1]["image"]["bytes"]))
    assert (converted.mode, converted.format) == ("RGB", "PNG")
    dropped = [json.loads(line) for line in (tmp_path / "set.work" / "dropped.jsonl").read_text().splitlines()]
    assert [(each["prompt"], each["reason"]) for each in dropped] == [("prompt 0", "image refused")] * 2
    assert "0.png': The PNG file is cut off" in dropped[0]["detail"]
    assert "1.png': The GIF file is animated" in dropped[1]["detail"]
    card = (tmp_path / "set" / "README.md").read_text()
    assert "2 of 11 images are not in the set: refused" in card
    assert "model 1" in card


def unused() -> Policy:
    raise AssertionError("no image is to be made")


def test_a_missing_key_is_noticed_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer(tmp_path / "log.jsonl") as server:
        for settings in ({}, {"rewriter": OpenAIChatRewriter(chat(server)), "annotator": Fixed("own")}):
            given = {"annotator": OpenAIChatAnnotator(chat(server)), "generators": {"unused": unused}, **settings}
            with pytest.raises(ValueError, match="OPENAI_API_KEY"):
                Builder(prompts(), **given).build(tmp_path / "set")
        paid(server).plan(tmp_path / "set")  # what it would cost can be known without a key
        paid(server).build(tmp_path / "set", until="generate")
    assert not (tmp_path / "set").exists()


def test_an_image_that_is_screened_out_is_not_rated_and_the_card_counts_it(tmp_path: Path) -> None:
    class ByBytes(Fixed):
        async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
            assert aspect == "harmlessness"
            return Answer(write_ratings([Rating(1 + 4 * (len(image) % 2), "odd ones are safe") for image in images]))

    builder(prompts(), Fixed("own"), screen=Screen(ByBytes("screen"), at_least=3)).build(tmp_path / "set")
    found = rows(tmp_path / "set")
    assert found
    assert all(len(image["image"]["bytes"]) % 2 for row in found for image in row["images"])
    card = (tmp_path / "set" / "README.md").read_text()
    kept = sum(len(row["images"]) for row in found)
    assert f"{80 - kept} of 80 images are not in the set: refused, screened out" in card


def test_two_annotators_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="Two annotators are called 'scene'"):
        builder(second_opinions=SecondOpinions(SceneAnnotator()))
    with pytest.raises(ValueError, match=r"share=0 must be above 0"):
        SecondOpinions(share=0)


def test_two_builds_in_one_place_are_refused(tmp_path: Path) -> None:
    class Nested(Fixed):
        async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
            builder(prompts()).build(tmp_path / "set")
            return Answer("")

    with pytest.raises(OSError, match="Another build is at work"):
        builder(prompts(), Nested("own")).build(tmp_path / "set")


def test_a_stage_can_be_the_last_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    builder(prompts(), makers={"dark": lambda: pytest.fail("made")}).build(folder, until="prompts")
    lines = (tmp_path / "set.work" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS
    builder(prompts(), Fixed("own")).build(folder, until="generate")
    assert len(list((tmp_path / "set.work" / "images").rglob("*.png"))) == 80
    assert not folder.exists()
    makers = dict.fromkeys(MAKERS, lambda: pytest.fail("made again"))
    builder(prompts(), Fixed("own"), makers=makers).build(folder)
    assert len(rows(folder)) == 20


def test_a_finished_dataset_is_pushed_and_anything_else_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: done.append((name, how)) or f"hub/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **what: done.append(what))
    with pytest.raises(FileNotFoundError, match="No VisionPrefer dataset"):
        push(tmp_path / "set", "me/mine")
    assert not done
    builder(prompts(), Fixed("own")).build(tmp_path / "set")
    assert push(tmp_path / "set", "me/mine") == "hub/me/mine"
    assert done[0] == ("me/mine", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert done[1] == {"repo_id": "me/mine", "folder_path": tmp_path / "set", "repo_type": "dataset"}
    monkeypatch.undo()
    with pytest.raises(OSError, match="could not be uploaded to 'no such name'"):
        push(tmp_path / "set", "no such name")


@pytest.mark.slow
def test_ray_makes_the_images_of_the_local_engine(tmp_path: Path) -> None:
    makers = {"tiny-sd": partial(StableDiffusion, "tiny-sd", None)}  # what workers can import
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have it: the last bits depend on that
    try:
        for name, engine in (("local", None), ("ray", RayEngine(workers=2))):
            built = builder(prompts(), Fixed("own"), makers=makers, batch_size=8, engine=engine)
            built.build(tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    assert rows(tmp_path / "local") == rows(tmp_path / "ray")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["annotator=openai_chat", "annotator.chat.model=m", "annotator.chat.api_key_env=NO_KEY"], "NO_KEY"),
        (["annotator=openai_chat", "annotator.chat.model=m", "annotator.chat.base_url=http://127.0.0.1:9/v1"], ":9/v1"),
        (["prompts=file", "prompts.path=nowhere.txt"], "nowhere.txt"),
        (["budget_usd=0"], "budget_usd=0"),
        (["until=bild"], "until='bild' is no stage"),
        (["annotator=opneai"], "annotator/opneai"),
        (["folder=scripts"], "'scripts' is not empty"),
    ],
    ids=["no key", "wrong address", "no file", "no budget", "no stage", "no annotator", "no room"],
)
@pytest.mark.slow
def test_bad_input_gets_one_message(tmp_path: Path, overrides: list[str], said: str) -> None:
    places = [f"folder={tmp_path / 'set'}", f"hydra.run.dir={tmp_path / 'run'}"]
    small = ["prompts.train=4", "prompts.validation=2", "prompts.test=2"] if "prompts=file" not in overrides else []
    command = [sys.executable, "scripts/build_visionprefer.py", *places, *small, *overrides]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert KEY not in result.stdout + result.stderr


@pytest.mark.slow
def test_ray_workers_rate_as_the_annotator_here_does(tmp_path: Path) -> None:
    import ray

    source = ScenePrompts(4, 0, 0)
    rated = RayAnnotator(SceneAnnotator, workers=2)
    assert rated.concurrency == 2 * SceneAnnotator().concurrency
    try:
        builder(source, rated).build(tmp_path / "ray")
        picture = rows(tmp_path / "ray")[0]["images"][0]["image"]["bytes"]
        with pytest.raises(ValueError, match="no scene at all"):
            asyncio.run(rated.ask("no scene at all", [picture], "aesthetic"))
    finally:
        ray.shutdown()
    builder(source, SceneAnnotator()).build(tmp_path / "here")
    assert rows(tmp_path / "ray") == rows(tmp_path / "here")
