"""The sets' public formats, from small files in the same schema; and the real rankings of ImageReward's test set."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from fakes import write_dataset
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from vp_rl.data.sets import files
from vp_rl.data.sets.base import HumanSet, Judged, Scored
from vp_rl.data.sets.rankings import RankingColumns, Rankings
from vp_rl.evaluation import protocols
from vp_rl.types import ASPECTS

CONF = Path(__file__).parents[1] / "conf"
REAL = Path(__file__).parents[2] / "shared" / "data" / "prompts" / "imagereward_test_rankings.json"


def image(shade: int, format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, format=format)
    return buffer.getvalue()


def human(name: str, folder: Path, *overrides: str) -> HumanSet:
    """A set as conf/human/NAME.yaml has it, in another folder."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", [f"+human@data.it={name}", f"data.it.folder={folder}", *overrides])
    return instantiate(config.data.it)


def everything(judged: list[Judged]) -> set[str]:
    return {name for each in judged for name in each.images}


# --- ImageRewardDB


def test_the_real_rankings_have_the_published_counts() -> None:
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not here")
    columns = RankingColumns(images="generations", ranks="ranking")
    judged = Rankings("ImageRewardDB", str(REAL.parent), REAL.name, columns, [protocols.pooled]).judgements()
    assert len(judged) == 466
    assert len(everything(judged)) == sum(len(each.images) for each in judged) == 2720
    assert sum(len(each.images) * (len(each.images) - 1) // 2 for each in judged) == 7230
    rng = np.random.default_rng(0)
    outcome = protocols.pooled([Scored(each.prompt, each.ranks, rng.random(len(each.images))) for each in judged])
    assert outcome.possible.sum() == 6399
    assert not np.any(protocols.prompt_mean([Scored(e.prompt, e.ranks, -e.ranks) for e in judged]).possible == 0)


def image_reward_db(folder: Path) -> None:
    """metadata-test.parquet and an archive with flat names, as on the hub."""
    rows = [
        {
            "image_path": f"images/test/test_1/{prompt}{number}.webp",
            "prompt_id": f"id-{prompt}",
            "prompt": f"prompt {prompt}",
            "classification": "People",
            "image_amount_in_total": 3,
            "rank": rank,
            "overall_rating": 8 - rank,
            "image_text_alignment_rating": rank,
            "fidelity_rating": 4,
        }
        for prompt in "ab"
        for number, rank in enumerate([2, 1, 2])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata-test.parquet")
    (folder / "images" / "test").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images" / "test" / "test_1.zip", "w") as archive:
        archive.writestr("test_1.json", "[]")
        for shade, row in enumerate(rows):
            archive.writestr(Path(row["image_path"]).name, image(shade, "webp"))


def test_image_reward_db_of_the_hub_is_read_with_its_archives_packed(tmp_path: Path) -> None:
    image_reward_db(tmp_path)
    it = human("image_reward_db", tmp_path)
    first, second = it.load()
    assert (first.prompt, second.prompt) == ("prompt a", "prompt b")
    assert first.images == tuple(f"images/test/test_1/a{number}.webp" for number in range(3))
    assert first.ranks.tolist() == [2, 1, 2]
    assert first.shares.tolist() == [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]
    assert {name: np.sign(ranks - ranks[0]).tolist() for name, ranks in first.aspects.items()} == {
        "overall": [0, -1, 0],  # rated higher, ranked before
        "alignment": [0, 1, 0],
        "fidelity": [0, 0, 0],
    }
    found = dict(it.read([first.images[2], second.images[0]]))
    assert found == {first.images[2]: image(2, "webp"), second.images[0]: image(3, "webp")}


def test_image_reward_db_with_the_repositorys_rankings_and_a_folder_of_files(tmp_path: Path) -> None:
    rows = [{"id": "1", "prompt": "a", "generations": ["x/1.webp", "x/2.webp"], "ranking": [2, 1]}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "pictures" / "x").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / "pictures" / "x" / f"{number}.webp").write_bytes(image(number, "webp"))
    columns = ["columns.images=generations", "columns.ranks=ranking", "columns.group=null"]
    overrides = [f"data.it.{each}" for each in ("table=test.json", "images=pictures", *columns)]
    it = human("image_reward_db", tmp_path, *overrides, "data.it.columns.aspects=null")
    [each] = it.load()
    assert each.ranks.tolist() == [2, 1]
    assert dict(it.read(each.images)) == {"x/1.webp": image(1, "webp"), "x/2.webp": image(2, "webp")}


def test_missing_images_are_counted_and_named_before_anything_is_scored(tmp_path: Path) -> None:
    image_reward_db(tmp_path)
    (tmp_path / "images" / "test" / "test_1.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"6 of 6 images of ImageRewardDB are missing, 'images/test/test_1/"):
        human("image_reward_db", tmp_path).load()


# --- HPD v2

HPD_V2 = [
    {
        "prompt": "a cat",
        "image_path": ["1.jpg", "2.jpg", "3.jpg"],
        "rank": [1, 2, 3],
        "raw_annotations": [{"rank": [1, 2, 3], "user_hash": "x"}, {"rank": [1, 3, 2], "user_hash": "y"}],
    }
]


def packed(folder: Path, table: list[dict[str, Any]]) -> None:
    """test.json and test.tar.gz, as on the hub."""
    (folder / "test.json").write_text(json.dumps(table))
    with tarfile.open(folder / "test.tar.gz", "w:gz") as archive:
        for row in table:
            for shade, name in enumerate(row["image_path"]):
                data = image(shade, "jpeg")
                entry = tarfile.TarInfo(f"test/{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def test_hpd_v2_comes_from_the_hub_and_has_the_votes_of_all_annotators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        asked.append((repository, allow_patterns))
        local_dir.mkdir()
        packed(local_dir, HPD_V2)

    monkeypatch.setattr(files, "snapshot_download", download)
    it = human("hpd_v2", tmp_path / "hpd")
    [each] = it.load()
    it.load()
    assert asked == [("ymhao/HPDv2", ["test.json", "test.tar.gz"])]  # the second time it is there
    assert each.images == ("1.jpg", "2.jpg", "3.jpg")
    assert each.shares.tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert dict(it.read(["2.jpg"])) == {"2.jpg": image(1, "jpeg")}


def test_a_set_that_is_not_there_and_cannot_be_downloaded_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"no test.json in '.*', and ymhao/HPDv2 cannot be downloaded.*no network"):
        human("hpd_v2", tmp_path).load()
    with pytest.raises(FileNotFoundError, match="no test.json in"):
        human("hpd_v3", tmp_path).load()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": [1, 2]}, r"row 1 of '.*test.json' has no ranking.*not 3 numbers"),
        ({"rank": [1, 2, None]}, "not 3 numbers"),
        ({"rank": "first"}, "has no ranking"),
        ({"image_path": ["1.jpg", "1.jpg", "2.jpg"]}, "is there twice"),
        ({"raw_annotations": [{"ranks": [1, 2, 3]}]}, "'rank'"),
    ],
)
def test_a_ranking_that_is_none_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "test.json").write_text(json.dumps([HPD_V2[0] | change]))
    with pytest.raises(ValueError, match=said):
        human("hpd_v2", tmp_path).load()


