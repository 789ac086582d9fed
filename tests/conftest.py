"""Every test runs offline, on few threads, without what the shell happens to set."""

import os

# Before anything imports these libraries.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: more threads than cores would take turns
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray adds 15 to ours: beside other work its processes would starve

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` on a machine without one skips."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test's numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one is a word that other tests may use."""
    monkeypatch.setattr("vp_rl.secrets._known", set())
