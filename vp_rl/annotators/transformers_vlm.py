"""A vision-language model on this machine as annotator: Qwen2-VL, Qwen2.5-VL and their like, through transformers.

It is given the same guidelines as a model behind a server. Questions that are asked at the same time are answered in
batches. Decoding is greedy: the same question has the same answer, so asking again after an unreadable one is no help.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    StoppingCriteriaList,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vp_rl.annotators.answers import read_ratings
from vp_rl.annotators.wording import rating_instructions, rating_question
from vp_rl.configuration.kinds import Count, Device, Text, one_of
from vp_rl.files import images as image_files
from vp_rl.files.paths import user_place
from vp_rl.interfaces import Annotator
from vp_rl.types import Answer, Aspect, Rating, Usage

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TEMPLATE = "1"  # how a question is put together; raised when that changes
_PAUSE = 0.05  # seconds without a further question after which a batch that is not full sets off


class TransformersVLMAnnotator(Annotator):
    """Rates images by asking a local vision-language model.

    The folder is looked through at once; the weights are loaded at the first question, as the memory may be needed by
    the images' makers before, and go with this object. What is in a batch with a question changes its answer by
    rounding only: not at all in float32 on a CPU, now and then a word in 16 bits on a GPU.

    Args:
        model: a folder as `save_pretrained` writes it, or a name on the hub; with safetensors, without code of its own.
        batch_size: questions answered at once. Memory grows with it; halved for a while when there is too little.
        max_new_tokens: an answer is cut off there: 90 an image are usual.
        max_pixels: an image of more is made smaller before it is shown; Qwen's models make a token of 784.
        dtype: of the weights; auto: as they were saved.
        device: auto: the first GPU, or the CPU where there is none.
        guidelines: a folder with `system.md` and an `ASPECT.md` for each aspect; None: those of this package.

    Raises:
        ValueError: a setting that makes no sense, missing guidelines, no model there, or one that cannot see.
    """

    def __init__(
        self,
        model: Text,
        *,
        batch_size: Count = 4,
        max_new_tokens: Count = 1024,
        max_pixels: Count = 768 * 768,
        dtype: Annotated[str, one_of("auto", "float32", "bfloat16", "float16")] = "auto",
        device: Device = "auto",
        guidelines: Text | None = None,
    ) -> None:
        if min(batch_size, max_new_tokens) < 1 or max_pixels < 32 * 32:
            raise ValueError(
                f"batch_size={batch_size} and max_new_tokens={max_new_tokens} must be at least 1, "
                f"max_pixels={max_pixels} at least 1024."
            )
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}.")
        self._systems, texts = rating_instructions(guidelines)
        model = user_place(model)
        self.name = Path(model).resolve().name if Path(model).is_dir() else Path(model).name
        self.version = f"{_TEMPLATE}-{texts}"
        self.concurrency = 2 * batch_size  # while one batch is answered, the next one gathers
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._max_pixels = max_pixels
        self._batcher = _Batcher(_Model(model, max_new_tokens, dtype, device).answer, batch_size)

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """Its answer, as it came; cut off at `max_new_tokens` it is still one.

        Raises:
            ValueError: a file is no image, the weights cannot be loaded, or the memory does not suffice for one
                question.
        """
        shown = await asyncio.to_thread(_pictures, images, self._max_pixels)
        return await self._batcher.ask(
            _Question(self._systems[aspect], rating_question(prompt, len(images), aspect), shown)
        )

    def read(self, answer: str, images: int) -> list[Rating]:
        """See `read_ratings`."""
        return read_ratings(answer, images)


class _Question(NamedTuple):
    system: str
    before: str
    """The images."""
    images: list[Image.Image]

    def conversation(self) -> list[dict[str, Any]]:
        """As chat templates want it."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.before}]
        for number, image in enumerate(self.images, 1):
            parts += [{"type": "text", "text": f"\nImage {number}:\n"}, {"type": "image", "image": image}]
        system = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        return [system, {"role": "user", "content": parts}]