@pytest.mark.parametrize(
    ("text", "said"), [("{", r"test\.json is no JSON"), ("[{}]", "no column 'image_path', 'prompt', 'rank'")]
)
def test_a_table_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        human("hpd_v2", tmp_path).load()


# --- HPD v3


def test_hpd_v3_prefers_the_first_image_and_has_votes_where_they_are_known(tmp_path: Path) -> None:
    common = {"prompt": "a fox", "model1": "flux", "model2": "sd2", "confidence": 0.9}
    rows = [
        {**common, "path1": "images/1.jpg", "path2": "images/2.jpg", "choice_dist": [15, 5]},
        {**common, "path1": "images/3.jpg", "path2": "images/2.jpg", "choice_dist": None},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image(number, "jpeg"))
    it = human("hpd_v3", tmp_path)
    first, second = it.load()
    assert first.shares[0, 1] == 0.75
    assert second.shares[0, 1] == 1
    assert first.ranks[0] < first.ranks[1]
    assert first.generators == ("flux", "sd2")
    assert len(human("hpd_v3", tmp_path, "data.it.limit=1").load()) == 1


# --- Pick-a-Pic


def pick_a_pic(folder: Path, **change: Any) -> None:
    (folder / "data").mkdir()
    for split, labels in {"test_unique": [1.0, 0.5, 0.0], "validation_unique": [0.5, 1.0]}.items():
        rows = [
            {
                "caption": f"{split} {number}",
                "image_0_uid": f"{split}-{number}",
                "image_1_uid": f"{split}-{number}-b" if number else "shared",
                "jpg_0": image(number, "jpeg"),
                "jpg_1": image(100 + number, "jpeg"),
                "label_0": label,
                "label_1": 1 - label,
                "model_0": "sdxl",
                "model_1": "dreamlike",
            }
            | change
            for number, label in enumerate(labels)
        ]
        file = folder / "data" / f"{split}-00000-of-00001-0123.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)


