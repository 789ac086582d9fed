"""The dashboard that is saved in W&B is whole, and shows metrics that there are; no network is needed to see that."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_metric_names import explained

pytest.importorskip("wandb_workspaces")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Pydantic, in wandb-workspaces 0.4


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wandb_dashboard", ROOT / "scripts" / "wandb_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_curve_is_of_a_metric_that_is_logged(script: ModuleType) -> None:
    shown = {metric for panels in script.CURVES.values() for metrics in panels.values() for metric in metrics}
    known = {name for each in explained() for name in (each, f"held_out/{each}")}
    assert shown <= known
    assert {"train/reward", "train/kl", "train/ratio", "train/clip_fraction", "train/images_per_second"} <= shown


def test_what_would_be_saved_has_every_panel(script: ModuleType) -> None:
    view = script.workspace("me", "mine")._spec
    text = json.dumps(view)
    (bank,) = re.findall(r'"panelBankConfig": ', text)
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert (view["entity"], view["project"]) == ("me", "mine")
    assert len(sections) == len(script.CURVES) + 2
    for metrics in (metrics for panels in script.CURVES.values() for metrics in panels.values()):
        assert json.dumps(metrics) in text
    assert json.dumps(script.SAMPLES) in text
    for name in script.SWEPT:  # W&B has the value of a setting's first part in between
        first, *rest = name.split(".")
        assert f"config:{'.'.join([first, 'value', *rest])}" in text
    assert "summary:final/mean_rating" in text


@pytest.mark.slow
def test_a_dry_run_prints_it_and_saves_nothing() -> None:
    command = [sys.executable, "scripts/wandb_dashboard.py", "--entity=me", "--dry-run"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["project"] == "vp_rl"
