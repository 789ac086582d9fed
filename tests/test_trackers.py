"""What W&B is told of a run: settings, tables of images, curves and results, and nothing of the machine it ran on."""

import getpass
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from test_evaluation import SAMPLER, Bright, Brightness, Prompts, evaluator
from wandb.proto import wandb_internal_pb2 as proto

from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.held_out import HeldOutEvaluation
from vp_rl.callbacks.trackers import tracked, wandb_logger
from vp_rl.data.prompts import PromptDataModule
from vp_rl.evaluation.images import Evaluator
from vp_rl.types import ASPECTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),  # the frozen reward
]

KEY = "sk-0123456789abcdef0123456789abcdef"
SETTINGS = {
    "seed": 3,
    "annotator": {"api_key": KEY, "base_url": "https://judge.example.org:8000/v1", "model": "a-judge"},
    "data": {"folder": "/home/someone/secret place/visionprefer"},
    "algorithm": {"optimizer": {"lr": 0.5}},
}


class Dark(Brightness):
    """Another reward, for the panel."""

    def forward(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -super().forward(images, prompts)


def run(folder: Path, epochs: int = 1) -> None:
    """A run that is tracked as `train.py` has it."""
    plain = evaluator(seeds=(0, 1))
    with_panel = Evaluator(
        Prompts(), plain.annotator, plain.sampler, limit=12, seeds=(0, 1), batch_size=5, panel={"dark": Dark()}
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[HeldOutEvaluation(with_panel, every=1, small=3)],
        logger=wandb_logger(str(folder), project="test", name="ddpo_vpscore"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ReFL(Bright(), Brightness(), SAMPLER, partial(torch.optim.SGD, lr=0.5), reward_weight=1.0)
    with tracked(trainer, SETTINGS):
        trainer.fit(module, PromptDataModule(Prompts(), batch_size=4))


def records(run: Path) -> list[proto.Record]:
    """What W&B has written down to be sent. Its own process writes it, and may be behind."""
    (offline,) = (run / "wandb").glob("offline-run-*")
    for _ in range(300):
        found = list(written(offline))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError("W&B has not finished its file.")


def written(offline: Path) -> Iterator[proto.Record]:
    """LevelDB's log format: blocks of 32 KiB with whole or split records."""
    (file,) = offline.glob("*.wandb")
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # still being written
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # a whole one, or the last part
            yield proto.Record.FromString(whole)
            whole = b""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished job of a sweep."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("someones-home") / "lr" / "3"
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder / "wandb"))  # as conf/logger/wandb.yaml has it
        patch.setattr(socket, "gethostname", lambda: "someones-machine")
        patch.setattr(sys, "argv", ["train.py", f"annotator.api_key={KEY}"])
        run(folder)
        assert wandb.run is None, "the next job of the sweep would write into this one's run"
        yield folder


@pytest.fixture(scope="module")
def sent(job: Path) -> list[proto.Record]:
    return records(job)


def history(sent: list[proto.Record]) -> dict[str, list[float]]:
    found: dict[str, list] = {}
    for record in sent:
        for item in record.history.item:
            found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return found


def test_a_job_is_called_by_its_number_in_its_sweeps_group(sent: list[proto.Record]) -> None:
    (of,) = (record.run for record in sent if record.HasField("run"))
    assert (of.project, of.display_name, of.run_group) == ("test", "lr/3", "ddpo_vpscore/lr")


def test_the_settings_are_there_without_what_is_nobodys_business(sent: list[proto.Record]) -> None:
    told = {item.key: json.loads(item.value_json) for record in sent for item in record.config.update}
    assert told["seed"] == 3
    assert told["algorithm"] == {"optimizer": {"lr": 0.5}}
    assert told["data"] == {"folder": "…/visionprefer"}
    assert told["annotator"] == {"api_key": "(hidden)", "base_url": "https://(host)/v1", "model": "a-judge"}


def waiting(sent: list[proto.Record], name: str) -> dict[str, Path]:
    """The files of the artifact whose name begins so, and where they wait to be sent."""
    (artifact,) = (record.artifact for record in sent if record.artifact.name.startswith(name))
    return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}


def test_the_table_has_both_images_and_every_reward_of_each(job: Path, sent: list[proto.Record]) -> None:
    files = waiting(sent, "run-")
    assert all(file.is_relative_to(job) for file in files.values()), "they would be lost with the home folder"
    content = json.loads(files["held_out/images.table.json"].read_text())
    scores = ["reward", *ASPECTS, "mean_rating", "correct", "panel/dark"]
    both = [name for score in scores for name in (f"base {score}", score)]
    assert content["columns"] == ["prompt", "seed", "base", "now", *both]
    assert [row[1] for row in content["data"]] == [0, 1] * 3
    for row in content["data"]:
        cells = dict(zip(content["columns"], row, strict=True))
        assert cells["panel/dark"] == -cells["reward"]
        assert cells["base panel/dark"] == -cells["base reward"]
        for when, score in (("base", "base reward"), ("now", "reward")):
            # The reward is the brightness: the picture is the one that was scored, and not black.
            bright = np.asarray(Image.open(files[cells[when]["path"]])).mean() / 255
            assert bright == pytest.approx(cells[score], abs=1 / 255)


def test_curves_and_results_are_there(sent: list[proto.Record]) -> None:
    found = history(sent)
    assert len(found["held_out/mean_rating"]) == 2
    assert {"train/reward", "held_out/panel/dark", "final/mean_rating", "epoch"} <= found.keys()


def test_adapter_and_report_are_artifacts(job: Path, sent: list[proto.Record]) -> None:
    name = (job / "wandb" / "run_id").read_text()
    assert waiting(sent, f"adapter-{name}").keys() == {"shift.pt"}
    assert {"report.html", "summary.json", "samples/epoch_0001.png"} <= waiting(sent, f"report-{name}").keys()


def test_nothing_tells_whose_machine_it_was(job: Path) -> None:
    """In what W&B would send; its logs stay on the machine. Its client puts the places of files into a manifest."""
    secrets = [KEY, "judge.example.org", "secret place", "someones-machine", "someones-home", str(Path.cwd())]
    secrets += [name for name in (socket.gethostname(), getpass.getuser(), os.uname().nodename) if len(name) > 5]
    (offline,) = (job / "wandb").glob("offline-run-*")
    for file in (path for path in offline.rglob("*") if path.is_file() and path.suffix not in {".wandb", ".log"}):
        found = [secret for secret in secrets if secret.encode() in file.read_bytes()]
        assert not found, (file.name, found)
    assert not list(offline.rglob("wandb-metadata.json"))
    assert not list(offline.rglob("requirements.txt"))
    assert not list(offline.rglob("output.log"))
    for record in records(job):
        for entry in record.artifact.manifest.contents:
            entry.local_path = ""
        text = str(record)
        found = [secret for secret in secrets if secret in text]
        assert not found, text
        assert not re.search(r"/(?:home|root|Users|tmp)/", text), text


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    first, again = (wandb_logger(str(tmp_path), project="test", name="a") for _ in range(2))
    other = wandb_logger(str(tmp_path / "other"), project="test", name="a")
    assert first.version == again.version != other.version
    assert (first._wandb_init["name"], first._wandb_init["group"]) == ("a", None)  # no number, no job


def test_a_run_that_fails_is_marked_so_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=wandb_logger(str(tmp_path), project="test", name="a")
    )
    with pytest.raises(RuntimeError), tracked(trainer, SETTINGS):
        raise RuntimeError
    assert wandb.run is None
    assert [record.exit.exit_code for record in records(tmp_path) if record.HasField("exit")] == [1]
