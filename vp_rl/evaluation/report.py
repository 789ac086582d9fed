"""The page that a run leaves: self-contained, readable offline, failures shown beside successes."""

import base64
import hashlib
import io
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from vp_rl.evaluation import settings
from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.claims import ALPHA, Compared, counted
from vp_rl.evaluation.compare import BASE, LEVELS, Change, Rival
from vp_rl.evaluation.curves import curves as learning_curves
from vp_rl.evaluation.curves import history, phases
from vp_rl.evaluation.distances import Distances
from vp_rl.evaluation.guidance_curve import GuidanceCurve
from vp_rl.evaluation.guidance_page import section
from vp_rl.evaluation.images import Evaluation, noise_seed
from vp_rl.evaluation.looks import blank
from vp_rl.evaluation.no_adapter import BELOW
from vp_rl.evaluation.rows import Row, row, rows
from vp_rl.evaluation.signs import Sign
from vp_rl.evaluation.verdict import LOOK, OWN, PANEL, Chosen, label, verdicts
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny
from vp_rl.secrets import mask
from vp_rl.types import ASPECTS

_ALL = "all prompts"
_CARDS = 12  # images of each kind in the page
_PIXELS = 256  # longest side of an image in the page
_PACKAGES = ("vp_rl", "torch", "diffusers", "transformers", "peft", "lightning")
_FLOW = ("vp_rl.policies.sd3.", "vp_rl.policies.flux.")  # whose pipelines come with the sampler that is used here


def _sha256(text: str) -> str:
    """What a content security policy names a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("vp_rl.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
PAGES.filters["sha256"] = _sha256


def write_report(
    folder: Path,
    base: Evaluation,
    tuned: Evaluation,
    compared: Compared,
    *,
    sampler: Sampler,
    seconds: Mapping[str, float],
    note: str = "",
    signs: Sequence[Sign] = (),
    distances: Distances | None = None,
    asked: Mapping[str, Asked] | None = None,
    command: str = "",
    rival: Rival = BASE,
    chosen: Chosen | None = None,
    curves: Sequence[GuidanceCurve] = (),
) -> Path:
    """Writes `report.html` into the run's folder and returns its path.

    Args:
        folder: with `metrics*.csv` and `.hydra/`, where the run wrote them.
        base, tuned: the same prompts and seeds, by the rival and by the adapter.
        compared: their comparison; other rewards than the one trained for are named `panel/NAME`.
        sampler: what made the images.
        seconds: wall time of each part of the run, by its name.
        note: what readers must know of the data.
        signs: of an exploited reward.
        distances: of the sets of images as wholes.
        asked: what the judge took, by the way in which it was asked.
        command: that made it, fit to be passed on, where it is not the one that is found in the folder.
        rival: what `base` is of.
        chosen: how the adapter was, where it was.
        curves: over guidance scales, decided.
    """
    read, values = settings.read(folder), history(folder)
    run = read._replace(command=command or read.command)
    told = sorted(signs, key=lambda sign: sign.severity != "warning")
    date = f"{folder.parent.name}, job {folder.name}" if folder.name.isdigit() else folder.name
    page = PAGES.get_template("report.html").render(
        **{"title": run.title, "date": date},
        note=note,
        **{"prompts": len(set(base.prompts)), "images": len(base.prompts)},
        verdicts=verdicts(compared, len(set(base.prompts)), told, rival, chosen, next(iter(curves), None)),
        chosen=chosen,
        rival=rival,
        **{"scale": f"{sampler.guidance:g}", "guidance": [section(curve) for curve in curves]},
        **_comparisons(compared),
        distances=distances,
        asked={way: spent(each) for way, each in (asked or {}).items()},
        signs=[(sign, _of_prompts(base, tuned, sign.prompts)) for sign in told],
        heading="Signs of an exploited reward" if any(each.severity == "warning" for each in told) else "Notes",
        **_galleries(base, tuned),
        curves=learning_curves(values, signs),
        run=run,
        code=_code(run.policy, sampler, base.prompts[0], base.seeds[0], _folder(chosen)),
        phases=phases(values),
        **_circumstances(seconds),
    )
    (folder / "report.html").write_text(mask(page), encoding="utf-8")
    return folder / "report.html"


def _comparisons(compared: Compared) -> dict[str, Any]:
    """What the page's tables have, and how much they look at."""
    return {
        "rows": rows(compared.changes),
        "tiles": rows(compared.first),
        "groups": _groups(compared.changes),
        "categories": _by_category(compared),
        "pairs": {name: (name.replace("_", " ").capitalize(), duel) for name, duel in compared.pairs.items()},
        **{"looks": len(counted(*compared)), "alpha": ALPHA},
    }


