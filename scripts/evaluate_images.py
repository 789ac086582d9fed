"""A run's adapter against its base model, or against another adapter: what `python scripts/evaluate.py images` does."""

import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from evaluate_blind import ask, check  # these lie beside this file
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from run_settings import command, device_of, find, kept_of, look, names_in, plain_errors, said, sampler_of, with_given
from tqdm import tqdm

from vp_rl.configuration.own import IMAGES
from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.claims import FIRST
from vp_rl.evaluation.compare import BASE, OTHER
from vp_rl.evaluation.conclusion import ALONE, PAIRS, conclude, publish
from vp_rl.evaluation.distances import Encoder, distances, images_in, sees_whole
from vp_rl.evaluation.duel import duels
from vp_rl.evaluation.guidance_curve import GuidanceCurve, Side, guidance_curves, without_curve
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.lock import hold
from vp_rl.evaluation.settings import publishable
from vp_rl.evaluation.store import Kept, Store, fingerprint
from vp_rl.evaluation.terminal import quiet_libraries
from vp_rl.interfaces import Policy, Reward

log = logging.getLogger("vp_rl")

_NODES = ("policy", "reward", "prompts", "annotator")


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "conf"), config_name="evaluate_images"
)
def images(config: DictConfig) -> None:
    """One adapter."""
    with plain_errors("what was made is"), quiet_libraries():
        look(config, IMAGES)  # first what is said, then what is there, and both before a folder is made in it
        find(Path(config.adapter))
        _alone = hold(Path(config.folder), "give another folder=...")
        evaluate(config)


def expand(arguments: Sequence[str]) -> list[str]:
    """Turns `panel=[a,b]` and `distances=a` into what Hydra puts in place; and adds to what a run's nodes have.

    What comes of `against=` has a folder of its own, so that it does not take the place of what came of the base model.

    Raises:
        ValueError: the list has no name in it, or one twice.
    """
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    found: list[str] = []
    if "against" in given and "folder" not in given:
        name = "_".join(part for part in Path(given["against"]).parts[-2:] if part != "adapter")
        found.append(f"folder=${{adapter}}/against_{re.sub(r'[^A-Za-z0-9._-]+', '_', name).strip('_')}")
    for argument in arguments:
        key, _, value = argument.partition("=")
        node, dot, _ = key.partition(".")
        if key == "distances":
            if len(names := names_in(argument)) > 1:
                raise ValueError(f"{argument!r}: images are compared by one encoder.")
            found += [f"+reward@distances.encoder={names[0]}", f"+distances.name={names[0]}"]
        elif key == "panel":
            found += [f"+reward@panel.{name}={name}" for name in names_in(argument)]
        elif dot and (node == "sampler" or (node in _NODES and node not in given)):
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
    look(whole)
    other = None if config.against is None else find(Path(config.against), "against")
    check(config.blind.pairs, config.blind.aspects)
    folder, started = Path(config.folder), time.monotonic()
    torch.manual_seed(config.seed)
    device = device_of(config.device)
    evaluator: Evaluator = instantiate(whole.evaluation, _convert_="all")
    policy: Policy = instantiate(whole.policy)
    reward: Reward = instantiate(whole.reward).to(device).requires_grad_(False).eval()
    encoder = _encoder(config, device)
    policy.load_adapter(adapter)
    evaluator.annotator.check()
    store = Store(None if config.cache is None else Path(config.cache))
    rewards = _fingerprints({"reward": reward, **evaluator.panel}, {"reward": whole.reward, **whole.evaluation.panel})
    without, adapted = kept_of(policy, whole.policy, device, store, rewards)
    if other is None:
        rival = BASE
        with policy.to(device).base():
            base = _run(evaluator, policy, reward, without, rival.name)
    else:
        rival = OTHER
        base = _of_the_other(config, *other, evaluator, reward, Kept(store, rewards=rewards), device)
    half = time.monotonic()
    policy.to(device)  # not before the other one has left it
    tuned = _run(evaluator, policy, reward, adapted, "the adapter")
    _check_sizes(base, tuned)
    seconds = {f"{rival.name}'s images": half - started, "the adapter's images": time.monotonic() - half}
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(publishable(OmegaConf.to_container(whole)), folder / ".hydra" / "config.yaml")
    begun, asked = time.monotonic(), {ALONE: base.asked.plus(tuned.asked)}
    found: dict[str, Any] = {}
    if config.pairs:
        quiet = not sys.stderr.isatty()
        found["pairs"], asked[PAIRS] = duels(evaluator.annotator, base, tuned, store, quiet=quiet)
    if encoder is not None:
        reference = None if config.reference is None else Path(config.reference)
        name = publishable(f"{config.distances.name} ({config.distances.encoder.get('model', 'its own weights')})")
        found["distances"] = distances(encoder, name, base.images, tuned.images, reference, torch.device(device), rival)
    seconds["comparison"] = time.monotonic() - begun
    begun, kept = time.monotonic(), {"base": without, "tuned": adapted}
    curves = [] if other else _curves(config, evaluator, policy, reward, kept, {"base": base, "tuned": tuned}, asked)
    seconds |= {"guidance curve's images": time.monotonic() - begun} if curves else {}
    more = {"seconds": {name: round(value, 1) for name, value in seconds.items()}}
    done = conclude(evaluator, base, tuned, asked=asked, rival=rival, curves=curves, **found)
    written = publish(done, folder, evaluator, seconds, more, command=command("images"))
    if config.blind.pairs:
        ask(folder / "blind", base, tuned, config.blind.pairs, list(config.blind.aspects), rival)
    return written


