"""The dataset card: what people and the hub read, and that no prompt can write into it."""

import html
import io
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from PIL import Image

from vp_rl.types import ASPECTS, Usage
from vp_rl.visionprefer import card, plots, ratings, schema
from vp_rl.visionprefer.card import About, write_card
from vp_rl.visionprefer.estimates import NOTHING, Estimate
from vp_rl.visionprefer.journal import Spent
from vp_rl.visionprefer.markdown import Markdown, code, escape, fenced, number, percent, table
from vp_rl.visionprefer.statistics import measure
from vp_rl.visionprefer.votes import Vote

HOSTILE = (
    "<script>alert(1)</script> | a cell | `code` **bold** _it_ $x^2$ ![i](http://e.vil/x.png) [l](javascript:0) &amp; "
    "<img src=x onerror=alert(1)>\n# Title\n\n---\n- item\n1. one www.evil.com https://evil.com a@b.cd \\ ~~s~~ 红色 🟥"
)
PIECES = [
    *"*_`|<>&#[]()!~$\\-+=:@\"'\n \t",
    *("a", "b9", "é", "1.", "1)", "&lt;", "<b>", "</p>", "www.a.b", "http://a.b", "--", "```", "~~~"),
]


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pictures, which take a second."""
    monkeypatch.setattr(plots, "_write", lambda *_: None)


def row(number: int, split: str = "train", prompt: str | None = None, annotators: tuple[str, ...] = ("judge",)) -> dict:
    """One prompt with three images of two generators; ratings follow from the numbers."""
    rng = random.Random(number)
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (10 * number % 256, 90, 160)).save(buffer, format="png")
    images = [
        {
            "image_id": f"{number}-{image}",
            "image": {"bytes": buffer.getvalue(), "path": None},
            "generator": ("one", "two_b")[image % 2],
            "guidance_scale": rng.choice((1.0, 7.5)),
            "seed": image,
            "steps": 20,
            "width": 24,
            "height": 24,
        }
        for image in range(3)
    ]
    notes = [
        {
            "image_id": image["image_id"],
            "aspect": aspect,
            "rating": rng.randint(1, 5),
            "rationale": "because",
            "annotator": annotator,
            "template_version": "1",
            "position": place,
        }
        for annotator in annotators
        for aspect in ASPECTS
        for place, image in enumerate(images)
    ]
    text = prompt or f"prompt {number}"
    return {
        "prompt_id": number,
        "source_prompt": text,
        "prompt": text,
        "split": split,
        "images": images,
        "annotations": notes,
    }


def dataset(folder: Path, *rows: dict, **splits: int) -> Path:
    """Shards as the builder writes them; a split without rows has a file too."""
    (folder / "data").mkdir(parents=True)
    made = {"train": list(rows), "validation": [], "test": []}
    for offset, (split, count) in enumerate(splits.items()):
        made[split] += [row(100 * offset + number, split) for number in range(count)]
    for split, own in made.items():
        table = pyarrow.Table.from_pylist(own, schema=schema.FEATURES.arrow_schema)
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=2)
    return folder


def rendered(text: str) -> str:
    """As GitHub's and the hub's readers do, but for formulas."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