def _folder(chosen: Chosen | None) -> str:
    """Where the adapter lies that the page is about."""
    return "adapter" if chosen is None or chosen.beats_base else BELOW


def _groups(changes: Mapping[str, Change]) -> dict[str, list[str]]:
    """The metrics' names below the table's headings."""
    groups = {
        "Trained for": [name for name in changes if name == "reward"],
        "By the held-out judge": [
            name for name in changes if name != "reward" and not name.startswith((PANEL, OWN, LOOK))
        ],
        "By other rewards": [name for name in changes if name.startswith(PANEL)],
        "By your own metrics": [name for name in changes if name.startswith(OWN)],
        "What images look like: neither more nor less is better": [name for name in changes if name.startswith(LOOK)],
    }
    return {title: names for title, names in groups.items() if names}


def _by_category(compared: Compared) -> dict[str, list[Row]]:
    """The lines of each of the judge's metrics, from the largest gain, in bars of one scale; all prompts before them.

    The two that readers look for come first: the others may be below the fold.
    """
    tables, changes = {}, compared.changes
    for name in sorted((name for name in changes if name in LEVELS), key=lambda name: name in ASPECTS):
        own = {category: each[name] for category, each in compared.categories.items() if name in each}
        if own:
            ordered = sorted(own.items(), key=lambda item: -item[1].difference)
            peers = [changes[name], *own.values()]
            tables[label(name)] = [row(name, each, peers, called) for called, each in [(_ALL, changes[name]), *ordered]]
    return tables


def spent(asked: Asked) -> str:
    """What asking a judge took, in words."""
    said = [f"{asked.questions:,} questions"] if asked.questions else []
    if asked.kept:
        said.append(f"{asked.kept:,} {'more ' if said else ''}answered in earlier evaluations")
    if asked.usage.input_tokens or asked.usage.output_tokens:
        said.append(f"{asked.usage.input_tokens:,} tokens in, {asked.usage.output_tokens:,} out")
        said.append(f"${asked.usage.usd:,.2f}" if asked.usage.usd else "no prices are set")
    return " · ".join(said)


