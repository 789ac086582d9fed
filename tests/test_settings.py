"""Every value that a yaml can set is looked at before anything is built: generated from conf/, so a new yaml is too."""

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_conf import CONF, composed

from vp_rl.configuration.check import check, fits, resolve
from vp_rl.configuration.kinds import Count, Seconds, Share, Span, Text, Texts
from vp_rl.configuration.own import AUTOMATIC, BUILD, SERVE, TRAIN

ROOT = Path(__file__).parents[1]
Tree = dict[str, Any]

LIST, DICT = [1, "a", None], {"a": {"b": 1}}
HUGE = (10**30, 1e300)
WRONG: dict[type, list[Any]] = {  # by the type of the value in the yaml
    bool: ["three words", "", LIST, DICT, -3, 1.5, math.nan, *HUGE],
    int: ["three words", "", LIST, DICT, -3, math.nan, math.inf, True, *HUGE],
    float: ["three words", "", LIST, DICT, -3.0, math.nan, math.inf, True, *HUGE],
    str: ["", LIST, DICT, -3, math.nan, True, *HUGE],
    list: [DICT, -3, math.nan, True, [None], *HUGE],
    dict: ["three words", LIST, -3, math.nan, True, *HUGE],
    type(None): [LIST, DICT, math.nan],
}
# What looks wrong and has a meaning.
MAY_BE_EMPTY = {"note", "negative_prompt", "accelerator", "default_root_dir", "save_dir", "name", "version", "strategy"}
MAY_BE_EMPTY |= {"target_modules"}
MAY_BE_NEGATIVE = {"version", "target", "mean", "weights", "devices", "num_sanity_val_steps", "val_check_interval"}
MAY_BE_LIST = {"devices", "columns", "target_modules", "plugins", "files", "embedder"}
MAY_BE_ANY = {"extra_body", "init_lora_weights"}


def nodes(value: Any) -> Iterator[Tree]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item)


