"""Several devices: what they train together is what one trains, and who stops one of them stops all."""

import itertools
import multiprocessing
import os
import signal
import socket
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import test_checkpoint
import torch
from diffusers import StableDiffusionPipeline
from fakes import LinearPolicy, QuadraticReward, Words, write_dataset
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from test_checkpoint import Counting, kills, latest, names
from test_data_preferences import png, row
from test_ddpo_pytorch import tiny_sd
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vp_rl.algorithms.awm import AdvantageWeightedMatching
from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.branch_ddpo import BranchDDPO
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.dpo import DiffusionDPO
from vp_rl.algorithms.draft import DRaFT
from vp_rl.algorithms.flow_bp import FlowBP
from vp_rl.algorithms.nft import DiffusionNFT
from vp_rl.algorithms.online import OnlineTraining
from vp_rl.algorithms.refl import ReFL
from vp_rl.algorithms.rounds import Rollout
from vp_rl.callbacks.adapter import RunAdapter
from vp_rl.callbacks.checkpoint_files import read
from vp_rl.callbacks.guards import Guards
from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.data.prompts import EpochPrompts, PromptDataModule, Stream
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny
from vp_rl.types import ASPECTS, Images, Scores

NOISY = Sampler(steps=4, guidance=1.0, eta=1.0)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Liked(QuadraticReward):
    """Every prompt likes another brightness."""

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        liked = torch.tensor([float(prompt.split()[-1]) for prompt in prompts])
        return super().forward(images, prompts) + liked * images.mean((1, 2, 3))


class Mixing(LinearPolicy):
    """With a weight that all images share, so that its gradient tells whether they are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.1 * torch.eye(3))

    def predict(self, latents: Tensor, *rest: Any) -> Tensor:
        mixed = (latents.movedim(1, -1)[..., None] * self.mix).sum(-2).movedim(-1, 1)
        return super().predict(latents, *rest) + (mixed if self.on else 0.0)


class Record(lightning.Callback):
    """Each update's gradient, and each round's advantages by prompt's place and image; written at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.gradients, self.rounds = file, [], []

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if isinstance(module, OnlineTraining):
            rollout = module.rollout

            def recorded(*given: Any) -> Rollout:
                batch, _, share = found = rollout(*given)
                samples = itertools.product(share.places, share.images)
                each = batch.advantages.reshape(len(share.places) * len(share.images), -1)[:, 0].tolist()
                self.rounds.append(dict(zip(samples, each, strict=True)))
                return found

            module.rollout = recorded  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: lightning.Trainer, module: PolicyTraining, *_: Any) -> None:
        """As the optimizer had them: they are weighed right before its step."""
        if trainer.global_step > len(self.gradients):
            gradients = [p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]
            self.gradients.append(torch.cat(gradients).clone())

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        values = {name: metrics[name].item() for name in ("train/reward", "train/loss") if name in metrics}
        found = {"gradients": self.gradients, "rounds": self.rounds, "values": values}
        torch.save(found, self.file.with_suffix(f".{trainer.global_rank}"))


def ddpo(batch: int, kind: type[OnlineTraining] = DDPO, **settings: Any) -> OnlineTraining:
    clipped = {} if kind is DiffusionNFT else {"clip_range": 0.2}
    settings = {"images_per_prompt": 4, "kl_weight": 0.1} | clipped | settings
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return kind(Mixing(), Liked(), NOISY, optimizer, train_batch=batch, **settings)


def refl(**settings: Any) -> ReFL:
    settings = {"target": 9.0, "reward_weight": 1.0} | settings
    return ReFL(Mixing(), Liked(), NOISY, partial(torch.optim.SGD, lr=0.01), **settings)