@pytest.mark.parametrize("name", ["pick_a_pic", "pick_a_pic_v2"])
def test_pick_a_pic_has_ties_and_pairs_to_tune_on(tmp_path: Path, name: str) -> None:
    pick_a_pic(tmp_path)
    it = human(name, tmp_path)
    judged = it.load()
    assert [each.prompt for each in judged if not each.tuning] == ["test_unique 0", "test_unique 1", "test_unique 2"]
    assert [np.sign(each.ranks[1] - each.ranks[0]) for each in judged] == [1, 0, -1, 0, 1]
    assert [each.shares[0, 1] for each in judged] == [1, 0.5, 0, 0.5, 1]
    assert [each.tuning for each in judged] == [False] * 3 + [True] * 2
    wanted = everything(judged)
    read = list(it.read(wanted))
    assert sorted(name for name, _ in read) == sorted(wanted)  # each once, though one is in both splits
    assert dict(read)["test_unique-2"] == image(2, "jpeg")


def test_pick_a_pic_reads_no_more_than_is_wanted(tmp_path: Path) -> None:
    pick_a_pic(tmp_path)
    it = human("pick_a_pic", tmp_path)
    assert list(it.read({"test_unique-1"})) == [("test_unique-1", image(1, "jpeg"))]
    assert list(it.read(set())) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [({"label_0": 0.7}, "label_0=0.7"), ({"label_0": None}, "label_0=None")],
)
def test_a_label_that_is_none_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    pick_a_pic(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"{said} in row 1 of '.*parquet' must be 1, 0.5 or 0"):
        human("pick_a_pic", tmp_path).load()


@pytest.mark.parametrize("kind", [int, float], ids=str)
def test_ids_may_be_numbers(tmp_path: Path, kind: type) -> None:
    """They were named as text and looked for as numbers: no image was ever found."""
    pick_a_pic(tmp_path)
    for file in (tmp_path / "data").iterdir():
        table = parquet.read_table(file).to_pylist()
        for number, row in enumerate(table):
            row["image_0_uid"], row["image_1_uid"] = kind(10 * number + 1), kind(10 * number + 2)
        parquet.write_table(pyarrow.Table.from_pylist(table), file)
    it = human("pick_a_pic", tmp_path)
    wanted = everything(it.load())
    assert wanted == {"1", "2", "11", "12", "21", "22"}
    assert {name for name, _ in it.read(wanted)} == wanted


@pytest.mark.parametrize("column", ["image_0_uid", "image_1_uid", "caption"])
def test_a_row_without_an_id_or_a_prompt_is_left_out_and_counted(tmp_path: Path, column: str) -> None:
    """It was called 'None', and all such rows were one image."""
    pick_a_pic(tmp_path)
    file = tmp_path / "data" / "test_unique-00000-of-00001-0123.parquet"
    table = parquet.read_table(file).to_pylist()
    table[1][column] = None
    parquet.write_table(pyarrow.Table.from_pylist(table), file)
    it = human("pick_a_pic", tmp_path)
    judged = it.load()
    assert len([each for each in judged if not each.tuning]) == 2
    assert "None" not in everything(judged) | {each.prompt for each in judged}
    assert it.note.startswith(f"1 of 3 rows are left out, which lack a value: `{column}` in row 2 of '{file}'")


def test_a_ranking_without_its_group_is_left_out_and_counted(tmp_path: Path) -> None:
    image_reward_db(tmp_path)
    table = parquet.read_table(tmp_path / "metadata-test.parquet").to_pylist()
    table[0]["prompt_id"] = None
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "metadata-test.parquet")
    it = human("image_reward_db", tmp_path)
    assert [len(each.images) for each in it.load()] == [2, 3]
    assert "1 of 6 rows are left out" in it.note


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    image_reward_db(tmp_path)
    archive = tmp_path / "images" / "test" / "test_1.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"test_1\.zip' is no zip archive that can be read"):
        human("image_reward_db", tmp_path).load()


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    pick_a_pic(tmp_path)
    with pytest.raises(ValueError, match="no column 'text'; it has .* Name the right ones in `columns`"):
        human("pick_a_pic", tmp_path, "data.it.columns.prompt=text").load()
    with pytest.raises(ValueError, match="no column webp_0"):
        human("pick_a_pic", tmp_path, "data.it.contents=[webp_0,jpg_1]").load()


