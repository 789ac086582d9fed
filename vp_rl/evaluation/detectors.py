"""Detectors for GenEval's checks: the embedded world's object finder, and OWLv2 with CLIP for real images.

Published GenEval figures are by Mask2Former of mmdetection, which gives masks; OWLv2 gives boxes. Two detectors find
different objects in the same images, so figures by these are not comparable with published ones: only with each other.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

from vp_rl.configuration.kinds import Dtype, Share, Text, Texts
from vp_rl.evaluation.geneval import Detector, Found, Limits, Picture
from vp_rl.scenes.grammar import COLORS, SHAPES
from vp_rl.scenes.judge import look
from vp_rl.types import Images

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's."""
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_FAMILIES = ("owlv2", "owlvit")


@runtime_checkable
class Embedder(Protocol):
    """Puts images and texts into one space, as CLIP does: `vp_rl.rewards.clip.CLIPReward` is one."""

    def look(self, images: Images) -> Float[Tensor, "batch features"]:
        """Of images, of length 1."""
        ...

    def read(self, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """Of texts, of length 1."""
        ...


class SceneDetector(Detector):
    """The embedded world's: regions of one hue, classified by their overlap with shapes, which is the confidence.

    It is what the scene judge sees, so it is no second opinion on that judge.

    Args:
        threshold: in either task. 0: all that the judge sees counts. The lowest of 700 drawn objects is 0.61.
    """

    def __init__(self, threshold: Share = 0.0) -> None:
        super().__init__()
        self.limits = Limits(threshold, threshold)

    def check(self, names: Sequence[str], colors: Sequence[str]) -> None:
        """Shapes and colours of the grammar.

        Raises:
            ValueError: one is another.
        """
        _known("class", names, SHAPES, "Real images need another detector, such as detector=owlv2.")
        _known("colour", colors, tuple(COLORS), "Real images need another detector, such as detector=owlv2.")

    def find(self, image: Picture, names: Sequence[str]) -> list[Found]:
        """Coloured already; boxes are square, of the mean of width and height.

        Raises:
            ValueError: the image is not of 64x64 pixels.
        """
        return [
            Found(o.shape, o.fit, (o.x - o.side / 2, o.y - o.side / 2, o.x + o.side / 2, o.y + o.side / 2), o.color)
            for o in look(image).objects
            if o.shape in names
        ]

    def colors(self, image: Picture, found: Sequence[Found]) -> list[str]:
        """What was seen at once."""
        return [each.color for each in found]


class ZeroShotDetector(Detector):
    """OWLv2 or OWL-ViT, which find what they are told the name of, and CLIP, which says what colour it has.

    An object's box is cropped and given the colour whose prompts, three of GenEval's averaged, CLIP finds nearest.
    GenEval greys out what is beside the object's mask; here there is no mask.

    Args:
        model: folder or hub name, in transformers' format.
        clip: for the colours.
        threshold, counting_threshold, max_overlap: see `Limits`. OWLv2 puts several boxes on one object, so they must
            not overlap much.
        palette: the colours that objects may have.
        query: what is asked for, of a class.
        revision: of the hub repository.
        dtype: of the detector: float32, float16 or bfloat16.

    Raises:
        ValueError: there is no such model, or it is none of these.
    """

    def __init__(
        self,
        model: Text,
        clip: Embedder,
        *,
        threshold: Share = 0.2,
        counting_threshold: Share = 0.3,
        max_overlap: Share = 0.5,
        palette: Texts = COLOURS,
        query: Text = "a photo of a {name}",
        revision: Text | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"detector.dtype={dtype!r} must be float32, float16 or bfloat16.")
        if query.count("{") != 1 or "{name}" not in query:
            raise ValueError(f"detector.query={query!r} must have {{name}}, for the class, and no other braces.")
        self.limits = Limits(threshold, counting_threshold, max_overlap)
        self.clip, self.palette = clip, tuple(palette)
        self._query, self._prototypes = query, dict[str, Tensor]()
        found = {"pretrained_model_name_or_path": model, "revision": revision or "main"}
        self.network: Any = _tried(model, "weights", lambda: _network(found, dtype))
        self._processor: Any = _tried(
            model, "preprocessing", lambda: AutoImageProcessor.from_pretrained(**found, backend="pil")
        )
        self._tokenizer: Any = _tried(model, "tokenizer", lambda: _tokenizer(found, self.network.config))

    def check(self, names: Sequence[str], colors: Sequence[str]) -> None:
        """Any class has a name; colours are those of the palette.

        Raises:
            ValueError: a colour is another.
        """
        _known("colour", colors, self.palette, "Give them all in detector.palette.")

    @torch.no_grad()
    def find(self, image: Picture, names: Sequence[str]) -> list[Found]:
        """Each box has the class that fits it best of these; those surer than the lower threshold."""
        device = next(self.network.parameters()).device
        tokens = self._tokenizer(
            [self._query.format(name=name) for name in names],
            padding="max_length",
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        pixels = self._processor(images=image, return_tensors="pt").pixel_values.to(device, self.network.dtype)
        output = self.network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        output.logits, output.pred_boxes = output.logits.float().cpu(), output.pred_boxes.float().cpu()
        (boxes,) = self._processor.post_process_object_detection(
            output, min(self.limits.threshold, self.limits.counting_threshold), [image.shape[:2]]
        )
        rows = zip(boxes["labels"].tolist(), boxes["scores"].tolist(), boxes["boxes"].tolist(), strict=True)
        return [Found(names[int(label)], score, (box[0], box[1], box[2], box[3])) for label, score, box in rows]

    @torch.no_grad()
    def colors(self, image: Picture, found: Sequence[Found]) -> list[str]:
        """By CLIP, of what lies in each box."""
        whole = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
        device = next(self.network.parameters()).device
        seen = [self.clip.look(_crop(whole, each)[None].to(device))[0] for each in found]
        return [
            self.palette[int((self._named(each.name) @ embedding).argmax())]
            for each, embedding in zip(found, seen, strict=True)
        ]

    def _named(self, name: str) -> Float[Tensor, "palette features"]:
        """Each colour of a class in CLIP's space: the mean of its prompts, of length 1."""
        if name not in self._prototypes:
            texts = [template.format(color=color, name=name) for color in self.palette for template in _TEMPLATES]
            means = self.clip.read(texts).unflatten(0, (len(self.palette), len(_TEMPLATES))).mean(1)
            self._prototypes[name] = torch.nn.functional.normalize(means, dim=1)
        return self._prototypes[name]


def _crop(whole: Float[Tensor, "3 height width"], found: Found) -> Float[Tensor, "3 high wide"]:
    """What lies in the box, at least a pixel."""
    height, width = whole.shape[1:]
    left, top = (int(np.clip(np.floor(found.box[i]), 0, size - 1)) for i, size in ((0, width), (1, height)))
    right, bottom = (int(np.clip(np.ceil(found.box[i]), 1, size)) for i, size in ((2, width), (3, height)))
    return whole[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _known(what: str, given: Sequence[str], known: Sequence[str], way_out: str) -> None:
    if strange := [name for name in given if name not in known]:
        raise ValueError(
            f"The detector does not know the {what} {', '.join(map(repr, strange))}; it knows {', '.join(known)}. "
            + way_out
        )


def _network(found: dict[str, str], dtype: str) -> Any:
    config = AutoConfig.from_pretrained(**found)
    if config.model_type not in _FAMILIES:
        raise ValueError(f"it is a {config.model_type} model; those of {', '.join(_FAMILIES)} can be used")
    network, report = AutoModelForZeroShotObjectDetection.from_pretrained(
        **found, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would make them up
        raise ValueError(f"it lacks {len(report['missing_keys'])} weights, such as {sorted(report['missing_keys'])[0]}")
    return network.requires_grad_(False).eval()


def _tokenizer(found: dict[str, str], config: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(**found)
    if not len(tokenizer.all_special_tokens) + 1 < len(tokenizer) <= config.text_config.vocab_size:
        # Without its files one is made up.
        raise ValueError(f"it has {len(tokenizer)} words, where the model reads {config.text_config.vocab_size}")
    return tokenizer


def _tried(model: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises anything for a folder that lacks a file, or has a strange one
        raise ValueError(
            f"detector.model={model!r}: its {what} cannot be loaded. Give a folder with OWLv2 as `save_pretrained` "
            f"writes it, or its name on the hub. ({type(error).__name__}: {str(error)[:500]})"
        ) from error
