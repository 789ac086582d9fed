"""VisionPrefer's stages and the builder of them all: prompts to images to ratings to a dataset."""

import asyncio
import os
import random
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from fakes import read_dataset, write_dataset
from torch.nn import functional as F

from vp_rl.annotators.scene import SceneAnnotator
from vp_rl.interfaces import Annotator, Policy, PromptSource
from vp_rl.processes.ddim import DDIM
from vp_rl.scenes.grammar import RELATIONS, Scene, parse, scenes
from vp_rl.types import ASPECTS, Conditioning, Images, Latents, Rating, Split
from vp_rl.visionprefer import schema
from vp_rl.visionprefer.build import Builder
from vp_rl.visionprefer.engine import LocalEngine
from vp_rl.visionprefer.generate import ImageStore, Recipe, generate, recipes, to_uint8
from vp_rl.visionprefer.polish import prompt_id
from vp_rl.visionprefer.prompts import FilePrompts, ScenePrompts
from vp_rl.visionprefer.schema import SPLITS


class ToyPolicy(Policy):
    """Blotches that follow from prompt, noise, steps, guidance and the policy's own tint; each row for itself."""

    def __init__(self, tint: float = 0.0) -> None:
        super().__init__()
        self.process = DDIM(DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=False))
        self.tint = tint

    def encode(self, prompts: list[str]) -> Conditioning:
        return {"text": torch.tensor([zlib.crc32(prompt.encode()) / 2**32 for prompt in prompts])}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        return randn_tensor((batch, 3, 8, 8), list(generator) if isinstance(generator, Sequence) else generator)

    def predict(self, latents: Latents, timestep: torch.Tensor, conditioning: Conditioning, guidance: float) -> Latents:
        return 0.1 * guidance * latents + conditioning["text"][:, None, None, None] + self.tint

    def decode(self, latents: Latents) -> Images:
        return F.interpolate(latents.clamp(0, 1), size=64)

    def encode_images(self, images: Images) -> Latents:
        raise NotImplementedError

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save_adapter(self, directory: Path) -> None:
        raise NotImplementedError

    def load_adapter(self, directory: Path) -> None:
        raise NotImplementedError


MAKERS: dict[str, Callable[[], Policy]] = {"dark": ToyPolicy, "light": lambda: ToyPolicy(0.3)}


class Lists(PromptSource):
    """Given prompts."""

    def __init__(self, **splits: list[str]) -> None:
        self._splits = splits

    def split(self, name: Split) -> list[str]:
        return self._splits[name]


def builder(
    prompts: PromptSource | None = None,
    annotator: Annotator | None = None,
    makers: dict[str, Callable[[], Policy]] = MAKERS,
    **settings: object,
) -> Builder:
    return Builder(
        prompts or ScenePrompts(6, 3, 3),
        makers,
        annotator or SceneAnnotator(),
        **{"guidance_scales": (1.0, 4.0), "steps": (2, 3), **settings},
    )


# --- prompts


def test_no_prompt_and_no_combination_is_in_two_splits() -> None:
    source = ScenePrompts(60, 15, 15)
    prompts = [prompt for split in SPLITS for prompt in source.split(split)]
    assert len(prompts) == len(set(prompts)) == 90
    combinations = [{frozenset(map(str, parse(prompt).things)) for prompt in source.split(s)} for s in SPLITS]
    assert len(set.union(*combinations)) == sum(map(len, combinations))


def test_a_combination_is_in_one_split_whatever_its_order_and_relation() -> None:
    for scene in scenes("train", 30, categories=("relation", "composition")):
        assert {Scene(things, r).split for things in (scene.things, scene.things[::-1]) for r in RELATIONS} == {"train"}


def test_prompts_of_a_file_are_split_without_overlap(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i % 20}" for i in range(30)) + "\n\n")
    source = FilePrompts(str(file), validation=3, test=5)
    parts = [source.split(split) for split in SPLITS]
    assert [len(part) for part in parts] == [12, 3, 5]
    assert sum(parts, []) == [f"prompt {i}" for i in range(20)]


@pytest.mark.parametrize(("lines", "error"), [(None, FileNotFoundError), (8, ValueError)])
def test_a_prompt_file_that_is_absent_or_too_short_is_refused(
    tmp_path: Path, lines: int | None, error: type[Exception]
) -> None:
    file = tmp_path / "prompts.txt"
    if lines is not None:
        file.write_text("\n".join(map(str, range(lines))))
    with pytest.raises(error, match="prompts.txt"):
        FilePrompts(str(file), validation=3, test=5)


