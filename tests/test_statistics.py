"""What a dataset holds and how it is rated: closed forms on small sets, intervals that keep their promise."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import rated
from scipy.stats import binomtest, bootstrap, norm, spearmanr, t

from vp_rl.types import ASPECTS
from vp_rl.visionprefer import estimates
from vp_rl.visionprefer.estimates import Estimate
from vp_rl.visionprefer.pairs import pairs
from vp_rl.visionprefer.ratings import REVERSED, Batch, batches, shards
from vp_rl.visionprefer.statistics import Setting, measure


def drawn(prompts: int = 40, images: int = 4, seed: int = 0) -> np.ndarray:
    """Ratings that images deserve more or less."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(3, 1, (prompts, images, 1))
    return np.clip(np.round(quality + rng.normal(0, 0.8, (prompts, images, len(ASPECTS)))), 1, 5).astype(np.int64)


def same(rating: list[int]) -> np.ndarray:
    """One prompt whose images are rated alike in every aspect."""
    return np.repeat(np.array(rating)[None, :, None], len(ASPECTS), 2)


# --- estimates


def test_a_share_of_independent_trials_has_wilsons_interval() -> None:
    wins = np.arange(20000) % 10 < 3
    mine = estimates.share(estimates.sums(wins, np.ones(20000)))
    theirs = binomtest(6000, 20000).proportion_ci(method="wilson")
    assert (mine.value, mine.count, mine.prompts) == (0.3, 20000, 20000)
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_a_mean_of_single_values_has_students_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 5.0, 5.0])
    mine = estimates.mean(estimates.sums(values, np.ones(5)))
    half = t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5)
    assert mine == pytest.approx((3.4, 3.4 - half, 3.4 + half, 5, 5))


def test_prompts_that_repeat_themselves_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    wins, ones = rng.integers(2, size=100), np.ones(100)
    once, sixfold = (estimates.share(estimates.sums(times * wins, times * ones)) for times in (1, 6))
    assert sixfold[:3] == pytest.approx(once[:3])
    assert (once.count, sixfold.count) == (100, 600)


def test_prompts_that_happen_to_balance_add_no_more_certainty_than_was_counted() -> None:
    balanced = estimates.share(estimates.sums(np.array([3] * 9 + [4]), np.full(10, 6)))
    theirs = binomtest(31, 60).proportion_ci(method="wilson")
    assert balanced.low < theirs.low < theirs.high < balanced.high


def test_a_share_is_a_mean_that_is_bounded_by_0_and_1() -> None:
    wins = np.arange(100) % 10 < 3
    totals = estimates.sums(wins, np.ones(100))
    assert estimates.bounded(totals, 0.0, 1.0)[:3] == pytest.approx(estimates.share(totals)[:3], rel=1e-2)
    shifted = estimates.bounded(estimates.sums(2.0 * wins - 1, np.ones(100)), -1.0, 1.0)
    assert shifted[:3] == pytest.approx([2 * part - 1 for part in estimates.bounded(totals, 0.0, 1.0)[:3]])


def test_an_interval_stays_within_its_bounds() -> None:
    nearly = estimates.bounded(estimates.sums(np.array([1.0] * 9 + [0.8]), np.ones(10)), -1.0, 1.0)
    assert nearly.value == pytest.approx(0.98)
    assert 0.8 < nearly.low < 0.98 < nearly.high < 1
    unanimous = estimates.bounded(estimates.sums(np.ones(10), np.ones(10)), -1.0, 1.0)
    assert unanimous.low < 0.6 < unanimous.high == 1


def test_sums_may_be_added_batch_by_batch() -> None:
    rng = np.random.default_rng(0)
    y, n = rng.integers(3, size=(2, 90, 5))
    whole = estimates.sums(y, y + n)
    parts = sum(estimates.sums(y[start : start + 7], (y + n)[start : start + 7]) for start in range(0, 90, 7))
    np.testing.assert_allclose(parts, whole)


def test_prompts_without_a_comparison_do_not_count() -> None:
    y, n = np.array([1, 2, 0, 1]), np.array([2, 3, 1, 3])
    padding = np.zeros(50, np.int64)
    for estimate in (estimates.share, estimates.mean):
        assert estimate(estimates.sums(np.append(y, padding), np.append(n, padding))) == estimate(estimates.sums(y, n))


