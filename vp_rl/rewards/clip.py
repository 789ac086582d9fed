"""Rewards that are a cosine of CLIP's image and text embeddings: CLIP score, PickScore and HPS v2.1.

    CLIP score    cosine; tables often quote 100 times this
    HPS v2.1      cosine, as `hpsv2.score` returns it; its tables quote 100 times this
    PickScore     cosine * exp(logit_scale), which is about 100

They differ in nothing else but weights, how they are stored, what is done with images that are not square, and that
open_clip, which HPS v2.1 is scored with, mends broken text and HTML's `&amp;` before it reads a prompt.
"""

import html
import math

import ftfy
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTokenizer

from vp_rl.configuration.kinds import Dtype, Fit, Positive, Text
from vp_rl.interfaces import Reward
from vp_rl.rewards import checkpoints, clip_names
from vp_rl.rewards.clip_towers import Towers, read_architecture, read_colours, read_tokenizer
from vp_rl.rewards.preprocess import Colours, letterbox, preprocess
from vp_rl.types import Images, Scores

_FITS = ("crop", "pad")


class CLIPReward(Reward):
    """How well an image fits its prompt, by the angle between their embeddings.

    Frozen, and always in evaluation mode. A prompt goes through the text tower once, however many images it has.

    Args:
        towers: they may be in half precision.
        tokenizer: of as many words as the text tower reads.
        colours: what pixels are standardised by.
        scale: what the cosine is multiplied by.
        fit: what is done with images that are not square. `crop`: the shorter side is resized, the rest cropped, as
            CLIP does it; `pad`: the longer side is resized, black bars are added, as HPS v2 does it.
        mends: whether prompts are read as open_clip reads them.

    Raises:
        ValueError: `scale` or `fit` is none of these.
    """

    differentiable = True

    def __init__(
        self,
        towers: Towers,
        tokenizer: CLIPTokenizer,
        colours: Colours,
        scale: float | None = 1.0,
        fit: str = "crop",
        mends: bool = False,
    ) -> None:
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"reward.scale={scale} must be above 0, or null for the checkpoint's own.")
        if fit not in _FITS:
            raise ValueError(f"reward.fit={fit!r} must be one of {', '.join(_FITS)}.")
        self.towers, self.tokenizer, self.colours, self.fit = towers, tokenizer, colours, fit
        self.scale = towers.logit_scale if scale is None else scale
        self._mends = mends
        self._end = tokenizer.get_vocab()[str(tokenizer.eos_token)]

    @classmethod
    def load(
        cls,
        model: Text,
        *,
        revision: Text | None = None,
        processor: Text | None = None,
        scale: Positive | None = 1.0,
        fit: Fit = "crop",
        dtype: Dtype = "float32",
    ) -> "CLIPReward":
        """Reads a CLIP model as transformers stores it.

        Args:
            model: a folder or hub name.
            revision: of the hub repository.
            processor: a folder or hub name with the tokenizer and the preprocessing, if that of the model has none.
            scale: of the cosine; None is the checkpoint's own, exp(logit_scale).
            fit: `crop` or `pad`; see the class.
            dtype: of the towers: float32, float16 or bfloat16. Scores are in float32.

        Raises:
            FileNotFoundError: there is no such model, tokenizer or preprocessing.
            ValueError: one of them is damaged, or they do not fit each other.
        """
        towers = Towers.load(model, "reward.model", dtype, revision)
        if processor is None:
            return cls._of(towers, (model, "reward.model", revision), scale, fit)
        return cls._of(towers, (processor, "reward.processor", None), scale, fit)

    @classmethod
    def from_open_clip(
        cls,
        init: Text,
        *,
        file: Text = "open_clip_pytorch_model.bin",
        revision: Text | None = None,
        architecture: Text = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: Positive | None = 1.0,
        fit: Fit = "crop",
        dtype: Dtype = "float32",
    ) -> "CLIPReward":
        """Reads a checkpoint in open_clip's names, such as HPS v2.1.

        Args:
            init: a file, a folder, or a hub name.
            file: its name in that folder or repository.
            revision: of the repository.
            architecture: a folder or hub name with the same model in transformers' format, of which sizes, tokenizer
                and preprocessing are taken, but no weights.
            scale, fit, dtype: as of `load`.

        Raises:
            FileNotFoundError: there is no such checkpoint or architecture.
            ValueError: one of them is damaged, or they do not fit each other.
        """
        config = read_architecture(architecture, "reward.architecture")
        state = clip_names.rename(
            checkpoints.read(init, file, revision, "reward.init", "state_dict"), init, "reward.init"
        )
        wrong = f"reward.init={init!r} does not fit reward.architecture={architecture!r} (its names of tensors)"
        towers = Towers.of(config, state, dtype, wrong)
        return cls._of(towers, (architecture, "reward.architecture", None), scale, fit, mends=True)

    @classmethod
    def _of(
        cls,
        towers: Towers,
        processor: tuple[str, str, str | None],
        scale: float | None,
        fit: str,
        *,
        mends: bool = False,
    ) -> "CLIPReward":
        source, setting, revision = processor
        words = read_tokenizer(source, setting, towers.words, revision)
        return cls(towers, words, read_colours(source, setting, towers.size, revision), scale, fit, mends)

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Scores in float32; gradients flow to the images.

        One image for many prompts, given as `image.expand(len(prompts), -1, -1, -1)`, is looked at once.
        """
        seen = self.look(images[:1] if images.stride(0) == 0 else images)
        return self.scale * (seen * self.read(prompts)).sum(1)

    def look(self, images: Images) -> Float[Tensor, "batch features"]:
        """The embeddings of images, of length 1, in float32."""
        if self.fit == "pad":
            return self.towers.look(letterbox(images, self.towers.size, self.colours))
        return self.towers.look(preprocess(images, self.towers.size, self.colours, math.floor))

    def read(self, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """The embeddings of prompts, of length 1, in float32; what is too long is cut."""
        different = list(dict.fromkeys(prompts))
        texts = [mended(prompt) for prompt in different] if self._mends else different
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.towers.longest, return_tensors="pt"
        )
        read = self.towers.read(tokens.input_ids.to(self.towers.text.device), self._end)
        return read[[different.index(prompt) for prompt in prompts]]


def mended(prompt: str) -> str:
    """As `basic_clean` of open_clip's tokenizer: wrongly decoded text put right, HTML's names of characters gone."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
