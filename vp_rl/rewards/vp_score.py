"""VP-Score: BLIP's image and text towers, a linear head on [CLS], trained to rank images as VisionPrefer does.

The architecture is ImageReward's (Xu et al. 2023), which VP-Score follows: a vision transformer, a text encoder that
cross-attends to it in every layer, and five linear layers on the text's first token. Any size; ImageReward itself is
this class on its published weights.

    VPScore.load(folder)                                      what `save` wrote
    VPScore.from_blip("ImageReward.pt").save(folder)          what others wrote, once, to make such a folder of it
"""

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vp_rl.configuration.kinds import Dtype, Positive, Real, Text
from vp_rl.interfaces import TrainableReward
from vp_rl.rewards import blip_names, blip_sizes, checkpoints
from vp_rl.rewards.blip_attention import fuse
from vp_rl.rewards.head import Head, in_order
from vp_rl.rewards.preprocess import preprocess
from vp_rl.scenes import tiny
from vp_rl.types import ASPECTS, Images, Scores

_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_WANTED = (
    f"a folder with {', '.join(_FILES)}, as VPScore.save writes it (or tiny-vp-score, or tiny-blip). Files of "
    "BLIP or ImageReward are for reward=vp_score_large reward.init=..."
)
_DTYPES = ("float32", "float16", "bfloat16")
_POSITIONS = "vision.embeddings.position_embedding"