def test_little_evidence_gives_wide_intervals_or_none() -> None:
    assert estimates.share(np.zeros(6)).count == 0
    assert math.isnan(estimates.share(np.zeros(6)).value)
    one = estimates.sums(np.array([3]), np.array([3]))
    assert estimates.share(one) == Estimate(1.0, 0.0, 1.0, 3, 1)
    assert estimates.mean(one).value == 1
    assert math.isnan(estimates.mean(one).low)
    unanimous = estimates.share(estimates.sums(np.full(10, 6), np.full(10, 6)))
    assert unanimous.high == 1
    assert 0.6 < unanimous.low < binomtest(10, 10).proportion_ci(method="wilson").low + 1e-9  # not as of 60 trials
    lopsided = estimates.share(estimates.sums(np.full(10, 3), np.full(10, 6)))  # each prompt exactly half
    assert lopsided.low < 0.5 < lopsided.high


def covered(draw: Callable[[np.random.Generator], Estimate], truth: float, times: int = 1000) -> float:
    """How often the interval holds the truth."""
    rng = np.random.default_rng(0)
    found = [draw(rng) for _ in range(times)]
    return sum(each.low <= truth <= each.high for each in found) / times


@pytest.mark.parametrize("prompts", [10, 40, 200])
def test_intervals_hold_the_truth_in_95_of_100_cases(prompts: int) -> None:
    """Prompts with a mind of their own and unequal weight. Binomial error of 1000 cases is 0.7%; 3 of them: 2%."""

    def share(rng: np.random.Generator) -> Estimate:
        n = rng.integers(1, 7, prompts)
        return estimates.share(estimates.sums(rng.binomial(n, rng.beta(1.5, 1.0, prompts)), n))

    def mean(rng: np.random.Generator) -> Estimate:
        n = rng.integers(1, 7, prompts)
        return estimates.mean(estimates.sums(n * rng.normal(3, 1, prompts) + rng.normal(0, np.sqrt(n)), n))

    assert 0.93 < covered(share, 0.6) < 0.985
    assert 0.93 < covered(mean, 3.0) < 0.97


# --- differences of the same prompts


def moved(rng: np.random.Generator, prompts: int, before: float, after: float, seeds: int) -> np.ndarray:
    """By prompt, how much larger the share of right images became; prompts differ in how hard they are."""
    was, now = (rng.beta(4 * p, 4 * (1 - p), prompts) for p in (before, after))
    return (rng.binomial(seeds, now) - rng.binomial(seeds, was)) / seeds


@pytest.mark.parametrize("prompts", [3, 5, 8, 20, 128])
@pytest.mark.parametrize(
    ("before", "after"), [(0.03, 0.03), (0.5, 0.5), (0.97, 0.97), (0.03, 0.23), (0.5, 0.7), (0.97, 0.77)]
)
def test_intervals_of_differences_hold_the_truth_near_the_bounds_and_of_few_prompts(
    prompts: int, before: float, after: float
) -> None:
    rng, times, held = np.random.default_rng(0), 200, 0
    for number in range(times):
        low, high = estimates.paired(moved(rng, prompts, before, after, 1 + 3 * (number % 2)), scale=1.0)
        held += low <= after - before <= high
        assert low < high
    assert held >= 180, "Binomial(200, 0.95) is below 181 in 0.2% of cases"


def test_eight_prompts_that_did_not_change_leave_room_for_what_was_not_seen() -> None:
    low, high = estimates.paired(np.zeros(8), scale=1.0)
    assert (low, high) == pytest.approx((-(1 - 0.025 ** (1 / 8)), 1 - 0.025 ** (1 / 8)))  # the rule of three's kind
    assert 0.3 < high < 0.4
    assert all(math.isnan(end) for number in (0, 1, 2) for end in estimates.paired(np.ones(number)))


