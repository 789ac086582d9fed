"""Prompts' encodings on disk: the same bits as without, encoded once, whatever happens to the files."""

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PROMPTS, adapter, make, predict
from torch import nn

from vp_rl.policies import text_cache
from vp_rl.policies.text_cache import TextCache, key_of


class Encoder(nn.Module):
    """Weights and settings."""

    class config:  # noqa: N801  # as transformers' models have it
        @staticmethod
        def to_dict() -> dict[str, Any]:
            return {"_name_or_path": "anywhere", "layers": 1}

    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))


def cache(folder: Path, encoder: nn.Module | None = None, recipe: str = "sd") -> TextCache:
    return TextCache(folder, [encoder or Encoder()], recipe)


def row(number: int) -> dict[str, torch.Tensor]:
    return {"text": torch.full((1, 5, 4), float(number)), "pooled": torch.full((1, 3), -number, dtype=torch.bfloat16)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def count_embeddings(policy: Any) -> list[int]:
    """One entry for each time that encoders read."""
    calls: list[int] = []
    policy.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# --- in policies


@torch.no_grad()
@pytest.mark.parametrize("case", [*FAMILIES, "sd3_without_t5"])
def test_a_prompt_is_encoded_once_and_to_the_same_bits(case: str, tmp_path: Path) -> None:
    plain = make(case)
    settings = {"text_cache": str(tmp_path), "text_encoders": "cpu"}
    for run, fresh in enumerate((2, 1)):  # the second run meets one prompt that is new
        policy = make(case, economy=settings)
        calls = count_embeddings(policy)
        prompts = [*PROMPTS, *["a green star"] * run]
        assert same(policy.encode(prompts), plain.encode(prompts))
        assert len(calls) == fresh
        assert same(policy.encode(prompts[::-1]), plain.encode(prompts[::-1]))
        assert len(calls) == fresh
    assert torch.equal(predict(policy, guidance=3.0), predict(plain, guidance=3.0))


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_a_prompts_bits_do_not_depend_on_its_batch_or_on_autocast(case: str) -> None:
    policy = make(case)
    together = policy.encode([*PROMPTS, "a green star"])
    with torch.autocast("cpu", torch.bfloat16):
        alone = policy.encode(PROMPTS[1:])
    assert same(alone, {name: tensor[1:2] for name, tensor in together.items()})


@pytest.mark.parametrize("place", ["cpu", "visit"])
@pytest.mark.parametrize("case", FAMILIES)
def test_encoders_off_the_device_are_out_of_reach_of_whoever_moves_the_policy(case: str, place: str) -> None:
    policy = make(case, economy={"text_encoders": place})
    plain = make(case, economy={"text_encoders": "device"})
    assert any(name.startswith("text_encoder") for name, _ in plain.named_parameters())
    assert not any(name.startswith("text_encoder") for name, _ in policy.named_parameters())
    assert not any(name.startswith("text_encoder") for name in policy.state_dict())
    assert adapter(policy).keys() == adapter(plain).keys()
    policy.to("meta")  # as good a device as any
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
    assert policy.text_encoder.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in policy.text_encoder.parameters())


@torch.no_grad()
def test_visiting_encoders_read_on_the_device_and_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, moves, reading = make("sdxl", economy={"text_encoders": "visit"}), [], []
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(policy, name)
        monkeypatch.setattr(encoder, "to", lambda place, name=name: moves.append((name, str(place))))
        encoder.register_forward_pre_hook(lambda *_: reading.append(len(moves)))
    monkeypatch.setattr(type(policy), "device", property(lambda _: torch.device("cpu", 0)))
    policy.encode(PROMPTS)
    names = ["text_encoder", "text_encoder_2"]
    assert moves == [(name, place) for place in ("cpu:0", "cpu") for name in names]
    assert reading == [2] * 4  # once there, and before they leave


# --- the key


def test_the_key_is_of_what_every_encoder_reads() -> None:
    one, two = torch.tensor([[1, 2]]), torch.tensor([[3]])
    assert key_of([one, two]) == key_of([one.clone(), two.clone()])
    others = [[one], [two, one], [one, two + 1], [torch.tensor([[1, 2, 0]]), two], [torch.tensor([[1]]), two]]
    assert len({key_of(tokens) for tokens in [[one, two], *others]}) == 6


@pytest.mark.parametrize(
    "other", [Encoder(1.0), Encoder(dtype=torch.float16), nn.Sequential()], ids=["weights", "dtype", "recipe"]
)
def test_other_encoders_have_a_cache_of_their_own(tmp_path: Path, other: nn.Module) -> None:
    cache(tmp_path).put({"a": row(1)})
    encoder, recipe = (None, "sdxl") if isinstance(other, nn.Sequential) else (other, "sd")
    assert not cache(tmp_path, encoder, recipe).get(["a"])
    assert same(cache(tmp_path, Encoder()).get(["a"])["a"], row(1))


# --- files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, empty, flip])
@pytest.mark.parametrize("opened", [False, True], ids=["before opening", "after"])
def test_a_spoilt_file_is_a_warning_and_its_prompts_are_encoded_anew(
    tmp_path: Path, spoil: Callable[[Path], None], opened: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache(tmp_path).put({"a": row(1)})
    cache(tmp_path).put({"b": row(2)})
    kept = cache(tmp_path) if opened else None
    spoil(next(path for path in files(tmp_path) if b'"a.text"' in path.read_bytes()))
    kept = kept or cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = kept.get(["a", "b"])
    assert found.keys() == {"b"}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "policy.economy.text_cache" in message
    assert "encoded anew" in message
    kept.put({"a": row(1)})
    assert cache(tmp_path).get(["a", "b"]).keys() == {"a", "b"}


def test_many_small_files_are_put_together(tmp_path: Path) -> None:
    first, number = cache(tmp_path), 3 * text_cache._PACK // 2
    for index in range(number):
        first.put({f"{index}": row(index)})
    assert len(files(tmp_path)) == number
    second = cache(tmp_path)
    assert len(files(tmp_path)) == 2
    for kept in (first, second, cache(tmp_path)):  # the first still has the old list of files
        found = kept.get(f"{index}" for index in range(number))
        if kept is first and len(found) < number:
            found |= kept.get(f"{index}" for index in range(number))
        assert len(found) == number
        assert all(same(found[f"{index}"], row(index)) for index in range(number))


def work(folder: Path, start: int) -> None:
    kept = cache(folder)
    for index in range(start, start + 40):
        key = f"{index % 50}"
        if not (found := kept.get([key])):
            kept.put({key: row(index % 50)})
        else:
            assert same(found[key], row(index % 50))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = cache(tmp_path).get(f"{index}" for index in range(50))
    assert len(found) == 50
    assert all(same(kept, row(int(key))) for key, kept in found.items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = cache(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(text_cache, "save_file", full)
    with caplog.at_level(logging.WARNING):
        kept.put({"a": row(1)})
    assert "No space left" in caplog.text
    assert not kept.get(["a"])