def run(
    algorithm: PolicyTraining, file: Path, prompts: int, rounds: int = 2, devices: int = 1, **settings: Any
) -> list[dict[str, Any]]:
    """What each process recorded of a run of two epochs."""
    of_data = ("devices_per_prompt", "images", "images_per_batch")
    given = {name: settings.pop(name) for name in of_data if name in settings}
    data = settings.pop("data", None) or PromptDataModule(Words(), prompts, batches_per_epoch=rounds, **given)
    # Not `ddp`, which would run the test's command line again.
    several = {"devices": devices, "strategy": DDPStrategy(start_method="fork")} if devices > 1 else {}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[Record(file)], **{**QUIET, **several, **settings}
    )
    trainer.fit(algorithm, data)
    return [torch.load(file.with_suffix(f".{rank}"), weights_only=True) for rank in range(devices)]


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Advantages, exactly the same where the weights are; each update's gradient, to 16 roundings of float32; metrics.

    DDPO's later rounds are of weights that rounding has moved, and standardising magnifies that where a prompt's scores
    are close: there advantages are the same to 1e-5, and so are gradients.
    """
    rounds = len(expected["rounds"])
    first = len(expected["gradients"]) // rounds if rounds else len(expected["gradients"])  # updates
    for process in found:
        assert len(process["gradients"]) == len(expected["gradients"]) > 1
        for update, (gradient, like) in enumerate(zip(process["gradients"], expected["gradients"], strict=True)):
            assert like.norm() > 0
            assert (gradient - like).norm() <= (16 * 2**-23 if update < first else 1e-5) * like.norm()
        # DDPO's loss is a mean of advantages that cancel: what rounding leaves of terms of about 1 is absolute.
        assert process["values"] == pytest.approx(expected["values"], rel=1e-5, abs=1e-7)
        assert process["values"] == found[0]["values"]
    rounds = [dict(ChainMap(*parts)) for parts in zip(*(process["rounds"] for process in found), strict=True)]
    assert all(len(process["rounds"][0]) == len(rounds[0]) // len(found) for process in found if rounds)
    assert rounds[:1] == expected["rounds"][:1]
    for advantages, like in zip(rounds, expected["rounds"], strict=True):  # of weights that rounding has moved
        assert advantages == pytest.approx(like, abs=1e-5)


DDPOS: dict[str, dict[str, Any]] = {
    "all steps": {},
    "half of the steps, twice": {"timestep_fraction": 0.5, "inner_epochs": 2},
    "two of the steps": {"random_steps": 2},
    "branch": {"kind": BranchDDPO, "window": (0.0, 0.9)},
    "nft": {"kind": DiffusionNFT, "old_warmup": 2},
    "awm": {"kind": AdvantageWeightedMatching, "anchor_weight": 0.1},
}


@pytest.mark.parametrize("name", DDPOS)
def test_two_processes_and_accumulation_make_an_online_methods_updates(name: str, tmp_path: Path) -> None:
    make = partial(ddpo, **DDPOS[name])
    batch = 2 if name == "branch" else 8
    [one] = run(make(2 * batch), tmp_path / "one", 4)
    assert_same(run(make(batch), tmp_path / "pieces", 4, accumulate_grad_batches=2), one)
    assert_same(run(make(batch, sample_batch=3), tmp_path / "two", 2, devices=2), one)


@pytest.mark.parametrize("name", ["all steps", "branch"])
def test_processes_that_divide_a_prompts_images_use_the_statistics_of_all_of_them(name: str, tmp_path: Path) -> None:
    make = partial(ddpo, **DDPOS[name])
    batch = 1 if name == "branch" else 8
    [one] = run(make(batch if name == "branch" else 2 * batch), tmp_path / "one", 1)
    two = run(make(batch), tmp_path / "two", 1, devices=2, devices_per_prompt=2)
    assert_same(two, one)
    assert {image for _, image in two[0]["rounds"][0]} == {0, 2}


def test_images_that_cannot_be_divided_among_devices_are_refused(tmp_path: Path) -> None:
    stream = Stream(16, 1, "0", 0, 1)
    prompts = EpochPrompts(lightning.Trainer(**QUIET), ["a"] * 16, [], stream, None, (0, 3), 1)
    with pytest.raises(ValueError, match=r"images_per_prompt=4 cannot be divided among data\.devices_per_prompt=3"):
        ddpo(8).batches(prompts)
    with pytest.raises(ValueError, match=r"data\.devices_per_prompt=3 must divide the number of devices, 1"):
        run(ddpo(8), tmp_path / "one", 1, devices_per_prompt=3)


@pytest.mark.parametrize("kind", [partial(DRaFT, last_steps=2), partial(FlowBP, active_steps=2)])
def test_two_processes_and_accumulation_make_the_updates_of_one_process(kind: Any, tmp_path: Path) -> None:
    def make() -> PolicyTraining:
        return kind(Mixing(), Liked(), replace(NOISY, eta=0.0), partial(torch.optim.SGD, lr=0.01))

    [one] = run(make(), tmp_path / "one", 4)
    assert_same(run(make(), tmp_path / "pieces", 2, 4, accumulate_grad_batches=2), one)
    assert_same(run(make(), tmp_path / "two", 2, devices=2), one)


@pytest.mark.parametrize("pretrain_weight", [0.0, 0.5])
def test_two_processes_and_accumulation_make_refls_updates_of_one_process(
    pretrain_weight: float, tmp_path: Path
) -> None:
    make = partial(refl, pretrain_weight=pretrain_weight)
    images = {"images": str(tmp_path / "set"), "images_per_batch": 4} if pretrain_weight else {}
    half = images | {"images_per_batch": 2} if images else {}
    if images:
        whole = [row(number, "train", {aspect: [3] for aspect in ASPECTS}, [png(20 * number)]) for number in range(6)]
        write_dataset({"train": whole, "validation": [], "test": []}, tmp_path / "set")
    [one] = run(make(), tmp_path / "one", 4, **images)
    assert_same(run(make(), tmp_path / "pieces", 2, 4, accumulate_grad_batches=2, **half), one)
    assert_same(run(make(), tmp_path / "two", 2, devices=2, **half), one)


def test_two_processes_and_accumulation_make_dpos_updates_of_one_process(tmp_path: Path) -> None:
    """Of prompts with one pair, and with three."""
    rated = [
        row(
            number,
            "train",
            {aspect: [1, 5, 3][:images] for aspect in ASPECTS},
            [png(50 * n + number) for n in range(images)],
        )
        for number, images in enumerate((2, 3, 3, 2, 2, 2, 3, 3))
    ]
    write_dataset({"train": rated, "validation": rated[:2], "test": []}, tmp_path / "set")

    def trained(name: str, batch_size: int, **settings: Any) -> list[dict[str, Any]]:
        algorithm = DiffusionDPO(Mixing(), partial(torch.optim.SGD, lr=0.01), beta=10.0)
        data = PreferenceDataModule(str(tmp_path / "set"), batch_size, "mean")
        return run(algorithm, tmp_path / name, batch_size, data=data, **settings)

    [one] = trained("one", 4)
    assert_same(trained("pieces", 2, accumulate_grad_batches=2), one)
    assert_same(trained("two", 2, devices=2), one)


def two_processes(work: Callable[..., None], *given: Any) -> list[int | None]:
    """The exit codes of two processes of `work`, started as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    def start(rank: int) -> None:
        world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        run = {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in (world | run).items()})
        work(rank, *given)

    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:  # a deadlock
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


