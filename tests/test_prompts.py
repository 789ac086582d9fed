"""Stage 1 of VisionPrefer: prompts are read from any source, cleaned by rules that hold as laws, and split."""

import csv
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vp_rl.types import Dropped
from vp_rl.visionprefer.clean import Cleaner, bands, grams, normalise, similarity, summary
from vp_rl.visionprefer.prompts import FilePrompts, HubPrompts, split_prompts
from vp_rl.visionprefer.raw import Columns, RawPrompt, read_file, read_hub
from vp_rl.visionprefer.schema import SPLITS

CONF = Path(__file__).parents[1] / "conf" / "prompts"
REAL = Path(__file__).parents[2] / "shared" / "data" / "prompts" / "imagereward_refl.json"
PROMPTS = ['a cat, "asleep"; on a mat', "café – 雨の中の猫", "NA", "007", "two\tdogs", "a 🐱 | a 🐶", "x\u2028y"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def raw(*texts: str) -> list[RawPrompt]:
    return [RawPrompt(text) for text in texts]


def reasons(dropped: Sequence[Dropped]) -> Counter[str]:
    return Counter(prompt.reason for prompt in dropped)


def noisy(seed: int = 0, number: int = 60) -> list[RawPrompt]:
    """Prompts of which many repeat each other, exactly or nearly."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(80)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(number)]
    texts += [text.upper() for text in texts[::4]] + [f"{text}  !" for text in texts[::5]]
    texts += [f"{text} {rng.choice(words)[:3]}" for text in texts[::3]] + ["", "\u200b"]
    rng.shuffle(texts)
    return raw(*texts)


# --- sources


def write_csv(file: Path, rows: list[dict[str, object]], delimiter: str = ",") -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


ROWS: list[dict[str, object]] = [{"id": f"no-{n}", "text": text, "unsafe": n / 10} for n, text in enumerate(PROMPTS)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "p.txt": lambda file: file.write_text("\n\n".join(PROMPTS), encoding="utf-8"),
    "windows.text": lambda file: file.write_bytes("\r\n".join(["\ufeff" + PROMPTS[0], *PROMPTS[1:], ""]).encode()),
    "p.csv": lambda file: write_csv(file, ROWS),
    "excel.csv": lambda file: (write_csv(file, ROWS), file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())),
    "p.TSV": lambda file: write_csv(file, ROWS, "\t"),
    "p.json": lambda file: file.write_text(json.dumps(ROWS)),
    "texts.json": lambda file: file.write_text(json.dumps(PROMPTS)),
    "p.jsonl": lambda file: file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "texts.ndjson": lambda file: file.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n"),
    "p.parquet": lambda file: parquet.write_table(pyarrow.Table.from_pylist(ROWS), file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_yields_the_same_prompts(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    source = FilePrompts(str(tmp_path / name), column="text", validation=0, test=0)
    assert source.split("train") == [normalise(text) for text in PROMPTS]
    assert not source.dropped()


@pytest.mark.parametrize("name", ["p.csv", "excel.csv", "p.TSV", "p.json", "p.jsonl", "p.parquet"])
def test_tables_bring_names_and_scores(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    found = read_file(str(tmp_path / name), Columns("text", ("unsafe",), "id"))
    assert found == [RawPrompt(text, n / 10, f"no-{n}") for n, text in enumerate(PROMPTS)]


@pytest.mark.parametrize(("dataset", "name"), [("parquet", "p.parquet"), ("json", "p.jsonl"), ("json", "p.json")])
def test_the_hub_loader_brings_the_same(dataset: str, name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    columns = Columns("text", ("unsafe",), "id")
    assert read_hub(dataset, columns, files=str(tmp_path / name)) == read_file(str(tmp_path / name), columns)


def test_the_highest_score_counts_and_an_absent_one_is_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,a,b\none,0.1,0.7\ntwo,,0.2\nthree,,\nfour,nan,1\n")
    rows = [[0.1, 0.7], [None, 0.2], [None, math.nan], [False, True]]
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "p", "a": a, "b": b} for a, b in rows]))
    for name in ("p.csv", "p.json"):
        found = read_file(str(tmp_path / name), Columns(nsfw=("a", "b")))
        assert [repr(prompt.nsfw) for prompt in found] == ["0.7", "0.2", "nan", "1.0"]


def test_quotes_need_no_quotes_between_tabs(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('prompt\tn\n"HI" on a wall\t1\na "cat"\t2\n"open\t3\n')
    prompts = ['"HI" on a wall', 'a "cat"', '"open']
    assert [prompt.text for prompt in read_file(str(tmp_path / "p.tsv"), Columns())] == prompts


def test_prompts_are_named_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    write_csv(tmp_path / "p.csv", [{"prompt": "one"}, {"prompt": "two"}])
    assert [prompt.name for prompt in read_file(str(tmp_path / "p.txt"), Columns())] == ["line 1", "line 3"]
    assert [prompt.name for prompt in read_file(str(tmp_path / "p.csv"), Columns())] == ["row 1", "row 2"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "another encoding": ("p.csv", "prompt\ncafé\n".encode("latin-1"), r"p\.csv is not a UTF-8 text file \(byte 10\)"),
    "no such column": ("p.csv", b"text,seed\na,1\n", r"p\.csv has no column 'prompt'; it has text, seed\."),
    "unquoted separator": ("p.csv", b"prompt,n\na cat, a dog,1\n", r"row 1 has more fields .* in quotes"),
    "open quote": ("p.csv", b'prompt\n"a cat\n', r"p\.csv is no well-formed table .*double the quotes"),
    "too many tabs": ("p.tsv", b'prompt\tn\n"a" cat\tand\t1\n', r"p\.tsv: row 1 has more fields"),
    "no JSON": ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', r"p\.json is no JSON .* must end in \.jsonl"),
    "no list": ("p.json", b'{"prompt": "a"}', r"p\.json holds no list"),
    "no rows": ("p.json", b"[1, 2]", r"row 1 is int; it must be an object"),
    "no JSON in a line": ("p.jsonl", b'{"prompt": "a"}\n{prompt}\n', r"p\.jsonl has no JSON in line 2"),
    "column gone": ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"no column 'prompt'; it has text"),
    "no text": ("p.jsonl", b'{"prompt": ["a"]}\n', r"column 'prompt' is list in line 1, not text"),
    "no Parquet": ("p.parquet", b"prompt\na\n", r"p\.parquet is no whole Parquet file"),
    "nothing": ("p.txt", b"\n", r"p\.txt has 0 different prompts .* none is left to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_told(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FilePrompts(str(tmp_path / name), validation=0, test=0)


def test_a_missing_file_column_or_score_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No prompt file at '.*none\.csv'"):
        FilePrompts(str(tmp_path / "none.csv"))
    WRITERS["p.parquet"](tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="has no column 'prompt'; it has id, text, unsafe"):
        FilePrompts(str(tmp_path / "p.parquet"))
    with pytest.raises(ValueError, match="column 'id' is 'no-0' in row 1, not a number"):
        FilePrompts(str(tmp_path / "p.parquet"), column="text", nsfw_columns=["id"])
    WRITERS["p.txt"](tmp_path / "p.txt")
    with pytest.raises(ValueError, match=r"has prompts alone \(line 1\), so no column 'unsafe'"):
        FilePrompts(str(tmp_path / "p.txt"), nsfw_columns=["unsafe"])


def test_a_dataset_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The dataset nobody/nothing cannot be loaded: .*nobody/nothing"):
        HubPrompts("nobody/nothing")
    file = tmp_path / "p.parquet"
    WRITERS["p.parquet"](file)
    with pytest.raises(ValueError, match=r"The dataset parquet \(.*p\.parquet\) cannot be loaded: .*tset.*train"):
        HubPrompts("parquet", files=str(file), source_split="tset")
    with pytest.raises(ValueError, match="parquet has no column 'caption'; it has id, text, unsafe"):
        HubPrompts("parquet", files=[str(file)], column="caption")
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("")
    with pytest.raises(ValueError, match="scripts are no longer supported"):
        HubPrompts(str(tmp_path / "scripted"))


def test_a_hub_repository_is_asked_for_by_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str | None, **settings: object) -> datasets.Dataset:
        asked.append((names, settings))
        return datasets.Dataset.from_dict({"prompt": ["a cat"]})

    monkeypatch.setattr("vp_rl.visionprefer.raw.load_dataset", load)
    source = HubPrompts("owner/name", config="large", source_split="all", revision="v2", validation=0, test=0)
    assert source.split("train") == ["a cat"]
    assert asked == [(("owner/name", "large"), {"data_files": None, "split": "all", "revision": "v2"})]


def diffusiondb(file: Path) -> None:
    """Some of the columns of its metadata.parquet, in their types; one row an image."""
    scores = [(0.01, 0.1), (0.9, 0.1), (0.01, 2.0), (0.01, 0.3)]
    rows = [
        {"image_name": f"{n}.png", "prompt": f"{'abcd'[n] * 30}", "seed": n, "image_nsfw": image, "prompt_nsfw": text}
        for n, (text, image) in enumerate(scores)
    ]
    kinds = [pyarrow.string(), pyarrow.string(), pyarrow.uint32(), pyarrow.float32(), pyarrow.float32()]
    schema = pyarrow.schema(zip(rows[0], kinds, strict=True))
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)


def hpd(file: Path) -> None:
    row = {"human_preference": [0, 1], "file_path": ["1.jpg", "2.jpg"]}
    file.write_text(json.dumps([{"prompt": letter * 30, **row} for letter in "aad"]))


def pickapic(file: Path) -> None:
    row = {"are_different": True, "has_label": True, "label_0": 0.5, "model_0": "m", "user_id": 7}
    rows = [{"caption": letter * 30, "ranking_id": n, **row} for n, letter in enumerate("aad")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize(
    ("name", "write", "left_out"),
    [
        ("diffusiondb", diffusiondb, [("b" * 30, "unsafe", "score 0.90"), ("c" * 30, "unsafe", "score 2.00")]),
        ("hpd", hpd, [("a" * 30, "duplicate", "as row 1")]),
        ("pickapic", pickapic, [("a" * 30, "duplicate", "as 0")]),
    ],
)
def test_the_configurations_fit_their_datasets(
    name: str, write: Callable[[Path], None], left_out: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    file = tmp_path / ("train.json" if name == "hpd" else "table.parquet")
    write(file)
    local = {"files": str(file), "dataset": "parquet" if name == "pickapic" else config.dataset}
    source = instantiate(config, **local, validation=0, test=0)
    assert source.split("train") == ["a" * 30, "d" * 30]
    assert source.dropped() == left_out


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_a_limit_draws_rows_and_keeps_their_order(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    texts = ["".join(random.Random(n).choices("abcdefgh", k=20)) for n in range(60)]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": text} for text in texts]), file)

    maker = {"file": partial(FilePrompts, str(file)), "hub": partial(HubPrompts, "parquet", files=str(file))}[kind]

    def drawn(seed: int) -> list[str]:
        return maker(limit=25, seed=seed, validation=0, test=0).split("train")

    first = drawn(1)
    assert len(first) == 25
    assert first == drawn(1) == [text for text in texts if text in first]
    assert first != drawn(2)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        maker(limit=0)


# --- normalisation


def test_normalising_again_changes_nothing_whatever_the_character() -> None:
    for start in range(0, sys.maxunicode + 1, 1 << 16):
        once = normalise("x".join(map(chr, range(start, min(start + (1 << 16), sys.maxunicode + 1)))))
        assert normalise(once) == once
        left = {unicodedata.category(character) for character in set(once) - {"\u200c", "\u200d"}}
        assert not left & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert not re.search(r"\s\s|[^\S ]", once)


def test_normalising_again_changes_nothing_in_any_order_of_difficult_characters() -> None:
    rng = random.Random(0)
    difficult = "aé´\u0301¨\u200b\u200d\u200c \t\n\u00a0\u3000\ufeffﬁ½…Åﷺ\ud800가ᄀ\u1161\u0345\u2028🐱"
    for _ in range(3000):
        once = normalise("".join(rng.choices(difficult, k=8)))
        assert normalise(once) == once


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  a \t cat\r\n", "a cat"),
        ("ｆｕｌｌ　ｗｉｄｔｈ ﬁsh", "full width fish"),
        ("cafe\u0301", "café"),
        ("ca\u200bt\x00on\ufeff a mat\x1b", "cat on a mat"),
        ("\u200b\u200d\n", ""),
        ("half \ud83d", "half"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_a_prompt_is_normalised(text: str, normal: str) -> None:
    assert normalise(text) == normal


# --- cleaning


def test_every_prompt_stays_or_goes_once_in_the_order_given() -> None:
    texts = [prompt.text for prompt in noisy()]
    kept, dropped = Cleaner().clean(raw(*texts))
    assert {"empty", "duplicate", "near-duplicate"} == reasons(dropped).keys()
    gone = [prompt.prompt for prompt in dropped]
    assert Counter(map(normalise, texts)) == Counter(map(normalise, kept + gone))
    order = iter(texts)
    assert all(text in order for text in gone)
    order = map(normalise, texts)
    assert all(text in order for text in kept)


@pytest.mark.parametrize("similar", [0.3, 0.5, 0.8, 1.0, None])
def test_what_is_clean_is_left_as_it_is(similar: float | None) -> None:
    cleaner = Cleaner(near_duplicates=similar)
    kept, dropped = cleaner.clean(noisy())
    assert dropped
    assert cleaner.clean(raw(*kept)) == (kept, [])


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real prompts beside the project")
def test_real_prompts_are_clean_after_one_pass() -> None:
    given = read_file(str(REAL), Columns("text"))[:2500]
    kept, dropped = Cleaner().clean(given)
    distinct = {normalise(prompt.text).casefold() for prompt in given}
    assert reasons(dropped)["duplicate"] + len(distinct) == len(given)
    assert len(kept) + reasons(dropped)["near-duplicate"] + reasons(dropped)["long"] == len(distinct)
    assert Cleaner().clean(raw(*kept)) == (kept, [])


def test_the_number_of_exact_duplicates_does_not_depend_on_the_order() -> None:
    given = noisy(number=100)
    words = {normalise(prompt.text).casefold() for prompt in given}
    empty = sum(not normalise(prompt.text) for prompt in given)
    for seed in range(3):
        random.Random(seed).shuffle(given)
        found = reasons(Cleaner().clean(given)[1])
        assert found["empty"] == empty
        assert found["duplicate"] == len(given) - empty - len(words - {""})


def test_the_first_of_those_that_repeat_each_other_stays() -> None:
    kept, dropped = Cleaner().clean(raw("A  cat", "a dog", "a CAT", "A Dog"))
    assert kept == ["A cat", "a dog"]
    assert dropped == [Dropped("a CAT", "duplicate", "as number 1"), Dropped("A Dog", "duplicate", "as number 2")]


def pair(runs: int, rng: random.Random) -> tuple[str, str]:
    """Two texts of that many different runs of 5 characters; the one character that is changed spoils 5 of them."""
    while True:
        one = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=runs + 4))
        other = one[: runs // 2] + "#" + one[runs // 2 + 1 :]
        if len(grams(one)) == len(grams(other)) == runs:
            return one, other


def test_pairs_at_the_stated_similarity_are_found_and_those_below_never() -> None:
    rng = random.Random(0)
    at, below = [[pair(runs, rng) for _ in range(400)] for runs in (45, 44)]
    assert {similarity(*map(grams, both)) for both in at} == {0.8}  # (45 - 5) / (45 + 5)
    assert all(0.79 < similarity(*map(grams, both)) < 0.8 for both in below)
    cleaner = Cleaner(near_duplicates=0.8)
    _, dropped = cleaner.clean(raw(*(text for both in at for text in both)))
    # At most 0.5% are missed: 2 of 400 on average, with a standard deviation of 1.4, so 4 of those above.
    assert 400 - 7 <= len(dropped) <= 400
    assert not cleaner.clean(raw(*(text for both in below for text in both)))[1]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_are_the_narrowest_that_find_enough(threshold: float) -> None:
    number, rows = bands(threshold)
    assert number >= 2
    assert number * rows <= 128
    assert 1 - (1 - threshold**rows) ** number >= 0.995
    assert rows == 64 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.995


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A cat, on a mat!", "a cat on a mat", True),
        ("a cat on a mat, oil painting", "a cat on a mat; Oil-painting.", True),
        ("a dog left of a cat", "a cat left of a dog", False),
        ("four cats on a sofa", "five cats on a sofa", False),
        ("🐱", "🐶", False),
        ("a 🐱", "a 🐶", False),
        ("!!!", "???", False),
        ("क", "कि", False),
    ],
)
def test_case_and_punctuation_make_no_other_prompt_but_symbols_do(one: str, other: str, same: bool) -> None:
    kept, _ = Cleaner().clean(raw(one, other))
    assert kept == ([one] if same else [one, other])


def test_a_near_duplicate_names_the_prompt_that_is_likest_and_of_equals_the_first() -> None:
    fox = "a red fox in a forest of tall birches at dawn, in the fog"
    _, dropped = Cleaner(near_duplicates=0.7).clean(raw(f"{fox} and the rain of the", f"so it is {fox}", fox))
    assert [prompt.detail[:18] for prompt in dropped] == ["as number 2, 0.85:"]
    _, dropped = Cleaner(near_duplicates=0.87).clean(raw(f"{fox} or if", f"{fox} by me", fox))
    assert [prompt.detail[:18] for prompt in dropped] == ["as number 1, 0.90:"]
    chain = [fox, f"{fox} and the", f"{fox} and the rain of the"]  # the last is like none that stays
    assert Cleaner(near_duplicates=0.8).clean(raw(*chain))[0] == chain[::2]


def test_length_limits_hold_to_the_word_and_the_character() -> None:
    cleaner = Cleaner(min_words=2, max_words=4, max_characters=20)
    kept, dropped = cleaner.clean(raw("a b", "a", "a b c d", "a b c d e", "a " + 18 * "b", "a " + 19 * "b"))
    assert kept == ["a b", "a b c d", "a " + 18 * "b"]
    assert [prompt[1:] for prompt in dropped] == [("short", "1 words"), ("long", "5 words"), ("long", "21 characters")]


def test_very_long_prompts_are_no_trouble() -> None:
    rng = random.Random(0)
    giant = ["".join(rng.choices("abcdefgh    ", k=10_000)) for _ in range(3)]
    assert reasons(Cleaner().clean(raw(*giant, "x" * 10_000))[1]) == {"long": 4}
    kept, dropped = Cleaner(max_words=10_000, max_characters=10_000).clean(raw(*giant, giant[0] + "x", "x" * 10_000))
    assert len(kept) == 4
    assert reasons(dropped) == {"near-duplicate": 1}


def test_scores_above_the_limit_and_absent_ones_are_dropped() -> None:
    scores = {"aaa": 0.4, 2000 * "b": 0.41, "ccc": math.nan, "ddd": None, "eee": 0.0}
    given = [RawPrompt(text, score) for text, score in scores.items()]
    kept, dropped = Cleaner(max_nsfw=0.4).clean(given)
    assert kept == ["aaa", "ddd", "eee"]
    assert dropped == [Dropped(2000 * "b", "unsafe", "score 0.41"), Dropped("ccc", "unscored", "no NSFW score")]
    assert Cleaner(max_nsfw=None, max_characters=2000).clean(given) == (list(scores), [])


def test_a_prompt_is_as_unsafe_as_its_worst_row() -> None:
    given = [RawPrompt("a cat", 0.1), RawPrompt("A  cat", 0.9), RawPrompt("a dog", math.nan), RawPrompt("A dog", 0.2)]
    for rows in (given, given[::-1]):
        kept, dropped = Cleaner().clean(rows)
        assert [prompt.casefold() for prompt in kept] == ["a dog"]
        assert reasons(dropped) == {"unsafe": 2, "duplicate": 1}


def test_half_a_character_reaches_no_file(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(r'["cat \ud83d", "cat", "dog"]')
    source = FilePrompts(str(tmp_path / "p.json"), validation=0, test=0)
    assert source.split("train") == ["cat", "dog"]
    dropped = Cleaner().clean([RawPrompt("cat", name="no \ud83d"), RawPrompt("cat \ud83d")])[1]
    assert dropped == [Dropped("cat ?", "duplicate", "as no ?")]
    summary(1, [Dropped("\ud83d", "long", "\ud83d")]).encode()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_words": 0}, "min_words=0"),
        ({"min_words": 9, "max_words": 8}, "min_words=9 to max_words=8"),
        ({"max_characters": 0}, "max_characters=0"),
        ({"near_duplicates": 0.0}, r"near_duplicates=0\.0 must be"),
        ({"near_duplicates": 1.1}, r"near_duplicates=1\.1 must be"),
        ({"max_nsfw": -0.1}, r"max_nsfw=-0\.1 must be"),
        ({"diverse": 0, "embedder": lambda texts: np.eye(len(texts))}, "diverse=0 must be at least 1"),
        ({"diverse": 5}, "diverse=5 needs an embedder"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cleaner(**settings)


def test_the_most_different_prompts_are_kept_in_their_order() -> None:
    places = {"north": 1, "north again": 1 + 0.05j, "east": 1j, "east once more": 1j - 0.05, "south": -1}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[places[text].real, places[text].imag] for text in texts])

    kept, dropped = Cleaner(diverse=3, embedder=embed).clean(raw("north", *places))
    assert [text.split()[0] for text in kept] == ["north", "east", "south"]
    surplus = ("surplus", "not among the 3 most different")
    assert [prompt[1:] for prompt in dropped] == [("duplicate", "as number 1"), surplus, surplus]
    assert Cleaner(diverse=3, embedder=embed).clean(raw(*kept)) == (kept, [])
    assert Cleaner(diverse=9, embedder=embed).clean(raw(*places)) == (list(places), [])


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nONE\nOne\n" + 2000 * "x")
    with caplog.at_level("INFO", "vp_rl"):
        FilePrompts(str(tmp_path / "p.txt"), validation=0, test=0)
    assert caplog.messages == [f"{tmp_path / 'p.txt'}: 2 prompts kept; left out: 2 duplicate, 1 long"]


# --- splits


def test_splits_are_parts_of_all_prompts_in_their_order() -> None:
    prompts = [f"prompt {number}" for number in range(100)]
    for seed in (None, 0, 1):
        parts = split_prompts(prompts, 10, 20, seed, "p.txt")
        assert [len(parts[name]) for name in SPLITS] == [70, 10, 20]
        assert sorted(sum(parts.values(), []), key=prompts.index) == prompts
        assert all(part == sorted(part, key=prompts.index) for part in parts.values())
    last = split_prompts(prompts, 10, 20, None, "p.txt")
    assert (last["validation"], last["test"]) == (prompts[70:80], prompts[80:])


def test_drawn_splits_depend_on_the_prompts_and_the_seed_alone() -> None:
    prompts = [f"prompt {number}" for number in range(400)]
    shuffled = random.Random(0).sample(prompts, 400)
    cases = ((prompts, 0), (shuffled, 0), (prompts, 1))
    first, again, other = (
        {name: set(part) for name, part in split_prompts(given, 40, 60, seed, "p.txt").items()} for given, seed in cases
    )
    assert first == again
    assert first != other
    more = split_prompts([*prompts, "one more"], 40, 60, 0, "p.txt")
    assert sum(len(first[name] - set(more[name])) for name in SPLITS) <= 2  # the new one pushes at most two on


def test_no_two_splits_have_near_duplicates(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(prompt.text for prompt in noisy(number=200)))
    source = FilePrompts(str(tmp_path / "p.txt"), cleaner=Cleaner(near_duplicates=0.7), validation=40, test=40, seed=0)
    assert reasons(source.dropped())["near-duplicate"] > 20
    for one, other in combinations(SPLITS, 2):
        pairs = ((grams(a), grams(b)) for a in source.split(one) for b in source.split(other))
        assert max(similarity(*both) for both in pairs) < 0.7


def test_held_out_prompts_that_leave_none_to_train_on_are_told(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nONE\nthree\n")
    with pytest.raises(ValueError, match=r"p\.txt has 3 different prompts .*; 3 are held out, so none is left"):
        FilePrompts(str(tmp_path / "p.txt"), validation=1, test=2)
    with pytest.raises(ValueError, match="validation=-1 and test=2"):
        FilePrompts(str(tmp_path / "p.txt"), validation=-1, test=2)
    assert FilePrompts(str(tmp_path / "p.txt"), validation=1, test=1).split("train") == ["one"]


# --- the report


def test_the_summary_counts_every_reason() -> None:
    dropped = (
        [Dropped("A cat", "duplicate", "as row 1")] * 3 + [Dropped("x", "empty")] + [Dropped("y", "long", "9 words")]
    )
    assert summary(15, dropped).splitlines()[2:] == [
        "| kept | 15 | 75.0% | |",
        '| duplicate | 3 | 15.0% | "A cat" (as row 1); "A cat" (as row 1) |',
        '| empty | 1 | 5.0% | "x" |',
        '| long | 1 | 5.0% | "y" (9 words) |',
    ]
    assert summary(0, []).splitlines()[2] == "| kept | 0 | 0.0% | |"


def test_nothing_in_a_prompt_breaks_the_table_or_is_read_as_markup() -> None:
    evil = "a | b ` <b>1</b>\n\n# [x](http://y) \\| ``` \u2028 \ud83d "
    lines = summary(1, [Dropped(evil, "long", evil), Dropped("z" * 10_000, "long")]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {5}
    assert not re.search(r"[<>`\[\]\\]", lines[3])
    assert f'"{"z" * 59}…"' in lines[3]


def test_a_prompt_with_an_unsafe_word_is_dropped_and_words_that_only_contain_one_are_not(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("gore\n\nblood bath\n")
    texts = ["Lots of GORE!", "al gore's house", "a gorey day", "a blood  bath", "a bath of blood", "gore"]
    raw = [RawPrompt(text, nsfw=0.9 if text == "gore" else 0.0) for text in texts]
    kept, dropped = Cleaner(unsafe_words=str(words)).clean(raw)
    assert kept == ["a gorey day", "a bath of blood"]
    assert [(each.reason, each.detail) for each in dropped] == [
        ("unsafe", "has the word 'gore'"),
        ("unsafe", "has the word 'gore'"),
        ("unsafe", "has the word 'blood bath'"),
        ("unsafe", "score 0.90"),
    ]


def test_word_lists_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for given, said in (("nowhere.txt", "nowhere.txt"), (str(tmp_path / "empty.txt"), "no word")):
        with pytest.raises(ValueError, match=said):
            Cleaner(unsafe_words=given)
    monkeypatch.setattr("vp_rl.visionprefer.clean.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"vp_rl\[words\]"):
        Cleaner(unsafe_words="english")


def test_the_packaged_word_list_is_found() -> None:
    pytest.importorskip("better_profanity")
    kept, _ = Cleaner(unsafe_words="english").clean([RawPrompt("porn"), RawPrompt("a red fox")])
    assert kept == ["a red fox"]


def test_unsafe_prompts_are_not_shown() -> None:
    text = summary(1, Cleaner().clean([RawPrompt("something awful", 0.9), RawPrompt("unknown", math.nan)])[1])
    assert not {"awful", "unknown"} & set(re.findall(r"\w+", text))
    assert "| score 0.90 |" in text
