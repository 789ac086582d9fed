"""What the commands of evaluate.py have in common: a run's adapter and settings, and errors in one line."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vp_rl.configuration.check import check
from vp_rl.evaluation.no_adapter import why_none
from vp_rl.evaluation.settings import command as pasted
from vp_rl.evaluation.store import TRAINING, Kept, Store, fingerprint, in_words, kept_of_base
from vp_rl.evaluation.terminal import is_full, stop
from vp_rl.interfaces import Policy, Unanswered


@contextmanager
def plain_errors(kept: str) -> Iterator[None]:
    """What a user can mend is said in one line; so is Ctrl-C, with what of the work is kept."""
    try:
        yield
    except InstantiationException as error:
        stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError | ImportError) else error)
    except Unanswered as error:
        sys.exit(f"error: {error}\n{kept} kept: start the same command again to go on")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {kept} kept, start the same command again to go on")
    except Exception as error:
        if is_full(error):
            stop(error, f"\nThe disk is full; {kept} kept: free some space, and start the same command again to go on")
        if not isinstance(error, ValueError | OSError | OmegaConfBaseException):
            raise
        stop(error)


def look(config: Any, own: Mapping[str, Any] | None = None) -> None:
    """Looks at a configuration before anything is built: see `check`."""
    runtime = HydraConfig.get().runtime if HydraConfig.initialized() else OmegaConf.create()
    made = OmegaConf.select(runtime, "output_dir", throw_on_missing=False)
    folder = None if made is None else Path(made)
    asked: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    written: Any = {} if own is None else OmegaConf.to_container(config)  # a run's settings are resolved already
    check(asked, own, written=written, folder=folder)


def names_in(argument: str) -> list[str]:
    """Those in `key=a` or `key=[a,b]`.

    Raises:
        ValueError: the list has no name in it, or one twice.
    """
    key, _, value = argument.partition("=")
    names = [name.strip() for name in re.sub(r"^\[|\]$", "", value.strip()).split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"{argument!r}: give one name, or different ones as {key}=[a,b].")
    return names


def find(given: Path, key: str = "adapter") -> tuple[Path, Any]:
    """The folder of an adapter, and the settings of the run that it is of; empty where it is of none.

    Args:
        given: the run's folder, or the adapter's.
        key: the setting that it was given by.

    Raises:
        FileNotFoundError: there is no adapter.
    """
    for run in (given, given.parent) if given.name == "adapter" else (given,):
        if (why := why_none(run)) is not None:
            raise FileNotFoundError(f"{key}='{given}': {why}")
    adapter = given / "adapter" if (given / "adapter").is_dir() else given
    files = (place / ".hydra" / "config.yaml" for place in (given, given.parent))
    saved = next((file for file in files if file.is_file()), None)
    if saved is None and not any(adapter.glob("*.safetensors")):  # for its log Hydra has made even a mistyped folder
        raise FileNotFoundError(f"{key}='{given}' is no folder of a run or of an adapter.")
    return adapter, OmegaConf.create() if saved is None else OmegaConf.load(saved)


def with_given(run: Any, name: str, given: Any, adapter: str, key: str = "adapter") -> Any:
    """A node of the run's settings, with what was given over it; or the given one, where it is a whole one.

    Raises:
        ValueError: the run has no such node, and a whole one was not given.
    """
    own = OmegaConf.select(run, name)
    if given is None or "_target_" not in given:
        if own is None:
            raise ValueError(f"{key}='{adapter}' is of no run, so that {name}=... must be given, as in {name}=NAME.")
        given = OmegaConf.merge(OmegaConf.to_container(own, resolve=True), given or {})
    if name != "policy" or "start" not in given:
        return given
    # The adapter that is looked at has in it what it began with, whose file need not be there any more.
    return OmegaConf.merge(given, {"start": None, "reference": "base"})


def sampler_of(run: Any, given: Any) -> dict[str, Any]:
    """The node of the sampler that the run's evaluations used, with what was given over it."""
    own: Any = OmegaConf.to_container(OmegaConf.select(run, "evaluation.sampler") or OmegaConf.create())
    return {"_target_": "vp_rl.sampler.Sampler"} | own | dict(given)


def device_of(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    count = torch.cuda.device_count()
    if name.startswith("cuda") and (torch.device(name).index or 0) >= count:
        raise ValueError(f"device={name}: {count or 'no'} GPUs are here that torch can use. device=auto takes what is.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def command(what: str, added: str = "") -> str:
    """Repeats the running command of evaluate.py, fit to be passed on; empty where Hydra has not started it.

    Args:
        what: the command's name.
        added: what `expand` has put before some of its overrides.
    """
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    shown = (each.removeprefix(added) for each in given)
    return pasted(["python", "scripts/evaluate.py", what, *shown]) if given else ""


def kept_of(
    policy: Policy, node: Any, device: str, store: Store, rewards: Mapping[str, str] | None = None
) -> tuple[Kept, Kept]:
    """What is kept of the base model, and of it with its adapter, whichever command has made it.

    Args:
        policy: with the adapter.
        node: the policy's settings.
        device: where its images are made.
        store: of them.
        rewards: see `Kept`.
    """
    kind, settings = torch.device(device).type, cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))
    base = kept_of_base(policy, settings, kind, store, rewards)
    return base, base._replace(policy=fingerprint(policy, f"{said(node, TRAINING)} {kind}"))


def said(node: Any, without: Sequence[str] = ()) -> str:
    """A node in words that are the same whenever its settings are, but for some of these."""
    settings: Any = OmegaConf.to_container(node, resolve=True)
    return in_words(settings, without)
