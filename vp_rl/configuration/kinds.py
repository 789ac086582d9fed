"""Kinds of settings: a type and the range that makes sense. Constructors that a configuration reaches ask for these.

`check` looks at them before anything is built; it also has all floats finite.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval, MinLen


@dataclass(frozen=True)
class Such:
    """A condition that no range says, for pydantic; `words` follow those for the type."""

    words: str
    holds: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """As pydantic asks for it."""
        from pydantic_core import core_schema  # not when a class is imported that has such a setting

        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(self.words)
        return value


def one_of(*names: str) -> Such:
    """Text that is one of these."""
    return Such(f", one of {', '.join(names)}", lambda value: value in names)


Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
Several = Annotated[int, Interval(ge=2, le=2**31 - 1)]
Whole = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""What every random number generator takes."""
Seeds = Annotated[Sequence[Seed], MinLen(1)]
Real = Annotated[float, Interval(ge=-1e6, le=1e6)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Part = Annotated[float, Interval(gt=0, le=1)]
"""A share that is not nothing."""
Span = Annotated[tuple[Share, Share], Such(", rising", lambda pair: pair[0] <= pair[1])]
Seconds = Annotated[float, Interval(gt=0, le=1e8)]
Text = Annotated[str, MinLen(1)]
Texts = Annotated[Sequence[Text], MinLen(1)]
Url = Annotated[str, Such(", an address as http://localhost:8000", re.compile(r"https?://[^\s/].*").fullmatch)]
Device = Annotated[str, Such(", auto, cpu, cuda or as cuda:1", re.compile(r"auto|cpu|mps|xpu|cuda(:\d+)?").fullmatch)]
Dtype = Annotated[str, one_of("float32", "bfloat16", "float16")]
Port = Annotated[int, Interval(ge=0, le=65535)]
Stars = Annotated[int, Interval(ge=1, le=5)]
"""A rating."""
Structured = Annotated[str, one_of("json_schema", "json_object", "none")]
Fit = Annotated[str, one_of("crop", "pad")]
"""How an image is made square."""
