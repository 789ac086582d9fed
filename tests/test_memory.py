"""Memory is counted as allocators hand it out: by closed forms, the CPU's allocator and, if there is one, a GPU's."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import pytest
import torch
from methods import METHODS
from peft import LoraConfig
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.planning.estimate import Estimator, Part, peak
from vp_rl.planning.geometry import Geometry, solve
from vp_rl.planning.memory import Fakes, PeakMemory, optimizer_bytes, size_of
from vp_rl.planning.work import real
from vp_rl.policies.sd import StableDiffusion
from vp_rl.rewards.vp_score import VPScore
from vp_rl.sampler import Sampler

MEGA = torch.zeros(2**18)  # a MiB
ADAM = partial(torch.optim.AdamW, lr=1e-3)


# --- closed forms


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes at the peak, and left with what `run` gives still there; in MiB."""
    with PeakMemory() as memory:
        kept = run()
    left = memory.now
    del kept
    return memory.peak // 2**20, left // 2**20


def test_what_is_dropped_is_counted_no_longer_and_views_and_inputs_never() -> None:
    def run() -> torch.Tensor:
        first = MEGA + 1
        second = first * 2  # two live
        del first
        return second.view(2, -1) + 1  # and two again

    assert counted(run) == (2, 1)


def test_a_graph_keeps_what_its_backward_needs_and_a_checkpoint_its_input_alone() -> None:
    weight = torch.ones(1, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = (x * weight).sigmoid()  # sigmoid keeps its output, the product its input
        return x

    def kept(call: Callable[[torch.Tensor], torch.Tensor]) -> int:
        return counted(lambda: call(call(MEGA + 0)))[1]

    assert kept(block) == 9  # the input, and eight outputs
    assert kept(lambda x: checkpoint(block, x, use_reentrant=False)) == 3  # what the blocks begin with, and the result


def test_a_frozen_layer_under_nothing_that_learns_keeps_nothing() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    rows = torch.zeros(4096, 64)
    assert counted(lambda: layer(layer(rows)))[1] == 1


def test_storages_count_once() -> None:
    assert size_of([MEGA, MEGA.view(2, -1), MEGA[:5]]) == 2**20


@pytest.mark.parametrize(
    ("make", "each"),
    [
        (partial(torch.optim.SGD, lr=1e-3), 0.0),
        (ADAM, 8.0),
        (partial(bitsandbytes.optim.AdamW8bit, lr=1e-3), 2 + 2 * 4 / 256),  # and a scale for each 256 of both moments
    ],
)
def test_an_optimizer_remembers_what_its_kind_does(make: Any, each: float) -> None:
    # Beside it: a step's number, and the 8-bit formats' two tables of 256 values.
    assert optimizer_bytes(make) == pytest.approx(each, abs=(8 + 2 * 256 * 4) / 2**16)


def test_the_peak_is_the_largest_phases_with_what_is_always_there() -> None:
    parts = [Part("a", 10, "always"), Part("b", 3, "x"), Part("c", 4, "x"), Part("d", 6, "y"), Part("e", None, "y")]
    assert peak(parts) == (17, "x")


# --- against what is allocated


def allocated(run: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator had handed out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def algorithm(kind: type, checkpointing: bool = False) -> Any:
    lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules={"to_q", "to_k", "to_v", "conv1"})
    policy = StableDiffusion("tiny-sd", lora, gradient_checkpointing=checkpointing)
    return kind(policy, VPScore.load("tiny-vp-score"), Sampler(steps=4, guidance=3.0, eta=1.0), ADAM)


@pytest.fixture(scope="module")
def ddpo() -> Any:
    made = algorithm(DDPO)
    return made, Estimator(made, ADAM)


# Convolutions take buffers inside their kernels (columns of an image), which no one sees before they run: at 64 px and
# below one image's columns are at most 9 copies of its largest feature map, for a batch that holds dozens of them.
INSIDE = 0.05


def test_training_is_estimated_as_it_is_allocated(ddpo: Any) -> None:
    made, estimator = ddpo
    estimated = estimator.of("training", 16)
    with real(made, torch.device("cpu")) as work:
        gradients = allocated(lambda: work.do(work.phase("training", 16), 16)) - estimated
    expected = size_of(p for p in made.policy.parameters() if p.requires_grad)  # the estimate leaves them out
    assert gradients == pytest.approx(expected, abs=INSIDE * estimated)


def test_sampling_and_reward_are_estimated_as_they_are_allocated(ddpo: Any) -> None:
    made, estimator = ddpo
    with real(made, torch.device("cpu")) as work:
        for name in ("sampling", "decoding", "reward"):
            phase = work.phase(name, 16)
            prepared = work.prepare(phase, 16)
            taken = allocated(lambda: work.do(phase, prepared))  # noqa: B023
            assert estimator.of(name, 16) == pytest.approx(taken, rel=INSIDE)


def test_estimating_leaves_the_algorithm_as_it_was(ddpo: Any) -> None:
    made, estimator = ddpo
    assert estimator.of("training", 2)
    assert all(parameter.grad is None for parameter in made.policy.parameters())
    assert not isinstance(next(made.policy.parameters()), torch._subclasses.FakeTensor)
    with real(made, torch.device("cpu")) as work:
        work.do(work.phase("training", 1), 1)
    assert all(parameter.grad is None for parameter in made.policy.parameters())


def test_the_work_leaves_random_numbers_as_they_were(ddpo: Any) -> None:
    before = torch.get_rng_state()
    with real(ddpo[0], torch.device("cpu")) as work:
        work.do(work.phase("sampling", 1), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_larger_batches_take_more_and_checkpointing_less(ddpo: Any) -> None:
    few, many = ddpo[1].of("training", 4), ddpo[1].of("training", 8)
    gradients = size_of(p for p in ddpo[0].policy.parameters() if p.requires_grad)  # not all there at the peak
    assert few < many < 2 * few + gradients
    checkpointing: Any = Estimator(algorithm(DDPO, checkpointing=True), ADAM)
    assert checkpointing.of("training", 8) < many / 2


@pytest.mark.slow
def test_all_that_is_frozen_is_counted_once_and_refl_has_the_reward_in_its_training() -> None:
    plan = solve(Geometry(images_per_update=8), 1, 8, 8)
    made = algorithm(ReFL)
    parts: dict[str, Any] = {part.name: part.bytes for part in Estimator(made, ADAM).parts(plan.load)}
    frozen = sum(size for name, size in parts.items() if name.startswith("frozen"))
    modules = [*made.policy.parameters(), *made.policy.buffers(), *made.reward.parameters(), *made.reward.buffers()]
    trained = size_of(p for p in made.policy.parameters() if p.requires_grad)
    assert frozen + trained == size_of(modules)
    activations = "activations, 8 images, with VAE and reward at once"
    assert parts[activations] > parts["sampling, 8 at once"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "ddpo"])
def test_every_methods_training_is_estimated_as_it_is_allocated(name: str) -> None:
    made, rows = METHODS[name](), 4 if name in ("branch_ddpo", "dpo") else 16  # prompts, with all their images
    estimated = Estimator(made, ADAM).of("training", rows)
    assert estimated is not None
    with real(made, torch.device("cpu")) as work:
        gradients = allocated(lambda: work.do(work.phase("training", rows), rows)) - estimated
    expected = size_of(p for p in made.policy.parameters() if p.requires_grad)
    assert gradients == pytest.approx(expected, abs=INSIDE * estimated)


@pytest.mark.slow
def test_checkpointed_steps_need_no_more_memory_for_their_number() -> None:
    def needed(name: str, **settings: Any) -> int:
        size = Estimator(METHODS[name](**settings), ADAM).of("training", 8)
        assert size is not None
        return size

    for name, number in (("draft", "last_steps"), ("flow_bp", "active_steps")):
        few, many = (needed(name, **{number: steps}) for steps in (1, 4))
        assert many < 1.02 * few
        assert needed(name, **{number: 4}, checkpoint_steps=False) > 2 * many


@pytest.mark.gpu
def test_training_is_estimated_as_a_gpu_allocates_it() -> None:
    made, device = algorithm(DDPO), torch.device("cuda")
    estimated = Estimator(made, ADAM).of("training", 64)
    trained = size_of(p for p in made.policy.parameters() if p.requires_grad)
    with real(made, device) as work:
        work.do(work.phase("training", 64), 64)  # cuDNN's and cuBLAS's workspaces stay
        torch.cuda.synchronize()
        work.forget()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.do(work.phase("training", 64), 64)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before - trained
    # The allocator rounds each tensor up to 512 bytes, and kernels for convolutions try out workspaces.
    assert estimated == pytest.approx(measured, rel=0.2)


# --- the published models


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[1] / "scripts" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NUMBERS = {  # of parameters, as published
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840},
    "flux": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", NUMBERS)
def test_the_scripts_models_are_the_published_ones(script: ModuleType, family: str) -> None:
    pipeline = script.built(script.FAMILIES[family][0], Fakes(), torch.float16)
    for name, number in NUMBERS[family].items():
        assert sum(p.numel() for p in pipeline.components[name].parameters()) == number
        assert next(pipeline.components[name].parameters()).device.type == "cpu"
