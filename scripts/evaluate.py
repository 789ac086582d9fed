"""How good a reward is: how often it agrees with people; and how good an adapter is: against its base model.

Stop it whenever you like and start it again.

python scripts/evaluate.py accuracy reward=vp_score data=visionprefer
python scripts/evaluate.py accuracy reward=[vp_score,image_reward] data=[image_reward_db,hpd_v2,pick_a_pic]
python scripts/evaluate.py images adapter=outputs/ddpo_vpscore/DATE
python scripts/evaluate.py objects adapter=outputs/ddpo_vpscore/DATE
python scripts/evaluate.py blind outputs/ddpo_vpscore/DATE/evaluation/blind answers-*.json
python scripts/evaluate.py accuracy --help
python scripts/evaluate.py images --help
python scripts/evaluate.py objects --help
"""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
import torch
from command_line import nearest, start  # these lie beside this file
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from run_settings import look, names_in, plain_errors  # it lies beside this file

from vp_rl.configuration.own import ACCURACY
from vp_rl.data.sets.base import HumanSet, Judged
from vp_rl.evaluation.accuracy_report import console, write
from vp_rl.evaluation.human_accuracy import Result, measure
from vp_rl.evaluation.lock import hold
from vp_rl.evaluation.scoring import Scorer, fingerprint, score_set
from vp_rl.evaluation.settings import command
from vp_rl.evaluation.terminal import quiet_libraries

log = logging.getLogger("vp_rl")

COMMANDS = ("accuracy", "images", "objects", "blind")
_LISTS = {"reward": ("reward", "rewards", "vp_score"), "data": ("human", "data", "visionprefer")}
_COMMAND = command(["python", "scripts/evaluate.py", *sys.argv[1:]])


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def accuracy(config: DictConfig) -> None:
    """Rewards on sets of human judgements."""
    with plain_errors("all scores are"), quiet_libraries():
        _alone = hold(Path(config.folder), "give another folder=...")
        results = evaluate(config)
        print(console(results))
        log.info("report: %s", write(results, Path(config.folder), _COMMAND))


def evaluate(config: DictConfig) -> list[Result]:
    """Every reward on every set; one reward is in memory at a time.

    Raises:
        ValueError, OSError: see `HumanSet.load`, `Scorer` and the rewards.
    """
    look(config, ACCURACY)
    sets: dict[str, tuple[HumanSet, list[Judged]]] = {}
    for name in config.data:  # all of them first: what is missing shows before hours of scoring
        human: HumanSet = instantiate(config.data[name])
        sets[name] = human, human.load()
    results = []
    for name in config.rewards:
        torch.manual_seed(config.seed)  # a pretrained tower without a head gets the same new one every time
        reward = instantiate(config.rewards[name])
        log.info("%s", name)
        scorer = Scorer(reward, config.batch_size, config.device, config.threads)
        own = f"{name}-{fingerprint(_settings(config.rewards[name]), reward=reward)}"
        scores = Path(config.folder) / "scores" / own
        scorer.settle(*next(iter(sets.values())), scores / "statistics.json")
        for key, (human, judged) in sets.items():
            kept = scores / f"{key}-{fingerprint(key, human.stamp())}"
            results.append(measure(name, human, judged, score_set(scorer, human, judged, kept)))
        del reward, scorer
        gc.collect()
    return results


def _settings(node: DictConfig) -> str:
    return str(OmegaConf.to_container(node, resolve=True))


def expand(arguments: Sequence[str]) -> list[str]:
    """Turns `reward=[a,b]` and `data=[c]` into what Hydra puts at `rewards.a`, `rewards.b` and `data.c`.

    Hydra itself would merge the options of a list into one node. Without a choice there is the embedded one.

    Raises:
        ValueError: a list has no name in it, or one twice.
    """
    found: list[str] = []
    missing = dict(_LISTS)
    for argument in arguments:
        key, is_choice, _ = argument.partition("=")
        if key not in _LISTS or not is_choice:
            found.append(argument)
            continue
        group, place, _ = _LISTS[key]
        found += [f"+{group}@{place}.{name}={name}" for name in names_in(argument)]
        missing.pop(key, None)
    chosen = {argument.lstrip("+").partition("=")[0].partition(".")[0] for argument in found}
    for group, place, default in missing.values():
        if f"{group}@{place}" not in chosen:
            found.append(f"+{group}@{place}.{default}={default}")
    return found


def main() -> None:
    """Finds out what is to be evaluated, and leaves the rest to Hydra; what people say to argparse."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("", "-h", "--help"):
        print((__doc__ or "").strip(), file=sys.stdout if command else sys.stderr)
        sys.exit(0 if command else 2)
    if command not in COMMANDS:
        meant = "".join(f" Did you mean {name}?" for name in nearest(command, COMMANDS))
        sys.exit(
            f"error: {command!r} is nothing that can be evaluated.{meant} Choose from {', '.join(COMMANDS)}, as in "
            "`python scripts/evaluate.py accuracy reward=vp_score data=visionprefer`."
        )
    if command == "blind":
        from evaluate_blind import main as blind  # it lies beside this file

        blind(sys.argv[2:])
        return
    from evaluate_images import expand as expand_images
    from evaluate_images import images
    from evaluate_objects import expand as expand_objects
    from evaluate_objects import objects

    kinds = {
        "accuracy": (accuracy, expand, "evaluate"),
        "images": (images, expand_images, "evaluate_images"),
        "objects": (objects, expand_objects, "evaluate_objects"),
    }
    run, expanded, config = kinds[command]
    with plain_errors("nothing is"):
        sys.argv[1:] = expanded(sys.argv[2:])
    start(run, config)


if __name__ == "__main__":
    main()
