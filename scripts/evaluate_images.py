"""A run's adapter against its base model: what `python scripts/evaluate.py images` does."""

import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from vp_rl.evaluation.categories import by_category
from vp_rl.evaluation.compare import as_dict, as_markdown, compare
from vp_rl.evaluation.duel import duels
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.settings import override, publishable
from vp_rl.evaluation.signs import signs
from vp_rl.evaluation.store import Kept, Store, fingerprint
from vp_rl.interfaces import Policy, Reward

log = logging.getLogger("vp_rl")

_NODES = ("policy", "reward", "prompts", "annotator")
_TRAINING = ("lora", "gradient_checkpointing")  # of a policy's settings: they change nothing in the base's images


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "conf"), config_name="evaluate_images"
)
def images(config: DictConfig) -> None:
    """One adapter."""
    try:
        evaluate(config)
    except InstantiationException as error:
        _stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError | ImportError) else error)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        _stop(error)
    except KeyboardInterrupt:
        sys.exit("stopped; what was made is kept, start the same command again to go on")


def expand(arguments: Sequence[str]) -> list[str]:
    """Turns `panel=[a,b]` into what Hydra puts at `panel.a` and `panel.b`; and adds to what a run's nodes have.

    Raises:
        ValueError: the list has no name in it, or one twice.
    """
    chosen = {argument.partition("=")[0] for argument in arguments}
    found: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        node, dot, _ = key.partition(".")
        if key == "panel":
            names = [name.strip() for name in re.sub(r"^\[|\]$", "", value.strip()).split(",")]
            if "" in names or len(set(names)) < len(names):
                raise ValueError(f"{argument!r}: give one name, or different ones as panel=[a,b].")
            found += [f"+reward@panel.{name}={name}" for name in names]
        elif dot and (node == "sampler" or (node in _NODES and node not in chosen)):
            found.append(f"+{argument}")
        else:
            found.append(argument)
    return found


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Makes, judges, compares, and writes `summary.json` and `report.html`.

    Returns:
        What is in `summary.json`.

    Raises:
        ValueError, OSError: the adapter, or something else that is named, is not there or does not fit.
    """
    adapter, whole = complete(config)
    folder, started = Path(config.folder), time.monotonic()
    torch.manual_seed(config.seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    evaluator: Evaluator = instantiate(whole.evaluation, _convert_="all")
    policy: Policy = instantiate(whole.policy).to(device)
    reward: Reward = instantiate(whole.reward).to(device).requires_grad_(False).eval()
    policy.load_adapter(adapter)
    evaluator.annotator.check()
    store = Store(None if config.cache is None else Path(config.cache))
    rewards = {"reward": fingerprint(reward, _said(whole.reward))}
    for name, each in evaluator.panel.items():
        rewards[name] = fingerprint(each.eval(), _said(whole.evaluation.panel[name]))
    settings = f"{_said(whole.policy, _TRAINING)} {torch.device(device).type}"
    frozen = fingerprint(policy, settings, trained=False)
    with policy.reference():
        base = _run(evaluator, policy, reward, Kept(store, frozen, frozen, rewards), "base model")
    half = time.monotonic()
    tuned = _run(evaluator, policy, reward, Kept(store, fingerprint(policy, settings), frozen, rewards), "adapter")
    seconds = {"base model's images": half - started, "adapter's images": time.monotonic() - half}
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(publishable(OmegaConf.to_container(whole)), folder / ".hydra" / "config.yaml")
    return conclude(folder, evaluator, base, tuned, bool(config.pairs), seconds)


def complete(config: DictConfig) -> tuple[Path, DictConfig]:
    """The adapter's folder, and the settings: the run's, with what was given over them.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of no run, and what the run would have said was not given.
    """
    given = Path(config.adapter)
    adapter = given / "adapter" if (given / "adapter").is_dir() else given
    if not adapter.is_dir():
        raise FileNotFoundError(f"adapter='{given}' is no folder of a run or of an adapter.")
    saved = next(
        (file for place in (given, given.parent) if (file := place / ".hydra" / "config.yaml").is_file()), None
    )
    run = OmegaConf.create() if saved is None else OmegaConf.load(saved)
    whole = OmegaConf.create({name: _node(config, run, name) for name in _NODES})
    own: dict[str, Any] = OmegaConf.to_container(OmegaConf.select(run, "evaluation.sampler") or OmegaConf.create())  # type: ignore[assignment]
    sampler = {"_target_": "vp_rl.sampler.Sampler"} | own | dict(config.sampler)
    panel = config.panel or OmegaConf.select(run, "evaluation.panel") or {}
    whole.evaluation = {
        "_target_": "vp_rl.evaluation.images.Evaluator",
        "prompts": whole.prompts,
        "annotator": whole.annotator,
        "sampler": sampler,
        "panel": panel,
    } | {name: config[name] for name in ("split", "limit", "seeds", "batch_size")}
    return adapter, whole


def _node(config: DictConfig, run: Any, name: str) -> Any:
    given, saved = config.get(name), OmegaConf.select(run, name)
    if given is not None and "_target_" in given:
        return given
    if saved is None:
        raise ValueError(
            f"adapter='{config.adapter}' is of no run, so that {name}=... must be given, as in {name}=NAME."
        )
    return OmegaConf.merge(OmegaConf.to_container(saved, resolve=True), given or {})


def conclude(
    folder: Path, evaluator: Evaluator, base: Evaluation, tuned: Evaluation, pairs: bool, seconds: dict[str, float]
) -> dict[str, Any]:
    """Compares and writes."""
    changes = compare(base, tuned)
    categories = by_category(base, tuned, evaluator.categories)
    found = signs([], changes)
    summary: dict[str, Any] = {
        "held_out": as_dict(changes),
        "categories": {name: as_dict(each) for name, each in categories.items()},
        "signs": [asdict(sign) for sign in found],
        "prompts": len(evaluator.prompts),
        "images": len(tuned.prompts),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if pairs:
        summary["pairs"] = {name: asdict(duel) for name, duel in duels(evaluator.annotator, base, tuned).items()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(as_markdown(changes))
    for name, duel in summary.get("pairs", {}).items():
        print(f"both at once, {name}: " + ", ".join(f"{part} {value:.0%}" for part, value in duel.items()))
    print("".join(f"\n{sign.severity}: {sign.words}" for sign in found))
    report = write_report(
        folder,
        base,
        tuned,
        changes,
        sampler=evaluator.sampler,
        seconds=seconds,
        signs=found,
        categories=categories,
        command=_command(),
    )
    print(f"\nReport: {report}")
    return summary


def _run(evaluator: Evaluator, policy: Policy, reward: Reward, kept: Kept, what: str) -> Evaluation:
    total, quiet = len(evaluator.prompts) * len(evaluator.seeds), not sys.stderr.isatty()
    with tqdm(total=total, desc=f"images, {what}", unit="img", disable=quiet) as bar:
        return evaluator.evaluate(policy, reward, on_batch=bar.update, kept=kept)


def _command() -> str:
    """Repeats the evaluation; empty where Hydra has not started it."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join(["python", "scripts/evaluate.py", "images", *map(override, given)]) if given else ""


def _said(node: Any, without: Sequence[str] = ()) -> str:
    settings: Any = OmegaConf.to_container(node, resolve=True)
    return json.dumps({name: value for name, value in settings.items() if name not in without}, sort_keys=True)


def _stop(error: BaseException) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    sys.exit(f"error: {error}")
