"""What a person sees of a run: held-out evaluations beside training, and one progress bar."""

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from test_asking import Paid
from test_evaluation import SAMPLER, Bright, Brightness, Prompts, evaluator

from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.adapter import RunAdapter
from vp_rl.callbacks.held_out import HeldOutEvaluation
from vp_rl.callbacks.progress import Progress
from vp_rl.data.prompts import PromptDataModule
from vp_rl.evaluation.images import Evaluator
from vp_rl.interfaces import Unanswered
from vp_rl.types import Answer, Aspect

pytestmark = [
    # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as resuming has it
    # The reward is frozen, and it stays so.
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),
]


def algorithm() -> ReFL:
    return ReFL(Bright(), Brightness(), SAMPLER, partial(torch.optim.SGD, lr=0.5), reward_weight=1.0)


def fit(
    folder: Path,
    callbacks: list,
    epochs: int = 4,
    module: ReFL | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> lightning.Trainer:
    """Trains on one batch of prompts an epoch, with the real Trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        **({"logger": False, "enable_checkpointing": False} | quiet | settings),
    )
    trainer.fit(module or algorithm(), PromptDataModule(Prompts(), batch_size=4), ckpt_path=resume)
    return trainer


def held_out(**settings: Any) -> HeldOutEvaluation:
    return HeldOutEvaluation(evaluator(seeds=(0, 1)), **({"every": 2, "small": 5} | settings))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_that_a_user_takes_away(tmp_path: Path) -> None:
    module = algorithm()
    trainer = fit(tmp_path, [held_out()], module=module)
    left = {"adapter", "report.html", "samples", "scores.csv", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert torch.load(tmp_path / "adapter" / "shift.pt", weights_only=True).item() == module.policy.shift.item() > 0
    found = summary(tmp_path)
    assert (found["prompts"], found["images"], found["epochs"]) == (12, 24, 4)
    assert found["held_out"]["reward"]["low"] > 0
    after = evaluator(seeds=(0, 1)).evaluate(module.policy, Brightness())
    assert found["held_out"]["reward"]["tuned"] == pytest.approx(after.means()["reward"], abs=1e-6)
    # What a sweep maximises.
    final = trainer.callback_metrics["final/mean_rating"].item()
    assert final == pytest.approx(found["held_out"]["mean_rating"]["difference"])


@pytest.mark.parametrize("watched", [True, False])
def test_a_run_ends_with_where_its_adapter_is(tmp_path: Path, capsys: pytest.CaptureFixture, watched: bool) -> None:
    fit(tmp_path, [RunAdapter(), *([held_out()] if watched else [])], epochs=1)
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"Adapter: {tmp_path / 'adapter'}"
    assert sum(line.startswith("Adapter:") for line in printed) == 1


def test_the_grid_has_the_base_above_the_trained_images(tmp_path: Path) -> None:
    module = algorithm()
    fit(tmp_path, [held_out(every=3)], module=module)
    assert {path.name for path in (tmp_path / "samples").glob("*.png")} == {"epoch_0003.png", "epoch_0004.png"}
    grid = np.asarray(Image.open(tmp_path / "samples" / "epoch_0004.png"))
    tool = evaluator(seeds=(0, 1))
    watched = tool.watched[:5]
    np.testing.assert_array_equal(grid[:16, :16], tool.evaluate(Bright(), Brightness(), watched).images[0])
    np.testing.assert_array_equal(grid[-16:, -16:], tool.evaluate(module.policy, Brightness(), watched).images[8])
    assert json.loads((tmp_path / "samples" / "prompts.json").read_text()) == watched
    assert grid.shape[1] == 5 * 16 + 4 * 2  # of each prompt the first seed's


def test_held_out_curves_start_at_the_base_and_end_with_the_run(tmp_path: Path) -> None:
    fit(tmp_path, [held_out(every=3)], logger=CSVLogger(tmp_path, name="", version=""))
    rows = metrics(tmp_path)
    curve = [(int(row["epoch"]) + 1, float(row["held_out/reward"])) for row in rows if row["held_out/reward"]]
    assert [epoch for epoch, _ in curve] == [0, 3, 4]
    tool = evaluator(seeds=(0, 1))
    base = tool.evaluate(Bright(), Brightness(), tool.watched[:5]).means()
    assert curve[0][1] == pytest.approx(base["reward"], abs=1e-6)
    assert curve[0][1] < curve[1][1] < curve[2][1]
    assert float(next(row["final/reward"] for row in rows if row["final/reward"])) > 0
    assert "Reward on held-out prompts" in (tmp_path / "report.html").read_text()


def test_watching_does_not_change_training(tmp_path: Path) -> None:
    watched, alone = algorithm(), algorithm()
    fit(tmp_path, [held_out(every=1)], module=watched)
    fit(tmp_path, [], module=alone)
    assert watched.policy.shift.item() == alone.policy.shift.item() != 0
    assert watched.policy.on


def test_a_resumed_run_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, [held_out()], epochs=4)
    fit(parts, [held_out(), ModelCheckpoint(parts, "half")], epochs=2, enable_checkpointing=True)
    saved = torch.load(parts / "half.ckpt", weights_only=True)["callbacks"]["HeldOutEvaluation"]["seconds"]
    resumed, keep = held_out(), ModelCheckpoint(parts, "whole")
    fit(parts, [resumed, keep], epochs=4, resume=parts / "half.ckpt", enable_checkpointing=True)
    assert summary(parts)["held_out"] == summary(whole)["held_out"]
    assert 0 < saved < resumed.state_dict()["seconds"]


def test_wall_time_before_an_interruption_counts(tmp_path: Path) -> None:
    callback = held_out()
    callback.load_state_dict({"seconds": 5000.0})
    fit(tmp_path, [callback], epochs=1)
    assert 5000 <= summary(tmp_path)["training_seconds"] < 5100


def test_checkpoints_can_be_kept_by_the_held_out_judge(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="held_out/reward", mode="max")
    fit(tmp_path, [held_out(every=1), keep], enable_checkpointing=True)
    assert keep.best_model_score.item() > 0
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_only_the_main_process_judges_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    told = {"[]": ["reward"]}  # by the main process: the metrics that it has
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda _, obj, src=0: told.get(str(obj), obj))
    monkeypatch.setattr(Evaluator, "judge", lambda *_: pytest.fail("another process judges"))
    fit(tmp_path, [held_out(every=1, best="reward")])
    assert list(tmp_path.iterdir()) == []


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="every=0"):
        held_out(every=0)


def test_tensorboard_gets_the_images(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(tmp_path, [held_out()], epochs=2, logger=TensorBoardLogger(tmp_path, name="", version="board"))
    events = reader.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (picture,) = events.Images("held_out/images")
    assert np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))).mean() > 20
    assert len(events.Scalars("held_out/mean_rating")) == 2


def test_wandb_offline_keeps_images_that_are_not_black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))  # where the images of tables wait for `wandb sync`
    fit(tmp_path, [held_out()], epochs=2, logger=WandbLogger(project="test", save_dir=tmp_path))
    wandb.finish()
    (table,) = tmp_path.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert {"prompt", "base", "now", "reward"} <= set(content["columns"])
    assert len(content["data"]) == 10
    pictures = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"]
    stored = [np.asarray(Image.open(path)).mean() for path in pictures if "samples" not in path.parts]
    assert len(stored) >= 20
    assert min(stored) > 1


class Counting(ReFL):
    """Logs the epoch when the epoch ends, as DDPO does with its rewards."""

    def on_train_epoch_end(self) -> None:
        self.log("train/number", float(self.current_epoch + 1))


def counting() -> Counting:
    return Counting(Bright(), Brightness(), SAMPLER, partial(torch.optim.SGD, lr=0.5), reward_weight=1.0)


def test_a_log_file_gets_a_line_now_and_then_with_the_epochs_own_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vp_rl")
    fit(tmp_path, [Progress({"n": "train/number", "absent": "train/absent"})], epochs=50, module=counting())
    lines = [record.getMessage() for record in caplog.records if record.name == "vp_rl.callbacks.progress"]
    assert len(lines) == 25
    assert re.fullmatch(r"epoch 2/50  n 2  \d+\.\d min", lines[0])
    assert lines[-1].startswith("epoch 50/50  n 50  ")
    assert "absent" not in lines[0]
    assert "%|" not in capfd.readouterr().err


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_over_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    fit(tmp_path, [Progress({"n": "train/number"}), held_out(every=1)], epochs=5, module=counting())
    text = terminal.getvalue()
    shown = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("epoch")]
    assert shown[0].startswith("epoch 1/5 sampling   0%|")
    assert shown[-1].startswith("epoch 5/5 training 100%|")
    assert shown[-1].rstrip().endswith("n=5")
    assert "held-out images, base model" in text
    assert "held-out images, trained model" in text
    percent = [int(value) for value in re.findall(r"(\d+)%", "".join(shown))]
    assert percent == sorted(percent), "one bar, which never starts over"


def test_the_bar_goes_on_where_a_resumed_run_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, [ModelCheckpoint(tmp_path, "half")], epochs=2, enable_checkpointing=True)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    callbacks = [Progress({"r": "train/reward"}), ModelCheckpoint(tmp_path, "whole")]
    fit(tmp_path, callbacks, epochs=4, resume=tmp_path / "half.ckpt", enable_checkpointing=True)
    shown = [line for line in terminal.getvalue().replace("\r", "\n").splitlines() if line.startswith("epoch")]
    assert shown[0].startswith("epoch 3/4 sampling  50%|")


def test_an_error_closes_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    module = algorithm()
    module.policy.shift.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fit(tmp_path, [Progress({})], module=module)
    assert terminal.getvalue().endswith("\n")


def test_a_judge_that_cannot_be_asked_shows_before_any_image_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = held_out()
    monkeypatch.setattr(callback._evaluator.annotator, "check", fail("No API key"), raising=False)
    monkeypatch.setattr(Evaluator, "make", lambda *_, **__: pytest.fail("an image was made"))
    with pytest.raises(ValueError, match="No API key"):
        fit(tmp_path, [callback])


def test_a_judge_is_not_paid_twice_whenever_the_run_is_stopped(tmp_path: Path) -> None:
    def watched(answers: int = 10**6) -> HeldOutEvaluation:
        tool = evaluator(seeds=(0, 1))
        tool.annotator = Limited(answers)
        return HeldOutEvaluation(tool, every=2, small=5, judged=str(tmp_path / "judged.sqlite"))

    fit(tmp_path / "whole", [held_out()])
    with pytest.raises(Unanswered):  # while the base model's images are judged, before there is any checkpoint
        fit(tmp_path / "run", [watched(answers=25)])
    fit(tmp_path / "run", [watched()])
    found, undisturbed = summary(tmp_path / "run"), summary(tmp_path / "whole")
    assert found["held_out"] == undisturbed["held_out"]
    asked, all_of_them = (each["judge"]["images by themselves"] for each in (found, undisturbed))
    assert asked["kept"] >= 25 - 4 * 3  # four prompts are asked about at once, and of each three answers may be lost
    assert asked["questions"] + asked["kept"] == all_of_them["questions"]
    assert asked["usage"]["usd"] == pytest.approx(0.5 * asked["questions"])
    fit(tmp_path / "again", [watched(answers=0)])  # another run of the same images
    again = summary(tmp_path / "again")["judge"]["images by themselves"]
    assert (again["questions"], again["kept"]) == (0, all_of_them["questions"])


def test_a_file_that_holds_no_answers_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "judged.sqlite").write_text("something else, and long enough to be no empty database " * 20)
    with pytest.raises(ValueError, match=r"callbacks\.held_out\.judged: .*judged\.sqlite' is not a cache.* With null"):
        fit(tmp_path, [held_out(judged=str(tmp_path / "judged.sqlite"))])


def test_scores_of_a_reward_are_not_taken_for_anothers(tmp_path: Path) -> None:
    file = str(tmp_path / "judged.sqlite")
    with_panel = evaluator(seeds=(0, 1), panel={"half": Half()})
    fit(tmp_path / "one", [HeldOutEvaluation(with_panel, every=2, small=5, judged=file)])
    fit(tmp_path / "two", [HeldOutEvaluation(evaluator(seeds=(0, 1), panel={"half": Brightness()}), 2, 5, judged=file)])
    one, two = (summary(tmp_path / name)["held_out"] for name in ("one", "two"))
    assert one["reward"] == two["reward"]
    assert two["panel/half"]["base"] == two["reward"]["base"] != one["panel/half"]["base"]


class Limited(Paid):
    """Answers so often, and then no more, as where an account is empty."""

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        if self.left == 0:
            raise Unanswered("the account is empty")
        return await super().ask(prompt, images, aspect)


class Half(Brightness):
    """Another reward."""

    def forward(self, *given: Any) -> torch.Tensor:
        return super().forward(*given) / 2


def fail(message: str):  # noqa: ANN201
    def check() -> None:
        raise ValueError(message)

    return check