def test_of_many_different_prompts_the_interval_is_the_widened_bootstraps() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.8, 128)
    reach = math.sqrt(128 / 127) * t.ppf(0.975, 127)
    theirs = bootstrap(
        (values,),
        np.mean,
        confidence_level=1 - 2 * norm.sf(reach),
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert estimates.paired(values, scale=1.0) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("prompts", [3, 4, 6, 12, 40])
def test_no_change_is_taken_for_one_in_at_most_5_of_100_cases(prompts: int) -> None:
    rng, times = np.random.default_rng(0), 1000
    chances = [estimates.chance(rng.normal(size=prompts)) for _ in range(times)]
    # Binomial(1000, 0.05) is above 71 in 0.2% of cases. An interval of resamples alone leaves 0 out of 25% at three.
    assert sum(chance <= 0.05 for chance in chances) <= 71
    assert min(chances) >= min(1.0, 2 * 0.5**prompts), "nor surer than the sign test"


def test_what_is_not_a_number_is_null_in_json() -> None:
    assert estimates.without_nan({"a": [math.nan, 1.0, (2, math.inf)], "b": "nan"}) == {
        "a": [None, 1.0, [2, None]],
        "b": "nan",
    }


# --- reading


def test_ratings_come_out_as_they_were_put_in() -> None:
    ratings, counts = drawn(9, 5), np.array([5, 2, 3, 1, 5, 4, 5, 2, 0])
    given = ratings * (np.arange(5) < counts[:, None])[..., None]
    places = np.random.default_rng(1).permuted(np.broadcast_to(np.arange(5)[:, None], given.shape), axis=1)
    batch = rated.rows(
        {"judge": given, "other": given[..., ::-1]}, places={"judge": places, "other": places}, counts=counts
    )
    for part, rows in ((slice(0, 9), batch), (slice(3, 7), batch.slice(3, 4))):
        read = Batch(rows)
        assert read.prompt_ids.tolist() == list(range(9))[part]
        np.testing.assert_array_equal(read.ratings("judge")[0], given[part])
        np.testing.assert_array_equal(read.ratings("other")[0], given[part][..., ::-1])
        np.testing.assert_array_equal(read.ratings("judge")[1], np.where(given > 0, places, -1)[part])
        assert not read.ratings("nobody")[0].any()


def test_settings_are_given_to_the_images_they_are_of() -> None:
    generators = np.array([["a", "b", "a"], ["c", "a", "b"]])
    names, codes = Batch(rated.rows({"judge": drawn(2, 3)}, generators=generators, counts=np.array([3, 2]))).setting(
        "generator"
    )
    assert [[names[code] for code in row if code >= 0] for row in codes] == [["a", "b", "a"], ["c", "a"]]
    assert codes[1, 2] == -1


def change(rows: pyarrow.RecordBatch, **changes: object) -> pyarrow.RecordBatch:
    """The same with the first rating changed."""
    lists = rows.to_pylist()
    lists[0]["annotations"][0] |= changes
    return pyarrow.RecordBatch.from_pylist(lists, schema=rows.schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating": 6}, "cannot have said so"),
        ({"rating": 0}, "cannot have said so"),
        ({"rating": None}, "cannot have said so"),
        ({"position": None}, "cannot have said so"),
        ({"aspect": "beauty"}, "cannot have said so"),
        ({"image_id": "1-0"}, "cannot have said so"),  # of another row
        ({"image_id": "9-9"}, "cannot have said so"),
        ({"image_id": "0-1"}, "twice"),
        ({"aspect": "fidelity"}, "twice"),
    ],
    ids=str,
)
def test_ratings_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    rows = rated.rows({"judge": drawn(2, 2)})
    Batch(rows).ratings("judge")
    with pytest.raises(ValueError, match=message):
        Batch(change(rows, **changes)).ratings("judge")


def test_images_of_one_name_are_refused() -> None:
    rows = rated.rows({"judge": drawn(2, 2)}).to_pylist()
    rows[1]["images"][0]["image_id"] = "0-0"
    with pytest.raises(ValueError, match="one image_id"):
        Batch(pyarrow.RecordBatch.from_pylist(rows, schema=rated.SCHEMA))


def test_shards_are_found_by_split_in_order_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = ["train-00001-of-00002", "test-00000-of-00001", "train-00000-of-00002", "train", "retrain-00000-of-00001"]
    for number, name in enumerate(names):
        rows = rated.rows({"judge": drawn(3, 2)}, first=10 * number)
        parquet.write_table(pyarrow.Table.from_batches([rows]), tmp_path / "data" / f"{name}.parquet")
    found = shards(tmp_path)
    assert {split: [file.stem for file in files] for split, files in found.items()} == {
        "train": [names[2], names[0]],
        "test": [names[1]],
    }
    numbers = [number for rows in batches(tmp_path) for number in Batch(rows).prompt_ids.tolist()]
    assert numbers == [20, 21, 22, 0, 1, 2, 10, 11, 12]


# --- statistics


