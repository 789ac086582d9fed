"""What an evaluation has made before, by its content: images, text encodings, scores and ratings on disk."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load, save
from torch import Tensor, nn

from vp_rl.files import images as image_files
from vp_rl.files.store import Store
from vp_rl.interfaces import Policy
from vp_rl.types import Conditioning
from vp_rl.visionprefer.generate import as_png

TRAINING = ("lora", "gradient_checkpointing", "start", "reference")
"""Of a policy's settings: what changes nothing in the base's images."""


class Kept(NamedTuple):
    """A store, and what tells the models of this evaluation from others."""

    store: Store
    policy: str = ""
    """The policy's fingerprint, adapter included where it is on."""
    text: str = ""
    """That of what encodes the prompts: the frozen part's."""
    rewards: Mapping[str, str] = {}
    """The fingerprints of the rewards by their names in the panel; the trained one's is `reward`. Scores of a reward
    that has none are not kept."""


NOTHING = Kept(Store(None))
"""Nothing is kept."""


def key_of(*parts: object) -> str:
    """Of what a value follows from."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def in_words(settings: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Settings in words that are the same whenever they are, but for some of them."""
    return json.dumps({name: value for name, value in settings.items() if name not in without}, sort_keys=True)


def kept_of_base(
    policy: Policy, settings: Mapping[str, Any], device: str, store: Store, rewards: Mapping[str, str] | None = None
) -> Kept:
    """What is kept of a base model, whichever command has made it, and whatever is being trained on it.

    Args:
        policy: with or without an adapter.
        settings: of the policy.
        device: the kind of it that images are made on.
        store: of them.
        rewards: see `Kept`.
    """
    frozen = fingerprint(policy, f"{in_words(settings, TRAINING)} {device}", trained=False)
    return Kept(store, frozen, frozen, rewards or {})


def fingerprint(module: nn.Module, settings: str, *, trained: bool = True) -> str:
    """Changes with the settings and with any of the weights; without those that are `trained`, if that is false.

    Layers are named as they are without an adapter, so that a frozen model is the same whatever was to be trained.
    """
    learned = set() if trained else {name for name, each in module.named_parameters() if each.requires_grad}
    tensors = {
        name.replace(".base_layer", ""): each for name, each in module.state_dict().items() if name not in learned
    }
    digest = hashlib.blake2b(f"{type(module).__name__}\n{settings}".encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_image(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """As a file without loss."""
    return as_png(pixels)


def unpack_image(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """What `pack_image` packed."""
    return image_files.pixels(data)


def pack_row(conditioning: Conditioning, row: int) -> bytes:
    """One prompt's encoding."""
    return save({name: tensor[row : row + 1].cpu().contiguous() for name, tensor in conditioning.items()})


def unpack_rows(rows: Sequence[bytes], device: torch.device) -> Conditioning:
    """Several prompts' encodings together."""
    read = [load(row) for row in rows]
    return {name: torch.cat([row[name] for row in read]).to(device) for name in read[0]}


def same_pixels(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """Of the picture itself, by which its scores and ratings are kept."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