# --- VisionPrefer


def vision_prefer(folder: Path, ratings: dict[str, list[list[int]]]) -> None:
    """A dataset whose test split has these ratings, by prompt, an image a row, in the order of the aspects."""
    rows = []
    for number, (prompt, of_images) in enumerate(ratings.items()):
        images = [
            {
                "image_id": f"{number}-{place}",
                "image": {"bytes": image(10 * number + place), "path": None},
                "generator": "sd15" if place % 2 else "sdxl",
                "guidance_scale": 7.5,
                "seed": 0,
                "steps": 20,
                "width": 8,
                "height": 8,
            }
            for place in range(len(of_images))
        ]
        notes = [
            {
                "image_id": f"{number}-{place}",
                "aspect": aspect,
                "rating": rating if annotator == "judge" else 3,
                "rationale": "so",
                "annotator": annotator,
                "template_version": "1",
                "position": place,
            }
            for annotator in ("judge", "second")
            for place, own in enumerate(of_images)
            for aspect, rating in zip(ASPECTS, own, strict=True)
        ]
        row = {"prompt_id": number, "source_prompt": prompt, "prompt": prompt, "split": "test"}
        rows.append({**row, "images": images, "annotations": notes})
    write_dataset({"test": rows}, folder)


def test_visionprefer_ranks_by_the_mean_of_its_own_annotator_and_by_aspect(tmp_path: Path) -> None:
    vision_prefer(
        tmp_path / "set", {"a": [[5, 1, 3, 3], [3, 3, 3, 3], [5, 5, 5, 5]], "b": [[1, 1, 1, 1], [2, 2, 2, 2]]}
    )
    it = human("visionprefer", tmp_path / "set")
    first, second = it.load()
    assert np.sign(first.ranks - first.ranks[0]).tolist() == [0, 0, -1]
    assert np.argsort(first.aspects["prompt_following"], kind="stable").tolist() == [0, 2, 1]
    assert first.generators == ("sdxl", "sd15", "sdxl")
    assert first.shares[2].tolist() == [1, 1, 0.5]
    assert "AI" in it.note
    found = dict(it.read({first.images[1], second.images[0]}))
    assert found == {first.images[1]: image(1), second.images[0]: image(10)}


def test_a_visionprefer_that_is_not_there_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="build_visionprefer.py folder="):
        human("visionprefer", tmp_path / "nothing").load()


@pytest.mark.parametrize("name", ["image_reward_db", "hpd_v2", "pick_a_pic", "visionprefer"])
def test_a_set_has_a_stamp_that_changes_with_its_files(tmp_path: Path, name: str) -> None:
    makers = {
        "image_reward_db": image_reward_db,
        "hpd_v2": lambda folder: packed(folder, HPD_V2),
        "pick_a_pic": pick_a_pic,
        "visionprefer": lambda folder: vision_prefer(folder / "set", {"a": [[1] * 4, [2] * 4]}),
    }
    stamps = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        makers[name](tmp_path / place)
        folder = tmp_path / place / ("set" if name == "visionprefer" else "")
        stamps += [human(name, folder).stamp(), human(name, folder).stamp()]
    assert stamps[0] == stamps[1] != stamps[2]


def test_a_stamp_changes_when_an_image_is_replaced_under_the_same_table(tmp_path: Path) -> None:
    packed(tmp_path, HPD_V2)
    (tmp_path / "test").mkdir()
    for name in HPD_V2[0]["image_path"]:
        (tmp_path / "test" / name).write_bytes(image(0))
    it = human("hpd_v2", tmp_path)
    before = it.stamp()
    assert it.stamp() == before
    (tmp_path / "test" / "2.jpg").write_bytes(image(1))
    assert it.stamp() != before
    (tmp_path / "test" / "unknown.jpg").write_bytes(image(1))
    assert it.stamp() == human("hpd_v2", tmp_path).stamp()
    (tmp_path / "db").mkdir()
    image_reward_db(tmp_path / "db")
    it = human("image_reward_db", tmp_path / "db")
    before = it.stamp()
    with zipfile.ZipFile(tmp_path / "db" / "images" / "test" / "test_1.zip", "a") as archive:
        archive.writestr("more", "more")
    assert it.stamp() != before
