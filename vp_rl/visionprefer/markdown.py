"""Markdown in which text from outside stays text, whatever it is made of."""

import math
import re
from collections.abc import Iterable, Sequence

from vp_rl.visionprefer.estimates import Estimate

_MARKUP = re.compile(
    r"[&<>`*\[\]#|~$\\@]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word it is a letter
    r"|(?<=\w):(?=\S)|(?i:(?<=www)\.)"  # addresses become links by themselves
    r"|^[-+=]|^\d+(?=[.)](?:\s|$))"  # the start of a list, or the line under a heading
)


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escape(text: object) -> Markdown:
    """The text on one line, as it would be read: no markup, HTML, link, formula or table cell comes of it.

    Characters that mean something become references like `&#42;`, which by CommonMark mean nothing but themselves.
    """
    if isinstance(text, Markdown):
        return text
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return Markdown(_MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found.group()), line))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """A table whose cells are escaped; the columns behind the first are flush right."""
    lines = [head, [Markdown(":--"), *[Markdown("--:")] * (len(head) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines))


def code(text: object) -> Markdown:
    """The text as it is, in the type of code; not for cells of a table, which a `|` would end."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    edge = " " if "`" in line else ""
    return Markdown(f"{ticks}{edge}{line}{edge}{ticks}")


def fenced(text: str, language: str) -> Markdown:
    """A block of code that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def percent(estimate: Estimate, *, interval: bool = True) -> Markdown:
    """A share, with its interval or without."""
    if not estimate.count:
        return Markdown("–")
    bounds = f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" if interval else ""
    return Markdown(f"{estimate.value:.1%}{bounds}")


def number(estimate: Estimate, digits: int = 2) -> Markdown:
    """A mean with its interval, if it has one."""
    value, low, high = (f"{round(part, digits) + 0.0:.{digits}f}" for part in estimate[:3])  # + 0.0: no minus zero
    if math.isnan(estimate.value):
        return Markdown("–")
    return Markdown(value if math.isnan(estimate.low) else f"{value} [{low}, {high}]")
