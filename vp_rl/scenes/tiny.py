"""The embedded world's trained models: where their weights lie in the installed package."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NAMES = {"tiny-sd": "sd", "tiny-blip": "blip", "tiny-clip": "clip", "tiny-vp-score": "vp_score"}


def resolve(path: str | Path) -> Path | str:
    """The folder of an embedded model's name (`tiny-sd`, `tiny-blip`, `tiny-clip`, ...); any other path as it is."""
    return WEIGHTS / NAMES[str(path)] if str(path) in NAMES else path
