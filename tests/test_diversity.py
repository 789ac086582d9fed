"""Which prompts differ most: farthest-first traversal has its bound, and an embedding is its own text's alone."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from vp_rl.visionprefer.diversity import SentenceEmbedder, farthest_first


def covering(vectors: np.ndarray, chosen: Sequence[int]) -> float:
    """The largest distance from any vector to the nearest chosen one."""
    return float(np.linalg.norm(vectors[:, None] - vectors[None, list(chosen)], axis=-1).min(axis=1).max())


@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_covers_at_most_twice_as_badly_as_the_best_choice(seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(11, 3))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for count in (2, 3, 4):
        best = min(covering(units, chosen) for chosen in combinations(range(11), count))
        chosen = farthest_first(vectors, count)
        assert len(set(chosen)) == count
        assert covering(units, chosen) <= 2 * best + 1e-6
    every = farthest_first(vectors, 11)
    gaps = [np.linalg.norm(units[every[:n]] - units[every[n]], axis=1).min() for n in range(1, 11)]
    assert all(first >= second - 1e-6 for first, second in zip(gaps, gaps[1:], strict=False))


def test_farthest_first_takes_one_of_each_cluster_and_the_middle_first() -> None:
    angles = np.array([0.0, 0.01, 1.0, 1.01, 1.02, 2.0, 2.0, 2.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 9)[:, None]
    chosen = farthest_first(vectors, 3)
    assert chosen[0] in (2, 3, 4)
    assert {round(angles[place]) for place in chosen} == {0, 1, 2}
    assert sorted(farthest_first(vectors, 8)) == list(range(8))


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random BERT that reads at most 6 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "cat", "dog", "on", "mat"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=7, max_position_embeddings=6, **sizes)).save_pretrained(folder)
    return str(folder)


def test_an_embedding_is_the_mean_over_the_tokens_of_its_text_alone(sentence_model: str) -> None:
    embed = SentenceEmbedder(sentence_model, batch_size=3)  # by length, so that each batch has padding
    texts = ["a cat on a mat", "dog", "a dog", "cat on", "mat"]
    together = embed(texts)
    assert together.dtype == np.float32
    # A sum of 8 float32 squares near 1, each off by a rounding or two: 1e-6 is generous.
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    model, tokenizer = BertModel.from_pretrained(sentence_model).eval(), embed._tokenizer
    for text, vector in zip(texts, together, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        alone = torch.nn.functional.normalize(states.mean(0), dim=0)
        np.testing.assert_allclose(vector, alone, atol=1e-5)  # padding changes the order of float32 sums only


def test_a_text_too_long_for_the_model_is_read_to_its_limit(sentence_model: str) -> None:
    embed = SentenceEmbedder(sentence_model)
    np.testing.assert_array_equal(*embed(["a cat on a mat dog", "a cat on a mat dog" + " dog" * 500]))


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embedder\.path='.*none' is no model"):
        SentenceEmbedder(str(tmp_path / "none"))
