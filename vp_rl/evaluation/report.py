"""The page that a run leaves: self-contained, readable offline, failures shown beside successes."""

import base64
import csv
import io
import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from vp_rl.evaluation.compare import Change
from vp_rl.evaluation.images import Evaluation, noise_seed
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny
from vp_rl.types import ASPECTS

_LABELS = {
    "reward": "Reward (trained for)",
    "prompt_following": "Prompt following",
    "aesthetic": "Aesthetic",
    "fidelity": "Fidelity",
    "harmlessness": "Harmlessness",
    "mean_rating": "Mean of the four",
    "correct": "Fully correct images",
}
_CARDS = 12  # images of each kind in the page
_PIXELS = 256  # longest side of an image in the page
_CURVES = {
    "train/reward": "Reward while training",
    "held_out/reward": "Reward on held-out prompts",
    "held_out/mean_rating": "Judge's mean rating on held-out prompts",
    "held_out/correct": "Fully correct on held-out prompts, share",
    "train/kl": "KL to the base model, per step",
}
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("vp_rl.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
_PACKAGES = ("vp_rl", "torch", "diffusers", "transformers", "peft", "lightning")


class Row(NamedTuple):
    """One metric's line of the comparison, formatted."""

    label: str
    base: str
    tuned: str
    change: str
    interval: str
    direction: str  # `up` or `down` where the interval excludes 0, else `even`
    bar: tuple[float, float, float]  # low, difference and high as percent of the plot's width; 50 is no change
    shares: tuple[float, float, float]  # percent of the images that rose, stayed, fell


def write_report(
    folder: Path,
    base: Evaluation,
    tuned: Evaluation,
    changes: dict[str, Change],
    *,
    sampler: Sampler,
    seconds: float,
    note: str = "",
) -> Path:
    """Writes `report.html` into the run's folder and returns its path.

    Args:
        folder: with `metrics*.csv` and `.hydra/`, where the run wrote them.
        base, tuned: the same prompts and seeds before and after.
        changes: their comparison.
        sampler: what made the images.
        seconds: wall time of training.
        note: shown at the top.
    """
    command, settings, policy = _settings(folder)
    above = folder.parent.parent if folder.name.isdigit() else folder.parent  # a sweep's jobs are one level deeper
    page = _PAGES.get_template("report.html").render(
        name=above.name or folder.name,
        date=folder.relative_to(above),
        note=note,
        prompts=len(set(base.prompts)),
        images=len(base.prompts),
        rows={name: _row(name, changes) for name in changes},
        **_galleries(base, tuned),
        curves=_curves(folder),
        command=command,
        settings=settings,
        code=_code(policy, sampler, base.prompts[0], base.seeds[0]),
        minutes=seconds / 60,
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        versions={"Python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def _row(name: str, changes: dict[str, Change]) -> Row:
    change, percent = changes[name], name == "correct"
    scale, signed, plain = (100, "+.0f", "{:.0f}%") if percent else (1, "+.2f", "{:.2f}")
    # Ratings share a scale, so that their bars can be compared; reward and share have scales of their own.
    rated = changes.keys() - {"reward", "correct"}
    peers = [changes[key] for key in rated] if name in rated else [change]
    reach = max(max(abs(peer.low), abs(peer.high)) for peer in peers) or 1.0
    return Row(
        label=_LABELS[name],
        base=plain.format(scale * change.base),
        tuned=plain.format(scale * change.tuned),
        change=f"{scale * change.difference:{signed}}" + (" points" if percent else ""),
        interval=f"[{scale * change.low:{signed}}, {scale * change.high:{signed}}]",
        direction="even" if not change.significant else "up" if change.low > 0 else "down",
        bar=(50 + 48 * change.low / reach, 50 + 48 * change.difference / reach, 50 + 48 * change.high / reach),
        shares=(100 * change.win, 100 * change.tie, 100 * change.loss),
    )


def _galleries(base: Evaluation, tuned: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """One image of each of the first prompts, and those that the judge's mean rating moved most, up and down."""
    gain = tuned.ratings.mean(1) - base.ratings.mean(1)
    order = np.lexsort((base.scores - tuned.scores, -gain))
    chosen = {
        "first": base.of_first_seed()[:_CARDS],
        "gains": [index for index in order[:_CARDS] if gain[index] > 0],
        "losses": [index for index in order[::-1][:_CARDS] if gain[index] < 0],
    }
    return {name: [_card(base, tuned, int(index)) for index in indices] for name, indices in chosen.items()}


def _card(base: Evaluation, tuned: Evaluation, index: int) -> dict[str, Any]:
    before, after = (
        {
            "image": _embed(side.images[index]),
            "reward": side.scores[index],
            "rating": side.ratings[index].mean(),
            "correct": side.ratings[index, 0] == 5,
        }
        for side in (base, tuned)
    )
    sides = (base.ratings[index], tuned.ratings[index], base.rationales[index], tuned.rationales[index])
    return {
        "prompt": base.prompts[index],
        "before": before,
        "after": after,
        "small": max(base.images.shape[1:3]) < _PIXELS // 2,
        "verdicts": list(zip(ASPECTS, *sides, strict=True)),
    }


def _embed(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=85, lossless=max(image.size) <= _PIXELS // 2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _settings(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Command, configuration and the policy's part of it, from the files that Hydra writes before a run.

    Interpolations are unresolved there, so no environment variable gets into the page.
    """
    config, overrides = folder / ".hydra" / "config.yaml", folder / ".hydra" / "overrides.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    given = yaml.safe_load(overrides.read_text(encoding="utf-8")) if overrides.is_file() else []
    tree = yaml.safe_load(text) or {}
    command = shlex.join(["python", "train.py", *given]) if given else ""
    return public(command), public(text), tree.get("policy", {})


def _code(policy: dict[str, Any], sampler: Sampler, prompt: str, seed: int) -> str:
    """Plain diffusers, which makes the image for the first prompt again."""
    path = str(policy.get("path", "the base model"))
    embedded = path in tiny.NAMES
    source = f"resolve({path!r})" if embedded else repr(public(path))
    dtype = policy.get("dtype", "float32")  # said, since text encoders load in the type they were saved in
    call = {
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance,
        "eta": sampler.eta or None,
        "negative_prompt": policy.get("negative_prompt") or None,
        "height": policy.get("resolution"),
        "width": policy.get("resolution"),
    }
    lines = [
        "import torch",
        "from diffusers import DDIMScheduler, DiffusionPipeline",
        *(["from vp_rl.scenes.tiny import resolve  # where the embedded model lies"] if embedded else []),
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({source}, dtype=torch.{dtype})",
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)",
        'pipeline.load_lora_weights("adapter")  # in this run\'s folder',
        "image = pipeline(",
        f"    {prompt!r},",
        *(f"    {name}={value!r}," for name, value in call.items() if value is not None),
        f"    generator=torch.Generator().manual_seed({noise_seed(0, seed)}),",
        ").images[0]",
    ]
    return "\n".join(lines)


def public(text: str) -> str:
    """Without what a report must not give away: credentials, hosts, and the folders above a file."""
    secret = r"(?i)([\w.]*(?:(?:api|access|secret|private)_?key|token|secret|password)['\"]?\s*[:=][ \t]*)[^\s#]+"
    text = re.sub(secret, r"\1(hidden)", text)
    text = re.sub(r"://[^\s/'\"]+", "://(host)", text)
    return re.sub(r"(?<![\w:/.)}~])~?/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "…/", text)


def _curves(folder: Path) -> list[tuple[str, str]]:
    """(title, SVG) of what the CSV logger wrote; a later line for the same epoch replaces an earlier one."""
    series: dict[str, dict[float, float]] = {name: {} for name in _CURVES}
    for file in sorted(folder.glob("metrics*.csv")):
        with file.open(newline="") as handle:
            for row in csv.DictReader(handle):
                for name, points in series.items():
                    if row.get(name) and row.get("epoch"):
                        points[float(row["epoch"]) + 1] = float(row[name])  # after how many epochs
    return [(_CURVES[name], _plot(sorted(points.items()))) for name, points in series.items() if len(points) > 1]


def _plot(points: list[tuple[float, float]]) -> str:
    """An SVG whose colours are the page's, light or dark."""
    ink, line = "#010203", "#040506"  # stand-ins, replaced below: matplotlib takes no CSS colours
    colors = {f"{part}.color": ink for part in ("text", "xtick", "ytick", "grid")}
    style = {"svg.fonttype": "none", "svg.hashsalt": "vp_rl", "axes.labelcolor": ink, "axes.edgecolor": ink, **colors}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 30 else {}
        axes.plot(*zip(*points, strict=True), color=line, linewidth=2, **marker)
        axes.set_xlabel("epochs")
        axes.locator_params(axis="both", integer=False, nbins=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(alpha=0.15)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :].replace(ink, "currentColor").replace(line, "var(--accent)")
