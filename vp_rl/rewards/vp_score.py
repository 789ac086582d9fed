"""VP-Score: BLIP's image and text towers, a linear head on [CLS], trained to rank images as VisionPrefer does.

The architecture is ImageReward's (Xu et al. 2023), which VP-Score follows: a vision transformer, a text encoder that
cross-attends to it in every layer, and five linear layers on the text's first token. Any size.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from vp_rl.interfaces import TrainableReward
from vp_rl.rewards.head import Head
from vp_rl.rewards.preprocess import preprocess
from vp_rl.scenes import tiny
from vp_rl.types import ASPECTS, Images, Scores

_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_WANTED = f"a folder with {', '.join(_FILES)}, as VPScore.save writes it (or tiny-vp-score, or tiny-blip)"


class VPScore(TrainableReward):
    """Scores how well images follow their prompts and please, as standardised numbers: about 0 on average, std 1.

    Args:
        vision, text: sizes of BLIP's towers; `text.encoder_hidden_size` must be the vision's width.
        tokenizer: BERT's, with a vocabulary of at most `text.vocab_size`.
        head_widths: of the layers between [CLS] and the score; the published ones are 1024, 128, 64, 16.
        max_length: tokens that a prompt is padded or cut to; 35 in the published model.
        by_aspect: four outputs, one for each aspect, instead of one.

    Raises:
        ValueError: these do not fit each other.
    """

    differentiable = True

    def __init__(
        self,
        vision: BlipVisionConfig,
        text: BlipTextConfig,
        tokenizer: BertTokenizer,
        head_widths: tuple[int, ...] = (1024, 128, 64, 16),
        max_length: int = 35,
        by_aspect: bool = False,
    ) -> None:
        super().__init__()
        _check(vision, text, tokenizer, max_length)
        text = copy.copy(text)
        text.is_decoder = True  # creates the cross-attention; attention stays bidirectional as the call does not set it
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = Head(text.hidden_size, head_widths, len(ASPECTS) if by_aspect else 1)
        self.tokenizer, self.max_length, self.head_widths = tokenizer, max_length, tuple(head_widths)

    @classmethod
    def load(
        cls, checkpoint: str, by_aspect: bool | None = None, weights: Mapping[str, float] | None = None
    ) -> "VPScore":
        """Reads a folder that `save` wrote, or the embedded `tiny-vp-score` or `tiny-blip`: frozen, float32.

        A folder with the towers alone (a pretrained BLIP) gets a new head. `freeze(0.0)` makes it trainable.

        Args:
            checkpoint: the folder.
            by_aspect: whether a new head has an output for each aspect. None: as in the checkpoint, or else not.
            weights: of the aspects in the score, where the head has an output for each; one that is not named counts
                nothing. None: those that training found.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ValueError: a file in it is damaged or of another architecture.
        """
        folder = Path(tiny.resolve(checkpoint)).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(f"reward.checkpoint={checkpoint!r} {what}; it must be {_WANTED}.")
        for name in _FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"reward.checkpoint={checkpoint!r} has no {name}; it must be {_WANTED}.")
        try:
            config = json.loads((folder / "config.json").read_text())
            state = load_file(folder / "model.safetensors")
            reward = cls(
                BlipVisionConfig(**config["vision"]),
                BlipTextConfig(**config["text"]),
                BertTokenizer.from_pretrained(folder),
                tuple(config["head_widths"]),
                config["max_length"],
                config.get("by_aspect", bool(by_aspect)),
            )
        except (ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
            raise ValueError(f"reward.checkpoint={checkpoint!r} is damaged: {error!r}. Give {_WANTED}.") from error
        reward._load_strictly(state, checkpoint)
        if by_aspect is not None and by_aspect != (len(reward.head.mean) > 1):
            raise ValueError(
                f"reward.by_aspect={by_aspect}, but the head in reward.checkpoint={checkpoint!r} was trained "
                f"{'with one output' if by_aspect else 'by aspect'}: start from towers without a head."
            )
        if weights is not None:
            reward.weigh(_in_order(weights, len(reward.head.mean)))
        return reward.requires_grad_(False).eval()

    def _load_strictly(self, state: dict[str, Tensor], checkpoint: str) -> None:
        own = self.state_dict()
        if not any(name.startswith("head.") for name in state):
            state = {**state, **{name: value for name, value in own.items() if name.startswith("head.")}}
        wrong = own.keys() ^ state.keys() | {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
        if wrong:
            raise ValueError(
                f"reward.checkpoint={checkpoint!r} does not fit its own config.json: {len(wrong)} tensors are missing, "
                f"left over or of another shape, {min(wrong)!r} first. It must be {_WANTED}."
            )
        self.load_state_dict(state)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, head: bool = True) -> None:
        """Writes config, tokenizer and safetensors weights; without the head it is a pretrained BLIP.

        `dtype` is of the towers: the head, and with it what makes scores comparable between runs, stays in float32.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "vision": _settings(self.vision.config),
            "text": _settings(self.text.config),
            "head_widths": self.head_widths,
            "max_length": self.max_length,
            **({"by_aspect": len(self.head.mean) > 1} if head else {}),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)
        state = {
            name: tensor.float().contiguous() if name.startswith("head.") else tensor.to(dtype).contiguous()
            for name, tensor in self.state_dict().items()
            if head or not name.startswith("head.")
        }
        save_file(state, folder / "model.safetensors")

    def freeze(self, fraction: float) -> None:
        """Everything trains but the embeddings and the first `fraction` of each tower's layers, if it is above 0.

        Raises:
            ValueError: `fraction` is not in [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"algorithm.frozen={fraction} must be a share between 0 and 1.")
        self.requires_grad_(True)
        for embeddings, layers in (
            (self.vision.embeddings, self.vision.encoder.layers),
            (self.text.embeddings, self.text.encoder.layer),
        ):
            number = int(fraction * len(layers))
            for module in (*layers[:number], *([embeddings] if number else [])):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> "VPScore":
        """Turns dropout on, unless nothing in here is trained: then scores must not be random."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def standardise(self, outputs: Float[Tensor, "batch outputs"]) -> None:
        """Updates the stored constants; outputs that were standardised before may be given.

        Raises:
            ValueError: they are all equal, or not finite.
        """
        self.head.standardise(outputs)

    def weigh(self, weights: Float[Tensor, " outputs"]) -> None:
        """Sets how much each output counts in the score; only their ratios matter."""
        self.head.weights.copy_(weights)

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Standardised scores in float32; gradients flow to the images."""
        return self.combine(self.outputs(images, prompts))

    def outputs(self, images: Images, prompts: list[str]) -> Float[Tensor, "batch outputs"]:
        """The head's: one, or one for each aspect."""
        return self.head(self.features(images, prompts))

    def combine(self, outputs: Float[Tensor, "batch outputs"]) -> Scores:
        """See `Head.combine`."""
        return self.head.combine(outputs)

    def features(self, images: Images, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """The text tower's [CLS], which has read the prompt and looked at the image."""
        different = list(dict.fromkeys(prompts))  # in reinforcement learning a prompt has many images
        tokens = self.tokenizer(
            different, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        return self.text(
            input_ids=tokens.input_ids[rows].to(images.device),
            attention_mask=tokens.attention_mask[rows].to(images.device),
            encoder_hidden_states=self.look(images),
        ).last_hidden_state[:, 0]

    def look(self, images: Images) -> Float[Tensor, "batch tokens features"]:
        """The vision tower's tokens of any images."""
        pixels = preprocess(images, self.vision.config.image_size)  # type: ignore[arg-type]  # BLIP's is a number
        return self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state


def _check(vision: BlipVisionConfig, text: BlipTextConfig, tokenizer: BertTokenizer, max_length: int) -> None:
    if text.encoder_hidden_size != vision.hidden_size:
        raise ValueError(f"{text.encoder_hidden_size=} must be {vision.hidden_size=}: the text looks at the image.")
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} words, more than {text.vocab_size=}.")
    if max_length > text.max_position_embeddings:
        raise ValueError(f"{max_length=} is more than {text.max_position_embeddings=}.")


def _in_order(weights: Mapping[str, float], outputs: int) -> Float[Tensor, " outputs"]:
    """Weights of aspects as a tensor.

    Raises:
        ValueError: there is one output only, an aspect is unknown, or the weights make no score.
    """
    if outputs == 1:
        raise ValueError("reward.weights need a reward with an output for each aspect (reward.by_aspect=true).")
    given = dict(weights)
    if (
        not given.keys() <= set(ASPECTS)
        or not all(0 <= w < float("inf") for w in given.values())
        or not any(given.values())
    ):
        raise ValueError(
            f"reward.weights={given} must give aspects out of {', '.join(ASPECTS)} numbers of 0 or more, and one of "
            "them more than 0."
        )
    return torch.tensor([float(given.get(aspect, 0.0)) for aspect in ASPECTS])


def _settings(config: Any) -> dict[str, Any]:
    """A BLIP config as its constructor takes it, without what changes with the version of transformers."""
    skip = ("transformers_version", "dtype", "model_type")
    return {name: value for name, value in config.to_diff_dict().items() if name not in skip}
