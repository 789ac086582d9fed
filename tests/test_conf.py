"""Every configuration composes, and every key of every node is a parameter of what the node builds."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vp_rl.configuration import own
from vp_rl.configuration.check import check as look

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
DEFAULT = "ddpo_vpscore"
OPTIONS = sorted(
    f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name != "experiment"
)
_ROOTS = {"human": "evaluate", "detector": "evaluate_objects"}  # of groups that are in no training
_OWN = {"train": own.TRAIN, "build": own.BUILD, "evaluate": own.ACCURACY, "evaluate_objects": own.OBJECTS}
_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


@pytest.fixture(autouse=True)
def _hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`${hydra:...}` is resolved from a singleton, which is put back as it was."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    assert not GlobalHydra.instance().is_initialized()


def composed(*overrides: str, root: str = "train") -> DictConfig:
    """The run's configuration as `train.py` sees it, or as the script of another root does."""
    config = compose(root, overrides=list(overrides), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = "/run"
        config.hydra.job.num = 0
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """All nodes with a `_target_`, interpolations followed, by their place."""
    if isinstance(value, DictConfig):
        if "_target_" in value:
            yield path, value
        for key in value:
            if not OmegaConf.is_missing(value, key):
                yield from nodes(value[key], f"{path}.{key}".lstrip("."))
    elif isinstance(value, ListConfig):
        for index, item in enumerate(value):
            yield from nodes(item, f"{path}[{index}]")


def check(path: str, node: DictConfig) -> None:
    """Binds a node's keys to its target's signature.

    Raises:
        TypeError: a key is no parameter, or a parameter without a default has no key; names the node.
    """
    target = get_object(node._target_)
    signature = inspect.signature(target)
    if node._target_.startswith("vp_rl."):
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{node._target_} takes **kwargs, which hide mistyped keys"
    arguments = {str(key): None for key in node if key not in _HYDRA_KEYS}
    try:
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**arguments)
    except TypeError as error:
        raise TypeError(f"{path} ({node._target_}): {error}") from error


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_keys_are_parameters(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    look(OmegaConf.to_container(config, resolve=True), own.TRAIN, written=OmegaConf.to_container(config))
    found = dict(nodes(config))
    rewarded = set() if "dpo" in experiment.split("_") else {"algorithm.reward"}  # it learns from pairs
    assert {"algorithm", "policy.lora", "trainer", "logger.csv"} | rewarded <= found.keys()
    for path, node in found.items():
        check(path, node)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_its_keys_are_parameters(option: str) -> None:
    group, name = option.split("=")
    builders = {"builder", "engine", "generators", "polish"}
    places = {
        "generators": "generators@builder.generators",
        "human": "human@data.it",
        "optimizer": "optimizer@algorithm.optimizer",
    }
    place = places.get(group, group)
    root = "build" if group in builders else _ROOTS.get(group, "train")
    # Without an experiment: it has settings of its own algorithm, which do not bind to another's.
    needed = ["adapter=x"] if root == "evaluate_objects" else []
    config = composed(f"{'+' if group == 'human' else ''}{place}={name}", *needed, root=root)
    assert HydraConfig.get().runtime.choices[place] == name
    look(OmegaConf.to_container(config, resolve=True), _OWN[root], written=OmegaConf.to_container(config))
    for path, node in nodes(config):
        check(path, node)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("annotator=")])
def test_every_annotator_serves_a_build_in_any_of_its_three_places(option: str) -> None:
    name = option.partition("=")[2]
    config = composed(option, f"annotator@second={name}", f"annotator@screening={name}", root="build")
    found = dict(nodes(config))
    target = config.annotator._target_
    for place in ("builder.annotator", "builder.second_opinions.annotator", "builder.screen.annotator"):
        assert found[place]._target_ == target
    for path, node in found.items():
        check(path, node)


def test_a_run_without_an_experiment_composes_too() -> None:
    for path, node in nodes(composed()):
        check(path, node)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_value_of_an_experiment_resolves(experiment: str) -> None:
    resolved = OmegaConf.to_container(composed(f"experiment={experiment}"), resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    assert resolved["name"] == experiment
    assert "${" not in str(resolved)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_begins_with_the_command_that_runs_it(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert f"# python train.py experiment={experiment}" in lines[:2]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_changes_something_in_every_line(experiment: str) -> None:
    """An experiment is a diff: what equals the default is noise to its reader."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    own = OmegaConf.create({key: value for key, value in OmegaConf.create(text).items() if key != "defaults"})
    groups = re.findall(r"override /(\w+): (\w+)", text)
    base = composed(*(f"{group}={name}" for group, name in groups))
    for path, value in leaves(own):
        assert OmegaConf.select(base, path, default="absent") != value, path


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, DictConfig) and value:
        for key in value:
            yield from leaves(value[key], f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def test_the_policy_and_the_reward_are_built_once() -> None:
    """Each interpolation builds an object of its own: a second one would load the model twice."""
    for experiment in EXPERIMENTS:
        places = [path for path, _ in nodes(composed(f"experiment={experiment}"))]
        for part in ("policy", "reward"):
            assert len([path for path in places if path.endswith(f".{part}")]) <= 1, (experiment, places)


# --- the check itself


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+algorithm.clip_rnge=1", "algorithm .*clip_rnge"),
        ("~algorithm.policy", "algorithm .*policy"),
        ("+algorithm.optimizer.rate=1", "optimizer .*rate"),
        ("+policy.lora.rank=4", "algorithm.policy.lora .*rank"),
        ("+trainer.epochs=4", "trainer .*epochs"),
        ("+data.size=4", "data .*size"),
        ("+callbacks.held_out.often=true", "callbacks.held_out .*often"),
        ("reward._target_=vp_rl.rewards.nothing", "nothing"),
    ],
)
def test_a_key_that_is_no_parameter_is_found(override: str, said: str) -> None:
    def check_all() -> None:
        for path, node in nodes(composed(f"experiment={DEFAULT}", override)):
            check(path, node)

    with pytest.raises((TypeError, ImportError, ValueError), match=said):
        check_all()