class _Batcher:
    """Collects questions that are asked at the same time. A batch sets off when it is full, or nobody else comes."""

    def __init__(self, answer: Callable[[list[_Question], threading.Event], list[Answer]], size: int) -> None:
        self._answer, self._size = answer, size
        self._waiting: list[tuple[_Question, asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, question: _Question) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            await self._gathered()
            self._waiting = [each for each in self._waiting if not each[1].done()]  # else its asker was cancelled
            batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            if not batch:
                continue
            stop = threading.Event()
            try:
                answers = await asyncio.to_thread(self._answer, [question for question, _ in batch], stop)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
            except asyncio.CancelledError:
                stop.set()  # a thread cannot be cancelled, and the loop waits for it before it closes
                raise
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def _gathered(self) -> None:
        before = 0
        while before < len(self._waiting) < self._size:
            before = len(self._waiting)
            await asyncio.sleep(_PAUSE)


class _Model:
    """The model with its processor; no asyncio here."""

    def __init__(self, place: str, max_new_tokens: int, dtype: str, device: str) -> None:
        self._place, self._dtype, self._device = place, dtype, device
        config = _tried(place, "config.json", lambda: AutoConfig.from_pretrained(place))
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or type(config) not in PROCESSOR_MAPPING:
            raise ValueError(
                f"model={place!r} is a {config.model_type} model, which cannot be shown images and asked about them: "
                "choose a vision-language model, such as Qwen/Qwen2.5-VL-7B-Instruct."
            )
        self._processor = _tried(place, "processor", lambda: _processor(place, config))
        if self._processor.chat_template is None:
            raise ValueError(f"model={place!r} has no chat template: choose a model that was tuned to follow chats.")
        self._max_new_tokens = max_new_tokens
        self._network: Any = None

    def answer(self, questions: list[_Question], stop: threading.Event) -> list[Answer]:
        """One for each question; once `stop` is set, what there is by then."""
        try:
            return self._generate(questions, stop)
        except torch.OutOfMemoryError as error:
            if len(questions) == 1:
                raise ValueError(
                    f"One question with {len(questions[0].images)} images needs more memory than {self._device} has: "
                    "lower annotator.max_pixels or max_new_tokens, or choose a smaller model."
                ) from error
        half = len(questions) // 2  # out here, where the error no longer holds on to the memory
        return self.answer(questions[:half], stop) + self.answer(questions[half:], stop)

    @torch.inference_mode()
    def _generate(self, questions: list[_Question], stop: threading.Event) -> list[Answer]:
        if self._network is None:
            self._network = self._load()
        inputs = self._processor.apply_chat_template(
            [question.conversation() for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # what looks like one in a text is text
            processor_kwargs={"padding": True},
        ).to(self._device, dtype=self._network.dtype)
        stopping = StoppingCriteriaList([lambda ids, scores, **_: ids.new_full((len(ids),), stop.is_set()).bool()])
        output = self._network.generate(**inputs, stopping_criteria=stopping)[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        asked = inputs["attention_mask"].sum(1).tolist()
        told = (output != self._network.generation_config.pad_token_id).sum(1).tolist()
        cut = f"cut off at max_new_tokens={self._max_new_tokens}: raise annotator.max_new_tokens"
        return [
            Answer(text, Usage(a, b), hint=cut if b >= self._max_new_tokens else "")
            for text, a, b in zip(texts, asked, told, strict=True)
        ]

    def _load(self) -> Any:
        network, report = _tried(
            self._place,
            "weights",
            lambda: AutoModelForImageTextToText.from_pretrained(
                self._place,
                dtype=self._dtype,
                device_map={"": self._device},
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
        if report["missing_keys"]:  # transformers would make them up
            missing = sorted(report["missing_keys"])
            raise ValueError(f"model={self._place!r} lacks {len(missing)} weights, such as {missing[0]}: get it anew.")
        found = network.generation_config
        end = found.eos_token_id if found.eos_token_id is not None else self._processor.tokenizer.eos_token_id
        pad = found.pad_token_id if found.pad_token_id is not None else self._processor.tokenizer.pad_token_id
        # Models come with sampling settings and penalties of their own: greedy decoding has none.
        network.generation_config = GenerationConfig(
            max_new_tokens=self._max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad
        )
        return network.eval()


def _processor(place: str, config: PreTrainedConfig) -> Any:
    """What AutoProcessor makes, without the part for videos.

    That part needs torchvision, which the rest of this package must do without, and no image passes through it
    (transformers 5.24). Images are prepared by Pillow for the same reason, and alike on all machines.
    """
    made_for: Any = PROCESSOR_MAPPING[type(config)]

    class ForImages(made_for):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")  # answers begin where questions end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "ball" not in tokenizer.decode(tokenizer.encode("a red ball")):  # made up where its files are missing
        raise ValueError("its tokenizer cannot spell, so tokenizer.json is missing or not the model's")
    parts = {"image_processor": AutoImageProcessor.from_pretrained(place, backend="pil"), "tokenizer": tokenizer}
    settings, _ = made_for.get_processor_dict(place)
    return ForImages.from_args_and_dict([parts.get(name) for name in made_for.get_attributes()], settings)


def _tried(place: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises anything for a folder that lacks a file, or has a strange one
        raise ValueError(
            f"model={place!r}: its {what} cannot be loaded. Give a folder with a vision-language model as "
            f"`save_pretrained` writes it, or its name on the hub. ({type(error).__name__}: {str(error)[:500]})"
        ) from error


def _pictures(images: Sequence[bytes], max_pixels: int) -> list[Image.Image]:
    """RGB, of at most so many pixels."""
    pictures = []
    for number, data in enumerate(images, 1):
        try:
            picture = image_files.rgb(data)
        except ValueError as error:
            raise ValueError(f"Image {number} cannot be read: {error}") from error
        scale = math.sqrt(max_pixels / (picture.width * picture.height))
        if scale < 1:
            picture = picture.resize([max(1, int(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
        pictures.append(picture)
    return pictures
