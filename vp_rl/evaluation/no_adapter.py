"""A run that beat its base nowhere leaves no adapter: what whoever looks for one is told."""

import json
from pathlib import Path

BELOW = "below_base"
"""The folder, in a run's, of the best trained adapter where the base model is better."""


def beats(value: float, base: float) -> bool:
    """Whether an adapter's value on validation is better than the base model's; one that has no number is beaten."""
    return not value <= base


def why_none(run: Path) -> str | None:
    """Why a run has no adapter, with the way out; None: it has one, or is no such run."""
    if (run / "adapter").is_dir() or not (run / BELOW).is_dir():
        return None
    try:
        best = json.loads((run / "summary.json").read_text(encoding="utf-8"))["best"]
        said = f" ({best['value']:.2f} at best, base {best['base']:.2f}, by {best['metric']})"
    except (OSError, ValueError, KeyError, TypeError):  # stopped before its summary
        said = ""
    return (
        f"this run has no adapter, since on validation no epoch beats the base model{said}. The best trained one is in "
        f"'{run / BELOW}': rename that folder to adapter to use it all the same."
    )