class VPScore(TrainableReward):
    """Scores how well images follow their prompts and please, as standardised numbers: about 0 on average, std 1.

    Args:
        vision, text: sizes of BLIP's towers; `text.encoder_hidden_size` must be the vision's width.
        tokenizer: BERT's, with a vocabulary of at most `text.vocab_size`.
        head_widths: of the layers between [CLS] and the score; the published ones are 1024, 128, 64, 16.
        max_length: tokens after which a prompt is cut; 35 in the published model.
        by_aspect: four outputs, one for each aspect, instead of one.
        gradient_checkpointing: in training, computes each layer once more in the backward pass instead of keeping its
            activations.

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
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        blip_sizes.check(vision, text, tokenizer, max_length)
        text = copy.copy(text)
        text.is_decoder = True  # creates the cross-attention; attention stays bidirectional as the call does not set it
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        fuse(self.vision, self.text)
        self.tokenizer, self.max_length, self.head_widths = tokenizer, max_length, tuple(head_widths)
        self._by_aspect = by_aspect
        self.head = self._new_head()
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # transformers' own switch, `gradient_checkpointing_enable`, does not know the text tower.
                layer.gradient_checkpointing = gradient_checkpointing
                layer._gradient_checkpointing_func = partial(recompute, use_reentrant=False)  # type: ignore[assignment]

    @classmethod
    def load(
        cls,
        checkpoint: Text,
        by_aspect: bool | None = None,
        weights: Mapping[str, float] | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
    ) -> "VPScore":
        """Reads a folder that `save` wrote, or the embedded `tiny-vp-score` or `tiny-blip`: frozen.

        A folder with the towers alone (a pretrained BLIP) gets a new head. `freeze(0.0)` makes it trainable.

        Args:
            checkpoint: the folder.
            by_aspect: whether a new head has an output for each aspect. None: as in the checkpoint, or else not.
            weights: of the aspects in the score, where the head has an output for each; one that is not named counts
                nothing. None: those that training found.
            dtype: of the towers, and of the images in them; the head stays in float32.
            gradient_checkpointing: see the class.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ValueError: a file in it is damaged or of another architecture.
        """
        folder = Path(tiny.resolve(checkpoint)).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(f"reward.checkpoint={checkpoint!r} {what}; it must be {_WANTED}")
        for name in _FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"reward.checkpoint={checkpoint!r} has no {name}; it must be {_WANTED}")
        try:
            config = json.loads((folder / "config.json").read_text())
            state = load_file(folder / "model.safetensors")
            with torch.device("meta"):  # weights are about to come: none are made up
                reward = cls(
                    BlipVisionConfig(**config["vision"]),
                    BlipTextConfig(**config["text"]),
                    BertTokenizer.from_pretrained(folder),
                    tuple(config["head_widths"]),
                    config["max_length"],
                    config.get("by_aspect", bool(by_aspect)),
                    gradient_checkpointing,
                )
        except (ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
            raise ValueError(f"reward.checkpoint={checkpoint!r} is damaged: {error!r}. Give {_WANTED}") from error
        reward._fill(
            state, f"reward.checkpoint={checkpoint!r} does not fit its own config.json", f"It must be {_WANTED}"
        )
        if by_aspect is not None and by_aspect != reward._by_aspect:
            raise ValueError(
                f"reward.by_aspect={by_aspect}, but the head in reward.checkpoint={checkpoint!r} was trained "
                f"{'with one output' if by_aspect else 'by aspect'}: start from towers without a head."
            )
        if weights is not None:
            reward.weigh(in_order(weights, len(reward.head.mean)))
        return reward._frozen(dtype)

    @classmethod
    def from_blip(
        cls,
        init: Text,
        *,
        file: Text = "model.safetensors",
        revision: Text | None = None,
        tokenizer: Text = "bert-base-uncased",
        vision: BlipVisionConfig | None = None,
        text: BlipTextConfig | None = None,
        mean: Real = 0.0,
        std: Positive = 1.0,
        by_aspect: bool = False,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
    ) -> "VPScore":
        """Reads a checkpoint of BLIP (Salesforce's or transformers') or of ImageReward: frozen.

        Nothing is left over and nothing missing: every tensor in the file becomes one of ours or is on the list of
        those that a reward does not use (`blip_names`). Position embeddings of another image size are resized. BLIP
        has no head and gets a new one.

        Args:
            init: a file, a folder, or the hub name of a repository.
            file: its name in that folder or repository.
            revision: of the repository.
            tokenizer: hub name or folder of bert-base-uncased's; BLIP's two words, [DEC] and [ENC], are added.
            vision, text: sizes of the towers; without them the published ones.
            mean, std: what raw scores are standardised by, as the file does not say: ImageReward's are 0.1672, 1.0333.
            by_aspect: whether a new head has an output for each aspect.
            dtype, gradient_checkpointing: as in `load`.

        Raises:
            FileNotFoundError: there is no such checkpoint or tokenizer.
            ValueError: the checkpoint, the tokenizer and the sizes do not fit each other.
        """
        if not std > 0:
            raise ValueError(f"reward.std={std} must be above 0.")
        sizes = blip_sizes.published()
        vision, text = vision or sizes[0], text or sizes[1]
        state = blip_names.rename(checkpoints.read(init, file, revision, "reward.init", "model", mapped=True), init)
        with torch.device("meta"):
            words = blip_names.tokenizer(tokenizer, text.vocab_size)
            reward = cls(vision, text, words, by_aspect=by_aspect, gradient_checkpointing=gradient_checkpointing)
        if _POSITIONS in state:
            side = vision.image_size // vision.patch_size  # type: ignore[operator]  # BLIP's are numbers
            state[_POSITIONS] = blip_names.resize_positions(state[_POSITIONS], side)
        outputs = len(reward.head.mean)
        state |= {"head.mean": torch.full((outputs,), mean), "head.std": torch.full((outputs,), std)}
        state |= {"head.correlation": torch.eye(outputs), "head.weights": torch.ones(outputs)}
        reward._fill(
            state, f"reward.init={init!r} does not fit", "Sizes of other towers are reward.vision and reward.text."
        )
        return reward._frozen(dtype)

    def _new_head(self) -> Head:
        return Head(self.text.config.hidden_size, self.head_widths, len(ASPECTS) if self._by_aspect else 1)

    def _fill(self, state: dict[str, Tensor], wrong: str, way_out: str) -> None:
        """Gives parameters on the meta device their values: all of these, and no others."""
        own = self.state_dict()
        if not any(name.startswith("head.layers.") for name in state):
            self.head = self._new_head()
            state = {**{f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}, **state}
        unfit = sorted(
            own.keys() ^ state.keys() | {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
        )
        if unfit:
            raise ValueError(
                f"{wrong}: {len(unfit)} tensors are missing, left over or of another shape: "
                f"{', '.join(unfit[:3])}{', ...' if len(unfit) > 3 else ''}. {way_out}"
            )
        # Copies, as those in `state` are windows on a file that may be written to, by `save` for instance.
        self.load_state_dict({n: tensor.to(torch.float32, copy=True) for n, tensor in state.items()}, assign=True)
        # The one buffer that no checkpoint has.
        self.text.embeddings.position_ids = nn.Buffer(
            torch.arange(self.text.config.max_position_embeddings)[None], persistent=False
        )

    def _frozen(self, dtype: str) -> "VPScore":
        if dtype not in _DTYPES:
            raise ValueError(f"reward.dtype={dtype!r} must be one of {', '.join(_DTYPES)}.")
        return self.requires_grad_(False).eval().to(getattr(torch, dtype))

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, head: bool = True) -> None:
        """Writes config, tokenizer and safetensors weights; without the head it is a pretrained BLIP.

        `dtype` is of the towers: the head, and with it what makes scores comparable between runs, stays in float32.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "vision": blip_sizes.settings(self.vision.config),
            "text": blip_sizes.settings(self.text.config),
            "head_widths": self.head_widths,
            "max_length": self.max_length,
            **({"by_aspect": self._by_aspect} if head else {}),
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
        """Everything trains but the beginning of each tower, exactly as ImageReward's `fix_rate` has it.

        Frozen are the embeddings, the first `int(fraction * layers)` layers, and the first parameter of the layer after
        them, since the published code stops only behind it. Of 1.0 all of both towers, of 0 nothing at all.

        Raises:
            ValueError: `fraction` is not in [0, 1], or what is to be trained is in half precision.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"algorithm.frozen={fraction} must be a share between 0 and 1.")
        self.requires_grad_(True)
        for tower, layers, first in (
            (self.vision, self.vision.encoder.layers, "layer_norm1"),
            (self.text, self.text.encoder.layer, "attention.self.query"),
        ):
            number = int(fraction * len(layers))
            if number == len(layers):
                tower.requires_grad_(False)
            elif fraction > 0:
                for module in (tower.embeddings, *layers[:number]):
                    module.requires_grad_(False)
                layers[number].get_submodule(first).weight.requires_grad_(False)
        half = {p.dtype for p in self.parameters() if p.requires_grad} - {torch.float32}
        if half:
            raise ValueError(
                f"Weights in {half.pop()} would not move by updates as small as theirs: train in reward.dtype=float32 "
                "with trainer.precision=bf16-mixed, or freeze the towers with algorithm.frozen=1."
            )

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
        """The text tower's [CLS], which has read the prompt and looked at the image.

        One image for many prompts, given as `image.expand(len(prompts), -1, -1, -1)`, is looked at once; its gradient
        comes as a sum to what was expanded.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot be scored for {len(prompts)} prompts: give one for each.")
        different = list(dict.fromkeys(prompts))  # in reinforcement learning a prompt has many images
        # To the longest of them: more padding would be masked.
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        return self.text(
            input_ids=tokens.input_ids[rows].to(images.device),
            attention_mask=tokens.attention_mask[rows].to(images.device),
            encoder_hidden_states=self.look(images[:1] if images.stride(0) == 0 else images),
        ).last_hidden_state[:, 0]

    def look(self, images: Images) -> Float[Tensor, "batch tokens features"]:
        """The vision tower's tokens of any images."""
        pixels = preprocess(images, self.vision.config.image_size)  # type: ignore[arg-type]  # BLIP's is a number
        return self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
