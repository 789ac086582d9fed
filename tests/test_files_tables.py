"""One reader of tables: every kind of file gives the same rows, or is refused with its name and the place."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from vp_rl.data.sets.files import name_of
from vp_rl.data.sets.files import rows as judgements
from vp_rl.files import parquet, tables
from vp_rl.visionprefer.image_folder import ImageFolder
from vp_rl.visionprefer.object_prompts import GenEvalPrompts
from vp_rl.visionprefer.prompts import FilePrompts

PROMPTS = ["a \u2028 b", "c \u0085 d", "e \x0b f", 'quote " comma, tab', "x" * 200_000, " padded "]
ENDINGS = [".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"]


def quoted(rows: list[dict[str, Any]], separator: str) -> str:
    def line(fields: Any) -> str:
        return separator.join('"' + str(field).replace('"', '""') + '"' for field in fields)

    return "\r\n".join([line(rows[0]), *(line(row.values()) for row in rows)]) + "\r\n"


def written(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"table{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif ending in (".csv", ".tsv"):
        file.write_bytes(quoted(rows, "," if ending == ".csv" else "\t").encode())
    elif ending == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:  # as many programs leave them: a blank last line
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_table_gives_the_same_texts(ending: str, tmp_path: Path) -> None:
    file = written(tmp_path, ending, [{"prompt": text, "n": number} for number, text in enumerate(PROMPTS)])
    assert [row["prompt"] for _, row in tables.rows(file, ["prompt"])] == PROMPTS
    assert [row["prompt"] for _, row in judgements(file, ["prompt"])] == PROMPTS


@pytest.mark.parametrize("ending", [each for each in ENDINGS if each != ".parquet"] + [".txt"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "but UTF-16 .*save it as UTF-8"),
        ("utf-32", "but UTF-32"),
        ("utf-16-le", "character 2 is a null.*UTF-16"),
        ("utf-16-be", "character 1 is a null.*UTF-16"),
        ("latin-1", r"byte \d+"),
    ],
)
def test_text_in_another_encoding_is_refused_by_name(ending: str, encoding: str, said: str, tmp_path: Path) -> None:
    """Without its mark UTF-16 is UTF-8 too, with nulls in it: 'red fox' was read as 'r e d f o x'."""
    rows = [{"prompt": "red fox" + "é" * (encoding == "latin-1")}]
    file = tmp_path / f"table{ending}"
    file.write_bytes(
        (rows[0]["prompt"] if ending == ".txt" else written(tmp_path, ending, rows).read_text()).encode(encoding)
    )
    with pytest.raises(ValueError, match=rf"table{ending} is not a UTF-8 text file.*{said}"):
        list(tables.rows(file, ["prompt"]))


@pytest.mark.parametrize("ending", [*ENDINGS, ".txt"])
@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\n<!DOCTYPE html><html>"]
)
def test_what_a_failed_download_leaves_is_no_table(ending: str, content: bytes, tmp_path: Path) -> None:
    """As a text file it had three prompts."""
    file = tmp_path / f"table{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"table{ending} .*(git lfs pull|failed download)"):
        list(tables.rows(file))


DEEP = "[" * 200_000
TWICE: dict[str, bytes] = {
    ".csv": b"prompt,n,prompt\na,1,b\n",
    ".tsv": b"prompt\tn\tprompt\na\t1\tb\n",
    ".json": b'[{"prompt": "a", "prompt": "b"}]',
    ".jsonl": b'{"prompt": "a", "prompt": "b"}\n',
}


@pytest.mark.parametrize("ending", TWICE)
def test_a_column_that_is_there_twice_is_refused(ending: str, tmp_path: Path) -> None:
    """The last one counted, silently."""
    (tmp_path / f"table{ending}").write_bytes(TWICE[ending])
    with pytest.raises(ValueError, match=rf"table{ending} .*('prompt' twice|2 columns 'prompt')"):
        list(tables.rows(tmp_path / f"table{ending}", ["prompt"]))


def test_parquet_may_have_a_column_twice_that_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    table = pyarrow.table([["a"], [1], [2]], names=["prompt", "n", "n"])
    pyarrow.parquet.write_table(table, file)
    assert [row for _, row in tables.rows(file, ["prompt"])] == [{"prompt": "a"}]
    with pytest.raises(ValueError, match=r"table\.parquet has 2 columns 'n'"):
        list(tables.rows(file, ["prompt", "n"]))


@pytest.mark.parametrize(("ending", "place"), [(".json", "is no JSON"), (".jsonl", "has no JSON in line 2")])
@pytest.mark.parametrize("content", [DEEP, "9" * 5000, "{"])
def test_json_that_no_program_can_hold_is_refused_by_its_place(
    ending: str, place: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / f"table{ending}").write_text(content if ending == ".json" else f'{{"prompt": "a"}}\n{content}\n')
    for read in (lambda file: list(tables.rows(file)), lambda file: judgements(file, ["prompt"])):
        with pytest.raises(ValueError, match=rf"table{ending} {place}"):
            read(tmp_path / f"table{ending}")


def corrupt(file: Path) -> None:
    """The data pages of a compressed column; the footer is whole."""
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)


def invalid(file: Path) -> None:
    """Text that is not UTF-8, which Parquet's writers do not check."""
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), file)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "empty": lambda file: file.write_bytes(b""),
    "corrupt": corrupt,
    "invalid text": invalid,
    "text": lambda file: file.write_text("prompt\na\n"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "prompts": lambda file: FilePrompts(str(file), validation=0, test=0),
    "judgements": lambda file: judgements(file, ["prompt"]),
    "batches": lambda file: [row for batch in parquet.batches(file, 2) for row in parquet.values(file, batch)],
    "row group": lambda file: parquet.values(file, parquet.row_group(file, 0)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_parquet_file_is_named(damage: str, reader: str, tmp_path: Path) -> None:
    file = written(tmp_path, ".parquet", [{"prompt": f"a {number} cat" * 20} for number in range(50)])
    READERS[reader](file)
    DAMAGE[damage](file)
    with pytest.raises(ValueError, match=r"table\.parquet is no whole Parquet file"):
        READERS[reader](file)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_half_a_character_is_refused_where_it_comes_from(ending: str, tmp_path: Path) -> None:
    """Not when everything is paid for and is to be written."""
    row = '{"file": "a.png", "prompt": "a", "generator": "\\ud83d"}'
    (tmp_path / f"metadata{ending}").write_text(f"[{row}]" if ending == ".json" else row)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"metadata{ending}: column 'generator' in (row|line) 1 has half a surrogate"):
        ImageFolder(str(tmp_path), f"metadata{ending}")


def test_a_place_is_counted_as_editors_count(tmp_path: Path) -> None:
    file = tmp_path / "table.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\r\n\r\n{"text": "c"}\n', encoding="utf-8")
    with pytest.raises(tables.NoColumn, match=r"no column 'prompt'; it has text \(line 3\)"):
        list(tables.rows(file, ["prompt"]))


def test_objects_to_be_found_are_read_like_any_table(tmp_path: Path) -> None:
    row = {"prompt": "a \u2028 cup", "tag": "single_object", "include": [{"class": "cup", "count": 1}]}
    for ending in (".json", ".jsonl"):
        assert GenEvalPrompts(str(written(tmp_path, ending, [row]))).split("test") == ["a \u2028 cup"]


def test_ids_of_any_type_have_one_name() -> None:
    assert [name_of(value) for value in (7, 7.0, "7", 7.5, "a/b.png")] == ["7", "7", "7", "7.5", "a/b.png"]
    assert name_of(math.inf) == "inf"
