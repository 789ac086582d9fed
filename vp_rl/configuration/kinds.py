"""Kinds of settings: a type and the range that makes sense. Constructors that a configuration reaches ask for these.

`check` looks at them before anything is built; it also has all floats finite.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval, MinLen, Predicate


@dataclass(frozen=True)
class Such(Predicate):
    """A condition that no range says; `words` follow those for the type."""

    words: str


def one_of(*names: str) -> Such:
    """Text that is one of these."""
    return Such(lambda value: value in names, f", one of {', '.join(names)}")


def like(pattern: str, words: str) -> Such:
    """Text of a form."""
    return Such(lambda value: re.fullmatch(pattern, value) is not None, words)


Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
Counts = Annotated[Sequence[Count], MinLen(1)]
Several = Annotated[int, Interval(ge=2, le=2**31 - 1)]
Whole = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""What every random number generator takes."""
Seeds = Annotated[Sequence[Seed], MinLen(1)]
Real = Annotated[float, Interval(ge=-1e6, le=1e6)]
Amount = Annotated[float, Ge(0)]
Amounts = Annotated[Sequence[Amount], MinLen(1)]
Scales = Annotated[Sequence[Annotated[float, Ge(1)]], MinLen(1)]
"""Of guidance."""
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Part = Annotated[float, Interval(gt=0, le=1)]
"""A share that is not nothing."""
Span = Annotated[tuple[Share, Share], Such(lambda pair: pair[0] <= pair[1], ", rising")]
Seconds = Annotated[float, Interval(gt=0, le=1e8)]
Text = Annotated[str, MinLen(1)]
Texts = Annotated[Sequence[Text], MinLen(1)]
Url = Annotated[str, like(r"https?://[^\s/].*", ", an address as http://localhost:8000")]
Device = Annotated[str, like(r"auto|cpu|mps|xpu|cuda(:\d+)?", ", auto, cpu, cuda or as cuda:1")]
Dtype = Annotated[str, one_of("float32", "bfloat16", "float16")]
Port = Annotated[int, Interval(ge=0, le=65535)]
Stars = Annotated[int, Interval(ge=1, le=5)]
"""A rating."""
Structured = Annotated[str, one_of("json_schema", "json_object", "none")]
Noise = Annotated[str, one_of("sde", "cps")]
"""How a sampling step adds noise: by its process's own form, or keeping the coefficients."""
Normalised = Annotated[str, one_of("total", "parts")]
"""Which scores are standardised within a prompt's images."""
Fit = Annotated[str, one_of("crop", "pad")]
"""How an image is made square."""
