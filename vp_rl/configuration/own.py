"""What the programs themselves are told: settings of `conf/*.yaml` that belong to no node, by their dotted names."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from vp_rl.configuration.kinds import Amount, Count, Port, Seed, Seeds, Text, one_of

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
    "device": Text,
    "seed": Seed,
    "rewards": _Nodes,
    "data": _Nodes,
}
OBJECTS: dict[str, Any] = {
    "adapter": Text,
    "folder": Text,
    "cache": Text | None,
    "device": Text,
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
SERVE: dict[str, Any] = {"host": Text, "port": Port, "device": Text, "queue": Count, "max_body_mb": Count}