def test_counts_are_those_of_the_data() -> None:
    ratings, counts = drawn(30, 5), np.random.default_rng(0).integers(1, 6, 30)
    given = ratings * (np.arange(5) < counts[:, None])[..., None]
    found = measure([rated.rows({"judge": given, "other": given}, counts=counts)], "judge")
    blocks = [{a: block[:n, i].tolist() for i, a in enumerate(ASPECTS)} for block, n in zip(given, counts, strict=True)]
    for rule in ("pooled", "mean", *ASPECTS):
        assert found.pairs[rule] == sum(len(pairs(block, rule)) for block in blocks)
    assert (found.prompts, found.images, found.ratings) == (30, counts.sum(), 4 * counts.sum())
    assert found.annotators == {"judge": 4 * counts.sum(), "other": 4 * counts.sum()}
    assert found.possible_pairs == sum(math.comb(n, 2) for n in counts.tolist())
    for aspect in range(4):
        assert found.histogram[aspect].tolist() == [int((given[..., aspect] == rating).sum()) for rating in range(1, 6)]


def test_batches_of_any_size_give_the_same() -> None:
    ratings, rng = drawn(30), np.random.default_rng(0)
    generators, guidance = rng.choice(["a", "b", "c"], (30, 4)), rng.choice([1.0, 7.5], (30, 4))
    rows = rated.rows({"judge": ratings, "judge" + REVERSED: ratings}, generators=generators, guidance=guidance)
    whole = measure([rows], "judge")
    parts = measure([rows.slice(start, 4) for start in range(0, 30, 4)], "judge")
    assert str(parts) == str(whole)  # arrays among the fields have no equality of their own
    assert whole.generators["b"]["mean"].count > 30


def test_the_correlation_is_spearmans() -> None:
    ratings = drawn(50)
    ratings[..., 2] = 6 - ratings[..., 0]
    found = measure([rated.rows({"judge": ratings})], "judge").correlation
    np.testing.assert_allclose(found, spearmanr(ratings.reshape(-1, 4)).statistic, atol=1e-12)
    assert found[0, 2] == pytest.approx(-1)
    ratings[..., 3] = 5
    found = measure([rated.rows({"judge": ratings})], "judge").correlation
    assert np.isnan(found[3]).all()
    assert not np.isnan(found[:3, :3]).any()


def test_histograms_are_those_of_each_generator() -> None:
    generators = np.array([["a", "b"], ["b", "b"]])
    ratings = np.concatenate([same([5, 1]), same([2, 1])])
    found = measure([rated.rows({"judge": ratings}, generators=generators)], "judge").histograms
    assert {name: own[0].tolist() for name, own in found.items()} == {"a": [0, 0, 0, 0, 1], "b": [2, 1, 0, 0, 0]}


def test_a_generators_win_rate_is_against_the_others_and_without_ties() -> None:
    generators = np.array([["a", "b", "a", "c"]] * 2)
    ratings = np.concatenate([same([5, 3, 4, 3]), same([1, 3, 3, 2])])
    wins = measure([rated.rows({"judge": ratings}, generators=generators)], "judge").generators
    for column in (*ASPECTS, "mean"):
        # a: first prompt 4 of 4; second: image 0 loses both, image 2 ties b and beats c.
        assert wins["a"][column][:1] + wins["a"][column][3:] == (5 / 7, 7, 2)
        assert wins["b"][column][:1] + wins["b"][column][3:] == (2 / 4, 4, 2)  # b and c: a tie, then a win
        assert wins["c"][column][:1] + wins["c"][column][3:] == (1 / 5, 5, 2)


def test_win_rates_by_guidance_and_by_both_are_told_apart() -> None:
    guidance = np.array([[1.0, 7.5, 7.5, np.float32(2.3)]])
    rows = rated.rows({"judge": same([1, 3, 5, 2])}, guidance=guidance, generators=np.array([["a", "a", "b", "b"]]))
    found = measure([rows], "judge")
    assert {scale: (own["mean"].value, own["mean"].count) for scale, own in found.guidance.items()} == {
        1.0: (0.0, 3),
        2.3: (1 / 3, 3),
        7.5: (1.0, 4),
    }
    assert found.settings[Setting("a", 7.5)]["mean"].value == 2 / 3
    assert found.settings[Setting("b", 7.5)]["mean"].value == 1
    assert found.settings[Setting("b", 1.0)]["mean"].count == 0
    assert found.steps[20]["mean"].count == 0