def test_a_prompt_file_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.txt is not a UTF-8 text file \(byte 3\)"):
        FilePrompts(str(file))


# --- generation

PROMPTS = [f"prompt {i}" for i in range(7)]


def planned(prompts: list[str] = PROMPTS, seed: int = 0) -> list[Recipe]:
    return recipes(prompts, 4, sorted(MAKERS), (1.0, 2.0), (2, 3), seed)


def made(makers: dict[str, Callable[[], Policy]], wanted: list[Recipe], batch_size: int = 64) -> dict[Recipe, bytes]:
    """Images by recipe, made in a store of their own."""
    with TemporaryDirectory() as folder:
        store, by_id = ImageStore(Path(folder)), {f"1-{recipe.digest}": recipe for recipe in wanted}
        generate(makers, by_id, store, batch_size, LocalEngine())
        assert store.ids() == set(by_id)
        return {recipe: store.read(image_id) for image_id, recipe in by_id.items()}


def test_images_do_not_depend_on_batching_or_order() -> None:
    together = made(MAKERS, planned())
    assert len(together) == 4 * len(PROMPTS)
    assert made(MAKERS, planned(), 1) == together
    assert made(MAKERS, random.Random(0).sample(planned(), 28), 5) == together


def test_a_recipe_does_not_depend_on_the_other_prompts() -> None:
    assert set(planned(PROMPTS[3:4])) == {recipe for recipe in planned() if recipe.prompt == PROMPTS[3]}


def test_recipes_vary_with_the_seed_and_use_every_setting() -> None:
    drawn = planned([f"prompt {i}" for i in range(100)])
    assert len({recipe.seed for recipe in drawn + planned(seed=1)}) == 428
    settings = [(recipe.generator, recipe.guidance_scale, recipe.steps) for recipe in drawn]
    counts = {setting: settings.count(setting) for setting in settings}
    # 8 settings for 400 images; 4 standard deviations of a binomial count.
    assert len(counts) == 8
    assert all(abs(count - 50) < 4 * (400 / 8 * 7 / 8) ** 0.5 for count in counts.values())


def test_every_setting_of_a_recipe_changes_the_image() -> None:
    recipe = Recipe("a prompt", 0, "dark", 1.0, 2, 0)
    others: list[dict] = [{"prompt": "b"}, {"generator": "light"}, {"guidance_scale": 2.0}, {"steps": 3}, {"seed": 1}]
    images = made(MAKERS, [recipe, *(recipe._replace(**other) for other in others)])
    assert len(set(images.values())) == 6


def test_one_generator_is_in_memory_at_a_time_and_unused_ones_are_never_made() -> None:
    alive: weakref.WeakSet[Policy] = weakref.WeakSet()
    most: list[int] = []

    def make() -> Policy:
        policy = ToyPolicy()
        alive.add(policy)
        most.append(len(alive))
        return policy

    used = [recipe._replace(generator="ab"[index % 2]) for index, recipe in enumerate(planned())]
    made({"a": make, "b": make, "c": make}, used, 8)
    assert most == [1, 1]
    assert not alive


def test_pixels_are_the_nearest_8_bit_values() -> None:
    levels = torch.arange(256) / 255
    jitter = torch.rand(256) * 0.98 - 0.49
    images = (levels + jitter / 255).clamp(0, 1).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert to_uint8(images)[0, :, :, 0].flatten().tolist() == list(range(256))


# --- the builder


def test_a_build_holds_every_prompt_with_its_images_and_all_ratings(tmp_path: Path) -> None:
    source = ScenePrompts(6, 3, 3)
    builder(source).build(tmp_path / "set")
    for split in SPLITS:
        rows = read_dataset(tmp_path / "set", split)
        assert [row["prompt"] for row in rows] == source.split(split)
        for each in rows:
            names = [image["image_id"] for image in each["images"]]
            assert len(set(names)) == 4
            assert all(name.startswith(f"{prompt_id(each['prompt'])}-") for name in names)
            assert {(a["image_id"], a["aspect"]) for a in each["annotations"]} == {
                (n, a) for n in names for a in ASPECTS
            }
            assert {(a["annotator"], a["template_version"]) for a in each["annotations"]} == {("scene", "1")}
            assert all(1 <= a["rating"] <= 5 and a["rationale"] for a in each["annotations"])
            assert all(i["generator"] in MAKERS and i["steps"] in (2, 3) for i in each["images"])


