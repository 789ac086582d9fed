"""A local page on which people compare a dataset's images blind, two at a time; and how far its annotator agrees.

    python scripts/label.py data/visionprefer                     # then open the address that it prints
    python scripts/label.py data/visionprefer --agreement         # what the votes say so far

Votes are kept in the journal of the dataset's work folder (`<folder>.work/journal.sqlite`). Each voter sees the same
pairs in an order and on sides of their own, and goes on where they stopped. Several voters make agreement among people
visible.
"""

import argparse
import logging
import sys
from pathlib import Path

from vp_rl.annotators.wording import read_guidelines
from vp_rl.files.paths import user_path
from vp_rl.secrets import guard
from vp_rl.types import ASPECTS
from vp_rl.visionprefer import agreement, schema, tables
from vp_rl.visionprefer.label import Labeler, dataset_pairs, serve
from vp_rl.visionprefer.ratings import batches
from vp_rl.visionprefer.votes import Votes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="a VisionPrefer dataset")
    parser.add_argument("--agreement", action="store_true", help="print the agreement so far, and serve nothing")
    parser.add_argument("--split", default="test", help="whose prompts (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="one pair of images of each (default: %(default)s)")
    parser.add_argument("--aspects", nargs="+", choices=ASPECTS, default=list(ASPECTS), help="default: all four")
    parser.add_argument("--guidelines", help="a folder with an ASPECT.md for each aspect; default: the annotators'")
    parser.add_argument("--votes", type=user_path, help="an SQLite file; default: the journal in <folder>.work")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8780)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(given: argparse.Namespace) -> None:
    """Serves, or tells.

    Raises:
        ValueError, OSError: there is no such dataset, or see `serve`.
    """
    folder: Path = given.folder
    annotator = schema.about(folder)["annotator"]
    votes = Votes(given.votes or folder.with_name(folder.name + ".work") / "journal.sqlite")
    if given.agreement:
        cast = votes.read()
        if not cast:
            raise ValueError("Nobody has voted yet: start this script without --agreement, and open its page.")
        ratings = agreement.image_ratings(
            batches(folder), annotator, {v for vote in cast for v in (vote.left, vote.right)}
        )
        people = {
            f"{annotator} and a person": agreement.with_people(cast, ratings),
            "two persons": agreement.among_people(cast),
        }
        print(tables.people(people))
        return
    pairs = dataset_pairs(folder, given.split, given.aspects, given.prompts, given.seed)
    guidelines = read_guidelines(given.aspects, given.guidelines)
    serve(Labeler(pairs, guidelines, votes, seed=given.seed), host=given.host, port=given.port)


if __name__ == "__main__":
    guard()
    main()