# --- signals


def epochs(rank: int, folder: Path, told: tuple[int, ...] = (), resume: Path | None = None) -> None:
    """Three epochs of four rounds; the ranks that are told to stop are so while the sixth round is scored."""
    reward = Counting(kills(6)) if rank in told else Counting()
    algorithm = test_checkpoint.ddpo(Mixing(), reward, inner_epochs=2)
    test_checkpoint.fit(algorithm, folder, resume=resume, strategy="ddp", devices=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert two_processes(epochs, folder) == [0, 0]
    return folder


def adapter(folder: Path) -> dict[str, Tensor]:
    state = read(folder / "epoch-0003.ckpt")["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("policy.")}


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_processes_stop_together_whichever_is_told_and_lose_nothing(
    told: tuple[int, ...], undisturbed: Path, tmp_path: Path
) -> None:
    """Told while the sixth round's images are scored: what was learned of five rounds is kept."""
    codes = two_processes(epochs, tmp_path, told)
    assert codes == [128 + signal.SIGTERM] * 2
    assert names(tmp_path) == ["epoch-0001-batch-0004.ckpt", "epoch-0001.ckpt"]
    assert two_processes(epochs, tmp_path, (), latest(tmp_path)) == [0, 0]
    found = adapter(tmp_path)
    assert all(torch.equal(tensor, found[name]) for name, tensor in adapter(undisturbed).items())


def test_a_run_goes_on_with_another_number_of_devices(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As before to rounding, where one device has the prompts and the states of both."""
    twice = partial(PromptDataModule, batch_size=8)
    monkeypatch.setattr(test_checkpoint, "PromptDataModule", lambda words, batch_size, **rest: twice(words, **rest))
    algorithm = test_checkpoint.ddpo(Mixing(), Counting(), train_batch=48, inner_epochs=2)
    test_checkpoint.fit(algorithm, tmp_path, resume=undisturbed / "epoch-0001.ckpt")
    assert any("was on 2 devices and goes on with 1" in said for said in caplog.messages)
    found = adapter(tmp_path)
    assert found.keys() == adapter(undisturbed).keys()
    for name, tensor in adapter(undisturbed).items():  # Adam's steps of 0.05 enlarge rounding where gradients are small
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


# --- sharded weights


def sharded(rank: int, folder: Path, strategy: str, epochs: int = 1, resume: Path | None = None) -> None:
    """Two updates of DDPO an epoch on a policy that is used without its adapter first, as to evaluate the base."""
    policy = tiny_sd()
    algorithm = DDPO(
        policy,
        Counting(),
        Sampler(steps=3, guidance=1.0, eta=1.0),
        partial(torch.optim.SGD, lr=100.0, momentum=0.5),  # Lightning cannot resume an optimizer without a state
        images_per_prompt=2,
        train_batch=12,
        kl_weight=0.1,
    )

    class Reference(lightning.Callback):
        def on_train_start(self, *_: Any) -> None:
            with policy.reference():
                algorithm.sampler.sample(policy, policy.encode(["a"]), torch.Generator())

    chosen = ModelParallelStrategy(save_distributed_checkpoint=False) if strategy == "fsdp" else strategy
    short = {"max_epochs": epochs, "limit_train_batches": 2, "gradient_clip_val": 1e-3, "default_root_dir": folder}
    watching = (Reference(), Guards(), RunAdapter(0.9))
    test_checkpoint.fit(algorithm, folder, *watching, resume=resume, strategy=chosen, devices=2, **short)
    denoiser = [type(parameter) for parameter in policy.unet.parameters()]
    assert (DTensor in denoiser) == (strategy == "fsdp")


def left(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_fsdp_trains_and_saves_the_adapter_of_ddp(tmp_path: Path) -> None:
    start = {name: tensor for name, tensor in tiny_sd().state_dict(prefix="policy.").items() if "lora" in name}
    for strategy in ("ddp", "fsdp"):
        assert two_processes(sharded, tmp_path / strategy, strategy) == [0, 0]
    ddp, fsdp = (read(tmp_path / strategy / "epoch-0001.ckpt")["state_dict"] for strategy in ("ddp", "fsdp"))
    assert fsdp.keys() == ddp.keys()
    assert fsdp.pop("reward._extra_state") == ddp.pop("reward._extra_state")
    assert max((tensor - start[name]).abs().max().item() for name, tensor in ddp.items()) > 1e-3
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp[name], tensor, rtol=0, atol=1e-5)
    average = left(tmp_path / "ddp")
    assert max((tensor - average[_written(name)]).abs().max().item() for name, tensor in ddp.items()) > 1e-4
    torch.testing.assert_close(left(tmp_path / "fsdp"), average, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_fsdp_resumes_and_diffusers_reads_what_it_leaves(tmp_path: Path) -> None:
    assert two_processes(sharded, tmp_path / "whole", "fsdp", 2) == [0, 0]
    half = tmp_path / "whole" / "epoch-0001.ckpt"
    assert two_processes(sharded, tmp_path / "rest", "fsdp", 2, half) == [0, 0]
    whole, rest = left(tmp_path / "whole"), left(tmp_path / "rest")
    assert whole.keys() == rest.keys()
    assert all(torch.equal(tensor, rest[name]) for name, tensor in whole.items())
    ours, theirs = tiny_sd(), StableDiffusionPipeline.from_pretrained(tiny.resolve("tiny-sd"))
    ours.load_adapter(tmp_path / "whole" / "adapter")
    theirs.load_lora_weights(tmp_path / "whole" / "adapter")
    given = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), ours.encode(["a", "b"])["text"]
    found, same = (each.unet(*given).sample for each in (ours, theirs))
    torch.testing.assert_close(same, found, rtol=0, atol=1e-5)
    with ours.reference():
        assert (ours.unet(*given).sample - found).abs().max() > 1e-3


def _written(name: str) -> str:
    """A parameter's name in the adapter's file."""
    return name.removeprefix("policy.").replace(".default", "")