def test_a_rating_is_stored_with_the_image_that_it_is_of(tmp_path: Path) -> None:
    builder().build(tmp_path / "set")
    judge = SceneAnnotator()
    for each in read_dataset(tmp_path / "set", "train"):
        pictures = {i["image_id"]: i["image"]["bytes"] for i in each["images"]}
        for a in each["annotations"]:
            again = asyncio.run(judge.annotate(each["prompt"], [pictures[a["image_id"]]], a["aspect"]))
            assert again == [Rating(a["rating"], a["rationale"])]


def test_an_image_can_be_made_again_from_what_its_row_says(tmp_path: Path) -> None:
    builder().build(tmp_path / "set")
    each = read_dataset(tmp_path / "set", "test")[0]
    for number, image in enumerate(each["images"]):
        recipe = Recipe(
            each["prompt"], number, image["generator"], image["guidance_scale"], image["steps"], image["seed"]
        )
        assert made(MAKERS, [recipe])[recipe] == image["image"]["bytes"]


def test_a_larger_build_keeps_the_rows_of_a_smaller_one(tmp_path: Path) -> None:
    builder(Lists(train=["a red star and a blue star"], validation=[], test=[])).build(tmp_path / "small")
    more = Lists(train=["a small red trap", "a red star and a blue star"], validation=["two red traps"], test=[])
    builder(more, batch_size=3).build(tmp_path / "large")
    assert read_dataset(tmp_path / "small", "train")[0] == read_dataset(tmp_path / "large", "train")[1]


def test_a_prompts_number_is_its_own_for_good() -> None:
    numbers = {prompt_id(f"prompt {i}") for i in range(1000)}
    assert len(numbers) == 1000
    assert max(numbers) < 2**53  # exact in JSON
    assert prompt_id("a red star") == 3307424566002915


def test_the_card_says_what_the_data_are_and_how_they_were_made(tmp_path: Path) -> None:
    builder(about={"pretty_name": "Mine", "license": "cc0-1.0"}).build(tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text()
    for said in ("license: cc0-1.0", "# Mine", "The embedded world", "| Prompts for train | 6 |", "- light", "steps:"):
        assert said in card
    with pytest.raises(ValueError, match=r"about=\['licence'\] is not known to the card"):
        builder(about={"licence": "cc0-1.0"})


def fail(*_: object, **__: object) -> NoReturn:
    raise OSError("disk full")


def fail_at_the_second_split(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = schema.ParquetWriter, []

    def writer(*arguments: object) -> schema.ParquetWriter:
        calls.append(arguments)
        return fail() if len(calls) == 2 else real(*arguments)

    monkeypatch.setattr(schema, "ParquetWriter", writer)


@pytest.mark.parametrize(
    "crash",
    [
        lambda patch: patch.setattr(SceneAnnotator, "ask", fail),
        fail_at_the_second_split,
        lambda patch: patch.setattr(Path, "write_text", fail),
        lambda patch: patch.setattr(os, "replace", fail),
    ],
    ids=["rating", "a split", "the card", "the last moment"],
)
def test_a_build_that_crashes_leaves_no_dataset_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: Callable[[pytest.MonkeyPatch], None]
) -> None:
    folder = tmp_path / "set"
    with monkeypatch.context() as patch:
        crash(patch)
        with pytest.raises(OSError, match="disk full"):
            builder().build(folder)
    assert not schema.exists(folder)
    assert not folder.exists()
    builder().build(folder)
    assert len(read_dataset(folder, "train")) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"set", "set.work"}


def test_a_folder_with_something_in_it_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        builder(makers={"never": fail}).build(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        write_dataset({"train": []}, tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_prompt_in_two_splits_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    leaking = Lists(train=["a", "b", "a"], validation=["c"], test=["b"])
    with pytest.raises(ValueError, match="'b' is in two splits, train and test"):
        builder(leaking, makers={"never": fail}).build(tmp_path / "set")


@pytest.mark.parametrize(
    "wrong",
    [{"images_per_prompt": 1}, {"steps": ()}, {"guidance_scales": ()}, {"makers": {}}, {"batch_size": 0}],
    ids=str,
)
def test_a_builder_that_can_make_no_pair_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="images_per_prompt=1|No image can be made"):
        builder(**wrong)
