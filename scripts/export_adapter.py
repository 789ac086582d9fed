"""Writes a run's adapter as other programs read it: diffusers, Kohya's format (ComfyUI), or a whole pipeline.

python scripts/export_adapter.py run=outputs/ddpo_vpscore/DATE to=kohya
python scripts/export_adapter.py --help
"""

import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
from command_line import start  # it lies beside this file
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vp_rl.configuration.check import check
from vp_rl.configuration.own import EXPORT
from vp_rl.evaluation.no_adapter import why_none
from vp_rl.evaluation.terminal import is_full, quiet_libraries, stop
from vp_rl.policies import export
from vp_rl.policies.pipelines import Source
from vp_rl.secrets import mask, masked

FORMATS = ("diffusers", "kohya", "merged")
_SAID = ("policy", "algorithm", "reward", "sampler", "data", "prompts", "seed", "trainer")  # of the settings


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(config: DictConfig) -> None:
    """One export."""
    try:
        asked: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check(asked, EXPORT)
        with quiet_libraries():
            print(f"written: {write(Path(config.run), config.to, Path(config.folder))}")
    except (ValueError, OSError, OmegaConfBaseException) as error:
        stop(error)
    except Exception as error:
        if not is_full(error):
            raise
        stop(error, "\nThe disk is full: free some space, or give another folder=...")


def write(run: Path, to: str, folder: Path) -> Path:
    """Exports a run's adapter.

    Returns:
        The file, or the folder of a whole pipeline.

    Raises:
        FileNotFoundError: that is no folder of a finished run.
        ValueError: the format is unknown, or does not have such adapters.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is unknown: choose from {', '.join(FORMATS)}.")
    written = run / ".hydra" / "config.yaml"
    if not written.is_file():
        raise FileNotFoundError(f"run='{run}' is no folder of a run: it has no .hydra/config.yaml.")
    config = OmegaConf.load(written)
    if OmegaConf.select(config, "policy.path") is None:
        raise ValueError(f"run='{run}' has no policy, so no adapter.")
    if (why := why_none(run)) is not None:
        raise FileNotFoundError(f"run='{run}': {why}")
    policy: Any = OmegaConf.to_container(config.policy, resolve=True)
    facts = describe(config, policy["path"])
    if to == "diffusers":
        return export.to_diffusers(run / "adapter", folder, facts)
    if to == "kohya":
        return export.to_kohya(run / "adapter", folder, facts)
    source = Source(policy["path"], policy["dtype"], policy.get("revision"), policy.get("variant"))
    return export.to_merged(run / "adapter", source, policy.get("vae"), folder, facts)


def describe(config: Any, base: str) -> dict[str, str]:
    """What is said of the adapter in its header."""
    settings: Any = masked(OmegaConf.to_container(config, resolve=False))  # environment variables stay names
    facts = {
        "base_model": mask(base),
        "base_licence": export.licence(base),
        "reward": settings.get("reward", {}).get("_target_", "").rpartition(".")[2],
        "reward_checkpoint": settings.get("reward", {}).get("checkpoint"),
        "seed": settings.get("seed"),
        "settings": json.dumps({name: settings[name] for name in _SAID if name in settings}),
        "version": version("vp_rl"),
    }
    return {f"vp_rl.{name}": str(value) for name, value in facts.items() if value not in (None, "")}


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a CPU kernel that this system does not use
    start(main, "export")