def words(page: str) -> str:
    """What is read on a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


# --- escaping


@pytest.mark.parametrize("frame", ["{}", "**{}**", "# {}", "> {}", "- {}", "| a | b |\n|--|--|\n| {} | c |"])
def test_escaped_text_is_read_as_it_is_wherever_it_stands(frame: str) -> None:
    rng = random.Random(0)
    tags = set(re.findall(r"<(\w+)", rendered(frame.format("word"))))
    for text in [HOSTILE, *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(1500))]:
        if text.split():
            page = rendered(frame.format(escape(text)))
            assert set(re.findall(r"<(\w+)", page)) == tags, text
            plain = " ".join(text.split())
            assert words(page) == words(rendered(frame.format("WORD"))).replace("WORD", plain), text


def test_addresses_do_not_become_links_by_themselves() -> None:
    for text in ("http://evil.com", "https://evil.com", "www.evil.com", "WWW.evil.com", "me@evil.com", "mailto:a"):
        assert not re.search(r"https?://|www\.|@|mailto:", escape(text), re.IGNORECASE)
        assert words(rendered(escape(text))) == text


def test_no_character_is_left_that_could_start_a_tag_or_a_cell() -> None:
    assert not re.search(r"[<>|`\n\\\[\]]", escape(HOSTILE + "`|<\\"))
    assert not re.search(r"&(?!#\d+;)", escape(HOSTILE))


def test_characters_that_cannot_be_seen_are_left_out() -> None:
    assert escape("a\x00b\u202ec\ud800d\u2028e") == "a b c d e"


def test_names_with_underscores_stay_readable_in_the_raw_file() -> None:
    assert escape("stable_diffusion_v1_5") == "stable_diffusion_v1_5"
    assert escape("79.1") == "79.1"
    assert escape("1. item") != "1. item"  # which would begin a list
    assert escape("a red star, and 2 blue ones (small)") == "a red star, and 2 blue ones (small)"


def test_what_is_markdown_is_not_escaped_twice() -> None:
    assert escape(escape("a*b")) == escape("a*b") == "a&#42;b"


def test_code_cannot_be_left() -> None:
    for text in ("a`b", "``", "`a`", "```\n<script>", "a"):
        page = rendered(f"x {code(text)} y")
        assert words(page).replace(" ", "") == "x" + "".join(text.split()) + "y"
        assert page.count("<") == 4
        assert rendered(fenced(f"x\n{text}\n# Title", "yaml")).count("<h1>") == 0


def test_numbers_have_intervals_where_there_are_any() -> None:
    nan = float("nan")
    assert percent(Estimate(0.5, 0.25, 0.75, 8, 4)) == "50.0% [25.0, 75.0]"
    assert percent(Estimate(0.5, 0.25, 0.75, 8, 4), interval=False) == "50.0%"
    assert number(Estimate(-0.001, -1.0, 1.0, 8, 4)) == "0.00 [-1.00, 1.00]"
    assert number(Estimate(3.0, nan, nan, 8, 1)) == "3.00"
    assert percent(NOTHING) == number(NOTHING) == "–"


def test_a_table_has_a_cell_for_each_value() -> None:
    page = rendered(table(["a|b", "c"], [("x | y", 1), (Markdown("**z**"), "<i>")]))
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page) == [
        "a|b",
        "c",
        "x | y",
        "1",
        "<strong>z</strong>",
        "&lt;i&gt;",
    ]


# --- the card


def test_load_dataset_finds_the_splits_and_nothing_else(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", train=3, validation=2)
    (folder / "schema.json").write_text("{}")
    parquet.write_table(pyarrow.table({"x": [1]}), folder / "data" / "training.parquet")
    text = write_card(folder, About(annotator="judge")).read_text()
    assert list((folder / "card").glob("*.png"))
    cache = str(tmp_path / "cache")
    found = {split: rows["prompt_id"][:] for split, rows in load_dataset(str(folder), cache_dir=cache).items()}
    assert found == {"train": [0, 1, 2], "validation": [100, 101]}
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "path/to/this/folder" in block
    block = block.replace('"path/to/this/folder"', f"{str(folder)!r}, cache_dir={cache!r}")
    scope: dict = {}
    exec(block, scope)
    assert scope["row"]["images"][0]["image"].size == (24, 24)


@pytest.mark.usefixtures("_undrawn")
def test_the_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    folder = dataset(tmp_path, train=2, test=1)
    write_card(
        folder, About(annotator="judge", license="cc-by-4.0", pretty_name='A "set": of | one', tags=["tiny", "rlhf"])
    )
    head = DatasetCard.load(folder / "README.md").data.to_dict()
    assert (head["license"], head["pretty_name"]) == ("cc-by-4.0", 'A "set": of | one')
    assert (head["task_categories"], head["size_categories"]) == (["text-to-image"], ["n<1K"])
    assert head["tags"].count("rlhf") == 1
    assert "tiny" in head["tags"]
    assert head["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*-of-*.parquet"},
                {"split": "test", "path": "data/test-*-of-*.parquet"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (179_000, "100K<n<1M"), (10**7, "10M<n<100M")]
)
def test_the_size_is_one_of_the_hubs_classes(rows: int, size: str) -> None:
    assert card._head(About(annotator="judge"), {"train": rows - 1, "test": 1}).to_dict()["size_categories"] == [size]


def test_every_picture_is_there_and_as_wide_as_a_readme(tmp_path: Path) -> None:
    rows = [row(each) for each in range(6)]
    for image in (image for each in rows for image in each["images"]):
        image["generator"] += " 红 $\\frac$"  # what the font lacks, and what would be a formula
    text = write_card(dataset(tmp_path, *rows), About(annotator="judge")).read_text()
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert set(named) == {f"card/{file.name}" for file in (tmp_path / "card").iterdir()}
    assert len(named) == 6
    for name in named:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert 800 < picture.width < 2000


@pytest.mark.usefixtures("_undrawn")
def test_the_numbers_are_those_of_the_statistics(tmp_path: Path) -> None:
    folder = dataset(tmp_path, train=20, test=10)
    text = write_card(folder, About(annotator="judge")).read_text()
    found = measure(ratings.batches(folder), "judge")
    for line in (
        "| Prompts for train | 20 |",
        "| Prompts for test | 10 |",
        f"| Ratings | {found.ratings} |",
        f"| pooled | {found.pairs['pooled']} | {1 - found.pairs['pooled'] / 360:.1%} |",
        f"| mean | {found.pairs['mean']} | {1 - found.pairs['mean'] / 90:.1%} |",
        f"| two_b | {percent(found.generators['two_b']['mean'])} |",
        f"| guidance 7.5 | {percent(found.guidance[7.5]['mean'])} |",
        f"| 3 | {number(found.positions.ratings[2]['pooled'], 3)} | {percent(found.positions.wins[2]['pooled'])} |",
    ):
        assert line in text
    aesthetic = found.histogram[1]
    assert "steps 20 |" not in text  # all images have as many
    mean = f"{sum((i + 1) * n for i, n in enumerate(aesthetic)) / 90:.2f}"
    assert f"| Aesthetic | {' | '.join(map(str, aesthetic))} | {mean} |" in text


def test_a_hostile_prompt_or_name_does_nothing(tmp_path: Path) -> None:
    hostile = row(1, prompt=HOSTILE)
    for image in hostile["images"][1:]:
        image["generator"] = ("one", HOSTILE)[image["generator"] != "one"]
    for note in hostile["annotations"]:
        note["annotator"] = HOSTILE
    about = About(
        annotator=HOSTILE,
        template_version=HOSTILE,
        pretty_name=HOSTILE,
        note=HOSTILE,
        settings={HOSTILE: [HOSTILE, Path("x"), (1, 2)]},
        licences={HOSTILE: HOSTILE},
        limits=[HOSTILE],
    )
    spent = [Spent("annotate", HOSTILE, "accepted", 1, Usage())]
    tame = About(annotator="judge", note="n", settings={"a": [1]}, licences={"a": "b"}, limits=["c"])
    plain = write_card(dataset(tmp_path / "a", row(1)), tame, spent=[spent[0]._replace(respondent="judge")])
    text = write_card(dataset(tmp_path / "b", hostile), about, spent=spent).read_text()
    page, tame_page = (rendered(each.split("\n---\n", 1)[1]) for each in (text, plain.read_text()))
    assert re.findall(r"<(?!/?code)[^>]*>", page) == re.findall(r"<(?!/?code)[^>]*>", tame_page)
    assert DatasetCard(text).data.to_dict()["pretty_name"] == " ".join(HOSTILE.split())
    assert "<script>" in words(page)  # to be read, not to be run


@pytest.mark.usefixtures("_undrawn")
def test_sections_are_there_only_where_there_is_something_to_say(tmp_path: Path) -> None:
    titles = {
        "Do annotators agree?": "second",
        "shown a second time in reversed order": "reversed",
        "Do people agree?": "people",
        "What it cost": "spent",
        "Prompts and images left out": "dropped",
        "A toy world": "note",
        "rewritten into plain descriptions": "polished",
        "Which images win": "varied",
    }
    few = row(1)
    for image in few["images"]:
        image |= {"generator": "one", "guidance_scale": 1.0}
    bare = write_card(dataset(tmp_path / "bare", few), About(annotator="judge")).read_text()
    assert [title for title in titles if title in bare] == []
    names = ("judge", "other", "judge/reversed")
    full = dataset(tmp_path / "full", *(row(each, annotators=names) for each in range(5)))
    votes = [Vote("x", 1, "1-0", "1-1", "fidelity", "left"), Vote("y", 1, "1-1", "1-0", "fidelity", "left")]
    about = About(annotator="judge", note="A toy world", dropped="| a |\n|---|\n| *b* |", polished=True)
    text = write_card(
        full, about, spent=[Spent("annotate", "judge", "accepted", 7, Usage(1000, 20, 0.5))], votes=votes
    ).read_text()
    assert [title for title in titles if title not in text] == []
    assert "| annotate | judge | accepted | 7 | 1,000 | 20 | 0.50 |" in text
    assert "| all |  |  | 7 | 1,000 | 20 | 0.50 |" in text
    assert "\n| *b* |\n" in text
    assert text.count("| other |") == 4  # one for each aspect
    assert "| judge/reversed |" not in text  # it is no other annotator
    assert "| two persons | Fidelity | 1 | 0.0% [0.0, 100.0] |" in text


@pytest.mark.usefixtures("_undrawn")
def test_samples_show_the_images_with_their_own_ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(plots, "sample", lambda images, file: shown.append((images, file)))
    rows = [row(each, annotators=("other", "judge", "third")) for each in range(7)]
    text = write_card(dataset(tmp_path, *rows), About(annotator="judge"), samples=9).read_text()
    assert len(shown) == len({images[0].data for images, _ in shown}) == 7
    for index, (images, file) in enumerate(shown, 1):
        assert file == tmp_path / "card" / f"sample-{index}.png"
        [found] = [each for each in rows if each["images"][0]["image"]["bytes"] == images[0].data]
        assert f"**{found['prompt']}**\n\n![Images of this prompt with their ratings](card/sample-{index}.png)" in text
        for image, made in zip(images, found["images"], strict=True):
            assert image.data == made["image"]["bytes"]
            assert image.caption.startswith(made["generator"])
            assert image.ratings == {
                note["aspect"]: note["rating"]
                for note in found["annotations"]
                if note["annotator"] == "judge" and note["image_id"] == made["image_id"]
            }


def test_an_image_that_cannot_be_decoded_does_not_cost_the_card(tmp_path: Path) -> None:
    broken = row(1)
    broken["images"][0]["image"]["bytes"] = b"\x89PNG no more"
    assert write_card(dataset(tmp_path, broken), About(annotator="judge")).is_file()


@pytest.mark.usefixtures("_undrawn")
def test_settings_are_written_as_yaml_that_can_be_read_back(tmp_path: Path) -> None:
    settings = {
        "generators": ["sd15", "sdxl"],
        "guidance_scales": (3.0, 7.5),
        "seed": 0,
        "prompts": "ünïcode",
        "at": Path("x"),
    }
    text = write_card(dataset(tmp_path, train=2), About(annotator="judge", settings=settings)).read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(block) == {**settings, "guidance_scales": [3.0, 7.5], "at": "x"}


def test_nothing_is_read_of_the_image_files_but_for_the_samples(tmp_path: Path) -> None:
    [rows] = ratings.batches(dataset(tmp_path, train=2))
    assert "bytes" not in str(rows.schema)
    assert "rationale" not in str(rows.schema)


def test_a_card_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        write_card(dataset(tmp_path), About(annotator="judge"))
    with pytest.raises(ValueError, match="'nobody' has rated nothing"):
        write_card(dataset(tmp_path / "set", train=1), About(annotator="nobody"))
