"""Rewards whose work is done elsewhere: images are sampled meanwhile, and nothing else is different."""

import threading
from functools import partial

import pytest
import torch
from fakes import BlackBox, LinearPolicy, fit
from torch import Tensor

from vp_rl.algorithms.branch_ddpo import BranchDDPO
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.online import OnlineTraining
from vp_rl.algorithms.rounds import Scoring
from vp_rl.interfaces import Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Scores

NOISY = Sampler(steps=3, guidance=1.0, eta=1.0)
MAIN = threading.main_thread()


class Elsewhere(BlackBox):
    """Remembers in which threads it was asked, and how."""

    elsewhere = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[threading.Thread, bool, bool]] = []

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        self.asked.append((threading.current_thread(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return super().forward(images, prompts)


def ddpo(policy: LinearPolicy, reward: Reward, kind: type[OnlineTraining] = DDPO) -> OnlineTraining:
    optimizer = partial(torch.optim.Adam, lr=0.03)
    return kind(policy, reward, NOISY, optimizer, images_per_prompt=6, sample_batch=8, clip_range=0.2)


def learned(reward: Reward, kind: type[OnlineTraining] = DDPO, **trainer: object) -> Tensor:
    policy = LinearPolicy()
    fit(ddpo(policy, reward, kind), epochs=5, **trainer)
    return policy.bias.detach()


@pytest.mark.parametrize("kind", [DDPO, BranchDDPO])
def test_what_is_learned_is_the_same_to_the_bit(kind: type[OnlineTraining]) -> None:
    reward = Elsewhere()
    assert torch.equal(learned(reward, kind), learned(BlackBox(), kind))
    assert all(thread is not MAIN for thread, _, _ in reward.asked)
    assert not any(gradients for _, gradients, _ in reward.asked)


def test_it_is_asked_in_the_runs_own_precision() -> None:
    """Autocast is of a thread; a reward that is asked in another would compute in another precision."""
    for precision, cast in (("32-true", False), ("bf16-mixed", True)):
        reward = Elsewhere()
        learned(reward, precision=precision)
        assert {autocast for _, _, autocast in reward.asked} == {cast}


def test_the_next_images_are_sampled_while_the_first_are_scored() -> None:
    """Each waits for the other to begin: one after the other, neither would ever end."""
    scoring, sampling = threading.Event(), threading.Event()

    class Slow(BlackBox):
        elsewhere = True

        def forward(self, images: Images, prompts: list[str]) -> Scores:
            scoring.set()
            assert sampling.wait(timeout=20)
            return super().forward(images, prompts)

    class Watched(LinearPolicy):
        batches = 0

        def noise(self, batch: int, generator: object = None) -> Tensor:
            self.batches += 1
            if self.batches > 1:
                sampling.set()
                assert scoring.wait(timeout=20)
            return super().noise(batch, generator)  # type: ignore[arg-type]

    fit(ddpo(Watched(), Slow()))


def test_after_an_error_or_an_interruption_what_waits_is_not_asked_any_more() -> None:
    begun, asked = threading.Event(), []

    def score(images: Images, prompts: list[str]) -> Scores:
        asked.append(prompts)
        begun.wait(timeout=20)
        raise ValueError(f"no score for {prompts}")

    def interrupted() -> None:
        with Scoring(lambda each: each, score, 1, elsewhere=True) as scoring:
            scoring.add(torch.zeros(3, 3, 1, 1), ["a", "b", "c"])
            threading.Timer(0.2, begun.set).start()
            raise KeyboardInterrupt

    def failed() -> None:
        with Scoring(lambda each: each, score, 1, elsewhere=True) as scoring:
            scoring.add(torch.zeros(1, 3, 1, 1), ["d"])
            scoring.result()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert asked == [["a"]]
    with pytest.raises(ValueError, match=r"no score for \['d'\]"):
        failed()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_scores_keep_the_order_of_the_images() -> None:
    found = []
    for elsewhere in (False, True):
        with Scoring(lambda each: each, lambda images, _: images.flatten(1)[:, :1], 2, elsewhere) as scoring:
            for part in torch.arange(14.0).view(14, 1, 1, 1).expand(-1, 3, 1, 1).split(5):
                scoring.add(part, ["p"] * len(part))
            found.append(scoring.result()[:, 0].tolist())
    assert found == [list(range(14))] * 2
