"""Are the right objects in the images of a run's adapter? What `python scripts/evaluate.py objects` does."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from run_settings import command, device_of, find, kept_of, look, plain_errors, said, sampler_of, with_given
from tqdm import tqdm

from vp_rl.configuration.own import OBJECTS
from vp_rl.evaluation.geneval import Detector
from vp_rl.evaluation.images import Evaluator
from vp_rl.evaluation.lock import hold
from vp_rl.evaluation.objects import Checked, Score, Unasked, compare_tasks, examine_all
from vp_rl.evaluation.objects_page import as_markdown, write
from vp_rl.evaluation.store import Kept, Store, fingerprint
from vp_rl.evaluation.terminal import quiet_libraries
from vp_rl.interfaces import Policy
from vp_rl.visionprefer.object_prompts import ObjectPrompts

_ABOUT = (
    "Published GenEval figures are by Mask2Former of mmdetection; these are by {detector}. Another detector finds "
    "other objects, so compare these figures with each other, and with no published ones."
)


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "conf"), config_name="evaluate_objects"
)
def objects(config: DictConfig) -> None:
    """One adapter."""
    with plain_errors("what was made is"), quiet_libraries():
        look(config, OBJECTS)  # first what is said, then what is there, and both before a folder is made in it
        find(Path(config.adapter))
        _alone = hold(Path(config.folder), "give another folder=...")
        evaluate(config)


def expand(arguments: Sequence[str]) -> list[str]:
    """Lets settings of the run's policy and sampler be given, which are not in the configuration before it is read."""
    return [f"++{each}" if each.startswith(("policy.", "sampler.")) else each for each in arguments]


def evaluate(config: DictConfig) -> dict[str, Score]:
    """Makes, looks, checks, compares, and writes.

    Returns:
        The scores by task, and overall.

    Raises:
        ValueError, OSError: the adapter, or something else that is named, is not there or does not fit.
    """
    adapter, node, sampler = complete(config)
    look(OmegaConf.create({"policy": node, "sampler": sampler}))
    source = instantiate(config.prompts)
    if not isinstance(source, ObjectPrompts):
        raise ValueError("prompts=... must say what is in the image: choose geneval or scene_objects.")
    evaluator = Evaluator(
        source,
        Unasked(),
        instantiate(sampler),
        limit=None,
        seeds=config.seeds,
        batch_size=config.batch_size,
    )
    device = device_of(config.device)
    detector: Detector = instantiate(config.detector, _convert_="all").to(device).eval()
    wanted = [source.wanted(prompt) for prompt in evaluator.prompts]
    detector.check(source.vocabulary(), list(dict.fromkeys(color for each in wanted for color in each.colors)))
    who = fingerprint(detector, said(config.detector))
    policy: Policy = instantiate(node).to(device)
    policy.load_adapter(adapter)
    store = Store(None if config.cache is None else Path(config.cache))
    without, adapted = kept_of(policy, node, device, store)

    def side(kept: Kept, what: str) -> Checked:
        total, quiet = len(evaluator.prompts) * len(evaluator.seeds), not sys.stderr.isatty()
        with tqdm(total=total, desc=f"images, {what}", unit="img", disable=quiet) as bar:
            images = evaluator.make(policy, evaluator.prompts, bar.update, kept=kept)
        with tqdm(total=total, desc=f"looking, {what}", unit="img", disable=quiet) as bar:
            return examine_all(
                detector, source, evaluator.prompts, evaluator.seeds, images, store, who, on_batch=bar.update
            )

    with policy.base():
        base = side(without, "base model")
    tuned = side(adapted, "adapter")
    scores = compare_tasks(base, tuned)
    called = str(config.detector.get("model", type(detector).__name__))
    about = [_ABOUT.format(detector=Path(called).name), *filter(None, [source.note])]
    page = write(Path(config.folder), base, tuned, scores, about=about, command=command("objects", added="++"))
    print(f"{as_markdown(scores)}\n\nReport: {page}")
    return scores


def complete(config: DictConfig) -> tuple[Path, Any, dict[str, Any]]:
    """The adapter's folder, and the nodes of policy and sampler: see `find`, `with_given` and `sampler_of`."""
    adapter, run = find(Path(config.adapter))
    policy = with_given(run, "policy", config.get("policy"), config.adapter)
    return adapter, policy, sampler_of(run, config.sampler)
