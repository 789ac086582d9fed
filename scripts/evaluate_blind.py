"""People compare an adapter's images with its base model's, or another adapter's, blind: what they answered.

    python scripts/evaluate.py images adapter=RUN blind.pairs=60          # writes the page and its key
    python scripts/evaluate.py blind RUN/evaluation/blind answers-*.json  # what people saved from the page

Send `compare.html` to whom you like, and keep `key.json`, which alone says which image is whose. The results lie beside
it as `results.html` and `results.json`.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vp_rl.annotators.wording import read_guidelines
from vp_rl.evaluation import blind
from vp_rl.evaluation.blind_answers import read_answers, results
from vp_rl.evaluation.blind_report import console, write
from vp_rl.evaluation.compare import BASE, Rival
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.settings import command
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.votes import OVERALL

log = logging.getLogger("vp_rl")


def check(pairs: int, aspects: Sequence[str]) -> None:
    """Before any image is made.

    Raises:
        ValueError: the settings cannot be.
    """
    if pairs < 0:
        raise ValueError(f"blind.pairs={pairs} must be at least 0, which leaves no page.")
    if isinstance(aspects, str) or not aspects or any(aspect not in (OVERALL, *ASPECTS) for aspect in aspects):
        shown = aspects if isinstance(aspects, str) else list(aspects)
        raise ValueError(f"blind.aspects={shown}: give a list, as [overall], of {', '.join((OVERALL, *ASPECTS))}.")


def ask(
    folder: Path, base: Evaluation, tuned: Evaluation, pairs: int, aspects: Sequence[str], rival: Rival = BASE
) -> None:
    """Writes the page on which people compare them, and says where it is.

    Raises:
        ValueError: see `check` and `blind.write_page`.
    """
    check(pairs, aspects)
    rated = read_guidelines([aspect for aspect in aspects if aspect != OVERALL], None)
    page = blind.write_page(
        folder, base, tuned, pairs, {a: rated.get(a, blind.GUIDELINE) for a in aspects}, rival=rival
    )
    number = len(blind.read_key(folder).pairs)
    if number < pairs:
        few = "there are no more" if number == len(base.prompts) else "a page of them all would be above 10 MB"
        log.warning("%d pairs are compared, not %d: %s", number, pairs, few)
    print(f"\nFor people, {number} pairs: {page}, to be sent without {blind.KEY}; then\n  {_command(folder)}")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py blind", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help=f"where {blind.PAGE} and {blind.KEY} are")
    parser.add_argument("answers", type=Path, nargs="+", help="files that people saved from the page, one of each")
    given = parser.parse_args(arguments)
    try:
        key = blind.read_key(given.folder)
        found = results(read_answers(given.answers, key), key)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(console(found))
    print(f"\nResults: {write(found, given.folder, command(_words(given.folder, given.answers)))}")


def _command(folder: Path) -> str:
    return f"{shlex.join(_words(folder))} answers-*.json"


def _words(folder: Path, answers: Sequence[Path] = ()) -> list[str]:
    return ["python", "scripts/evaluate.py", "blind", str(folder), *map(str, answers)]