def arguments() -> dict[str, dict[str, Any]]:
    """What any yaml sets of any target, with a value that it sets; other nodes and interpolations are left out."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        for node in nodes(yaml.safe_load(file.read_text())):
            own = found.setdefault(node["_target_"], {})
            for name, value in node.items():
                elsewhere = any(nodes(value)) or "${" in str(value)
                if not (name.startswith("_") or name == "defaults" or elsewhere):
                    own.setdefault(name, value)
    return found


ARGUMENTS = arguments()


def refused(target: str, name: str, value: Any) -> str | None:
    """What is said of it, if anything."""
    try:
        check({"node": {"_target_": target, "_partial_": True, name: value}})
    except ValueError as error:
        return str(error)
    return None


def wrong(name: str, value: Any) -> list[Any]:
    if name in MAY_BE_ANY:
        return []
    found = WRONG[type(value)]
    if name in MAY_BE_EMPTY:
        found = [each for each in found if each != ""]
    if name in MAY_BE_NEGATIVE:
        found = [each for each in found if not (isinstance(each, int | float) and each < 0)]
    if name in MAY_BE_LIST:
        found = [each for each in found if each is not LIST]
    if name in ("devices", "val_check_interval"):
        found = [each for each in found if not isinstance(each, str)]
    return found


def test_all_of_conf_is_looked_at() -> None:
    assert len(ARGUMENTS) > 60
    assert sum(map(len, ARGUMENTS.values())) > 250


@pytest.mark.parametrize("target", ARGUMENTS)
def test_a_wrong_value_of_any_setting_is_refused_in_one_line_that_names_it(target: str) -> None:
    missed = []
    for name, value in ARGUMENTS[target].items():
        for each in wrong(name, value):
            said = refused(target, name, each)
            if said is None:
                missed.append((name, each))
            else:
                assert said.startswith(f"node.{name}="), said
                assert "\n" not in said
                assert len(said) < 400, said
    assert not missed


@pytest.mark.parametrize("target", ARGUMENTS)
def test_null_is_refused_where_it_means_nothing_and_what_the_yamls_say_is_not(target: str) -> None:
    parameters = inspect.signature(resolve(target)).parameters
    for name, value in ARGUMENTS[target].items():
        if value != "???" and not isinstance(value, dict):  # some are laid over a node; test_conf composes them
            assert refused(target, name, value) is None, name
        default = parameters[name].default
        means_something = value is None or default is None or type(None) in get_args(parameters[name].annotation)
        if not means_something and target.startswith("vp_rl"):
            assert (refused(target, name, None) or "").startswith(f"node.{name}=null must be "), name


@pytest.mark.parametrize("target", [each for each in ARGUMENTS if each.startswith("vp_rl.") and "Metrics" not in each])
def test_every_argument_of_our_own_that_a_yaml_can_set_has_a_type(target: str) -> None:
    for name, parameter in inspect.signature(resolve(target)).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert parameter.annotation not in (int, float), f"{name} has no range: see kinds.py"


# --- whole configurations


@pytest.fixture
def _hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


OWN = {"train": TRAIN, "build": BUILD, "serve": SERVE}


def look(*overrides: str, root: str = "train") -> None:
    config = composed(*overrides, root=root)
    check(OmegaConf.to_container(config, resolve=True), OWN[root], later=AUTOMATIC)


@pytest.mark.usefixtures("_hydra")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "trainer.max_epochs=three",
            "trainer.max_epochs='three' must be a whole number from -1 to 2147483647 or null.",
        ),
        ("policy.resolution=[64,64]", "policy.resolution=[64, 64] must be a whole number from 1 to"),
        ("evaluation.seeds=0", "evaluation.seeds=0 must be a list, each a whole number from 0 to"),
        ("evaluation.seeds=[]", "evaluation.seeds=[] must be a list"),
        ("sampler.guidance=nan", "sampler.guidance=nan must be a finite number of at least 0."),
        ("algorithm.optimizer.lr=fast", "algorithm.optimizer.lr='fast' must be a finite number."),
        ("algorithm.optimizer.lr=-1", "algorithm.optimizer.lr=-1"),
        ("algorithm.optimizer.betas=[1,2]", "algorithm.optimizer.lr="),
        ("algorithm.window=[0.6,0.1]", "algorithm.window=[0.6, 0.1] must be a list of a finite number from 0 to 1"),
        ("algorithm.train_batch=most", "algorithm.train_batch='most' must be a whole number from 1"),
        ("callbacks.held_out.every=null", "callbacks.held_out.every=null must be a whole number"),
        ("callbacks.checkpoint.grace=0", "callbacks.checkpoint.grace=0 must be a finite number above 0"),
        ("callbacks.adapter.ema=1", "callbacks.adapter.ema=1 must be a finite number above 0 and below 1 or null."),
        ("policy.dtype=float8", "policy.dtype='float8' must be text, one of float32, bfloat16, float16."),
        ("policy.lora.r=0", "policy.lora.r=0 must be a whole number from 1 to 65536."),
        ("policy.lora=null", None),
        ("policy.economy=null", "policy.economy=null must be a node with the _target_ of a Economy."),
        ("algorithm.reward=${policy}", "algorithm.reward=vp_rl.policies.sd.StableDiffusion(...) must be a node"),
        ("algorithm.sampler=5", "algorithm.sampler=5 must be a node with the _target_ of a Sampler."),
        (
            "+algorithm.clip_rnge=1",
            "algorithm.clip_rnge is no setting of vp_rl.algorithms.branch_ddpo.BranchDDPO: algorithm.clip_",
        ),
        ("~algorithm.policy", "algorithm.policy is missing"),
        ("reward._target_=vp_rl.rewards.nothing", "reward._target_='vp_rl.rewards.nothing' cannot be used"),
        ("seed=-1", "seed=-1 must be a whole number from 0 to 4294967295."),
        ("test=maybe", "test='maybe' must be true or false."),
        ("geometry.images_per_update=many", "geometry.images_per_update='many' must be a whole number"),
        ("algorithm.train_batch=auto", None),
        ("callbacks.held_out=null", None),
        ("evaluation.limit=null", None),
        ("+algorithm.optimizer.betas=[0.9,0.99]", None),
    ],
)
def test_a_training_that_cannot_be_is_refused_by_the_setting_that_the_user_knows(
    override: str, said: str | None
) -> None:
    override = f"+{override}" if override.startswith("algorithm.optimizer.betas") else override
    if said is None:
        look("experiment=ddpo_vpscore", override)
        return
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        look("experiment=ddpo_vpscore", override)
    assert str(caught.value).startswith(said)


@pytest.mark.usefixtures("_hydra")
def test_a_build_and_a_server_that_cannot_be_are_refused_likewise() -> None:
    for root, override, said in (
        ("build", "budget_usd=nan", "budget_usd=nan must be a finite number of at least 0 or null."),
        ("build", "budget_usd=-1", "budget_usd=-1"),
        ("build", "builder.steps=8", "builder.steps=8 must be a list, each a whole number"),
        ("build", "builder.guidance_scales=[1,x]", "builder.guidance_scales=[1, 'x'] must be"),
        ("build", "builder.screen.at_least=9", "builder.screen.at_least=9 must be a whole number from 1 to 5."),
        ("serve", "port=http", "port='http' must be a whole number from 0 to 65535."),
        ("serve", "queue=0", "queue=0 must be"),
        ("serve", "device=gpu", "device='gpu' must be text, auto, cpu, cuda or as cuda:1."),
    ):
        with pytest.raises(ValueError, match="must be") as caught:
            look(override, root=root)
        assert str(caught.value).startswith(said)


def test_several_wrong_settings_are_a_line_each_and_a_secret_among_them_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted-value")
    with pytest.raises(ValueError, match="must be") as caught:
        check({"a": {"_target_": "vp_rl.sampler.Sampler", "steps": "planted-value", "eta": -1}, "seed": 1.5}, TRAIN)
    lines = str(caught.value).splitlines()
    assert {line.partition("=")[0] for line in lines} >= {"a.steps", "a.eta", "seed"}
    assert "planted" not in str(caught.value)


def test_a_key_in_a_yaml_is_refused_and_taken_out_of_what_hydra_wrote(tmp_path: Path) -> None:
    written = {"annotator": {"chat": {"extra_body": {"api_key": "a-literal-key"}}}}
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ValueError, match=r"annotator\.chat\.extra_body\.api_key=\*\*\* must not be") as caught:
        check({}, written=written, folder=tmp_path)
    assert "a-literal-key" not in str(caught.value) + (tmp_path / ".hydra" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3, float, True),
        (3.0, int, False),
        (True, Count, False),
        ([0, 1], Span, True),
        ([1, 0], Span, False),
        ([0, 1, 1], Span, False),
        ("abc", Texts, False),
        (["a", ""], Texts, False),
        ([], Texts, False),
        (None, Count | None, True),
        (0, Count | None, False),
        (1e300, Seconds, False),
        (1, Share, True),
        (" ", Text, True),
        (object(), "no type", True),
    ],
)
def test_values_fit_as_python_has_it_and_lists_are_tuples_too(value: Any, hint: Any, wanted: bool) -> None:
    assert fits(value, hint) is wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train.py", "experiment=ddpo_vpscore", "trainer.max_epochs=three"], "trainer.max_epochs='three'"),
        (["train.py", "experiment=refl_vpscore", "algorithm.window=[0,nan]"], "algorithm.window=[0, nan]"),
        (["train.py", "experiment=ddpo_vpscore", "algorithm.optimizer.lr=-1"], "algorithm.optimizer.lr=-1"),
        (["train.py", "experiment=ddpo_vpscore", "reward=remote", "reward.url=here"], "reward.url='here'"),
        (["train.py", "experiment=ddpo_vpscore", "+annotator.api_key=letmein"], "annotator.api_key=***"),
        (["scripts/build_visionprefer.py", "builder.batch_size=0"], "builder.batch_size=0"),
        (["scripts/build_visionprefer.py", "seed=x"], "seed='x'"),
        (["scripts/evaluate.py", "accuracy", "reward=vp_score", "batch_size=-1"], "batch_size=-1"),
        (["scripts/evaluate.py", "images", "adapter=x", "limit=0"], "limit=0"),
        (["scripts/evaluate.py", "objects", "adapter=x", "seeds=0"], "seeds=0"),
        (["scripts/serve_reward.py", "port=-1"], "port=-1"),
        (["scripts/export_adapter.py", "run=x", "to=[a]"], "to=['a']"),
    ],
)
def test_each_program_says_it_in_one_line_and_ends(command: list[str], said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"letmein" in file.read_bytes()]
