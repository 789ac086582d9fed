"""Builds VisionPrefer: prompts to images to AI annotations to a dataset. Stop it whenever you like and start it again.

python scripts/build_visionprefer.py prompts.train=500
python scripts/build_visionprefer.py --help
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
from command_line import start  # it lies beside this file
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vp_rl.configuration.check import check
from vp_rl.configuration.own import BUILD
from vp_rl.evaluation.terminal import quiet_libraries, stop
from vp_rl.visionprefer import schema
from vp_rl.visionprefer.build import STAGES, Builder
from vp_rl.visionprefer.export import push

log = logging.getLogger("vp_rl")


@hydra.main(version_base="1.3", config_path="../conf", config_name="build")
def main(config: DictConfig) -> None:
    """One build, or its estimate."""
    try:
        with quiet_libraries():
            run(config)
    except InstantiationException as error:
        stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError | ImportError) else error)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit("stopped; everything answered is kept, start again to go on")


def run(config: DictConfig) -> None:
    """Builds what the config says.

    Raises:
        ValueError, OSError: `until` is no stage; see `Builder` and `push`.
    """
    asked: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    written: Any = OmegaConf.to_container(config)
    check(asked, BUILD, written=written, folder=Path(HydraConfig.get().runtime.output_dir))
    if config.until not in STAGES:
        raise ValueError(f"until={config.until!r} is no stage: choose from {', '.join(STAGES)}.")
    folder = Path(config.folder)
    if config.push_to is None or not schema.exists(folder):
        builder: Builder = instantiate(config.builder)
        if config.dry_run:
            print(as_markdown(builder.plan(folder)))
            return
        builder.build(folder, config.until)
    if config.push_to is not None:
        log.info("VisionPrefer: %s is at %s", folder, push(folder, config.push_to))


def as_markdown(estimates: list) -> str:
    """What is still to be asked, as a table."""
    lines = ["| stage | who | calls | input tokens | output tokens | USD |", "|---|---|---|---|---|---|"]
    for stage, who, calls, usage in estimates:
        tokens = f"{usage.input_tokens:,} | {usage.output_tokens:,}"
        lines.append(f"| {stage} | {who} | {calls:,} | {tokens} | {usage.usd:,.2f} |")
    total = sum(estimate.usage.usd for estimate in estimates)
    lines.append(f"| all | | {sum(estimate.calls for estimate in estimates):,} | | | {total:,.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a CPU kernel that nobody uses here
    start(main, "build")