def _fingerprints(rewards: Mapping[str, Reward], nodes: Mapping[str, Any]) -> dict[str, str]:
    return {name: fingerprint(each.eval(), said(nodes[name])) for name, each in rewards.items()}


def _check_sizes(base: Evaluation, tuned: Evaluation) -> None:
    """Raises ValueError where they differ."""
    if tuned.images.shape != base.images.shape:
        sizes = " and ".join("{2} x {1}".format(*each.images.shape) for each in (base, tuned))
        raise ValueError(f"Images of {sizes} pixels are not compared: make them alike, by policy.resolution=...")


def _of_the_other(
    config: DictConfig, adapter: Path, run: Any, evaluator: Evaluator, reward: Reward, kept: Kept, device: str
) -> Evaluation:
    """What another adapter makes, on the model of its own run, where it is of one.

    Raises:
        ValueError: see `with_given`.
    """
    node = with_given(run, "policy", config.get("policy"), config.against, "against")
    policy: Policy = instantiate(node)
    policy.load_adapter(adapter)
    _, adapted = kept_of(policy, node, device, kept.store, kept.rewards)
    return _run(evaluator, policy.to(device), reward, adapted, OTHER.name)


def _curves(
    config: DictConfig,
    evaluator: Evaluator,
    policy: Policy,
    reward: Reward,
    kept: Mapping[str, Kept],
    known: Mapping[Side, Evaluation | None],
    asked: dict[str, Asked],
) -> list[GuidanceCurve]:
    """Base and adapter over guidance scales, where that is wanted and the model takes any; counts what is asked."""
    why_not = without_curve(evaluator, policy)
    if why_not is not None:
        log.info(why_not) if why_not else None
        return []

    def make(side: Side, there: Evaluator, prompts: list[str]) -> Evaluation:
        with policy.base() if side == "base" else nullcontext():
            done = _run(there, policy, reward, kept[side], f"guidance {there.sampler.guidance:g}, {side}", prompts)
        asked[ALONE] = asked[ALONE].plus(done.asked)
        return done

    _, run = find(Path(config.adapter))
    metric = OmegaConf.select(run, "callbacks.held_out.best") or FIRST
    trained = None if OmegaConf.select(run, "sampler.scales") else OmegaConf.select(run, "sampler.guidance")
    return guidance_curves(evaluator, make, known, metric=metric, trained=trained)


def complete(config: DictConfig) -> tuple[Path, DictConfig]:
    """The adapter's folder, and the settings: the run's, with what was given over them.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of no run, and what the run would have said was not given.
    """
    adapter, run = find(Path(config.adapter))
    whole = OmegaConf.create({name: with_given(run, name, config.get(name), config.adapter) for name in _NODES})
    whole.evaluation = {
        "_target_": "vp_rl.evaluation.images.Evaluator",
        "prompts": whole.prompts,
        "annotator": whole.annotator,
        "sampler": sampler_of(run, config.sampler),
        "curve": config.curve,
        "panel": config.panel or OmegaConf.select(run, "evaluation.panel") or {},
        "metrics": OmegaConf.select(run, "evaluation.metrics") or {},
    } | {name: config[name] for name in ("split", "limit", "seeds", "batch_size")}
    return adapter, whole


def _encoder(config: DictConfig, device: str) -> Encoder | None:
    """What distances are taken on; None where they are not wanted."""
    if not config.distances:
        if config.reference is not None:
            raise ValueError(f"reference='{config.reference}' needs an encoder of images too: distances=clip_score.")
        return None
    if config.reference is not None:
        next(images_in(Path(config.reference)))  # before any image is made
    encoder = instantiate(config.distances.encoder).to(device)
    if not isinstance(encoder, Encoder) or not sees_whole(encoder, torch.device(device)):
        raise ValueError(
            f"distances={config.distances.name} has no features of images alone: choose a CLIP, like clip_score."
        )
    return encoder


def _run(
    evaluator: Evaluator, policy: Policy, reward: Reward, kept: Kept, what: str, prompts: list[str] | None = None
) -> Evaluation:
    chosen = evaluator.prompts if prompts is None else prompts
    total, quiet = len(chosen) * len(evaluator.seeds), not sys.stderr.isatty()
    with tqdm(total=total, desc=f"images, {what}", unit="img", disable=quiet) as bar:
        return evaluator.evaluate(policy, reward, chosen, on_batch=bar.update, kept=kept)
