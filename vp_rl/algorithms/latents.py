"""Clean latents of images that are trained on again and again, each encoded once and kept on disk by what it is."""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors.torch import load, save

from vp_rl.files.store import Store
from vp_rl.interfaces import Policy
from vp_rl.types import Images, Latents

log = logging.getLogger(__name__)


class ImageLatents:
    """Encodes images, but for those that it, or another run with the same file, has encoded before.

    Latents have for a name the image's pixels and size, and what encodes it; so any data sets and policies may share a
    file. None is in main memory longer than its batch. A disk that is full is a warning.

    Args:
        policy: what encodes.
        file: where they are; None, or a policy whose encoder has no name: nothing is kept.

    Raises:
        ValueError: the file is something else, or cannot be used.
    """

    def __init__(self, policy: Policy, file: Path | None) -> None:
        self._policy = policy
        self._encoder = None if file is None else policy.image_encoder()
        try:
            self._store = Store(None if self._encoder is None else file, "a cache of latents")
        except OSError as error:
            raise ValueError(
                f"algorithm.latents: {error} With null nothing is kept, and images are encoded in every epoch."
            ) from error
        self._full = False

    @torch.no_grad()
    def __call__(self, images: Images) -> Latents:
        """Of each image, on its device.

        One by one, and in the encoder's own precision: the size of a batch, or autocast, would change the last bits,
        and a run that goes on has other batches.
        """
        keys = [self._key(image) for image in images]
        found = {key: load(data)["latents"] for key, data in self._store.get(keys).items()}
        made = {}
        for key, image in zip(keys, images, strict=True):
            if key not in found:
                with torch.autocast(images.device.type, enabled=False):
                    made[key] = found[key] = self._policy.encode_images(image[None])[0].cpu()
        self._keep({key: save({"latents": latents.contiguous()}) for key, latents in made.items()})
        return torch.stack([found[key] for key in keys]).to(images.device)

    def close(self) -> None:
        """Lets go of the file."""
        self._store.close()

    def _key(self, image: torch.Tensor) -> str:
        eight_bits = image.mul(255).round().byte().cpu().numpy()  # what it was read from
        what = f"{self._encoder} {image.device.type} {tuple(image.shape)} "
        return hashlib.blake2b(what.encode() + eight_bits.tobytes(), digest_size=16).hexdigest()

    def _keep(self, made: dict[str, bytes]) -> None:
        if not made or self._full:
            return
        try:
            self._store.put(made.items())
        except OSError as error:
            self._full = True
            log.warning(
                "algorithm.latents: %s Until then, images that are not in it are encoded in every epoch.", error
            )