def _galleries(base: Evaluation, tuned: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """One image of each of the first prompts, and those that the judge's mean rating moved most, up and down."""
    gain = tuned.ratings.mean(1) - base.ratings.mean(1)
    order = np.lexsort((_score(base) - _score(tuned), -gain))
    chosen = {
        "first": base.of_first_seed()[:_CARDS],
        "gains": [index for index in order[:_CARDS] if gain[index] > 0],
        "losses": [index for index in order[::-1][:_CARDS] if gain[index] < 0],
    }
    return {name: [_card(base, tuned, int(index)) for index in indices] for name, indices in chosen.items()}


def _of_prompts(base: Evaluation, tuned: Evaluation, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """One image of each of these prompts, of what moved the judge's ratings of it most."""
    moved = np.abs(tuned.ratings - base.ratings).sum(1)
    wanted = list(dict.fromkeys(prompts))[:_CARDS]
    places = [[row for row, own in enumerate(base.prompts) if own == prompt] for prompt in wanted]
    return [_card(base, tuned, max(rows, key=lambda row: moved[row])) for rows in places if rows]


def _score(side: Evaluation) -> np.ndarray:
    """What orders images of one gain: the reward's scores, where there are any."""
    return np.zeros(len(side.prompts)) if side.scores is None else side.scores


def _card(base: Evaluation, tuned: Evaluation, index: int) -> dict[str, Any]:
    sides = []
    for side in (base, tuned):
        others = {label(name): each[index] for name, each in side.metrics().items() if name.startswith(PANEL)}
        sides.append(
            {
                "image": embed(Image.fromarray(side.images[index])),
                "scores": others if side.scores is None else {"reward": side.scores[index], **others},
                "rating": side.ratings[index].mean(),
                "correct": side.ratings[index, 0] == 5,
                "blank": bool(blank(side.images[index : index + 1])[0]),
            }
        )
    said = (base.ratings[index], tuned.ratings[index], base.rationales[index], tuned.rationales[index])
    return {
        "prompt": base.prompts[index],
        "seed": base.seeds[index],
        "before": sides[0],
        "after": sides[1],
        "gain": sides[1]["rating"] - sides[0]["rating"],
        "small": max(base.images.shape[1:3]) < _PIXELS // 2,
        "verdicts": list(zip(ASPECTS, *said, strict=True)),
    }


def embed(image: Image.Image, width: int = _PIXELS, height: int = _PIXELS) -> str:
    """As a URL that holds the image itself, made smaller where it is larger."""
    image.thumbnail((width, height))
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=85, lossless=image.height <= _PIXELS // 2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 60:
        return f"{seconds:.0f} second{'s' if round(seconds) != 1 else ''}"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _circumstances(seconds: Mapping[str, float]) -> dict[str, Any]:
    """How long it took, and where and with what it ran."""
    return {
        "parts": {name: duration(each) for name, each in seconds.items()},
        "total": duration(sum(seconds.values())),
        "machine": _machine(),
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    }


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, {os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}"


def _ddim(sampler: Sampler) -> list[str]:
    """Puts DDIM in the place of other samplers, as the policy does; without noise, Euler's steps are DDIM's."""
    same = ("DDIMScheduler",) if sampler.eta else ("DDIMScheduler", "EulerDiscreteScheduler")
    return [
        f"if type(pipeline.scheduler).__name__ not in {same}:",
        '    config = {**pipeline.scheduler.config, "clip_sample": False, "_use_default_values": []}',
        "    pipeline.scheduler = DDIMScheduler.from_config(config)",
    ]


def _code(policy: Mapping[str, Any], sampler: Sampler, prompt: str, seed: int, adapter: str = "adapter") -> str:
    """Plain diffusers, which makes the image for the first prompt again."""
    path = str(policy.get("path", "the base model"))
    embedded, flow = path in tiny.NAMES, str(policy.get("_target_", "")).startswith(_FLOW)
    source = f"resolve({path!r})" if embedded else repr(path)
    dtype = policy.get("dtype", "float32")  # said, since text encoders load in the type they were saved in
    which = "".join(f"{name}={policy[name]!r}, " for name in ("variant", "revision") if policy.get(name))
    call = {
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance,
        "eta": sampler.eta or None if not flow else None,
        "negative_prompt": policy.get("negative_prompt"),
        "max_sequence_length": policy.get("t5_tokens"),
        "height": policy.get("resolution"),
        "width": policy.get("resolution"),
    }
    lines = [
        "import torch",
        f"from diffusers import {'' if flow else 'DDIMScheduler, '}DiffusionPipeline",
        *(["from vp_rl.scenes.tiny import resolve  # where the embedded model lies"] if embedded else []),
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({source}, {which}dtype=torch.{dtype})",
        *([] if flow else _ddim(sampler)),
        f'pipeline.load_lora_weights("{adapter}")  # in this run\'s folder',
        *([] if embedded else ['pipeline.to("cuda")']),
        "image = pipeline(",
        f"    {prompt!r},",
        *(f"    {name}={value!r}," for name, value in call.items() if value is not None),
        f"    generator=torch.Generator().manual_seed({noise_seed(0, seed)}),",
        ").images[0]",
    ]
    return "\n".join(lines)