def test_each_aspect_has_win_rates_of_its_own() -> None:
    ratings = np.array([[[5, 1, 3, 3], [1, 5, 3, 2]]])
    wins = measure([rated.rows({"judge": ratings}, generators=np.array([["a", "b"]]))], "judge").generators["a"]
    assert [wins[column].value for column in ("prompt_following", "aesthetic", "harmlessness", "mean")] == [1, 0, 1, 1]
    assert wins["fidelity"].count == 0


def test_the_place_in_the_call_is_told_from_the_place_in_the_row() -> None:
    ratings, places = same([5, 3, 1]), np.array([[[2, 0, 1, 0], [1, 1, 2, 1], [0, 2, 0, 2]]])
    found = measure([rated.rows({"judge": ratings}, places={"judge": places})], "judge").positions
    assert [found.ratings[place]["prompt_following"].value for place in range(3)] == [1, 3, 5]
    assert [found.ratings[place]["pooled"].value for place in range(3)] == [3, 3.5, 2.5]
    assert [found.wins[place]["aesthetic"].value for place in range(3)] == [1, 0.5, 0]
    assert [(found.wins[place]["pooled"].value, found.wins[place]["pooled"].count) for place in range(3)] == [
        (4 / 8, 8),
        (5 / 8, 8),
        (3 / 8, 8),
    ]


def test_images_of_different_calls_at_one_place_do_not_compete_for_it() -> None:
    places = np.array([0, 0, 1, 1])[None, :, None] * np.ones((1, 1, 4), np.int64)
    found = measure([rated.rows({"judge": same([5, 4, 2, 1])}, places={"judge": places})], "judge").positions
    assert found.wins[0]["pooled"].count == found.wins[1]["pooled"].count == 4 * 4
    assert found.ratings[0]["pooled"].value == 4.5


def test_a_biased_annotator_is_found_out_and_a_fair_one_is_not() -> None:
    rng = np.random.default_rng(0)
    ratings = drawn(400)
    places = rng.permuted(np.broadcast_to(np.arange(4)[:, None], ratings.shape), axis=1)
    biased = np.clip(ratings + (places == 0), 1, 5)
    fair, bad = (measure([rated.rows({"j": r}, places={"j": places})], "j").positions for r in (ratings, biased))
    assert fair.wins[0]["pooled"].low < 0.5 < fair.wins[0]["pooled"].high
    assert bad.wins[0]["pooled"].low > 0.55
    assert bad.wins[3]["pooled"].high < 0.5
    assert bad.ratings[0]["pooled"].low > fair.ratings[0]["pooled"].high


def test_both_orders_are_compared_image_by_image() -> None:
    first, again = (
        np.concatenate([same([5, 3, 1]), same([4, 4, 2])]),
        np.concatenate([same([4, 3, 1]), same([2, 4, 4])]),
    )
    places = np.broadcast_to(np.arange(3)[:, None], first.shape)
    rows = rated.rows({"j": first, "j/reversed": again}, places={"j": places, "j/reversed": 2 - places})
    found = measure([rows], "j").both_orders
    for column in (*ASPECTS, "pooled"):
        # Prompt 1: two of three stay and all pairs; prompt 2: one stays, and of three pairs one is decided both times.
        times = 4 if column == "pooled" else 1
        assert (found.same[column].value, found.same[column].count) == (3 / 6, 6 * times)
        assert (found.alike[column].value, found.alike[column].count) == (3 / 4, 4 * times)
        # Images 0 and 2 came earlier once: +1 and 0, then +2 and +2; the middle one never moved.
        assert (found.earlier[column].value, found.earlier[column].count) == (5 / 4, 4 * times)


def test_only_prompts_shown_twice_count_for_both_orders() -> None:
    ratings = drawn(20)
    again = np.where((np.arange(20)[:, None, None] < 5) & (np.arange(4)[:, None] < 3), ratings, 0)  # and 3 images of 4
    found = measure([rated.rows({"j": ratings, "j/reversed": again})], "j").both_orders
    assert found.same["fidelity"][:1] + found.same["fidelity"][3:] == (1.0, 15, 5)
    untied = sum(len(set(two)) == 2 for row in ratings[:5, :3, 2].tolist() for two in combinations(row, 2))
    assert found.alike["fidelity"].count == untied
    assert found.earlier["fidelity"].count == 0  # shown at the same places


def test_an_annotator_who_has_rated_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'nobody' has rated nothing here; these have: judge"):
        measure([rated.rows({"judge": drawn(2)})], "nobody")
    with pytest.raises(ValueError, match="these have: none"):
        measure([], "nobody")
