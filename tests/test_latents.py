"""An image's latents are encoded once, whatever epoch, batch and run it is in, and are what they were without that."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import LinearPolicy, fit
from families import make
from test_methods import dpo
from test_methods import pairs as pairs
from torch import Tensor

from vp_rl.algorithms.latents import ImageLatents
from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.files.store import Store
from vp_rl.types import Images


class Counting(LinearPolicy):
    """Remembers how many images it has encoded, and into which precision."""

    def __init__(self, name: str | None = "counting", shade: float = 1.0) -> None:
        super().__init__(gain=0.0)
        self.encoded, self.name, self.shade, self.autocast = 0, name, shade, False

    def image_encoder(self) -> str | None:
        return self.name

    def encode_images(self, images: Images) -> Tensor:
        assert len(images) == 1, "a batch's size would change the last bits"
        self.encoded += 1
        self.autocast = self.autocast or torch.is_autocast_enabled("cpu")
        return self.shade * images


def trained(policy: Counting, folder: Path, file: Path | None, **settings: Any) -> Tensor:
    data = PreferenceDataModule(str(folder), batch_size=settings.pop("batch_size", 3), aspects="mean")
    latents = None if file is None else str(file)
    fit(dpo(policy, beta=1.0, latents=latents), data=data, **settings)
    return policy.bias.detach()


def test_a_second_epoch_and_a_second_run_encode_nothing(pairs: Path, tmp_path: Path) -> None:
    file, plain, first, second, longer = tmp_path / "a" / "latents.sqlite", *(Counting() for _ in range(4))
    without = trained(plain, pairs, None, epochs=3)
    assert plain.encoded > 3 * 14
    assert torch.equal(trained(first, pairs, file, epochs=3), without)
    assert first.encoded == 14  # of seven prompts; those of the validation split are among them
    assert torch.equal(trained(second, pairs, file, epochs=3), without)
    trained(longer, pairs, file, epochs=4, batch_size=2)
    assert second.encoded == longer.encoded == 0


def test_latents_are_of_their_image_its_size_and_its_encoder(tmp_path: Path) -> None:
    file, images = tmp_path / "latents.sqlite", torch.arange(24).reshape(2, 3, 2, 2) / 255
    policy, other, nameless = Counting(), Counting("other", 2.0), Counting(None, 3.0)
    encode = ImageLatents(policy, file)
    assert torch.equal(encode(images), images)
    assert torch.equal(encode(images[[1, 0, 1]]), images[[1, 0, 1]])
    assert policy.encoded == 2
    wide = images.reshape(2, 3, 1, 4)  # the same bytes
    assert torch.equal(encode(wide), wide)
    assert policy.encoded == 4
    assert torch.equal(ImageLatents(other, file)(images), 2 * images)
    for _ in range(2):
        assert torch.equal(ImageLatents(nameless, file)(images), 3 * images)
    assert (other.encoded, nameless.encoded) == (2, 4)


def test_images_are_encoded_in_the_encoders_own_precision(tmp_path: Path) -> None:
    policy = Counting()
    with torch.autocast("cpu", torch.bfloat16):
        ImageLatents(policy, None)(torch.rand(2, 3, 2, 2))
    assert policy.encoded == 2
    assert not policy.autocast


def test_a_full_disk_is_a_warning_and_another_file_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full.")

    monkeypatch.setattr(Store, "put", full)
    images, policy = torch.rand(2, 3, 2, 2), Counting()
    encode = ImageLatents(policy, tmp_path / "latents.sqlite")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(encode(images), images)
    assert [record.getMessage().count("the disk is full") for record in caplog.records] == [1]
    (tmp_path / "notes.txt").write_text("no database, but some text that is long enough to be looked at" * 100)
    with pytest.raises(ValueError, match=r"algorithm\.latents: .*notes\.txt.* is not a cache of latents"):
        ImageLatents(policy, tmp_path / "notes.txt")


def test_a_policys_encoder_is_named_by_its_vae_and_what_is_made_of_it() -> None:
    policy, other = make("tiny_sd"), make("tiny_sd")
    name = policy.image_encoder()
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert policy.image_encoder() == name  # an adapter plays no part
    next(other.vae.encoder.parameters()).data += 1e-3
    assert other.image_encoder() != name
    assert make("sd15").image_encoder() != name
