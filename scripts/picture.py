"""Prompts side by side: a row of images by the base model, and one by each run's adapter, all from the same noise.

    python scripts/picture.py outputs/refl_vpscore/DATE outputs/ddpo_vpscore/DATE --names ReFL DDPO --every 10 --judge
    python scripts/picture.py outputs/ddpo_vpscore_sd15/DATE --prompts "a cat on the moon" "two red apples"

Runs are named by their folders, or by their adapters'. Prompts, sampler and judge are the first run's, and held-out
prompts have the images that its evaluation has; they come from the cache of `evaluate.py images`, if they are there.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluate_images import complete  # these lie beside this file
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jaxtyping import Bool
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from run_settings import device_of, kept_of, plain_errors

from vp_rl.evaluation.asking import rate
from vp_rl.evaluation.images import Evaluator
from vp_rl.evaluation.looks import Pixels
from vp_rl.evaluation.store import Store
from vp_rl.evaluation.terminal import quiet_libraries
from vp_rl.interfaces import Policy

CONF = Path(__file__).resolve().parents[1] / "conf"
RIGHT = "#0072B2"  # of the frame


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--names", nargs="+", help="of the rows, one for each run; by default the folders' names")
    parser.add_argument("--prompts", nargs="+", help="of your own, instead of held-out ones")
    parser.add_argument("--every", type=int, default=10, help="which held-out prompts: each so many-th")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--judge", action="store_true", help="frame what the judge finds fully right")
    parser.add_argument("--to", type=Path, default=Path("picture.png"), help="a file, .png, .pdf or .svg")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    given = parser.parse_args()
    names = given.names or [run.name for run in given.runs]
    if len(names) != len(given.runs) or len(set(names)) < len(names) or "base" in names:
        parser.error("--names: one for each run, all different, and none of them `base`")
    if given.every < 1:
        parser.error("--every: 1 is all of them")
    with plain_errors("what was made is"), quiet_libraries():
        made = make(given.runs, names, given.prompts, given.every, given.seed, given.device, given.judge)
        draw(*made).savefig(given.to, dpi=100)
    print(f"{len(made[0])} prompts: {given.to}")


def make(
    runs: Sequence[Path],
    names: Sequence[str],
    own: Sequence[str] | None,
    every: int,
    seed: int,
    device: str,
    judged: bool,
    cache: Path | None = None,
) -> tuple[list[str], dict[str, Pixels], dict[str, Bool[np.ndarray, " prompts"]]]:
    """The prompts; the images of each row; and which are fully right, where the judge is asked.

    Args:
        runs, names: see the module; the base model's row is `base`.
        own: prompts of one's own; None: every `every`-th held-out one.
        seed: of the noise.
        device: see `device_of`.
        judged: whether to ask the first run's judge.
        cache: of what was made before; None: the one of `evaluate.py images`.

    Raises:
        ValueError, OSError: see `evaluate_images.complete`.
    """
    where, rows = device_of(device), {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate_images")
    found = [complete(OmegaConf.merge(config, {"adapter": str(run), "seeds": [seed]})) for run in runs]
    evaluation = found[0][1].evaluation
    evaluation.panel = {}  # rewards that nothing is asked of
    evaluator: Evaluator = instantiate(evaluation, _convert_="all")
    store = Store(cache or Path(config.cache))
    prompts, share = (list(own), (0, 1)) if own else (evaluator.prompts, (0, every))
    for (adapter, whole), name in zip(found, names, strict=True):
        policy: Policy = instantiate(whole.policy).to(where)
        policy.load_adapter(adapter)
        without, adapted = kept_of(policy, whole.policy, where, store)
        if not rows:
            with policy.base():
                rows["base"] = evaluator.make(policy, prompts, share=share, kept=without)
        rows[name] = evaluator.make(policy, prompts, share=share, kept=adapted)
        del policy  # before the next one takes its place on the device
    prompts = prompts[:: share[1]]
    if not judged:
        return prompts, rows, {}
    right = {}
    for name, images in rows.items():
        rated, _ = rate(evaluator.annotator, prompts, [[image] for image in images], store)
        right[name] = np.array([each[0][0].rating == 5 for each in rated])
    return prompts, rows, right


def draw(prompts: Sequence[str], rows: dict[str, Pixels], right: dict[str, Bool[np.ndarray, " prompts"]]) -> Figure:
    """A column for each prompt, a row for each model; framed where it is right."""
    figure = Figure((0.95 * len(prompts) + 0.6, 1.0 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(prompts), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for column, (place, pixels) in enumerate(zip(line, images, strict=True)):
            place.imshow(pixels)
            place.set(xticks=[], yticks=[])
            framed = name in right and right[name][column]
            for spine in place.spines.values():
                spine.set(color=RIGHT if framed else "#dddddd", linewidth=3 if framed else 1)
        said = f"{name}\n{right[name].sum()} right" if name in right else name
        line[0].set_ylabel(said, fontsize=10)
    for place, prompt in zip(axes[0], prompts, strict=True):
        place.set_title(textwrap.fill(textwrap.shorten(prompt, 70), 17), fontsize=7.5, pad=5)
    return figure


if __name__ == "__main__":
    main()
