"""Held-out images: gathered from all processes, shown beside the base's, and those of the base kept for other runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from jaxtyping import UInt8
from torch import distributed, nn

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.callbacks.trackers import send_images
from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.images import Evaluation, Evaluator, Pixels
from vp_rl.evaluation.store import NOTHING, Kept, Store, fingerprint, in_words, kept_of_base
from vp_rl.interfaces import Reward

_COLUMNS = 16  # images in a row of the sample grids


def gather(made: Pixels | None, each: int, ranks: int) -> Pixels | None:
    """All processes' images, on the main one.

    Args:
        made: by this process; None: it had nothing to make.
        each: images of a prompt.
        ranks: how many processes there are.
    """
    if ranks == 1:
        return made
    shares: list[Pixels | None] = [None for _ in range(ranks)]
    main = distributed.get_rank() == 0
    distributed.gather_object(made, shares if main else None)
    return interleave([share for share in shares if share is not None], each) if main else None


def show(trainer: lightning.Trainer, base: Evaluation | None, now: Evaluation, epoch: int) -> None:
    """The policy's images after `epoch` epochs below the base's, as a file in `samples/` and to the trackers."""
    assert base is not None, "evaluated when training started"
    folder = Path(trainer.default_root_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    columns = now.of_first_seed()[:_COLUMNS]
    grid([base.images[columns], now.images[columns]]).save(folder / f"epoch_{epoch:04d}.png")
    (folder / "prompts.json").write_text(json.dumps([now.prompts[column] for column in columns]))
    send_images(trainer.loggers, base, now, trainer.global_step)


def kept_images(
    file: Path | None,
    trainer: lightning.Trainer,
    module: PolicyTraining,
    evaluator: Evaluator,
    settings: Mapping[str, Any],
) -> Kept:
    """The store of a run's base model, by its weights and settings; nothing is kept where these are not known.

    Nor on several machines: their shared disks do not lock SQLite's files.

    Args:
        file: of the store, which `scripts/evaluate.py images` may share; None: nothing is kept.
        trainer, module, evaluator: of the run.
        settings: all of the run's, by node.

    Raises:
        OSError: the file is something else, or cannot be used.
    """
    if file is None or not settings.get("policy") or trainer.num_nodes > 1:
        return NOTHING
    panel = (settings.get("evaluation") or {}).get("panel") or {}
    said = {"reward": settings.get("reward"), **panel}
    rewards = {
        name: fingerprint(each, in_words(said[name]))
        for name, each in {"reward": module.reward, **evaluator.panel}.items()
        if each is not None and said.get(name) and _steady(each)
    }
    precision = "" if trainer.precision == "32-true" else f" {trainer.precision}"
    return kept_of_base(
        module.policy, settings["policy"], trainer.strategy.root_device.type + precision, Store(file), rewards
    )


def _steady(reward: Reward) -> bool:
    """Whether it will say the same of the same image in another run: no server is behind it, and it learns nothing."""
    learns = (type(part).get_extra_state is not nn.Module.get_extra_state for part in reward.modules())
    return not reward.elsewhere and not any(learns)


def interleave(shares: Sequence[np.ndarray], each: int) -> UInt8[np.ndarray, "whole height width 3"]:
    """The whole of which every share has each n-th prompt's images: see `Evaluator.make`.

    Args:
        shares: of the first process, of the second, and so on.
        each: images of a prompt.
    """
    size = shares[0].shape[1:]
    whole = np.empty((sum(map(len, shares)) // each, each, *size), np.uint8)
    for first, share in enumerate(shares):
        whole[first :: len(shares)] = share.reshape(-1, each, *size)
    return whole.reshape(-1, *size)
