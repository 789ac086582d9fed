"""What the programs themselves are told: settings of `conf/*.yaml` that belong to no node, by their dotted names."""

# pyright: reportOperatorIssue=false
# `Text | None` is a type here that is looked at, not an annotation.

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Interval

from vp_rl.configuration.kinds import Amount, Count, Device, Port, Seed, Seeds, Share, Text, one_of

_Split = Annotated[str, one_of("train", "validation", "test")]
_Nodes = Mapping[str, Any]

TRAIN: dict[str, Any] = {
    "seed": Seed,
    "name": Text | None,
    "resume": Text | None,
    "dry_run": bool,
    "geometry.images_per_update": Count | None,
    "geometry.updates": Count,
    "callbacks": _Nodes,
    "logger": _Nodes,
    "test": bool,
    "objective": Text,
}
AUTOMATIC = ("algorithm.train_batch", "algorithm.sample_batch", "data.batch_size")
"""What training may find out itself: these may be `auto`."""
BUILD: dict[str, Any] = {
    "folder": Text,
    "until": Text,
    "dry_run": bool,
    "push_to": Text | None,
    "budget_usd": Amount | None,
    "seed": Seed,
}
ACCURACY: dict[str, Any] = {
    "folder": Text,
    "batch_size": Count,
    "threads": Count,
    "device": Device,
    "seed": Seed,
    "rewards": _Nodes,
    "data": _Nodes,
}
OBJECTS: dict[str, Any] = {
    "adapter": Text,
    "folder": Text,
    "cache": Text | None,
    "device": Device,
    "seeds": Seeds,
    "batch_size": Count,
    "sampler": _Nodes,
}
IMAGES: dict[str, Any] = {
    **OBJECTS,
    "against": Text | None,
    "seed": Seed,
    "split": _Split,
    "limit": Count | None,
    "panel": _Nodes,
    "pairs": bool,
    "distances": _Nodes,
    "reference": Text | None,
    "blind.pairs": int,
    "blind.aspects": str | Sequence[str],
}
EXPORT: dict[str, Any] = {"run": Text, "to": Text, "folder": Text}
SERVE: dict[str, Any] = {"host": Text, "port": Port, "device": Device, "queue": Count, "max_body_mb": Count}

_Most = Annotated[int, Interval(ge=-1, le=2**31 - 1)]
"""A number, or -1 for no end."""
THEIRS: dict[str, dict[str, Any]] = {
    "lightning.Trainer": {
        "max_epochs": _Most | None,
        "min_epochs": Count | None,
        "max_steps": _Most,
        "accumulate_grad_batches": Count,
        "gradient_clip_val": Amount | None,
        "log_every_n_steps": Count,
        "num_sanity_val_steps": _Most,
        "check_val_every_n_epoch": Count | None,
        "num_nodes": Count,
    },
    "peft.LoraConfig": {
        "r": Annotated[int, Interval(ge=1, le=2**16)],
        "lora_alpha": Annotated[float, Interval(gt=0, le=1e6)],
        "lora_dropout": Share,
    },
}
"""Ranges that other libraries find out late, or never."""
