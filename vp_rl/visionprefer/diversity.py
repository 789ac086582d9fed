"""Prompts that differ most from each other, by what a sentence model makes of them."""

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from vp_rl.files.paths import user_place


def farthest_first(vectors: Float[np.ndarray, "prompts features"], count: int) -> list[int]:
    """Indices of `count` vectors, each the one that is least like those before it (Gonzalez 1985).

    No set of that size leaves every vector within less than half the distance, in the angle's chord, that this one
    does. The first is the one nearest to the mean. Costs time in proportion to `count` times all vectors.

    Args:
        vectors: only their directions count.
        count: 1 up to the number of vectors.
    """
    assert 1 <= count <= len(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    closest = -units @ units.mean(axis=0)  # of each vector: how like it is to the likest of those chosen
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(int(closest.argmin()))
        alike = units @ units[chosen[-1]]
        closest = alike if len(chosen) == 1 else np.maximum(closest, alike)
        closest[chosen[-1]] = np.inf
    return chosen


class SentenceEmbedder:
    """Unit vectors of texts: the mean over tokens of what a sentence model makes of them.

    As sentence-transformers computes it for models with mean pooling, all-MiniLM-L6-v2 among them; on a GPU if there is
    one.

    Args:
        path: hub name, or folder in transformers' format.
        batch_size: texts at once; does not change the vectors beyond rounding.

    Raises:
        ValueError: there is no such model.
    """

    def __init__(self, path: str = "sentence-transformers/all-MiniLM-L6-v2", batch_size: int = 64) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(user_place(path))
            model = AutoModel.from_pretrained(user_place(path))  # in evaluation mode
        except (OSError, ValueError) as error:
            raise ValueError(f"embedder.path={path!r} is no model in transformers' format: {error}") from error
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._longest = min(self._tokenizer.model_max_length, model.config.max_position_embeddings)
        self._batch_size = batch_size

    def __call__(self, texts: list[str]) -> Float[np.ndarray, "prompts features"]:
        """A float32 vector of length 1 for each text; the end of one too long for the model plays no part."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding in a batch
        found = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        starts = range(0, len(order), self._batch_size)
        for start in tqdm(starts, "embed prompts", unit="batch", mininterval=2, delay=5):
            batch = order[start : start + self._batch_size]
            found[batch] = self._embed([texts[place] for place in batch]).cpu().numpy()
        return found

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Float[torch.Tensor, "batch features"]:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._model.device)
        states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)
